"""A converted model works with what users do: copies, saving, half precision, training mode, timm's ways of calling."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from converted_hosts import CLEAR, POOLED, SIZE, call, converted, expected, hosts, specs
from covering import quick
from host_runs import FROM_A_FILE, TEXT, distance, run, stock
from processor_table import KIND_OF_SPEC, PROCESSORS
from safetensors.torch import load_file
from tiny_hosts import HOST, noise
from torch import Tensor, nn

from vision_attn import Clear, Conversion, Softmax, convert, load
from vision_attn.conversion.state import is_rerouted
from vision_attn.processors.base import CHILD, stored_name


def through_a_file(model: nn.Module) -> nn.Module:
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": through_a_file}


@hosts("flux", "sd15-unet", "sd35", "vit", "eva02")
@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
def test_a_copy_computes_the_same(host_id: str, make: Any) -> None:
    model = converted(host_id, POOLED)
    run(HOST[host_id], model, 8, 8)
    other = make(model)
    assert torch.equal(run(HOST[host_id], other, *SIZE), expected(host_id, POOLED))
    assert [type(m).__name__ for m in other.modules()] == [type(m).__name__ for m in model.modules()]
    Conversion.of(other).revert()
    assert torch.equal(run(HOST[host_id], other, *SIZE), stock(host_id, SIZE))
    assert torch.equal(run(HOST[host_id], model, *SIZE), expected(host_id, POOLED))
    with Conversion.of(make(model)).bypassed():
        assert torch.equal(run(HOST[host_id], model, *SIZE), expected(host_id, POOLED))


@hosts("flux", "sd15-unet", "vit")
def test_state_dict(host_id: str) -> None:
    weights = converted(host_id, POOLED).state_dict()
    fresh = HOST[host_id].build()
    conversion = convert(fresh, POOLED)
    fresh.load_state_dict(weights)
    assert torch.equal(run(HOST[host_id], fresh, *SIZE), expected(host_id, POOLED))
    result = HOST[host_id].build().load_state_dict(weights, strict=False)
    assert not result.missing_keys
    assert result.unexpected_keys == [name for name, _ in conversion.named_parameters()]


@hosts("flux", "sd15-unet", "sd35")
@specs
def test_save_pretrained(host_id: str, spec: Any, tmp_path: Path) -> None:
    model = converted(host_id, spec)
    model.save_pretrained(tmp_path)
    added = [name for name, _ in Conversion.of(model).named_parameters()]
    tensors = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert set(tensors) == set(model.state_dict()) and set(added) <= set(tensors)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert sorted(info["unexpected_keys"]) == sorted(added) and not info["missing_keys"]
    assert not any(is_rerouted(module) for module in loaded.modules())
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in loaded.state_dict().items())
    torch.testing.assert_close(run(HOST[host_id], loaded.eval(), *SIZE), stock(host_id, SIZE), **FROM_A_FILE)
    convert(loaded, spec)
    loaded.load_state_dict(tensors)
    torch.testing.assert_close(run(HOST[host_id], loaded, *SIZE), expected(host_id, spec), **FROM_A_FILE)


LOW = ["flux", "sd15-unet", "sd35", "vit"]


@hosts(*LOW)
def test_autocast(host_id: str) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        models = [HOST[host_id].build(), converted(host_id, Softmax()), converted(host_id, POOLED)]
        plain, softmax, output = [run(HOST[host_id], model, *SIZE) for model in models]
    assert output.dtype == plain.dtype and torch.equal(softmax, plain)
    rounding = distance(plain.float(), stock(host_id, SIZE))
    assert 0 < distance(output.float(), expected(host_id, POOLED)) < 2 * rounding + 2**-8


def lowered(tree: Any, dtype: torch.dtype) -> Any:
    if isinstance(tree, dict):
        return {name: lowered(value, dtype) for name, value in tree.items()}
    return tree.to(dtype) if isinstance(tree, Tensor) and tree.is_floating_point() else tree


@hosts(*LOW)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["half", "bfloat16"])
def test_half_precision(host_id: str, dtype: torch.dtype, tmp_path: Path) -> None:
    outputs = []
    for model in (HOST[host_id].build(), converted(host_id, Softmax()), converted(host_id, POOLED)):
        model.to(dtype)
        with torch.no_grad():
            outputs.append(HOST[host_id].output(model(**lowered(HOST[host_id].inputs(*SIZE, 2, TEXT), dtype))))
    assert outputs[2].dtype == outputs[0].dtype and torch.equal(outputs[0], outputs[1])
    rounding = distance(outputs[0].float(), stock(host_id, SIZE))
    limit = 2 * rounding + torch.finfo(dtype).eps
    assert 0 < distance(outputs[2].float(), expected(host_id, POOLED)) < limit
    conversion = Conversion.of(model)
    conversion.save(tmp_path)
    names = {stored_name(name) for name, _ in conversion.named_parameters()}
    assert set(load_file(tmp_path / "vision_attn.safetensors")) == names


@pytest.mark.parametrize("name", quick([(name,) for name in PROCESSORS], (KIND_OF_SPEC.get, 1)))
def test_channels_last(name: str, tmp_path: Path) -> None:
    case, model = HOST["unet2d"], converted("unet2d", PROCESSORS[name])
    want = run(case, model, *SIZE, batch=3)
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(run(case, model, *SIZE, batch=3), want, rtol=1e-4, atol=1e-4)
    Conversion.of(model).save(tmp_path)
    tensors = load_file(tmp_path / "vision_attn.safetensors")
    assert set(tensors) == {stored_name(name) for name in model.state_dict() if CHILD in name}
    load(fresh := case.build(), tmp_path)
    torch.testing.assert_close(run(case, fresh, *SIZE, batch=3), want, rtol=1e-4, atol=1e-4)


@hosts("flux", "sd15-unet", "vit")
def test_inference_mode_and_training_mode(host_id: str) -> None:
    model = converted(host_id, POOLED)
    for _ in range(2):
        with torch.inference_mode():
            assert torch.equal(call(host_id, model), expected(host_id, POOLED))
        assert torch.equal(run(HOST[host_id], model, *SIZE), expected(host_id, POOLED))
    assert model.train().training and all(module.training for module in model.modules())
    torch.testing.assert_close(call(host_id, model), expected(host_id, POOLED), rtol=0, atol=1e-5)


TIMM: dict[str, Callable[[Any, Tensor], Any]] = {
    "forward_features": lambda model, x: model.forward_features(x),
    "forward_intermediates": lambda model, x: torch.cat(
        [t.flatten() for t in model.forward_intermediates(x, indices=2, intermediates_only=True)]
    ),
    "get_intermediate_layers": lambda model, x: torch.cat([t.flatten() for t in model.get_intermediate_layers(x, n=2)]),
    "head": lambda model, x: model.forward_head(model.forward_features(x), pre_logits=True),
}


@pytest.mark.parametrize("way", TIMM.values(), ids=TIMM)
def test_ways_of_calling_timm(way: Any) -> None:
    x = HOST["vit"].inputs(*SIZE, 2, TEXT)["x"]
    with torch.no_grad():
        outputs = [way(model, x) for model in (HOST["vit"].build(), *(converted("vit", s) for s in (Softmax(), CLEAR)))]
        small = way(converted("vit", CLEAR), x[..., :64, :])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-5)
    assert distance(outputs[2], outputs[0]) > 1e-3 and small.isfinite().all()


def test_timm_features_only() -> None:
    extractor = timm.create_model("vit_tiny_patch16_224", features_only=True, img_size=64, depth=2, out_indices=(0, 1))
    x = noise(2, 3, 64, 64)
    with torch.no_grad():
        plain = extractor.eval()(x)
        conversion = convert(extractor.model, Softmax())
        same = extractor(x)
        conversion.revert()
        convert(extractor.model, Clear(radius=1.5))
        local = extractor(x)
    for a, b, c in zip(plain, same, local, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
        assert distance(c, a) > 1e-3


def test_timm_fused_attn_is_switched_on_and_back() -> None:
    model = HOST["vit"].build()
    model.blocks[1].attn.fused_attn = False
    before = run(HOST["vit"], model, *SIZE)
    conversion = convert(model, POOLED)
    assert model.blocks[1].attn.fused_attn is True
    run(HOST["vit"], model, *SIZE)
    conversion.revert()
    assert [block.attn.fused_attn for block in model.blocks] == [True, False]
    assert torch.equal(run(HOST["vit"], model, *SIZE), before)


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("host_id", ["vit", "flux"])
def test_tensors_without_values(host_id: str, name: str) -> None:
    """Tools that count parameters and operations run a model on the meta device."""
    case, model = HOST[host_id], HOST[host_id].build()
    convert(model, PROCESSORS[name], grid=SIZE if host_id == "flux" else None)
    want = run(case, model, *SIZE)
    inputs = case.inputs(*SIZE, 2, TEXT)
    inputs = {key: t.to("meta") if isinstance(t, Tensor) else t for key, t in inputs.items()}
    found = case.output(model.to("meta")(**inputs))
    assert found.is_meta and found.shape == want.shape and found.dtype == want.dtype
    found.sum().backward()
    assert any(p.grad is not None for p in model.parameters())


def test_a_grid_that_is_read_from_values_is_asked_for_where_there_are_none() -> None:
    case, model = HOST["flux"], HOST["flux"].build().to("meta")
    convert(model, CLEAR)
    inputs = {key: t.to("meta") for key, t in case.inputs(*SIZE, 2, TEXT).items()}
    with pytest.raises(RuntimeError, match=r"img_ids on the meta device cannot be read: give the grid with convert"):
        model(**inputs)
