"""`advise` and `vision-attn advise`: what a step is made of, what helps, and one line of code that runs as printed."""

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from host_runs import run
from tiny_hosts import HOST
from tiny_pipelines import PIPELINE
from torch import nn
from untouched import assert_untouched, state

from vision_attn import Clear, Multipole, advise, convert, estimate
from vision_attn.cli import main
from vision_attn.conversion.state import is_converted
from vision_attn.demo import load_teacher
from vision_attn.estimation.advice import Advice
from vision_attn.estimation.advising import _as_measured, timed
from vision_attn.estimation.cost import CPU, H200
from vision_attn.estimation.model import read
from vision_attn.estimation.profile import Profile, profile
from vision_attn.estimation.rates import BUSY
from vision_attn.estimation.step import PARTS, Attending, Step
from vision_attn.graphs import enable, replayed_of
from vision_attn.grid import Grid
from vision_attn.processors import REGISTRY, AttnSpec

DEMO = Path(__file__).parents[2] / "vision_attn" / "demo" / "weights" / "flux_nano"


def wide_vit() -> nn.Module:
    """Return a ViT whose steps are not limited by the host, without memory for its weights."""
    with torch.device("meta"):
        return timm.create_model("vit_large_patch16_224", dynamic_img_size=True)


def test_what_a_step_is_made_of() -> None:
    small, large = (advise(wide_vit(), pixels, pixels, device="cuda") for pixels in (512, 4096))
    assert small.attention_share < 0.2 and large.attention_share > 0.8
    text = str(large)
    assert text.startswith("VisionTransformer, 4096 x 4096 pixels, on ") and ": all times are estimated, with " in text
    assert ": the step of the model is measured, the rest is estimated, " in str(replace(large, about="measured"))
    for part in ("attention over the grid", "projections of attention", "(MLP)", "convolutions", "the host", "a step"):
        assert part in text
    stock = large.stock
    assert stock.device == pytest.approx(stock.attention + sum(getattr(stock, part) for part in PARTS))
    assert min(getattr(stock, part) for part in PARTS) > 0 and stock.projections < stock.linear


def test_every_processor_has_a_row_or_the_reason_why_not() -> None:
    found = advise(wide_vit(), 1024, 1024, device="cuda")
    kinds = {known.spec for name, known in REGISTRY.items() if name not in ("softmax", "schedule")}
    assert {type(spec) for spec, _, _ in found.rows} == kinds and isinstance(found.rows[0][0], Multipole)
    text = str(found)
    assert all(f"{spec}  " in text or f"{spec} does not fit: " in text for spec, _, _ in found.rows)
    small = advise(wide_vit(), 96, 96, device="cuda")
    assert "Neighborhood() does not fit: kernel_size 7 * dilation 1 does not fit in Grid(height=6, width=6" in str(
        small
    )


def gains(found: Advice) -> dict[str, float]:
    return {str(spec): found.stock.seconds() / step.seconds(step.names) for spec, step, _ in found.rows if step}


def test_a_larger_picture_gains_more() -> None:
    small, large = (gains(advise(wide_vit(), pixels, pixels, device="cuda")) for pixels in (1024, 4096))
    assert all(small[name] < large[name] for name in small) and max(large.values()) > 2
    one, many = (gains(advise(wide_vit(), 1024, 1024, device="cuda", batch=batch)) for batch in (1, 8))
    assert many["Clear()"] > one["Clear()"]  # the host has no more to do for eight pictures


def advice(host: float, dense: float, converted: float, pipeline: bool = True, extra: float = 1e-4) -> Advice:
    """Return the advice for a step of ten layers; times in seconds."""
    layers = tuple(Attending(f"{n}", Grid(64, 64), dense / 10, converted / 10, extra) for n in range(10))
    step = Step(layers, projections=2e-3, linear=3e-3, convolutions=0.0, other=1e-3, host=host)
    rows: list[tuple[AttnSpec, Step | None, str]] = [(Multipole(), step, ""), (Clear(), step, "")]
    stock = replace(step, layers=tuple(replace(layer, converted=layer.dense, host=0.0) for layer in layers))
    machine = CPU if host == 0 else H200
    component = "pipe.transformer" if pipeline else "model"
    return Advice("a model", stock, rows, machine, "estimated", pipeline, component, cached=True, eight_bits=True)


