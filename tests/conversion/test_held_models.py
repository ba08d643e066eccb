"""Models that others hold are found: several ControlNets of a pipeline, lists, and what distributes a model."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from converted_hosts import CLEAR, POOLED, SIZE, expected
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from host_runs import FROM_A_FILE, run, stock
from tiny_hosts import HOST
from tiny_pipelines import PIPELINE
from torch import nn
from untouched import assert_untouched, state

import vision_attn.pipelines  # noqa: F401 - gives pipelines their `set_attn_processor`
from vision_attn import Conversion, Softmax, convert, load
from vision_attn.conversion.state import is_converted

BOTH = ("unet", "controlnet")
NETS = ["controlnet.nets.0", "controlnet.nets.1"]


def controlled() -> Any:
    """Return a pipeline with two ControlNets."""
    pipe = PIPELINE["sd-controlnet"].build()
    nets = [pipe.controlnet, HOST["sd15-controlnet"].build()]
    return diffusers.StableDiffusionControlNetPipeline(
        **{**pipe.components, "controlnet": nets}, requires_safety_checker=False
    )


def images(pipe: Any) -> np.ndarray:
    call = PIPELINE["sd-controlnet"].call(128, 64)
    pipe.set_progress_bar_config(disable=True)
    return pipe(**call | dict(image=[call["image"]] * 2)).images


def test_several_controlnets(tmp_path: Path) -> None:
    pipe = controlled()
    assert isinstance(pipe.controlnet, MultiControlNetModel)
    before = images(pipe)
    conversion = convert(pipe, POOLED, components=BOTH)
    assert list(conversion.models) == ["unet", *NETS] == list(Conversion.of(pipe).models)
    with torch.no_grad():
        for parameter in conversion.parameters():
            parameter.add_(0.2)
    changed = images(pipe)
    assert set(conversion.status.values()) == {"rerouted"} and np.abs(changed - before).max() > 1e-3
    conversion.save(tmp_path)
    again = controlled()
    assert list(load(again, tmp_path).models) == [*NETS, "unet"]
    np.testing.assert_allclose(images(again), changed, **FROM_A_FILE)
    conversion.revert()
    assert np.array_equal(images(pipe), before)


def test_several_controlnets_by_name() -> None:
    pipe = controlled()
    before = images(pipe)
    assert list(pipe.set_attn_processor("clear", radius=2, components=BOTH).models) == ["unet", *NETS]
    pipe.set_attn_processor(None)
    assert np.array_equal(images(pipe), before)
    assert list(convert(pipe, CLEAR, components=("controlnet.nets.1",)).models) == ["controlnet.nets.1"]
    Conversion.of(pipe).revert()
    with pytest.raises(ValueError, match=r"no component controlnet.nets.2 .*controlnet.nets.1"):
        convert(pipe, CLEAR, components=("controlnet.nets.2",))


HELD = {
    "list": lambda models: models,
    "tuple": tuple,
    "module-list": nn.ModuleList,
    "module-dict": lambda models: nn.ModuleDict({str(number): model for number, model in enumerate(models)}),
    "compiled": lambda models: [torch.compile(model) for model in models],
}


@pytest.mark.parametrize("hold", HELD.values(), ids=HELD)
def test_lists_of_models(hold: Any, tmp_path: Path) -> None:
    models = [HOST["vit"].build(), HOST["flux"].build()]
    conversion = convert(hold(models), CLEAR)
    assert list(conversion.models.values()) == models
    for host_id, model in zip(("vit", "flux"), models, strict=True):
        assert torch.equal(run(HOST[host_id], model, *SIZE), expected(host_id, CLEAR))
    conversion.save(tmp_path)
    conversion.revert()
    load(hold(models), tmp_path)
    for host_id, model in zip(("vit", "flux"), models, strict=True):
        assert torch.equal(run(HOST[host_id], model, *SIZE), expected(host_id, CLEAR))


def test_one_model_under_several_names_is_converted_once(tmp_path: Path) -> None:
    model = HOST["vit"].build()
    before = state(model)
    for target in ([model, model], [nn.ModuleList([model]), model]):
        conversion = convert(target, CLEAR)
        assert len(conversion.models) == 1 and len(conversion.layers) == len(Conversion.of(target).layers) == 2
        assert torch.equal(run(HOST["vit"], model, *SIZE), expected("vit", CLEAR))
        Conversion.of(target).save(tmp_path)
        conversion.revert()
        assert_untouched(model, before)


def several(tmp_path: Path) -> tuple[Conversion, list[Any]]:
    """Return two models whose weights an adapter replaced, of which the second one cannot be reverted: it is fused."""
    models: list[Any] = [HOST["flux"].build() for _ in range(2)]
    conversion = convert(models, CLEAR)
    with torch.no_grad():
        for model in models:
            model.transformer_blocks[0].attn.to_q.weight.add_(1)
    conversion.save(tmp_path / "trained")
    conversion.revert()
    conversion = load(models, tmp_path / "trained")
    models[1].fuse_qkv_projections()
    return conversion, models


def test_a_model_that_is_refused_leaves_the_others_as_they_are(tmp_path: Path) -> None:
    conversion, models = several(tmp_path)
    want = [run(HOST["flux"], model, *SIZE) for model in models]
    for refused in (conversion.revert, lambda: convert(models, Softmax(), replace=True)):
        with pytest.raises(ValueError, match=r"unfuse_qkv_projections"):
            refused()
        assert [run(HOST["flux"], model, *SIZE).equal(was) for model, was in zip(models, want, strict=True)] == [
            True
        ] * 2
    with torch.no_grad():
        models[1].transformer_blocks[0].attn.to_qkv.weight.add_(1)
    with pytest.raises(ValueError, match=r"fused after the conversion and then trained"):
        conversion.save(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    models[1].unfuse_qkv_projections()
    conversion.revert()
    assert not any(map(is_converted, models))


def test_what_holds_no_model_is_refused() -> None:
    for target in ([], ["unet"], 3, {"unet": 1}):
        with pytest.raises(TypeError, match=r"cannot convert a .*: give a diffusers pipeline or model"):
            convert(target, CLEAR)
    with pytest.raises(ValueError, match="Linear is not a known host"):
        convert([nn.Linear(2, 2)], CLEAR)


@pytest.fixture
def one_process(tmp_path: Path) -> Any:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_models(one_process: Any) -> None:
    model = HOST["vit"].build()
    wrappers = nn.parallel.DistributedDataParallel(model), nn.DataParallel(model), torch.compile(model)
    model.cpu()  # where there is a GPU, DataParallel has moved it
    for wrapped in wrappers:
        conversion = convert(wrapped, CLEAR)
        assert list(conversion.models.values()) == [model]
        assert torch.equal(run(HOST["vit"], model, *SIZE), expected("vit", CLEAR))
        Conversion.of(wrapped).revert()
        assert torch.equal(run(HOST["vit"], model, *SIZE), stock("vit", SIZE))
    distributed = nn.parallel.DistributedDataParallel(model)
    convert(distributed, CLEAR)
    assert torch.equal(run(HOST["vit"], distributed, *SIZE), expected("vit", CLEAR))
    Conversion.of(distributed).revert()
    with pytest.raises(ValueError, match="DistributedDataParallel would not synchronise the 8 parameters"):
        convert(distributed, POOLED)
    assert torch.equal(run(HOST["vit"], model, *SIZE), stock("vit", SIZE))
    convert(nn.DataParallel(model), POOLED)
