"""UNets and their ControlNets: each block that attends sees the grid of its level in the shape of its input.

A UViT (aMUSEd) draws codes, and attends over one grid in its middle.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from vision_attn.grid import Grid
from vision_attn.hosts.host import Host, Timestep, grid_of_patches, is_a, not_whole


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


def _image(module: nn.Module, inputs: Mapping[str, Any]) -> Grid | str:
    return grid_of_patches(inputs["x"])


def _self_attention_of_kandinsky(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the first attention of each block, which is over the image; the others attend to the text."""
    return [
        (name, block)
        for name, block in model.named_modules()
        if re.fullmatch(r"(down|up)_blocks\.\d+\.attentions\.0", name) and is_a(block, "Kandinsky3AttentionBlock")
    ]


def _self_attention_of_cascade(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [
        (name, block) for name, block in model.named_modules() if is_a(block, "SDCascadeAttnBlock") and block.self_attn
    ]


def _cascade_level(model: Any, module: str, height: int, width: int) -> tuple[int, int]:
    """Return the grid of a block's level: sides are halved between two levels, or where `switch_level` says so."""
    halved = model.config.switch_level or [True] * len(model.config.block_out_channels)
    level = {"down_blocks": _number(module), "up_blocks": len(model.config.block_out_channels) - 1 - _number(module)}
    scale = model.config.patch_size * 2 ** sum(halved[: level.get(module.partition(".")[0], 0)])
    return height // scale, width // scale


def _number(module: str) -> int:
    """Return the number of the block that a module is in, 0 if it is in none."""
    found = re.match(r"(?:down|up)_blocks\.(\d+)", module)
    return int(found[1]) if found else 0


def _cascade_pixels(model: Any, height: float, width: float) -> str:
    return "how many pixels a latent of Stable Cascade has differs by stage"


def _uneven(model: Any, height: float, width: float) -> str | None:
    """Say why a size does not come back from the lowest level as it went down: upsampling doubles the sides."""
    side = 2 ** (len(model.config.block_out_channels) - 1)
    return None if height % side == width % side == 0 else f"its sides must be multiples of {side}"


def _level(model: Any, module: str, height: int, width: int) -> tuple[int, int]:
    """Return the grid of the level that a module of a UNet is in; each level halves the sides, rounding up."""
    blocks, number = len(model.config.block_out_channels), _number(module)
    level = {"down_blocks": number, "up_blocks": blocks - 1 - number, "mid_block": blocks - 1}
    for _ in range(level.get(module.partition(".")[0], 0)):
        height, width = -(-height // 2), -(-width // 2)
    return height, width


def _codes(module: Any, inputs: Mapping[str, Any]) -> Grid | str:
    codes = inputs["input_ids"]
    if codes.dim() != 3:
        return f"input_ids are not those of an image [B, height, width], but {tuple(codes.shape)}"
    return Grid(*_of_codes(module, "", *codes.shape[-2:]))


def _of_codes(model: Any, module: str, height: int, width: int) -> tuple[int, int]:
    """Return the grid of a module of a UViT: all but the first and the last may have half the sides, rounded up."""
    outside = module.startswith(("embed", "mlm_layer"))
    return (-(-height // 2), -(-width // 2)) if model.config.downsample and not outside else (height, width)


def _odd(model: Any, height: float, width: float) -> str | None:
    halves = model.config.downsample and (height % 2 or width % 2)
    return not_whole(model, height, width) or ("its sides must be even" if halves else None)


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
    Host(
        models=("Kandinsky3UNet",),
        layers=("attention",),
        parts=_self_attention_of_kandinsky,
        probe=_image,
        timestep=Timestep("timestep", noise=1000),
        finest="sample",
        size=_level,
        refuses=_uneven,
    ),
    Host(
        models=("StableCascadeUNet",),
        layers=("attention",),
        parts=_self_attention_of_cascade,
        probe=_image,
        others="suffix",
        more_keys="last",  # the text gives keys and asks nothing
        timestep=Timestep("timestep_ratio", noise=1),
        finest="sample",
        size=_cascade_level,
        refuses=_cascade_pixels,
        text=85,
    ),
    Host(
        models=("UVit2DModel",),
        layers=("transformer_layers.*.attn1",),  # those of its blocks attend to the text, also the `attn1`
        probe=_codes,
        size=_of_codes,
        refuses=_odd,
    ),
)