CONVERT = "vision_attn.convert(model, vision_attn.Multipole())"
RECOMMENDED = {
    "stock is best": (advice(2e-3, 1e-3, 9e-4), "pass"),
    "stock is best, converted layers are slower": (advice(2e-3, 1e-3, 2e-3), "pass"),
    "the host limits": (advice(3e-2, 1e-3, 9e-4), "import vision_attn.graphs; vision_attn.graphs.enable(pipe)"),
    "attention limits": (
        advice(2e-3, 1e-2, 1e-3), 'import vision_attn.pipelines; pipe.set_attn_processor("multipole")',
    ),
    "the host, then attention": (
        advice(3e-2, 1e-2, 1e-3), 'import vision_attn.pipelines; pipe.set_attn_processor("multipole", graphs=True)',
    ),
    "attention of a model": (
        advice(2e-3, 1e-2, 1e-3, pipeline=False), f"import vision_attn; {CONVERT}",
    ),
    "the host of a model": (
        advice(3e-2, 1e-3, 9e-4, pipeline=False), "import vision_attn.graphs; vision_attn.graphs.enable(model)",
    ),
    "both of a model": (
        advice(3e-2, 1e-2, 1e-3, pipeline=False),
        f"import vision_attn.graphs; vision_attn.graphs.enable(model); {CONVERT}",
    ),
    "a CPU": (advice(0.0, 1e-2, 1e-3), 'import vision_attn.pipelines; pipe.set_attn_processor("multipole")'),
}  # fmt: skip


@pytest.mark.parametrize("name", RECOMMENDED)
def test_the_recommended_line(name: str) -> None:
    found, line = RECOMMENDED[name]
    assert found.recommended.partition("  #")[0] == line
    text = str(found).splitlines()
    assert text[-1] == found.recommended
    assert ("Stock is best at this size" in text[-2]) == name.startswith("stock")
    assert ("CUDA graphs" in str(found)) == (name != "a CPU")


def test_layers_that_are_no_faster_are_left_alone() -> None:
    found = advice(2e-3, 1e-2, 1e-3)
    step = found.rows[0][1]
    assert step is not None
    slower = replace(step, layers=(*step.layers, Attending("low", Grid(4, 4), dense=1e-5, converted=3e-5, host=1e-4)))
    found = replace(found, rows=[(Multipole(), slower, "")])
    assert found.recommended.endswith('pipe.set_attn_processor("multipole", only_if_faster=True)')
    assert "Multipole(), where it is faster, makes a step " in str(found)


def test_what_else_helps_and_how_much_after_a_conversion() -> None:
    limited, free = (advice(host, 1e-2, 1e-3) for host in (3e-2, 2e-3))
    for found, first in ((limited, "CUDA graphs"), (free, "a cache of diffusers")):
        helps = {each.name: each for each in found.helps}
        assert found.helps[0].name.startswith(first)
        assert all(each.converted <= each.stock <= found.stock.seconds() for each in helps.values())
        assert {"CUDA graphs", "torch.compile of the blocks"} < set(helps)
    fp8 = next(each for each in free.helps if "8-bit" in each.name)
    step = free.stock
    assert fp8.stock == pytest.approx(step.device - 5e-3 * (1 - 1 / 1.6)) and "pipe.transformer" in fp8.code
    assert not any("8-bit" in each.name for each in replace(free, eight_bits=False).helps)
    assert not any("cache" in each.name for each in replace(free, cached=False).helps)


@pytest.mark.parametrize(
    ("found", "converted", "graphed"),
    [("stock is best", False, False), ("the host limits", False, True), ("attention limits", True, False),
     ("the host, then attention", True, True)],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["pipeline", "model"])
def test_the_recommended_line_runs_as_printed(kind: str, found: str, converted: bool, graphed: bool) -> None:
    advised = RECOMMENDED[found][0]
    pipe = load_teacher("nano")
    if kind == "model":
        advised = replace(advised, pipeline=False, component="model")
    exec(str(advised).splitlines()[-1], dict(pipe=pipe) if kind == "pipeline" else dict(model=pipe.transformer))
    assert is_converted(pipe.transformer) == converted
    assert (replayed_of(pipe.transformer) is not None) == graphed


