"""Bad input gives a clear error and leaves the model unchanged."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from converted_hosts import POOLED
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from host_runs import TEXT, run, stock
from tiny_hosts import HOST, noise
from tiny_pipelines import PIPELINE
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from untouched import assert_untouched, state

from vision_attn import Clear, Conversion, Neighborhood, Softmax, convert, load
from vision_attn.processors import AgentSD, Schedule, make_spec

SPECS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "radius-0": (lambda: Clear(radius=0), ValueError, "radius must be above 0, got 0"),
    "counted": (lambda: Clear(counted=True), ValueError, "give pool, the side of their cells"),
    "counted-type": (lambda: Clear(pool=2, counted=2), TypeError, "counted must be True or False, got 2"),
    "radius-nan": (lambda: Clear(radius=math.nan), ValueError, "radius must be a number of tokens, got nan"),
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
    "exponent": (lambda: AgentSD(k_scale=math.inf), ValueError, "k_scale must be finite, got inf"),
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
    "backend": (VIT, dict(backend="cuda"), ValueError, "'auto', 'triton', 'torch', 'reference', got 'cuda'"),
    "where-type": (VIT, dict(where=3), TypeError, "where must be a pattern"),
    "where-selects-nothing": (VIT, dict(where="blocks.9.*"), ValueError, "where selects no layer .*blocks.0.attn"),
    "min-tokens": (VIT, dict(min_tokens=-1), ValueError, "min_tokens must be at least 0, got -1"),
    "only-if-faster": (VIT, dict(only_if_faster="no"), TypeError, "only_if_faster must be True or False, got 'no'"),
    "replace": (VIT, dict(replace=1), TypeError, "replace must be True or False, got 1"),
    "pattern-kind": (VIT, dict(spec={3: POOLED}), TypeError, "patterns of layer names, .* got 3"),
    "grid-kind": (VIT, dict(grid="12x10"), ValueError, r"grid must be \(height, width\) in tokens, got '12x10'"),
    "grid-value": (VIT, dict(grid=(12, 0)), ValueError, "width must be at least 1, got 0"),
    "grid-float": (VIT, dict(grid=(12.0, 10)), TypeError, "height must be an int"),
    "grid-of-a-unet": (UNET, dict(grid=(12, 10)), ValueError, "levels of a UNet"),
    "components-of-a-model": (VIT, dict(components=("unet",)), ValueError, "is for a pipeline"),
    "host-kind": (VIT, dict(host="vit"), TypeError, "host"),
    "unknown-model": (lambda: nn.Linear(2, 2), {}, ValueError, "Linear is not a known host.*FluxTransformer2DM.*Host"),
    "no-attention": (unet_without_attention, {}, ValueError, "UNet2DConditionModel has no self-attention over a grid"),
    "differential": (
        lambda: timm.create_model("vit_tiny_patch16_224", depth=1, attn_layer="diff"), {}, ValueError, "DiffAttention",
    ),
    "sliced": (
        prepared("sd15-unet", lambda m: m.set_attention_slice("max")), {}, ValueError, "disable_attention_slicing",
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


def test_a_refusal_by_one_model_leaves_the_pipeline_as_it_was() -> None:
    pipe = PIPELINE["sd-controlnet"].build()
    before = state(pipe.unet)
    pipe.controlnet.set_attention_slice("max")
    with pytest.raises(ValueError, match="disable_attention_slicing"):
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
    "unfused": ("vit", Clear(2), lambda m: fuse(m, False), lambda m: fuse(m, True), {},
                RuntimeError, rf"blocks\.1\.attn {NEVER}fused_attn=False"),
    "eager": ("hf-dinov2", Clear(2), lambda m: m.set_attn_implementation("eager"),
              lambda m: m.set_attn_implementation("sdpa"), {},
              RuntimeError, rf"layer\.0\.attention.* {NEVER}'eager': call set_attn_implementation\('sdpa'\)"),
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
    assert len(str(conversion.layers).splitlines()) == 1 + len(conversion.status)
    conversion.revert()
    assert run(case, model.eval(), 12, 10).isfinite().all()
    cure(model)
    assert torch.equal(run(case, model, 12, 10), stock(host_id))
    convert(model, Clear(radius=2))
    assert not torch.allclose(run(case, model, 12, 10), stock(host_id), atol=1e-3)


def test_context_parallelism_that_the_model_does_not_know_of_is_refused() -> None:
    """`enable_parallelism` tells the model, which tells our layers how the tokens are cut."""
    case = HOST["flux"]
    model, inputs = case.build(), case.inputs(6, 8, 2, 7)
    convert(model, Clear(radius=2))
    model.transformer_blocks[0].attn.processor._parallel_config = object()
    with pytest.raises(ValueError, match=r"transformer_blocks.0.attn runs with context parallelism of which its model"):
        model(**inputs)
    assert model.transformer_blocks[0].attn.processor._parallel_config is not None


class Trained(nn.Module):
    """A model beside other layers, as a loop of one's own has it."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.head, self.parts = nn.Linear(10, 2), nn.ModuleDict({"backbone": backbone})


