"""`convert`, `Conversion` and `load`: options do what they say, bad input is refused by name and changes nothing."""

import json
import math
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from safetensors.torch import load_file, save_file
from test_hosts import RADIUS_2, TEXT, DenseOracle, run, stock
from tiny_hosts import HOST, Layout, noise
from tiny_pipelines import PIPELINE, images_of
from torch import Tensor, nn

from vision_attn import Clear, Conversion, Grid, Host, Neighborhood, Softmax, convert, load, use_grid
from vision_attn.intercept import is_rerouted
from vision_attn.processors import make_spec

POOLED = Clear(radius=2, pool=2)


@pytest.fixture(autouse=True)
def _native_attention():
    """`set_attention_backend` of one model sets that of the process too."""
    yield
    HOST["flux"].build().set_attention_backend("native")


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert not any(is_rerouted(module) for module in model.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    with pytest.raises(ValueError, match="not converted"):
        Conversion.of(model)


WHERE = {
    "glob": ("down_blocks.*", 2),
    "regex": (re.compile(r"down_blocks\.\d|mid_block"), 3),
    "predicate": (lambda name: "up_blocks" not in name and "mid" not in name, 2),
    "all": (None, 7),
}


@pytest.mark.parametrize("where, layers", WHERE.values(), ids=WHERE)
def test_where(where: Any, layers: int) -> None:
    model = HOST["sd15-unet"].build()
    conversion = convert(model, Clear(radius=2), where=where)
    assert len(conversion.layers) == layers
    run(HOST["sd15-unet"], model, 12, 10)
    assert set(conversion.status().values()) == {"rerouted"}


def test_min_tokens_leaves_small_grids_dense() -> None:
    case, model = HOST["sd15-unet"], HOST["sd15-unet"].build()
    conversion = convert(model, Clear(radius=2), min_tokens=30)
    output = run(case, model, 12, 10)
    with DenseOracle({Layout(0, (12, 10)), Layout(0, (6, 5))}, RADIUS_2):
        want = run(case, case.build(), 12, 10)
    torch.testing.assert_close(output, want, rtol=0, atol=2e-5)
    assert conversion.status()["mid_block.attentions.0.transformer_blocks.0.attn1"].startswith("dense: 9 tokens")
    conversion.revert()
    convert(model, Clear(radius=2), min_tokens=121)
    assert torch.equal(run(case, model, 12, 10), stock("sd15-unet"))


@pytest.mark.parametrize("how", ["convert", "use_grid", "Conversion.use_grid"])
def test_a_grid_given_by_the_user(how: str) -> None:
    case, model, want = HOST["flux"], HOST["flux"].build(), HOST["flux"].build()
    inputs = case.inputs(12, 10, 2, TEXT) | dict(img_ids=noise(120, 3))
    conversion = convert(model, Clear(radius=2), grid=(12, 10) if how == "convert" else None)
    with torch.no_grad(), DenseOracle({Layout(TEXT, (12, 10))}, RADIUS_2):
        expected = want(**inputs).sample
    with torch.no_grad():
        if how == "convert":
            output = model(**inputs).sample
        else:
            with use_grid(model, 12, 10) if how == "use_grid" else conversion.use_grid(12, 10):
                output = model(**inputs).sample
            with pytest.raises(RuntimeError, match=r"none of the 2 .* img_ids .* not those of a grid.*use_grid"):
                model(**inputs)
    torch.testing.assert_close(output, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_backends_agree(backend: str) -> None:
    case, outputs = HOST["sd35"], []
    for name in ("auto", backend):
        model = case.build()
        convert(model, POOLED, backend=name)
        outputs.append(run(case, model, 12, 10))
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)


def test_layers_print_as_a_table() -> None:
    case, model = HOST["flux"], HOST["flux"].build()
    conversion = convert(model, Clear(radius=2))
    assert set(conversion.status().values()) == {"not run yet"}
    assert str(conversion.layers).splitlines()[1].split() == [
        "transformer_blocks.0.attn", "2", "-", "-", "not", "run", "yet",
    ]  # fmt: skip
    run(case, model, 12, 10)
    head, *rows = [line.split() for line in str(conversion.layers).splitlines()]
    assert head == ["layer", "heads", "tokens", "attended", "status"]
    share = (RADIUS_2.allowed(Grid(12, 10)).sum().item() + 127**2 - 120**2) / 127**2
    assert rows[0] == ["transformer_blocks.0.attn", "2", "127", f"{share:.1%}", "rerouted"]
    assert "2 layers, 2 rerouted" in repr(conversion) and "radius=2" in repr(conversion)


def test_bypassed_is_the_stock_model_and_nests() -> None:
    case, model = HOST["sd35"], HOST["sd35"].build()
    conversion = convert(model, POOLED)
    converted = run(case, model, 12, 10)
    with conversion.bypassed():
        assert torch.equal(run(case, model, 12, 10), stock("sd35"))
        with pytest.raises(KeyError), Conversion.of(model).bypassed():
            raise KeyError
        assert torch.equal(run(case, model, 12, 10), stock("sd35"))
    assert torch.equal(run(case, model, 12, 10), converted)


def train(model: nn.Module, conversion: Conversion) -> set[str]:
    """Change all learned weights, one weight of one tensor, and all of another; return the names of what changed."""
    with torch.no_grad():
        for parameter in conversion.parameters():
            parameter.add_(torch.rand_like(parameter))
        (one_name, one), (all_name, everything) = [
            (n, p) for n, p in model.named_parameters() if n.endswith(("to_q.weight", "to_k.weight", "qkv.weight"))
        ][:2]
        one.view(-1)[1] += 1
        everything.mul_(1.5)
    return {one_name, all_name} | {name for name, _ in conversion.named_parameters()}


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
    assert torch.equal(run(case, restored, *size), trained)
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
    assert (images_of(case, restored, 64, 128) == images).all()
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
    "pickle": (lambda f: put(f, pickle.dumps({"a": 1})), ValueError, "damaged or no safetensors"),
    "no-weights": (lambda f: (f / "vision_attn.safetensors").unlink(), FileNotFoundError, "does not exist"),
    "no-config": (lambda f: (f / "config.json").unlink(), ValueError, "no config.json"),
    "config-truncated": (lambda f: truncate(f, "config.json"), ValueError, "config.json is damaged"),
    "config-of-diffusers": (lambda f: (f / "config.json").write_text('{"_class_name": "x"}'), ValueError, "its format"),
    "config-list": (lambda f: (f / "config.json").write_text("[]"), ValueError, "no vision_attn adapter"),
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


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    model = HOST["vit"].build()
    before = state(model)
    torch.save(before, tmp_path / "weights.bin")
    for source, options, error, message in (
        (tmp_path / "weights.bin", {}, ValueError, "only .safetensors files are, for a pickle can run any code"),
        (tmp_path, dict(weight_name="weights.bin"), ValueError, "only .safetensors files"),
        (tmp_path, {}, ValueError, "is no adapter.*only weights.bin"),
        (tmp_path / "nowhere", {}, FileNotFoundError, "nowhere does not exist"),
        ("nobody/nothing", {}, FileNotFoundError, "nobody/nothing"),
        (tmp_path, dict(weight_name="none.safetensors"), FileNotFoundError, "none.safetensors does not exist"),
    ):
        with pytest.raises(error, match=message):
            load(model, source, **options)
    assert_untouched(model, before)


SPECS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "radius-0": (lambda: Clear(radius=0), ValueError, "radius must be above 0, got 0"),
    "radius-nan": (lambda: Clear(radius=math.nan), ValueError, "radius must be above 0"),
    "radius-text": (lambda: Clear(radius="2"), TypeError, "radius must be a number of tokens, got '2'"),
    "radius-bool": (lambda: Clear(radius=True), TypeError, "radius"),
    "pool-0": (lambda: Clear(pool=0), ValueError, "pool must be at least 1, got 0"),
    "pool-float": (lambda: Clear(pool=2.0), TypeError, "pool must be an int, got 2.0"),
    "native-tokens-1": (lambda: Clear(native_tokens=1), ValueError, "native_tokens must be at least 2"),
    "kernel-1": (lambda: Neighborhood(1), ValueError, "kernel_size must be at least 2, got 1"),
    "kernel-float": (lambda: Neighborhood(3.5), TypeError, "kernel_size must be an int or a pair"),
    "kernel-triple": (lambda: Neighborhood((3, 3, 3)), TypeError, "kernel_size must be an int or a pair"),
    "dilation-0": (lambda: Neighborhood(3, 0), ValueError, "dilation must be at least 1, got 0"),
    "dilation-none": (lambda: Neighborhood(3, None), TypeError, "dilation must be an int or a pair"),
    "unknown-name": (lambda: make_spec("sparse"), ValueError, "'sparse': known are .*clear.*neighborhood.*softmax"),
    "unknown-field": (lambda: make_spec("Clear", size=3), TypeError, "Clear has no field size: it has radius, pool"),
}