def test_an_offloaded_model_has_the_rates_of_where_it_runs() -> None:
    import accelerate

    pipe = PIPELINE["sd"].build()
    assert advise(pipe, 64, 64).machine == CPU
    accelerate.cpu_offload_with_hook(pipe.unet, execution_device=torch.device("meta"))
    assert advise(pipe, 64, 64).machine == H200 == advise(pipe, 64, 64, device="cuda").machine
    assert estimate(pipe, Clear(3), height=64, width=64).step.host > 0


@pytest.mark.parametrize("host_id", ["sd15-unet", "flux", "vit", "pixart"])
def test_advice_leaves_the_model_as_it_was(host_id: str) -> None:
    model = HOST[host_id].build()
    before = state(model)
    found = advise(model, 64, 64)
    assert found.machine == CPU and not found.graphs and "on a CPU core" in str(found)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("host_id", "there"),
    [("sd15-unet", ("attention", "projections", "linear", "convolutions")), ("vit", ("attention", "projections"))],
    ids=["sd15-unet", "vit"],
)
def test_a_profile_of_real_forwards(host_id: str, there: tuple[str, ...]) -> None:
    """On a CPU the profiler's own time counts too, so only what is there at all is compared."""
    case = HOST[host_id]
    model = case.build().eval()
    before, calls = state(model), []

    def forward() -> None:
        calls.append(run(case, model, 24, 24))

    found = profile([model], forward, torch.device("cpu"))
    assert_untouched(model, before)
    spent = {"attention": found.attention, **found.parts}
    assert len(calls) == 3 and set(found.parts) == set(PARTS)
    assert all(spent[part] > 0 for part in there) and 0 < found.host <= found.seconds
    larger = profile([model], lambda: run(case, model, 64, 64), torch.device("cpu"))  # 7 times as many tokens
    shares = [each.attention / (each.attention + sum(each.parts.values())) for each in (found, larger)]
    assert shares[1] > shares[0]


def test_attention_to_other_keys_does_not_count() -> None:
    class Across(nn.Module):
        def forward(self, keys: int) -> torch.Tensor:
            q, k = torch.randn(1, 2, 64, 8), torch.randn(1, 2, keys, 8)
            return nn.functional.scaled_dot_product_attention(q, key=k, value=k)

    model = Across()
    own, other = (profile([model], partial(model, keys), torch.device("cpu")) for keys in (64, 63))
    assert own.attention > 0 and other.attention == 0


def test_a_pipeline_is_timed_by_drawing_and_is_as_before(caplog: pytest.LogCaptureFixture) -> None:
    pipe = load_teacher("nano")
    pipe.set_progress_bar_config(desc="kept")
    before, numbers = state(pipe.transformer), torch.get_rng_state()
    denoisers, _ = read(pipe, None, None)
    found, vae, about = timed(pipe, denoisers, (64, 64), (32, 32), None)
    assert found is not None and about == "measured" and found.attention > 0, caplog.text
    assert vae is None or vae > 0
    assert torch.equal(torch.get_rng_state(), numbers) and pipe._progress_bar_config == dict(desc="kept")
    assert_untouched(pipe.transformer, before)


@pytest.mark.parametrize("name", ["sd", "sd-img2img"])
def test_what_cannot_be_timed_is_estimated_and_says_why(name: str, caplog: pytest.LogCaptureFixture) -> None:
    pipe = PIPELINE[name].build()
    denoisers, scale = read(pipe, None, None)
    before = state(pipe.unet)
    size = (64 // scale, 64 // scale)
    found, _, about = timed(pipe, denoisers, (64, 64), size, None)  # no tokenizer, or an image is needed
    assert found is None and about.startswith("estimated, as it could not be timed: ")
    assert "a step could not be timed, so it is estimated" in caplog.text
    assert_untouched(pipe.unet, before)
    found, vae, about = timed(pipe, denoisers, (64, 64), size, lambda: run_unet(pipe.unet, size))
    assert found is not None and about == "measured" and vae is not None and vae > 0


def run_unet(unet: nn.Module, size: tuple[int, int]) -> None:
    unet(torch.zeros(1, 4, *size), 1, encoder_hidden_states=torch.zeros(1, 7, unet.config.cross_attention_dim))


def test_nothing_ran_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="no denoiser ran"):
        profile([nn.Linear(2, 2)], lambda: None, torch.device("cpu"))

    def fail() -> None:
        raise ValueError("out of memory")

    model = HOST["vit"].build()
    before = state(model)
    denoisers, _ = read(model, None, None)
    found, _, about = timed(model, denoisers, (64, 64), (64, 64), fail)
    assert found is None and about.endswith("ValueError: out of memory")
    assert_untouched(model, before)


