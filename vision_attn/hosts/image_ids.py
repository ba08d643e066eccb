"""Transformers whose grid is in the values of position ids: FLUX, and models that were made from it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vision_attn.grid import Grid
from vision_attn.hosts.host import Host, Timestep, any_size, packed_size


def _img_ids(module: nn.Module, inputs: Mapping[str, Any]) -> Grid | str:
    """Read position ids: the first segment is the image, the others are reference images after it."""
    if inputs.get("kv_cache_mode") is not None:
        return "with a key-value cache the reference images come first"
    ids = inputs.get("img_ids")
    return "img_ids is missing" if ids is None else grid_of_ids(ids)


def _position_ids(module: nn.Module, inputs: Mapping[str, Any]) -> Grid | str:
    """Read the position ids of the last tokens, which are the image's; the text comes first."""
    return grid_of_ids(inputs["position_ids"][-inputs["hidden_states"].shape[1] :])


def grid_of_ids(ids: Tensor) -> Grid | str:
    """Return the grid of the first segment, with all other segments as its suffix; or why there is no grid.

    The ids may have the prompt's dtype, and bfloat16 cannot tell 256 from 257, so the grid is read from where rows
    change, never from the largest id.

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


def _unpacked(model: nn.Module, layer: str, height: int, width: int) -> tuple[int, int]:
    """Return the grid of latents that are a token each."""
    return height, width


_BLOCKS = ("transformer_blocks.*.attn", "single_transformer_blocks.*.attn")
_THOUSAND, _ONE = Timestep("timestep", noise=1000), Timestep("timestep", noise=1)


def _of_flux(*models: str, **facts: Any) -> Host:
    """Return the host of a model that is built like FLUX: text first, packed latents, `img_ids`."""
    alike = dict(layers=_BLOCKS, probe=_img_ids, others="prefix", reads="img_ids")
    alike |= dict(timestep=_ONE, size=packed_size, refuses=any_size, text=512)
    return Host(models=models, **alike | facts)  # type: ignore[arg-type]


ID_HOSTS = (
    _of_flux("FluxTransformer2DModel", "FluxControlNetModel"),
    _of_flux("Flux2Transformer2DModel"),
    _of_flux(
        "Flux3Transformer2DModel",
        layers=("mode_blocks.image.*.attn", "single_transformer_blocks.*.attn"),
        after=("image_cond_ids",),
    ),
    _of_flux("ChromaTransformer2DModel", mask_means_dense="added"),  # its pipeline gives 0 / 1, which are added
    _of_flux("BriaTransformer2DModel", timestep=_THOUSAND, text=128),
    _of_flux("BriaFiboTransformer2DModel", timestep=_THOUSAND, size=_unpacked),
    _of_flux("LongCatImageTransformer2DModel"),
    _of_flux("OvisImageTransformer2DModel", text=256),
    _of_flux(
        "Krea2Transformer2DModel",
        layers=("transformer_blocks.*.attn",),
        probe=_position_ids,
        reads="position_ids",
        counted="hidden_states",
    ),
)