@pytest.mark.parametrize("make, error, message", SPECS.values(), ids=SPECS)
def test_a_wrong_spec_is_refused(make: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def unet_without_attention() -> nn.Module:
    blocks = dict(down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), mid_block_type=None)
    return UNet2DConditionModel(block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, **blocks)


def prepared(host_id: str, change: Callable[[Any], Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = HOST[host_id].build()
        change(model)
        return model

    return build


VIT, UNET, FLUX = HOST["vit"].build, HOST["sd15-unet"].build, HOST["flux"].build
REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], type[Exception], str]] = {
    "spec-name": (VIT, dict(spec="clear"), TypeError, r"spec such as Clear\(radius=16\), got 'clear'"),
    "spec-class": (VIT, dict(spec=Clear), TypeError, "spec must be a processor's spec"),
    "backend": (VIT, dict(backend="cuda"), ValueError, "'auto', 'reference', 'torch'.* got 'cuda'"),
    "where-type": (VIT, dict(where=3), TypeError, "where must be a pattern"),
    "where-selects-nothing": (VIT, dict(where="blocks.9.*"), ValueError, "where selects no layer .*blocks.0.attn"),
    "min-tokens": (VIT, dict(min_tokens=-1), ValueError, "min_tokens must be a number of tokens.* -1"),
    "grid-kind": (VIT, dict(grid="12x10"), ValueError, r"grid must be \(height, width\) in tokens, got '12x10'"),
    "grid-value": (VIT, dict(grid=(12, 0)), ValueError, "width must be at least 1, got 0"),
    "grid-float": (VIT, dict(grid=(12.0, 10)), TypeError, "height must be an int"),
    "grid-of-a-unet": (UNET, dict(grid=(12, 10)), ValueError, "levels of a UNet"),
    "components-of-a-model": (VIT, dict(components=("unet",)), ValueError, "is for a pipeline"),
    "host-kind": (VIT, dict(host="vit"), TypeError, "host"),
    "unknown-model": (lambda: nn.Linear(2, 2), {}, ValueError, "Linear is no known host.*FluxTransformer2DModel.*Host"),
    "no-attention": (unet_without_attention, {}, ValueError, "UNet2DConditionModel has no self-attention over a grid"),
    "differential": (
        lambda: timm.create_model("vit_tiny_patch16_224", depth=1, attn_layer="diff"), {}, ValueError, "DiffAttention",
    ),
    "sliced": (
        prepared("sd15-unet", lambda m: m.set_attention_slice("max")), {}, ValueError, "disable_attention_slicing",
    ),
    "flex": (prepared("flux", lambda m: m.set_attention_backend("flex")), {}, ValueError, "set_attention_backend"),
    "hooked": (
        prepared("vit", lambda m: add_hook_to_module(m.blocks[1].attn, ModelHook())), {}, ValueError,
        "blocks.1.attn: a hook has replaced the forward.*convert first",
    ),
}  # fmt: skip


