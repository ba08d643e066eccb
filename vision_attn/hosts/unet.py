"""UNets and their ControlNets: each block that attends sees the grid of its level in the shape of its input."""

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from vision_attn.grid import Grid
from vision_attn.hosts.host import Host, Timestep, grid_of_patches, is_a


def _grid(module: nn.Module, inputs: Mapping[str, Any]) -> Grid | str:
    return grid_of_patches(inputs["hidden_states"])


def _spatial_transformers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the `Transformer2DModel`s whose `attn1` attends over the image, in the order in which they run.

    With `only_cross_attention`, `attn1` attends to the text.
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if is_a(module, "Transformer2DModel", "DreamLiteTransformer2DModel")
        and not any(
            getattr(block, "only_cross_attention", False) for block in getattr(module, "transformer_blocks", ())
        )
    ]
    return sorted(found, key=lambda part: part[0].startswith("up_blocks"))


def _attention_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the blocks of an unconditional UNet; those that attend do so at the resolution of their input."""
    return [
        (name, block) for name, block in model.named_modules() if re.fullmatch(r"(down|up)_blocks\.\d+|mid_block", name)
    ]


def _uneven(model: Any, height: float, width: float) -> str | None:
    """Say why a size does not come back from the lowest level as it went down: upsampling doubles the sides."""
    side = 2 ** (len(model.config.block_out_channels) - 1)
    return None if height % side == width % side == 0 else f"its sides must be multiples of {side}"


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
        models=("UNet2DConditionModel", "ControlNetModel", "ControlNetUnionModel"),
        layers=("transformer_blocks.*.attn1",),
        parts=_spatial_transformers,
        probe=_grid,
        timestep=Timestep("timestep", noise=1000),
        finest="sample",
        size=_level,
    ),
    Host(
        models=("UNet2DModel",),
        layers=("attentions.[0-9]", "attentions.[0-9][0-9]"),
        parts=_attention_blocks,
        probe=_grid,
        timestep=Timestep("timestep", noise=1000),
        finest="sample",
        size=_level,
        refuses=_uneven,
    ),
)