def test_measured_parts_take_the_place_of_estimated_ones() -> None:
    found = advice(2e-3, 1e-2, 1e-3)
    step = found.rows[0][1]
    assert step is not None
    parts = dict(projections=4e-3, linear=6e-3, convolutions=0.0, other=2e-3)
    measured = Profile(seconds=3.2e-2, host=8e-3, attention=2e-2, parts=parts)
    stock, converted = (_as_measured(each, found.stock, measured) for each in (found.stock, step))
    assert stock.attention == pytest.approx(2e-2) and stock.seconds() == pytest.approx(3.2e-2)
    assert converted.seconds(converted.names) == pytest.approx(1.4e-2)  # attention is ten times as fast as before
    assert _as_measured(step, found.stock, None) == step


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(height=0), ValueError, "height must be at least 1"),
        (dict(width=64.0), TypeError, "width must be a number of pixels"),
        (dict(batch=0), ValueError, "batch must be at least 1"),
        (dict(device=torch.device("cpu")), ValueError, "device must be 'cuda' or 'cpu'"),
        (dict(device="mps"), ValueError, "device must be 'cuda' or 'cpu'"),
        (dict(height=3), ValueError, "smaller than a token"),
    ],
    ids=["height", "width", "batch", "device-type", "device", "token"],
)
def test_bad_input_is_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        advise(HOST["sd15-unet"].build(), **(dict(height=64, width=64) | arguments))


def test_a_model_that_is_not_as_its_makers_wrote_it_is_refused() -> None:
    model = HOST["vit"].build()
    convert(model, Clear(2))
    with pytest.raises(ValueError, match=r"this VisionTransformer is converted: revert\(\) the conversion first"):
        advise(model, 64, 64)
    model = HOST["vit"].build()
    enable(model)
    with pytest.raises(ValueError, match=r"this VisionTransformer replays from CUDA graphs: .*disable\(\) it first"):
        advise(model, 64, 64)
    with pytest.raises(TypeError, match="cannot convert a int"):
        advise(3, 64, 64)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--height", "512", "--width", "256"]
    assert main(["advise", str(DEMO), *size]) == 0
    text = capsys.readouterr().out.strip()
    assert "FluxTransformer2DModel, 512 x 256 pixels" in text and "pipe.transformer.compile" in text
    pipe = load_teacher("nano")
    exec(text.splitlines()[-1], dict(pipe=pipe))
    assert main(["advise", "vit_tiny_patch16_224", *size, "--device", "cpu", "--batch", "2"]) == 0
    text = capsys.readouterr().out.strip()
    assert "on a CPU core" in text and "what else helps" not in text
    exec(text.splitlines()[-1], dict(model=timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True)))
    HOST["sd15-unet"].build().save_pretrained(tmp_path / "unet")  # type: ignore[operator]
    assert main(["advise", str(tmp_path / "unet"), *size]) == 0
    assert "UNet2DConditionModel" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vit_of_dreams", "--height", "64", "--width", "64"], "neither a folder"),
        (["resnet18", "--height", "64", "--width", "64"], "not a known host"),
        (["vit_tiny_patch16_224", "--height", "64", "--width", "8"], "should be divisible by patch size"),
        *([(["vit_tiny_patch16_224", "--height", "64", "--width", "64", "--measure"], "no GPU can be used here")]
          if not torch.cuda.is_available() else []),
    ],
    ids=["unknown", "no transformer", "size", "no GPU"][: 3 + (not torch.cuda.is_available())],
)  # fmt: skip
def test_bad_input_of_the_command(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["advise", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_step_on_a_gpu_is_measured_needs_a_gpu(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = timm.create_model("vit_base_patch16_224", dynamic_img_size=True).eval().to("cuda", torch.bfloat16)
    small, large = (advise(model, pixels, pixels) for pixels in (512, 2048))
    for found in (small, large):
        assert found.about == "measured" and found.machine.source in ("measured", BUSY), caplog.text
        assert found.stock.host > 0 and min(getattr(found.stock, part) for part in PARTS) > 0
    assert small.attention_share < large.attention_share
    exec(str(large).splitlines()[-1], dict(model=model))
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 2048, 2048, device="cuda", dtype=torch.bfloat16)).isfinite().all()