@pytest.mark.parametrize("build, options, error, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_converted_is_refused(build: Any, options: Any, error: Any, message: str) -> None:
    model = build()
    before = state(model)
    with pytest.raises(error, match=message):
        convert(model, **(dict(spec=POOLED) | options))
    assert_untouched(model, before)


def test_a_converted_model_is_not_converted_again(tmp_path: Path) -> None:
    model, case = HOST["vit"].build(), HOST["vit"]
    conversion = convert(model, Clear(radius=2))
    converted = run(case, model, 12, 10)
    conversion.save(tmp_path)
    for again in (lambda: convert(model, Softmax()), lambda: load(model, tmp_path)):
        with pytest.raises(ValueError, match=r"VisionTransformer is converted already: revert\(\)"):
            again()
    assert torch.equal(run(case, model, 12, 10), converted)
    conversion.revert()
    for after in (conversion.revert, lambda: conversion.save(tmp_path), lambda: Conversion.of(model)):
        with pytest.raises(ValueError, match="not converted"):
            after()
    assert "reverted" in repr(conversion)


def test_one_model_of_a_pipeline_that_refuses_leaves_all_as_they_were() -> None:
    pipe = PIPELINE["sd-controlnet"].build()
    before = state(pipe.unet)
    add_hook_to_module(pipe.controlnet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1"), ModelHook())
    with pytest.raises(ValueError, match=r"mid_block\.attentions\.0.*a hook has replaced"):
        convert(pipe, POOLED, components=("unet", "controlnet"))
    assert_untouched(pipe.unet, before)
    pipe.unet = None
    with pytest.raises(ValueError, match=r"nothing to convert in this StableDiffusionControlNetPipeline.*vae"):
        convert(pipe, POOLED)
    with pytest.raises(TypeError, match="cannot convert a str: give a diffusers pipeline or model"):
        convert("pipe", POOLED)


class PlainAttention:
    """A processor that computes attention without `scaled_dot_product_attention`, as xformers does."""

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        q, k, v = (attn.head_to_batch_dim(p(hidden_states)) for p in (attn.to_q, attn.to_k, attn.to_v))
        return attn.to_out[0](attn.batch_to_head_dim(attn.get_attention_scores(q, k) @ v))


def replace_processor(model: Any) -> None:
    model.mid_block.attentions[0].transformer_blocks[0].attn1.processor = PlainAttention()


def fuse(model: Any, fused: bool) -> None:
    model.blocks[1].attn.fused_attn = fused


def drop(model: Any, p: float) -> None:
    model.train(p > 0).blocks[0].attn.attn_drop.p = p


def keep(model: Any) -> None:
    pass


NEVER = "never called scaled_dot_product_attention.*"
HIDE_ONE, BIAS = torch.ones(2, 120).index_fill(1, torch.tensor([3]), 0), torch.full((2, 1, 120), -0.5)
FAILS: dict[str, tuple[str, Any, Callable[[Any], Any], Callable[[Any], Any], dict[str, Any], type[Exception], str]] = {
    "sliced": ("sd15-unet", Clear(2), lambda m: m.set_attention_slice("max"), lambda m: m.set_attention_slice(None), {},
               RuntimeError, rf"down_blocks\.0.*attn1 {NEVER}Sliced.*disable_attention_slicing"),
    "plain": ("sd15-unet", Clear(2), replace_processor, lambda m: m.set_attn_processor(AttnProcessor2_0()), {},
              RuntimeError, rf"mid_block.*attn1 {NEVER}PlainAttention"),
    "flex": ("flux", Clear(2), lambda m: m.set_attention_backend("flex"), lambda m: m.set_attention_backend("native"),
             {}, RuntimeError, rf"transformer_blocks\.0\.attn {NEVER}set_attention_backend\(.native"),
    "unfused": ("vit", Clear(2), lambda m: fuse(m, False), lambda m: fuse(m, True), {},
                RuntimeError, rf"blocks\.1\.attn {NEVER}fused_attn=False"),
    "dropout": ("vit", Clear(2), lambda m: drop(m, 0.1), lambda m: drop(m, 0.0), {},
                ValueError, r"blocks\.0\.attn: attention dropout 0\.1"),
    "kernel": ("vit", Neighborhood(11), keep, keep, {}, ValueError, r"kernel_size 11 .* does not fit in Grid\("),
    "dilation": ("vit", Neighborhood(3, (1, 4)), keep, keep, {}, ValueError, r"kernel_size 3 \* dilation 4 does not"),
    "pool": ("vit", Clear(2, pool=4), keep, keep, {}, ValueError, r"pool 4 must divide .* Grid\(height=12, width=10"),
    "wrong-grid": ("flux", Clear(2), keep, keep, dict(img_ids=noise(120, 3)),
                   RuntimeError, "none of the 2 converted layers of this FluxTransformer2DModel .*use_grid"),
    "mask-of-a-unet": ("sd15-unet", Clear(2), keep, keep, dict(attention_mask=HIDE_ONE),
                       ValueError, r"down_blocks\.0.*attn1: cannot honour an attention mask that hides grid tokens"),
    "mask-of-a-dit": ("pixart", Clear(2), keep, keep, dict(attention_mask=HIDE_ONE), ValueError, "hides grid tokens"),
    "bias": ("pixart", Clear(2), keep, keep, dict(attention_mask=BIAS),
             ValueError, r"transformer_blocks\.0\.attn1: cannot honour an attention mask that biases the logits"),
}  # fmt: skip


@pytest.mark.parametrize("host_id, spec, change, cure, inputs, error, message", FAILS.values(), ids=FAILS)
def test_a_forward_that_cannot_be_rerouted_raises(
    host_id: str, spec: Any, change: Any, cure: Any, inputs: Any, error: Any, message: str
) -> None:
    case, model = HOST[host_id], HOST[host_id].build()
    conversion = convert(model, spec)
    change(model)
    with torch.no_grad(), pytest.raises(error, match=message):
        model(**case.inputs(12, 10, 2, TEXT) | inputs)
    assert len(str(conversion.layers).splitlines()) == 1 + len(conversion.status())
    conversion.revert()
    assert run(case, model.eval(), 12, 10).isfinite().all()
    cure(model)
    assert torch.equal(run(case, model, 12, 10), stock(host_id))
    convert(model, Clear(radius=2))
    assert not torch.allclose(run(case, model, 12, 10), stock(host_id), atol=1e-3)


def test_padding_of_the_text_is_not_seen() -> None:
    case, model = HOST["qwen-image-masked"], HOST["qwen-image-masked"].build()
    convert(model, Clear(radius=2))
    inputs = case.inputs(12, 10, 2, TEXT)
    padding = inputs["encoder_hidden_states_mask"] == 0
    outputs = []
    for where, value in ((padding, 0.0), (padding, 3.0), (~padding, 3.0)):
        inputs["encoder_hidden_states"][where] = value
        outputs.append(model(**inputs).sample)
    assert torch.equal(outputs[0], outputs[1]) and not torch.allclose(outputs[0], outputs[2], atol=1e-3)


@pytest.mark.parametrize("seen", [[7, 7], [7, 4]], ids=["same-length", "ragged"])
def test_cogview4_with_a_mask_stays_dense(seen: list[int]) -> None:
    case, model = HOST["cogview4"], HOST["cogview4"].build()
    inputs = case.inputs(12, 10, 2, TEXT)
    inputs["attention_mask"] = (torch.arange(TEXT) < torch.tensor(seen)[:, None]).float()
    want = model(**inputs).sample
    conversion = convert(model, Clear(radius=2))
    assert torch.equal(model(**inputs).sample, want)
    assert all(status.startswith("dense: the attention mask") for status in conversion.status().values())


class ToyAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class ToyViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.text = nn.Conv2d(3, 16, 4, 4), nn.Parameter(torch.randn(1, 5, 16))
        self.blocks = nn.Sequential(ToyAttention(16, 2), ToyAttention(16, 2))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.stem(pixels).flatten(2).transpose(1, 2)
        return self.blocks(torch.cat([x, self.text.expand(len(x), -1, -1)], 1))


def toy_grid(module: nn.Module, inputs: Any) -> Grid:
    return Grid(*(side // 4 for side in inputs["pixels"].shape[-2:]))


def test_a_host_of_ones_own() -> None:
    model, pixels = ToyViT(), noise(2, 3, 24, 32)
    host = Host(layers=("blocks.?",), probe=toy_grid, others="suffix")
    stock_output = model(pixels)
    with DenseOracle({Layout(0, (6, 8), suffix=5)}, RADIUS_2):
        want = model(pixels)
    conversion = convert(model, Clear(radius=2), host=host)
    torch.testing.assert_close(model(pixels=pixels), want, rtol=0, atol=1e-5)
    assert {row.tokens for row in conversion.layers} == {53}
    conversion.revert()
    assert torch.equal(model(pixels), stock_output)
    with pytest.raises(ValueError, match="ToyViT has no self-attention over a grid: no module is called layers"):
        convert(model, Clear(radius=2), host=replace(host, layers=("layers.*",)))
    with pytest.raises(ValueError, match="stem: a Conv2d does not tell its heads"):
        convert(model, Clear(radius=2), host=replace(host, layers=("stem",)))
    assert torch.equal(model(pixels), stock_output)


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
    assert torch.equal(run(case, fused, 16, 8), trained)