@pytest.mark.parametrize(
    "wrap, where",
    [(AveragedModel, "module"), (lambda m: nn.Sequential(m, nn.Softmax()), "0"), (Trained, "parts.backbone")],
    ids=["averaged", "sequential", "module"],
)
def test_what_wraps_a_model_says_what_to_convert(wrap: Any, where: str) -> None:
    wrapped = wrap(HOST["vit"].build())
    with pytest.raises(ValueError, match=rf"It holds one as its attribute `{where}`: convert that"):
        convert(wrapped, Clear(radius=2))
    convert(wrapped.get_submodule(where), Clear(radius=2))
    with pytest.raises(ValueError, match=r"Identity is not a known host\. Known"):
        convert(nn.Identity(), Clear(radius=2))


def test_a_model_of_features_says_what_to_convert() -> None:
    features = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, features_only=True)
    with pytest.raises(ValueError, match=r"It holds one as its attribute `model`: convert that"):
        convert(features, Clear(radius=2))
    convert(features.model, Clear(radius=2))
    x = torch.randn(1, 3, 64, 64)
    changed = features(x)
    Conversion.of(features.model).revert()
    assert not torch.allclose(changed[-1], features(x)[-1])


def test_a_processor_without_the_fused_function_is_an_error_that_names_the_cure() -> None:
    model = HOST["sd15-unet"].build()
    convert(model, Clear(radius=2))
    model.set_default_attn_processor()
    with pytest.raises(RuntimeError, match=r"set_attn_processor\(AttnProcessor2_0\(\)\)"):
        run(HOST["sd15-unet"], model, 12, 10)


class Shared:
    """Attention in which all pictures of a batch also see the first one (StyleAligned), or queries without heads."""

    def __init__(self, heads: bool = True) -> None:
        self.heads = heads

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, **kwargs: Any) -> Tensor:
        other = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (p(x) for p, x in ((attn.to_q, hidden_states), (attn.to_k, other), (attn.to_v, other)))
        if self.heads:
            q, k, v = (t.unflatten(2, (attn.heads, -1)).transpose(1, 2) for t in (q, k, v))
            if encoder_hidden_states is None:
                k, v = (torch.cat([t, t[:1].expand_as(t)], 2) for t in (k, v))
        output = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return attn.to_out[0](output.transpose(1, 2).flatten(2) if self.heads else output)


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (Shared(), r"dense: 192 keys for 96 queries \(shared attention\)"),
        (Shared(heads=False), "dense: queries without an axis of heads"),
    ],
    ids=["more-keys", "no-heads"],
)
def test_attention_over_other_keys_than_the_layers_own_is_no_silent_matter(processor: Any, message: str) -> None:
    model: Any = HOST["sd15-unet"].build()
    conversion = convert(model, Clear(radius=2))
    model.set_attn_processor(processor)
    with pytest.raises(RuntimeError, match=f"was rerouted: .*{message}"):
        run(HOST["sd15-unet"], model, 12, 8)
    assert any(re.match(message, status) for status in conversion.status.values())
    with conversion.bypassed():
        run(HOST["sd15-unet"], model, 12, 8)
    model.set_attn_processor(AttnProcessor2_0())
    run(HOST["sd15-unet"], model, 12, 8)
    assert set(conversion.status.values()) == {"rerouted"}


def test_a_layer_that_shares_attention_beside_others_says_so() -> None:
    model: Any = HOST["sd15-unet"].build()
    conversion = convert(model, Clear(radius=2))
    name = next(iter(conversion.status))
    model.get_submodule(name).set_processor(Shared())
    run(HOST["sd15-unet"], model, 12, 8)
    status = conversion.status
    assert status.pop(name).startswith("dense: 192 keys for 96 queries") and set(status.values()) == {"rerouted"}


STAGES = Schedule(((0.5, Clear(radius=2)), (1.0, Clear(radius=4))))


@pytest.mark.parametrize(
    ("host_id", "argument", "times"),
    [
        ("sd15-unet", "timestep", [900, 100]),
        ("flux", "timestep", [0.9, 0.1]),
        ("sd35", "timestep", [900.0, 100.0]),
        ("z-image", "t", [0.1, 0.9]),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_batch_in_several_stages_of_a_schedule_is_refused(host_id: str, argument: str, times: Any) -> None:
    model = HOST[host_id].build()
    convert(model, STAGES)
    size = (12, 8)
    inputs = HOST[host_id].inputs(*size, 2, TEXT)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"one stage for the whole batch, but the timesteps .* are in 2 stages"):
            model(**inputs | {argument: torch.tensor(times)})
        for one in times:  # samples of one stage run together, each at its own time
            together = torch.tensor([one, one + (1e-3 if isinstance(one, float) else 1)])
            outputs = [HOST[host_id].output(model(**inputs | {argument: t})) for t in (together, together[[0, 0]])]
            torch.testing.assert_close(outputs[0][0], outputs[1][0], rtol=0, atol=1e-5)
            assert not torch.equal(outputs[0][1], outputs[1][1])
