"""Pipelines: `pipe.set_attn_processor`, and `convert(pipe, ...)` without it."""

import re
import subprocess
import sys
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from host_runs import FROM_A_FILE
from tiny_pipelines import PIPELINE, PIPELINES, PipelineCase, images_of, ip_adapter_inputs, load_ip_adapter

import vision_attn.pipelines
from vision_attn import Clear, Conversion, Neighborhood, Softmax, convert
from vision_attn.conversion.state import is_rerouted
from vision_attn.pipelines import set_attn_processor

all_pipelines = pytest.mark.parametrize("case", PIPELINES, ids=lambda case: case.id)
SIZE = (12, 10)  # in tokens
SOME = re.compile(r"^(down|single|transformer_blocks\.1)")  # some layers of each denoiser, not all


def images(case: PipelineCase, pipe: Any, height: int = SIZE[0], width: int = SIZE[1]) -> np.ndarray:
    return images_of(case, pipe, height * case.patch, width * case.patch)


def spec_of(pipe: Any) -> Any:
    return Conversion.of(pipe).spec


def is_stock(pipe: Any) -> bool:
    parts = [part for part in pipe.components.values() if hasattr(part, "modules")]
    return not any(is_rerouted(module) for part in parts for module in part.modules())


@all_pipelines
def test_softmax_gives_the_same_images(case: PipelineCase) -> None:
    pipe = case.build()
    stock = images(case, pipe)
    assert isinstance(pipe.set_attn_processor(Softmax()), Conversion)
    assert np.abs(images(case, pipe) - stock).max() <= 1e-6
    assert set(Conversion.of(pipe).status.values()) == {"rerouted"}


@all_pipelines
def test_processors_by_name_with_options(case: PipelineCase) -> None:
    pipe = case.build()
    seen = [images(case, pipe)]
    for name, options, spec in (
        ("clear", dict(radius=2), Clear(radius=2)),
        ("Neighborhood", dict(kernel_size=3, dilation=1), Neighborhood(3)),
        ("clear", dict(radius=2, where=SOME, min_tokens=20), Clear(radius=2)),
    ):
        conversion = pipe.set_attn_processor(name, **options)
        assert spec_of(pipe) == conversion.spec == spec
        seen.append(images(case, pipe))
        assert np.isfinite(seen[-1]).all()
        assert min(np.abs(seen[-1] - other).max() for other in seen[:-1]) > 1e-4
    assert pipe.set_attn_processor(None) is None
    assert is_stock(pipe) and np.array_equal(images(case, pipe), seen[0])
    assert pipe.set_attn_processor(None) is None


@pytest.mark.parametrize("pipeline_id", ["sd", "flux"])
def test_the_last_processor_replaces_the_one_before(pipeline_id: str) -> None:
    case, twice, once = PIPELINE[pipeline_id], PIPELINE[pipeline_id].build(), PIPELINE[pipeline_id].build()
    keys = set(getattr(twice, case.denoiser).state_dict())
    stock = images(case, once)
    twice.set_attn_processor("clear", radius=2, pool=2)
    images(case, twice, 8, 8)
    twice.set_attn_processor("neighborhood", kernel_size=3)
    assert set(getattr(twice, case.denoiser).state_dict()) == keys
    convert(once, Neighborhood(3))
    assert np.array_equal(images(case, twice), images(case, once))
    Conversion.of(twice).revert()
    assert is_stock(twice) and np.array_equal(images(case, twice), stock)


def test_none_reverts_a_compiled_denoiser() -> None:
    pipe = PIPELINE["sd"].build()
    pipe.unet = torch.compile(pipe.unet)
    conversion = pipe.set_attn_processor("clear", radius=2)
    assert pipe.set_attn_processor(None) is None
    assert is_stock(pipe) and "reverted" in repr(conversion)


