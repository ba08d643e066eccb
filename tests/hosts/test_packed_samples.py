"""Batches of packed patches, where each sample has a grid of its own and padding after it."""

from functools import partial
from typing import Any

import pytest
import timm
import torch
import transformers
from dense_oracle import RADIUS_2, DenseOracle
from tiny_encoders import SIZES, packed_patches
from tiny_host_case import Layout, build, noise
from torch import Tensor, nn

from vision_attn import Clear, Neighborhood, Softmax, convert
from vision_attn.processors import AttnSpec

RAGGED, EVEN = [(5, 6), (8, 4), (4, 7)], [(5, 6), (5, 6)]
_CONFIG = SIZES | dict(intermediate_size=32, num_patches=16, vision_use_head=True)


def _siglip(grids: list[tuple[int, int]], padding: int = 0) -> dict[str, Any]:
    inputs = packed_patches(grids)
    for name in ("pixel_values", "pixel_attention_mask"):
        inputs[name] = nn.functional.pad(inputs[name], (0, 0) * (name == "pixel_values") + (0, padding))
    return inputs


def _naflex(grids: list[tuple[int, int]], padding: int = 0) -> dict[str, Any]:
    tokens = max(height * width for height, width in grids) + padding
    coordinates = torch.zeros(len(grids), tokens, 2, dtype=torch.long)
    valid = torch.zeros(len(grids), tokens, dtype=torch.bool)
    for b, (height, width) in enumerate(grids):
        coordinates[b, : height * width] = torch.cartesian_prod(torch.arange(height), torch.arange(width))
        valid[b, : height * width] = True
    patches = noise(len(grids), tokens, 192) * valid[..., None]
    return dict(x=dict(patches=patches, patch_coord=coordinates, patch_valid=valid))


def _named(grids: list[tuple[int, int]], padding: int = 0) -> dict[str, Any]:
    """The same by name, with padding at (-1, -1) in place of the mask."""
    given = _naflex(grids, padding)["x"]
    places = given["patch_coord"].masked_fill(~given["patch_valid"][..., None], -1)
    return dict(x=given["patches"], patch_coord=places)


_VIT = dict(patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=10)
_GEMMA = partial(build, timm.create_model, "gemma4_vit_167m", **_VIT)
HOSTS = {
    "siglip2": (
        partial(build, transformers.Siglip2VisionModel, transformers.Siglip2VisionConfig(**_CONFIG)),
        _siglip,
        lambda output: output.pooler_output,
        0,
    ),
    "naflexvit": (
        partial(build, timm.create_model, "naflexvit_base_patch16_gap", img_size=32, reg_tokens=4, **_VIT), _naflex,
        lambda output: output, 4,
    ),
    "gemma4-vit": (_GEMMA, _naflex, lambda output: output, 0),
    "gemma4-vit-by-name": (_GEMMA, _named, lambda output: output, 0),
}  # fmt: skip
hosts = pytest.mark.parametrize("host_id", HOSTS)


def run(host_id: str, spec: AttnSpec | None, inputs: dict[str, Any]) -> Tensor:
    make, _, output, _ = HOSTS[host_id]
    model = make()
    conversion = None if spec is None else convert(model, spec)
    with torch.no_grad():
        found: Tensor = output(model(**inputs))
    assert conversion is None or set(conversion.status.values()) == {"rerouted"}
    return found


@hosts
@pytest.mark.parametrize("grids", [RAGGED, EVEN], ids=["ragged", "even"])
@pytest.mark.parametrize("spec", [Softmax(), Clear(radius=100)], ids=["softmax", "covering-disc"])
def test_attending_to_everything_changes_nothing(host_id: str, grids: list[tuple[int, int]], spec: AttnSpec) -> None:
    inputs = HOSTS[host_id][1](grids, padding=3)
    torch.testing.assert_close(run(host_id, spec, inputs), run(host_id, None, inputs), rtol=0, atol=2e-5)


@hosts
@pytest.mark.parametrize("spec", [Clear(radius=2), Neighborhood(kernel_size=3)], ids=["clear", "neighborhood"])
def test_each_sample_is_attended_to_over_its_own_grid(host_id: str, spec: AttnSpec) -> None:
    make = HOSTS[host_id][1]
    together = make(RAGGED, padding=3)
    place = next(name for name in ("x", "pixel_values") if name in together)
    packed = isinstance(together[place], dict)
    patches = together[place]["patches"] if packed else together[place]
    found = run(host_id, spec, together)
    for b, (height, width) in enumerate(RAGGED):
        alone = make([(height, width)])
        own = patches[b : b + 1, : height * width]
        alone[place] = alone[place] | dict(patches=own) if packed else own
        torch.testing.assert_close(found[b : b + 1], run(host_id, spec, alone), rtol=0, atol=2e-5)


@hosts
def test_a_window_equals_the_host_with_a_dense_mask(host_id: str) -> None:
    make, inputs, output, prefix = HOSTS[host_id]
    one = inputs([(5, 6)])
    with torch.no_grad(), DenseOracle({Layout(prefix, (5, 6))}, RADIUS_2) as oracle:
        want = output(make()(**one))
    assert oracle.calls
    found = run(host_id, Clear(radius=2), one)
    torch.testing.assert_close(found, want, rtol=0, atol=2e-5)
    assert (found - run(host_id, None, one)).abs().max() > 1e-3


@hosts
def test_gradients_reach_every_sample(host_id: str) -> None:
    make, inputs, output, _ = HOSTS[host_id]
    stock, converted = make(), make()
    convert(converted, Clear(radius=100))
    for model in (stock, converted):
        output(model(**inputs(RAGGED))).square().sum().backward()
    want = dict(stock.named_parameters())
    for name, parameter in converted.named_parameters():
        if want[name].grad is not None:
            torch.testing.assert_close(parameter.grad, want[name].grad, rtol=1e-3, atol=1e-4, msg=name)


def test_patches_that_are_no_grid_give_the_reason() -> None:
    model = HOSTS["naflexvit"][0]()
    convert(model, Clear(radius=2))
    inputs = _naflex(EVEN)
    inputs["x"]["patch_coord"] = inputs["x"]["patch_coord"].flip(1)
    with pytest.raises(RuntimeError, match="are not the rows of a grid, followed by padding"):
        model(**inputs)


@pytest.mark.parametrize("host_id", ["naflexvit", "gemma4-vit"])
def test_a_compiled_model_takes_other_grids_of_as_many_patches(host_id: str) -> None:
    model = HOSTS[host_id][0]()
    convert(model, Clear(radius=2))
    compiled = torch.compile(model, backend="eager")
    for grid in [(5, 6), (6, 5)]:
        inputs = HOSTS[host_id][1]([grid, grid])
        with torch.no_grad():
            found, want = compiled(**inputs), run(host_id, Clear(radius=2), inputs)
        torch.testing.assert_close(found, want, rtol=0, atol=2e-5)
