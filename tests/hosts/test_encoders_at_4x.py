"""Vision encoders at four times the side they were trained for, with their own interpolation of positions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from dense_oracle import RADIUS_2, DenseOracle
from tiny_encoders import ENCODERS
from tiny_host_case import Layout, build, noise
from torch import Tensor, nn

from vision_attn import Clear, Softmax, convert
from vision_attn.conversion.state import is_rerouted, state_of
from vision_attn.processors import AttnSpec


class Case(NamedTuple):
    """An encoder, how it runs, the grid that it was trained for, four times that, and the tokens before it.

    `layers` of its layers attend over the whole grid.
    """

    build: Callable[[], nn.Module]
    run: Callable[[nn.Module], Tensor]
    native: tuple[int, int]
    grid: tuple[int, int]
    prefix: int
    layers: int = 2


def of_transformers(case: Any) -> Case:
    """Non-square, where the model is trained on squares."""
    (layout,) = case.layouts(16, 12, 0)

    def run(model: nn.Module) -> Tensor:
        output: Tensor = case.output(model(**case.inputs(16, 12, 1, 0)))
        return output

    return Case(case.build, run, (4, 4), (16, 12), layout.prefix)


def timm_sam() -> nn.Module:
    return build(
        timm.create_model, "samvit_base_patch16", img_size=(48, 40), use_rel_pos=True, patch_size=8, embed_dim=48,
        depth=3, num_heads=3, window_size=3, global_attn_indexes=(1,), num_classes=10,
    )  # fmt: skip


def hf_sam() -> nn.Module:
    """Absolute positions have one size, so they are enlarged with the weights; relative ones the model interpolates."""

    def made(side: int) -> nn.Module:
        config = transformers.SamVisionConfig(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=side, patch_size=8, window_size=4,
            global_attn_indexes=[1], output_channels=16, mlp_dim=32,
        )  # fmt: skip
        return build(transformers.SamVisionModel, config)

    small, large = made(48), made(192)
    weights = small.state_dict()
    own = dict(large.named_parameters())
    for name, stored in weights.items():
        value = stored
        if name.endswith("pos_embed"):
            value = F.interpolate(stored.permute(0, 3, 1, 2), (24, 24), mode="bicubic").permute(0, 2, 3, 1)
        outer, _, leaf = name.rpartition(".")
        if name in own:
            setattr(large.get_submodule(outer), leaf, nn.Parameter(value.clone()))
    assert [p.shape[0] for name, p in large.named_parameters() if "layers.1" in name and "rel_pos" in name] == [11, 11]
    return large


CASES = {case.id: of_transformers(case) for case in ENCODERS} | {
    "sam": Case(timm_sam, lambda model: model(noise(1, 3, 192, 160)), (6, 5), (24, 20), 0, layers=1),
    "hf-sam": Case(hf_sam, lambda model: model(noise(1, 3, 192, 192)).last_hidden_state, (6, 6), (24, 24), 0, layers=1),
}
QUICK = ("hf-dinov2", "hf-sam")
cases = pytest.mark.parametrize("case", [pytest.param(c, marks=() if c in QUICK else pytest.mark.slow) for c in CASES])


def outputs(case: str, spec: AttnSpec | None) -> Tensor:
    model = CASES[case].build()
    conversion = None if spec is None else convert(model, spec)
    with torch.no_grad():
        found = CASES[case].run(model)
    if conversion is not None:
        assert set(conversion.status.values()) == {"rerouted"} and len(conversion.layers) == CASES[case].layers
        grids = {state_of(module).grid for module in model.modules() if is_rerouted(module)}
        assert {(grid.height, grid.width) for grid in grids if grid} == {CASES[case].grid}
    return found


@cases
def test_attending_to_everything_changes_nothing(case: str) -> None:
    want = outputs(case, None)
    for spec in (Softmax(), Clear(radius=100)):
        torch.testing.assert_close(outputs(case, spec), want, rtol=0, atol=2e-5)


@cases
def test_a_window_equals_the_host_with_a_dense_mask(case: str) -> None:
    with torch.no_grad(), DenseOracle({Layout(CASES[case].prefix, CASES[case].grid)}, RADIUS_2) as oracle:
        want = CASES[case].run(CASES[case].build())
    assert oracle.calls == CASES[case].layers
    found = outputs(case, Clear(radius=2))
    torch.testing.assert_close(found, want, rtol=0, atol=2e-5)
    assert (found - outputs(case, None)).abs().max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_those_of_a_dense_mask(case: str) -> None:
    converted, masked = CASES[case].build(), CASES[case].build()
    convert(converted, Clear(radius=2))
    CASES[case].run(converted).square().mean().backward()
    with DenseOracle({Layout(CASES[case].prefix, CASES[case].grid)}, RADIUS_2):
        CASES[case].run(masked).square().mean().backward()
    want = dict(masked.named_parameters())
    for name, parameter in converted.named_parameters():
        if want[name].grad is not None:
            torch.testing.assert_close(parameter.grad, want[name].grad, rtol=1e-4, atol=2e-5, msg=name)