REFUSED: dict[str, tuple[tuple, dict[str, Any], type[Exception], str]] = {
    "unknown-name": (("sparse",), {}, ValueError, "'sparse': known are .*clear.*neighborhood.*softmax"),
    "unknown-field": (("clear",), dict(size=3), TypeError, "Clear has no field size: it has radius, pool"),
    "bad-value": (("clear",), dict(radius=0), ValueError, "radius must be above 0, got 0"),
    "spec-and-field": ((Clear(),), dict(radius=3), TypeError, "unknown options radius: known are where, min_tokens"),
    "none-and-option": ((None,), dict(radius=3), TypeError, "None takes no options, got radius"),
    "native-and-option": ((AttnProcessor2_0(),), dict(radius=3), TypeError, "AttnProcessor2_0 takes no options"),
    "where": (("clear",), dict(where="nope.*"), ValueError, "where selects no layer of UNet2DConditionModel"),
    "backend": (("clear",), dict(backend="gpu"), ValueError, "backend must be one of"),
    "component": (("clear",), dict(components=("prior",)), ValueError, "no component prior in the pipeline, only"),
    "grid": (("clear",), dict(grid=(12, 10)), ValueError, "levels of a UNet"),
    "class": ((Clear,), {}, TypeError, "a processor must be a spec such as"),
    "empty-list": (([],), {}, TypeError, "a processor must be a spec such as"),
    "list-with-none": (([Clear(), None],), {}, TypeError, "a processor must be a spec such as"),
    "number": ((3,), {}, TypeError, "a processor must be a spec such as"),
    "dict-of-another-model": (({"attn": AttnProcessor2_0()},), {}, ValueError, "number of processors"),
}


@pytest.fixture(scope="module", params=[None, Clear(radius=2)], ids=["stock", "converted"])
def standing(request: pytest.FixtureRequest) -> tuple[Any, Any, np.ndarray]:
    """Return a pipeline, what it is converted to, and its images. All rows share it: a refusal leaves it as it was."""
    pipe = PIPELINE["sd"].build()
    pipe.set_attn_processor(request.param)
    return pipe, request.param, images(PIPELINE["sd"], pipe, 6, 6)


@pytest.mark.parametrize("arguments, options, error, message", REFUSED.values(), ids=REFUSED)
def test_a_refusal_leaves_the_pipeline_as_it_was(
    standing: Any, arguments: Any, options: Any, error: Any, message: str
) -> None:
    pipe, first, before = standing
    with pytest.raises(error, match=message):
        pipe.set_attn_processor(*arguments, **options)
    assert is_stock(pipe) == (first is None)
    if first is not None:
        assert spec_of(pipe) == first
    assert np.array_equal(images(PIPELINE["sd"], pipe, 6, 6), before)


@pytest.mark.parametrize("first", [None, Softmax()], ids=["stock", "converted"])
def test_processors_of_diffusers_are_forwarded(first: Any) -> None:
    case, pipe = PIPELINE["sd"], PIPELINE["sd"].build()
    stock = images(case, pipe)
    pipe.set_attn_processor(first)
    native = AttnProcessor2_0()
    assert pipe.set_attn_processor(native) is None
    assert all(processor is native for processor in pipe.unet.attn_processors.values())
    assert np.abs(images(case, pipe) - stock).max() <= 1e-6
    each = {name: AttnProcessor2_0() for name in pipe.unet.attn_processors}
    given = dict(each)
    pipe.set_attn_processor(given)
    assert given == each == pipe.unet.attn_processors
    assert np.abs(images(case, pipe) - stock).max() <= 1e-6


def test_a_processor_that_hides_ours_is_named() -> None:
    case, pipe = PIPELINE["sd"], PIPELINE["sd"].build()
    pipe.set_attn_processor("clear", radius=2)
    pipe.set_attn_processor(AttnProcessor())
    with pytest.raises(RuntimeError, match=r"attn1 never called scaled_dot_product_attention.*AttnProcessor"):
        images(case, pipe)
    pipe.set_attn_processor(AttnProcessor2_0())
    assert set(Conversion.of(pipe).status) and np.isfinite(images(case, pipe)).all()


@pytest.mark.parametrize("pipeline_id", ["sd", pytest.param("sdxl", marks=pytest.mark.slow), "sd3", "flux"])
def test_several_resolutions_in_one_process(pipeline_id: str) -> None:
    case, pipe = PIPELINE[pipeline_id], PIPELINE[pipeline_id].build()
    pipe.set_attn_processor("clear", radius=2)
    for size in ((6, 8), (8, 6), (12, 4), (6, 8)):
        fresh = case.build()
        convert(fresh, Clear(radius=2))
        assert np.array_equal(images(case, pipe, *size), images(case, fresh, *size)), size


