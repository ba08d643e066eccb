"""Hosts that add relative positions to the logits, and image encoders of which some layers attend in windows."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import timm
import torch
import transformers
from dense_oracle import KERNEL_3, RADIUS_2, DenseOracle
from tiny_host_case import Layout, build, noise
from torch import Tensor, nn

from vision_attn import Clear, Neighborhood, Softmax, convert
from vision_attn.conversion.state import is_rerouted, state_of
from vision_attn.processors import AttnSpec, make_spec

_VIT = dict(patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=10)
_SAM = dict(patch_size=8, embed_dim=48, depth=3, num_heads=3, window_size=3, global_attn_indexes=(1,), num_classes=10)


class Case(NamedTuple):
    """A model for images of `grid` patches of 8 x 8 pixels, with `prefix` tokens before them."""

    build: Callable[[], nn.Module]
    grid: tuple[int, int] = (6, 5)
    prefix: int = 0
    layers: int = 2
    pixels: int = 8


def of_timm(name: str, **config: Any) -> Callable[[], nn.Module]:
    return partial(build, timm.create_model, name, **config)


def volo() -> nn.Module:
    return build(
        timm.models.volo.VOLO, layers=(1, 2), img_size=(96, 64), embed_dims=(16, 32), num_heads=(2, 2),
        mlp_ratio=(1, 1), downsamples=(True, False), outlook_attention=(True, False), post_layers=("ca", "ca"),
        num_classes=10,
    )  # fmt: skip


def hf_sam() -> nn.Module:
    config = transformers.SamVisionConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=48, patch_size=8, window_size=4,
        global_attn_indexes=[1], output_channels=16, mlp_dim=32,
    )  # fmt: skip
    return build(transformers.SamVisionModel, config)


_BEIT, _RELPOS = "beit_base_patch16_224", "vit_relpos_small_patch16_224"
CASES = {
    "beit": Case(of_timm(_BEIT, img_size=(48, 40), **_VIT), prefix=1),
    "beit-4x": Case(of_timm(_BEIT, img_size=(96, 80), **_VIT), grid=(12, 10), prefix=1),
    "beitv2-shared": Case(
        of_timm(_BEIT, img_size=(48, 40), use_rel_pos_bias=False, use_shared_rel_pos_bias=True, **_VIT), prefix=1
    ),
    "relpos-table": Case(of_timm(_RELPOS, img_size=(48, 40), rel_pos_type="bias", class_token=True, **_VIT), prefix=1),
    "relpos-mlp": Case(of_timm(_RELPOS, img_size=(48, 40), **_VIT)),
    "sam": Case(of_timm("samvit_base_patch16", img_size=(48, 40), use_rel_pos=True, **_SAM), layers=1),
    "sam-rope": Case(
        of_timm("samvit_base_patch16", img_size=(48, 40), use_rel_pos=False, use_rope=True, **_SAM), layers=1
    ),
    "hf-sam": Case(hf_sam, grid=(6, 6), layers=1),
    "volo": Case(volo, grid=(6, 4), pixels=16),
}
WITH_A_BIAS = [case for case in CASES if case not in ("volo", "sam-rope")]
cases = pytest.mark.parametrize("case", CASES)


def output_of(case: str, model: nn.Module) -> Tensor:
    height, width = CASES[case].grid
    side = CASES[case].pixels
    found = model(noise(2, 3, side * height, side * width))
    return found if isinstance(found, Tensor) else found.last_hidden_state


def run(case: str, spec: AttnSpec | None) -> Tensor:
    model = CASES[case].build()
    if spec is not None:
        conversion = convert(model, spec)
    with torch.no_grad():
        found = output_of(case, model)
    if spec is not None:
        assert len(conversion.layers) == CASES[case].layers
        assert set(conversion.status.values()) == {"rerouted"}
        grids = {state_of(module).grid for module in model.modules() if is_rerouted(module)}
        assert {(grid.height, grid.width, grid.prefix) for grid in grids if grid} == {
            (*CASES[case].grid, CASES[case].prefix)
        }
    return found


@cases
def test_attending_to_everything_changes_nothing(case: str) -> None:
    want = run(case, None)
    for spec in (Softmax(), Clear(radius=100), Neighborhood(kernel_size=CASES[case].grid)):
        torch.testing.assert_close(run(case, spec), want, rtol=0, atol=2e-5)


@cases
def test_a_window_equals_the_host_with_a_dense_mask(case: str) -> None:
    layout = Layout(CASES[case].prefix, CASES[case].grid)
    for spec, window in ((Clear(radius=2), RADIUS_2), (Neighborhood(kernel_size=3), KERNEL_3)):
        with torch.no_grad(), DenseOracle({layout}, window) as oracle:
            want = output_of(case, CASES[case].build())
        assert oracle.calls == CASES[case].layers
        found = run(case, spec)
        torch.testing.assert_close(found, want, rtol=0, atol=2e-5)
        assert (found - run(case, None)).abs().max() > 1e-4


@cases
def test_revert_is_bit_equal(case: str) -> None:
    model = CASES[case].build()
    keys = list(model.state_dict())
    convert(model, Clear(radius=2)).revert()
    with torch.no_grad():
        assert torch.equal(output_of(case, model), run(case, None))
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("case", ["beit", "sam", "hf-sam"])
def test_gradients_equal_those_of_a_dense_mask(case: str) -> None:
    converted, masked = CASES[case].build(), CASES[case].build()
    convert(converted, Clear(radius=2))
    output_of(case, converted).square().mean().backward()
    with DenseOracle({Layout(CASES[case].prefix, CASES[case].grid)}, RADIUS_2):
        output_of(case, masked).square().mean().backward()
    want = dict(masked.named_parameters())
    assert any("rel_pos" in name or "relative" in name for name in want)
    for name, parameter in converted.named_parameters():
        if want[name].grad is not None:
            torch.testing.assert_close(parameter.grad, want[name].grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("case", WITH_A_BIAS)
def test_a_processor_without_logits_of_pairs_is_refused(case: str) -> None:
    model = CASES[case].build()
    convert(model, make_spec("linfusion"))
    with pytest.raises(ValueError, match=r"adds relative positions .* LinFusion.* cannot: use Clear without pool"):
        output_of(case, model)


def test_pooled_keys_have_no_relative_positions() -> None:
    model = CASES["sam"].build()
    convert(model, Clear(radius=2, pool=2))
    with pytest.raises(ValueError, match="use Clear without pool"):
        output_of("sam", model)
