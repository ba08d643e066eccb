"""Diffusion transformers: where each keeps its image tokens, and how its forward tells their grid."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vision_attn.grid import Grid
from vision_attn.hosts.host import Host, Timestep, grid_of_patches, not_whole, patch_grid


def _patches(module: nn.Module, inputs: Mapping[str, Any]) -> Grid | str:
    return grid_of_patches(inputs["hidden_states"], module.config.patch_size)  # type: ignore[union-attr, arg-type]


def _square_patches(module: nn.Module, inputs: Mapping[str, Any]) -> Grid | str:
    found = _patches(module, inputs)
    if isinstance(found, Grid) and found.height != found.width:
        return f"DiT joins its patches to a square, and {found} is not square"
    return found


def _flux(module: nn.Module, inputs: Mapping[str, Any]) -> Grid | str:
    """Read position ids: the first segment is the image, the others are reference images after it."""
    if inputs.get("kv_cache_mode") is not None:
        return "with a key-value cache the reference images come first"
    ids = inputs.get("img_ids")
    return "img_ids is missing" if ids is None else grid_of_ids(ids)


def grid_of_ids(ids: Tensor) -> Grid | str:
    """Return the grid of the first segment, with all other segments as its suffix; or why there is no grid.

    FLUX is the one host whose grid is in the values of a tensor. The ids have the prompt's dtype, and bfloat16 cannot
    tell 256 from 257, so the grid is read from where rows change, never from the largest id.

    Args:
        ids: `[N, 3 or 4]` or `[B, N, 3 or 4]`: segment, row and column of each image token.
    """
    positions = (ids[0] if ids.dim() == 3 else ids)[:, :3].cpu().double()
    segments, rows, columns = positions.unbind(1)
    tokens = _first(segments != segments[0], len(segments))
    rows, columns = rows[:tokens], columns[:tokens]
    width = _first(rows != rows[0], tokens)
    height = tokens // width
    if height * width == tokens and (tokens > 1 or len(segments) == 1):
        rows, columns = rows.view(height, width), columns.view(height, width)
        in_rows = bool((rows == rows[:, :1]).all() and (columns == columns[:1]).all())
        if in_rows and bool((columns[0].diff() >= 0).all() and (rows[:, 0].diff() >= 0).all()):
            return Grid(height, width, suffix=len(segments) - tokens)
    return f"the values of img_ids {tuple(ids.shape)} are not those of a grid"


def _first(true: Tensor, otherwise: int) -> int:
    """Return the index of the first True."""
    found = torch.nonzero(true)
    return int(found[0]) if len(found) else otherwise


def _qwen(module: nn.Module, inputs: Mapping[str, Any]) -> Grid | str:
    """Read `img_shapes`: (frames, height, width) in tokens of the image and of the reference images after it."""
    shapes = inputs["img_shapes"]
    if not shapes:
        return "img_shapes is missing"
    shapes = shapes[0] if isinstance(shapes[0], list) else shapes[:1]
    frames, height, width = shapes[0]
    if frames != 1:
        return f"img_shapes holds {frames} layers, not one image"
    return Grid(height, width, suffix=sum(t * h * w for t, h, w in shapes[1:]))


def _z_image(module: nn.Module, inputs: Mapping[str, Any]) -> Grid | str:
    """Read a list of images `[C, frames, height, width]`; padding and text come after the image tokens."""
    images, patch, frames = inputs["x"], inputs.get("patch_size", 2), inputs.get("f_patch_size", 1)
    if isinstance(images[0], (list, tuple)):
        return "several images in one sample"
    shapes = {tuple(map(int, image.shape[-3:])) for image in images}
    if len(shapes) != 1:
        return f"images of different sizes in one batch: {sorted(shapes)}"
    t, height, width = shapes.pop()
    return Grid(height // patch, width // patch) if t == frames else f"{t} frames, not one image"


_BLOCKS = ("transformer_blocks.*.attn",)


def _packed(model: nn.Module, layer: str, height: int, width: int) -> tuple[int, int]:
    """Return the grid of packed latents: the pipeline packs 2 x 2 of them into one token."""
    return height // 2, width // 2


def _rounds(model: nn.Module, height: float, width: float) -> None:
    """Take every size: the pipeline rounds it."""
    return None


def _no_square(model: Any, height: float, width: float) -> str | None:
    rows, columns = patch_grid(model, "", int(height), int(width))
    return not_whole(model, height, width) or (None if rows == columns else "DiT joins its patches to a square")


def _whole_patches(model: Any, height: float, width: float) -> str | None:
    patch = model.config.patch_size
    return None if height % patch == width % patch == 0 else f"its sides must be multiples of {patch} latents"


def _too_large(model: Any, height: float, width: float) -> str | None:
    """Compare the patches of a side with the table of positions: its sides (SD3), or its tokens (AuraFlow)."""
    most, patch = model.config.pos_embed_max_size, model.config.patch_size
    if "Aura" in type(model).__name__:
        most = math.isqrt(most)
        if why := _whole_patches(model, height, width):
            return why
    large = max(height, width) // patch > most
    return not_whole(model, height, width) or (f"its positions end at {most} patches a side" if large else None)


def _beyond_axes(model: Any, height: float, width: float) -> str | None:
    _, rows, columns = model.config.axes_lens
    patch = model.config.patch_size
    large = height // patch > rows or width // patch > columns
    return _whole_patches(model, height, width) or (f"its positions end at {rows} x {columns}" if large else None)


_THOUSAND, _ONE = Timestep("timestep", noise=1000), Timestep("timestep", noise=1)
_FLUX_BLOCKS = (*_BLOCKS, "single_transformer_blocks.*.attn")

DITS = (
    Host(
        models=("DiTTransformer2DModel",),
        layers=("transformer_blocks.*.attn1",),
        probe=_square_patches,
        refuses=_no_square,
        timestep=_THOUSAND,
    ),
    Host(
        models=("PixArtTransformer2DModel",),
        layers=("transformer_blocks.*.attn1",),
        probe=_patches,
        timestep=_THOUSAND,
    ),
    Host(models=("HunyuanDiT2DModel",), layers=("blocks.*.attn1",), probe=_patches, timestep=_THOUSAND),
    Host(
        models=("SD3Transformer2DModel",),
        layers=(*_BLOCKS, "transformer_blocks.*.attn2"),
        probe=_patches,
        others="suffix",
        timestep=_THOUSAND,
        text=333,
        refuses=_too_large,
    ),
    Host(
        models=("AuraFlowTransformer2DModel",),
        layers=("joint_transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
        probe=_patches,
        others="prefix",
        timestep=_ONE,
        text=264,
        refuses=_too_large,
    ),
    Host(
        models=("CogView4Transformer2DModel",),
        layers=("transformer_blocks.*.attn1",),
        probe=_patches,
        others="prefix",
        mask_means_dense=True,  # its mask reaches the logits as an additive 0 / 1
        timestep=_THOUSAND,
        text=224,
        refuses=_whole_patches,
    ),
    Host(
        models=("Lumina2Transformer2DModel",),
        layers=("layers.*.attn", "noise_refiner.*.attn"),
        probe=_patches,
        others="prefix",
        mask_means_dense=True,  # texts of different lengths: the image starts elsewhere in each sample
        timestep=Timestep("timestep", noise=0, image=1),
        text=256,
        refuses=_beyond_axes,
    ),
    Host(
        models=("FluxTransformer2DModel", "FluxControlNetModel"),
        layers=_FLUX_BLOCKS,
        probe=_flux,
        others="prefix",
        reads="img_ids",
        timestep=_ONE,
        size=_packed,
        refuses=_rounds,
        text=512,
    ),
    Host(
        models=("Flux2Transformer2DModel",),
        layers=_FLUX_BLOCKS,
        probe=_flux,
        others="prefix",
        reads="img_ids",
        timestep=_ONE,
        size=_packed,
        refuses=_rounds,
        text=512,
    ),
    Host(
        models=("QwenImageTransformer2DModel",),
        layers=_BLOCKS,
        probe=_qwen,
        others="prefix",
        timestep=_ONE,
        size=_packed,
        refuses=_rounds,
        text=256,
    ),
    Host(
        models=("ZImageTransformer2DModel",),
        layers=("layers.*.attention", "noise_refiner.*.attention"),
        probe=_z_image,
        others="suffix",
        timestep=Timestep("t", noise=0, image=1),
        size=_packed,
        refuses=_rounds,
        text=128,
    ),
)
