"""`save` and `load`: trained weights come back exactly, and a damaged adapter changes nothing."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from converted_hosts import POOLED
from host_runs import FROM_A_FILE, run
from safetensors.torch import load_file, save_file
from tiny_hosts import HOST
from tiny_pipelines import PIPELINE, add_lora, images_of
from torch import nn
from untouched import assert_untouched, state

from vision_attn import Clear, Conversion, Neighborhood, convert, load
from vision_attn.processors.base import stored_name


def train(model: nn.Module, conversion: Conversion) -> set[str]:
    """Change all learned weights, a single weight of one host tensor and the whole of another; return their names."""
    with torch.no_grad():
        for parameter in conversion.parameters():
            parameter.add_(torch.rand_like(parameter))
        (one_name, one), (all_name, everything) = [
            (n, p) for n, p in model.named_parameters() if n.endswith(("to_q.weight", "to_k.weight", "qkv.weight"))
        ][:2]
        one.view(-1)[1] += 1
        everything.mul_(1.5)
    return {one_name, all_name} | {stored_name(name) for name, _ in conversion.named_parameters()}


def assert_same_tensors(model: nn.Module, other: nn.Module) -> None:
    want = other.state_dict()
    assert model.state_dict().keys() == want.keys()
    assert all(torch.equal(tensor, want[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("spec", [Clear(radius=2), POOLED, Neighborhood((3, 2), 1)], ids=["clear", "pool", "pair"])
@pytest.mark.parametrize("host_id", ["flux", "sd15-unet", "vit", "lumina2"])
def test_save_and_load(host_id: str, spec: Any, tmp_path: Path) -> None:
    case, size, model = HOST[host_id], (16, 8), HOST[host_id].build()
    conversion = convert(model, spec, where=lambda name: "refiner" not in name, min_tokens=20)
    changed = train(model, conversion)
    trained = run(case, model, *size)
    conversion.save(tmp_path / "adapter")
    assert set(load_file(tmp_path / "adapter" / "vision_attn.safetensors")) == changed

    restored = case.build()
    before, original = state(restored), run(case, restored, *size)
    again = load(restored, tmp_path / "adapter")
    assert_same_tensors(restored, model)
    torch.testing.assert_close(run(case, restored, *size), trained, **FROM_A_FILE)
    assert again.spec == spec and [row[:2] for row in again.layers] == [row[:2] for row in conversion.layers]
    again.save(tmp_path / "again")
    assert set(load_file(tmp_path / "again" / "vision_attn.safetensors")) == changed
    again.revert()
    assert_untouched(restored, before)
    assert torch.equal(run(case, restored, *size), original)


def test_save_and_load_a_pipeline_with_two_components(tmp_path: Path) -> None:
    case = PIPELINE["sd-controlnet"]
    pipe = case.build()
    conversion = convert(pipe, POOLED, components=("unet", "controlnet"))
    for name in ("unet", "controlnet"):
        train(getattr(pipe, name), Conversion.of(getattr(pipe, name)))
    images = images_of(case, pipe, 64, 128)
    conversion.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"unet", "controlnet"}
    restored = case.build()
    original = images_of(case, restored, 64, 128)
    again = load(restored, tmp_path)
    assert set(again.models) == {"unet", "controlnet"}
    for name in ("unet", "controlnet"):
        assert_same_tensors(getattr(restored, name), getattr(pipe, name))
    np.testing.assert_allclose(images_of(case, restored, 64, 128), images, **FROM_A_FILE)
    again.revert()
    assert (images_of(case, restored, 64, 128) == original).all()


def rewrite(folder: Path, change: Callable[[dict], Any]) -> None:
    path = folder / "vision_attn.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def reconfigure(folder: Path, change: Callable[[dict], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def truncate(folder: Path, name: str, size: int = 40) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:size])


def put(folder: Path, data: bytes) -> None:
    (folder / "vision_attn.safetensors").write_bytes(data)


WEIGHT = "blocks.1.attn.vision_attn.spatial_weight"


DAMAGES: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "truncated": (lambda f: truncate(f, "vision_attn.safetensors"), ValueError, "vision_attn.safetensors is damaged"),
    "garbage": (lambda f: put(f, b"\xff" * 64), ValueError, "vision_attn.safetensors is damaged"),
    "empty": (lambda f: put(f, b""), ValueError, "vision_attn.safetensors is damaged"),
    "pickle": (lambda f: put(f, pickle.dumps({"a": 1})), ValueError, "damaged or not a safetensors"),
    "no-weights": (lambda f: (f / "vision_attn.safetensors").unlink(), FileNotFoundError, "does not exist"),
    "no-config": (lambda f: (f / "config.json").unlink(), ValueError, "no config.json"),
    "config-truncated": (lambda f: truncate(f, "config.json"), ValueError, "config.json is damaged"),
    "config-of-diffusers": (lambda f: (f / "config.json").write_text('{"_class_name": "x"}'), ValueError, "its format"),
    "config-list": (lambda f: (f / "config.json").write_text("[]"), ValueError, "not a vision_attn adapter"),
    "config-lacks-a-key": (lambda f: reconfigure(f, lambda c: c.pop("processors")), ValueError, "processors"),
    "unknown-processor": (
        lambda f: reconfigure(f, lambda c: c["processors"][0]["spec"].update({"class": "Sparse"})),
        ValueError, "unknown processor 'Sparse': known are .*clear.*neighborhood.*softmax",
    ),
    "unknown-field": (
        lambda f: reconfigure(f, lambda c: c["processors"][0]["spec"].update(sides=3)),
        (TypeError, ValueError), "no field sides",
    ),
    "another-model": (
        lambda f: reconfigure(f, lambda c: c["base_model"].update({"class": "Eva"})), ValueError, "Eva",
    ),
    "unknown-layer": (
        lambda f: reconfigure(f, lambda c: c["processors"][0]["layers"].append("blocks.7.attn")),
        ValueError, "no layer blocks.7.attn",
    ),
    "no-layer": (
        lambda f: reconfigure(f, lambda c: c.update(processors=[])), ValueError, "has the spec of no layer",
    ),
    "missing-key": (lambda f: rewrite(f, lambda t: t.pop(WEIGHT)), ValueError, f"missing: {WEIGHT}"),
    "unexpected-key": (lambda f: rewrite(f, lambda t: t.update(x=t[WEIGHT] + 1)), ValueError, "unexpected: x"),
    "wrong-shape": (
        lambda f: rewrite(f, lambda t: t.update({WEIGHT: torch.ones(3)})), ValueError, rf"{WEIGHT} is \(3,\) there",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage, error, message", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_adapter_is_refused(damage: Any, error: Any, message: str, tmp_path: Path) -> None:
    conversion = convert(HOST["vit"].build(), POOLED)
    conversion.save(tmp_path)
    damage(tmp_path)
    model = HOST["vit"].build()
    before = state(model)
    with pytest.raises(error, match=message):
        load(model, tmp_path)
    assert_untouched(model, before)


def test_files_that_are_no_adapter_are_refused(tmp_path: Path) -> None:
    model = HOST["vit"].build()
    before = state(model)
    torch.save(before, tmp_path / "weights.bin")
    for source, options, error, message in (
        (tmp_path / "weights.bin", {}, ValueError, "only .safetensors files are read, because a pickle"),
        (tmp_path, dict(weight_name="weights.bin"), ValueError, "only .safetensors files"),
        (tmp_path, {}, ValueError, "is not an adapter.*only weights.bin"),
        (tmp_path / "nowhere", {}, FileNotFoundError, "nowhere does not exist"),
        ("nobody/nothing", {}, FileNotFoundError, "nobody/nothing"),
        (tmp_path, dict(weight_name="none.safetensors"), FileNotFoundError, "none.safetensors does not exist"),
    ):
        with pytest.raises(error, match=message):
            load(model, source, **options)
    assert_untouched(model, before)


def test_load_refuses_fused_projections(tmp_path: Path) -> None:
    case, model = HOST["flux"], HOST["flux"].build()
    conversion = convert(model, POOLED)
    train(model, conversion)
    trained = run(case, model, 16, 8)
    conversion.save(tmp_path)
    fused = case.build()
    fused.fuse_qkv_projections()
    before = state(fused)
    with pytest.raises(ValueError, match="unfuse_qkv_projections"):
        load(fused, tmp_path)
    assert_untouched(fused, before)
    fused.unfuse_qkv_projections()
    load(fused, tmp_path)
    torch.testing.assert_close(run(case, fused, 16, 8), trained, **FROM_A_FILE)


def save_trained(folder: Path) -> None:
    """Save the adapter of a FLUX that was trained."""
    model = HOST["flux"].build()
    conversion = convert(model, Clear(radius=2))
    train(model, conversion)
    conversion.save(folder)


def test_revert_keeps_the_dtype_that_the_model_has_now(tmp_path: Path) -> None:
    save_trained(tmp_path)
    model = HOST["flux"].build()
    want = state(model)
    conversion = load(model, tmp_path)
    model.to(torch.float64)
    conversion.revert()
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float64}
    assert all(torch.equal(tensor, want[name].double()) for name, tensor in state(model).items())


@pytest.mark.parametrize("before", [True, False], ids=["lora-first", "lora-last"])
def test_trained_weights_are_saved_and_loaded_beside_lora(before: bool, tmp_path: Path) -> None:
    model = HOST["flux"].build()
    if before:
        add_lora(model)
    conversion = convert(model, Clear(radius=2))
    if not before:
        add_lora(model)
    with torch.no_grad():
        dict(model.named_modules())["transformer_blocks.0.attn.to_q"].weight.add_(1)
    conversion.save(tmp_path)
    name = "transformer_blocks.0.attn.to_q.weight"
    assert set(load_file(tmp_path / "vision_attn.safetensors")) == {name}
    for restored in (HOST["flux"].build(), add_lora(HOST["flux"].build())):
        load(restored, tmp_path)
        got = {key.replace(".base_layer.", "."): tensor for key, tensor in restored.state_dict().items()}
        assert torch.equal(got[name], HOST["flux"].build().state_dict()[name] + 1)


def test_fused_projections_are_saved_only_if_they_are_copies(tmp_path: Path) -> None:
    model = HOST["flux"].build()
    conversion = convert(model, Clear(radius=2))
    model.fuse_qkv_projections()
    conversion.save(tmp_path / "copies")
    with torch.no_grad():
        model.transformer_blocks[0].attn.to_qkv.weight.add_(1)
    with pytest.raises(ValueError, match=r"to_qkv.weight was fused after the conversion .* unfuse_qkv_projections"):
        conversion.save(tmp_path / "trained")
    assert not (tmp_path / "trained").exists()


def test_saving_two_components_replaces_an_adapter_of_one(tmp_path: Path) -> None:
    case = PIPELINE["sd-controlnet"]
    pipe = case.build()
    convert(pipe, Clear(radius=2)).save(tmp_path)
    Conversion.of(pipe).revert()
    (tmp_path / "notes.txt").write_text("mine")
    convert(pipe, Neighborhood(3), components=("unet", "controlnet")).save(tmp_path)
    loaded = load(case.build(), tmp_path)
    assert set(loaded.models) == {"unet", "controlnet"} and loaded.spec == Neighborhood(3)
    assert (tmp_path / "notes.txt").exists()


@pytest.mark.parametrize("components", [("unet",), ("unet", "controlnet")], ids=["one", "two"])
def test_a_models_own_folder_is_no_place_for_an_adapter(components: tuple[str, ...], tmp_path: Path) -> None:
    pipe = PIPELINE["sd-controlnet"].build()
    pipe.unet.save_config(tmp_path if len(components) == 1 else tmp_path / "unet")
    (own,) = tmp_path.rglob("config.json")
    before = own.read_text()
    conversion = convert(pipe, Clear(radius=2), components=components)
    with pytest.raises(ValueError, match=r"config.json belongs to something else, such as a model, and would be lost"):
        conversion.save(tmp_path)
    assert own.read_text() == before and list(tmp_path.rglob("*.*")) == [own]
    own.write_text("{")  # what was cut off is nobody's
    conversion.save(tmp_path)
    assert set(load(PIPELINE["sd-controlnet"].build(), tmp_path).models) == set(components)


def test_adapters_of_other_components_are_not_left_beside_those_that_are_saved(tmp_path: Path) -> None:
    models: list[nn.Module] = [HOST[name].build() for name in ("vit", "vit-avg", "flux")]
    convert(models, Clear(radius=2)).save(tmp_path)
    Conversion.of(models).revert()
    conversion = convert(models[:2], Neighborhood(3))
    with pytest.raises(ValueError, match=r"has adapters of 2, which would be loaded with those of 0, 1: delete them"):
        conversion.save(tmp_path)
    assert "Clear" in (tmp_path / "0" / "config.json").read_text()
    shutil.rmtree(tmp_path / "2")
    conversion.save(tmp_path)
    conversion.revert()
    assert load(models, tmp_path).spec == Neighborhood(3)


def test_options_of_load_are_known_and_a_subfolder_is_found(tmp_path: Path) -> None:
    convert(HOST["flux"].build(), Clear(radius=2)).save(tmp_path / "inner")
    assert load(HOST["flux"].build(), tmp_path, subfolder="inner").spec == Clear(radius=2)
    with pytest.raises(FileNotFoundError, match="not_there does not exist"):
        load(HOST["flux"].build(), tmp_path, subfolder="not_there")
    with pytest.raises(TypeError, match="load has no option min_tokens: for the hub there are subfolder, revision"):
        load(HOST["flux"].build(), tmp_path / "inner", min_tokens=9)


def test_fused_lora_is_unfused_before_weights_are_put_back(tmp_path: Path) -> None:
    save_trained(tmp_path)
    model = HOST["flux"].build()
    conversion = load(model, tmp_path)
    add_lora(model)
    model.fuse_lora()
    with pytest.raises(ValueError, match=r"call unfuse_lora.. first"):
        conversion.revert()
    model.unfuse_lora()
    conversion.revert()


def test_fused_projections_are_unfused_before_weights_are_put_back(tmp_path: Path) -> None:
    save_trained(tmp_path)
    model = HOST["flux"].build()
    want = run(HOST["flux"], model, 16, 8)
    conversion = load(model, tmp_path)
    model.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"call unfuse_qkv_projections.. first"):
        conversion.revert()
    model.unfuse_qkv_projections()
    conversion.revert()
    assert torch.equal(run(HOST["flux"], model, 16, 8), want)


@pytest.mark.parametrize("before", [True, False], ids=["offloaded-first", "loaded-first"])
def test_weights_are_put_back_after_offloading(before: bool, tmp_path: Path) -> None:
    """Hooks that offload replace each parameter by another one."""
    save_trained(tmp_path)
    model = HOST["flux"].build()
    own = state(model)
    if before:
        cpu_offload(model, execution_device=torch.device("cpu"))
        remove_hook_from_submodules(model)
    conversion = load(model, tmp_path)
    changed = run(HOST["flux"], model, 16, 8)
    cpu_offload(model, execution_device=torch.device("cpu"))
    torch.testing.assert_close(run(HOST["flux"], model, 16, 8), changed, **FROM_A_FILE)
    with pytest.raises(ValueError, match=r"to_k.weight is offloaded .*pipe.remove_all_hooks.."):
        conversion.revert()
    with pytest.raises(ValueError, match=r"is offloaded .*pipe.remove_all_hooks.."):
        conversion.save(tmp_path / "again")
    remove_hook_from_submodules(model)
    conversion.revert()
    assert_untouched(model, own)