def test_controlnet_is_converted_when_asked_for() -> None:
    case = PIPELINE["sd-controlnet"]
    seen = []
    for components in (None, ("unet",), ("unet", "controlnet"), ("controlnet",)):
        pipe = case.build()
        if components is not None:
            conversion = pipe.set_attn_processor("clear", radius=2, components=components)
            assert set(conversion.models) == set(components)
            if len(components) == 2:
                assert {name.split(".")[0] for name in conversion.status} == set(components)
        seen.append(images(case, pipe))
    assert min(np.abs(seen[i] - seen[j]).max() for i in range(4) for j in range(i)) > 1e-5
    default = case.build()
    assert list(convert(default, Clear(radius=2)).models) == ["unet"]
    assert np.array_equal(images(case, default), seen[1])
    pipe = case.build()
    convert(pipe, Softmax(), components=("unet", "controlnet"))
    assert np.abs(images(case, pipe) - seen[0]).max() <= 1e-6
    pipe.set_attn_processor(None)
    assert is_stock(pipe)


@pytest.mark.parametrize("pipeline_id", ["sd", "flux"])
def test_ip_adapter_after_conversion(pipeline_id: str) -> None:
    case, seen = PIPELINE[pipeline_id], []
    for spec in (None, Softmax(), Clear(radius=2)):
        pipe = case.build()
        pipe.set_attn_processor(spec)
        load_ip_adapter(pipe)
        size = [tokens * case.patch for tokens in SIZE]
        seen.append(pipe(**case.call(*size), **ip_adapter_inputs(pipe)).images)
    assert np.abs(seen[1] - seen[0]).max() <= 1e-5 and np.abs(seen[2] - seen[0]).max() > 1e-4


def test_from_pipe_keeps_the_conversion() -> None:
    case, pipe = PIPELINE["sd-img2img"], PIPELINE["sd"].build()
    pipe.set_attn_processor("clear", radius=2)
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    fresh = case.build()
    fresh.set_attn_processor("clear", radius=2)
    assert np.array_equal(images(case, other), images(case, fresh))


def test_save_pretrained_writes_a_stock_pipeline(tmp_path: Any) -> None:
    case, pipe = PIPELINE["flux"], PIPELINE["flux"].build()
    stock = images(case, pipe)
    pipe.set_attn_processor("clear", radius=2)
    pipe.save_pretrained(tmp_path)
    absent = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    loaded = diffusers.FluxPipeline.from_pretrained(tmp_path, **absent)
    loaded.set_progress_bar_config(disable=True)
    np.testing.assert_allclose(images(case, loaded), stock, **FROM_A_FILE)


def test_diffusers_own_method_is_not_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    assert diffusers.DiffusionPipeline.set_attn_processor is set_attn_processor
    theirs = lambda pipe, processor: "theirs"
    monkeypatch.setattr(diffusers.DiffusionPipeline, "set_attn_processor", theirs)
    vision_attn.pipelines.register()
    assert diffusers.DiffusionPipeline.set_attn_processor is theirs


FRESH = """
import sys
sys.path.insert(0, "tests/support")
import vision_attn
assert "diffusers" not in sys.modules and "timm" not in sys.modules
import diffusers
from vision_attn._compat import ensure_torchvision
ensure_torchvision()
from tiny_pipelines import PIPELINE, images_of
case = PIPELINE["flux"]
pipe = case.build()
conversion = vision_attn.convert(pipe, vision_attn.Clear(radius=2))
images_of(case, pipe, 6 * case.patch, 4 * case.patch)
assert set(conversion.status.values()) == {"rerouted"}
assert not hasattr(diffusers.DiffusionPipeline, "set_attn_processor"), "convert touched the class"
assert "vision_attn.pipelines" not in sys.modules
import vision_attn.pipelines
assert pipe.set_attn_processor(None) is None and not conversion.models["transformer"]._forward_hooks
"""


@pytest.mark.slow  # starts a process; that `conversion` imports nothing from `pipelines` is a row of test_imports.py
def test_convert_leaves_the_class_of_pipelines_alone(pytestconfig: pytest.Config) -> None:
    command = [sys.executable, "-W", "ignore", "-c", FRESH]
    done = subprocess.run(command, cwd=pytestconfig.rootpath, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
