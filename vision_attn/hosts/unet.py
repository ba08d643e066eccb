"""UNets and their ControlNets: each `Transformer2DModel` sees the grid of its level in the shape of its input."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from vision_attn.grid import Grid
from vision_attn.hosts.host import Host, Timestep, grid_of_patches


def _grid(module: nn.Module, inputs: Mapping[str, Any]) -> Grid | str:
    return grid_of_patches(inputs["hidden_states"])


def _spatial_transformers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the `Transformer2DModel`s whose `attn1` attends over the image, in the order in which they run.

    With `only_cross_attention`, `attn1` attends to the text.
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if type(module).__name__ == "Transformer2DModel"
        and not any(
            getattr(block, "only_cross_attention", False) for block in getattr(module, "transformer_blocks", ())
        )
    ]
    return sorted(found, key=lambda part: part[0].startswith("up_blocks"))


def _level(model: Any, module: str, height: int, width: int) -> tuple[int, int]:
    """Return the grid of the level that a module of a UNet is in; each level halves the sides, rounding up."""
    blocks = len(model.config.block_out_channels)
    part, _, rest = module.partition(".")
    number = int(rest.partition(".")[0]) if part in ("down_blocks", "up_blocks") else 0
    level = {"down_blocks": number, "up_blocks": blocks - 1 - number, "mid_block": blocks - 1}.get(part, 0)
    for _ in range(level):
        height, width = -(-height // 2), -(-width // 2)
    return height, width


UNETS = (
    Host(
        models=("UNet2DConditionModel", "ControlNetModel"),
        layers=("transformer_blocks.*.attn1",),
        parts=_spatial_transformers,
        probe=_grid,
        timestep=Timestep("timestep", noise=1000),
        finest="sample",
        size=_level,
    ),
)
