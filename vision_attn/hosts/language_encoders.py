"""timm's vision encoders of language models, also in their classifiers: patches row by row, and no other tokens."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from vision_attn.grid import Grid
from vision_attn.hosts.host import Found, Host
from vision_attn.hosts.vit import grids_of_coordinates, patch_embed_grid, patch_embed_refuses, patch_embed_size

_BLOCKS = ("blocks.*.attn",)


def _encoder(model: nn.Module) -> nn.Module:
    return model.get_submodule("encoder") if "encoder" in model._modules else model


def _encoders(model: nn.Module) -> list[tuple[str, nn.Module]]:
    encoder = _encoder(model)
    return [("" if encoder is model else "encoder", encoder)]


def _patch_embed(encoder: nn.Module) -> nn.Module:
    return encoder.get_submodule("patch_embed")


def _size(model: nn.Module, layer: str, height: int, width: int) -> tuple[int, int]:
    return patch_embed_size(_encoder(model), layer, height, width)


def _refuses(model: nn.Module, height: float, width: float) -> str | None:
    return patch_embed_refuses(_encoder(model), height, width)


def _gemma_grid(module: Any, inputs: Mapping[str, Any]) -> Found:
    """Return the grid of images, or read those of samples that come as patches with coordinates."""
    given = inputs["x"]
    about: Mapping[str, Any] = given if isinstance(given, dict) else {"patches": given}
    image = about["patches"]
    coordinates, valid = (about.get(name, inputs.get(name)) for name in ("patch_coord", "patch_valid"))
    if coordinates is None:
        return _patches(module, *image.shape[-2:]) if image.dim() == 4 else "patches without their coordinates"
    return grids_of_coordinates(coordinates, (coordinates != -1).any(-1) if valid is None else valid)


def _patches(embed: Any, height: int, width: int) -> Grid:
    return Grid(height // embed.patch_size[0], width // embed.patch_size[1])


def _gemma_size(model: nn.Module, layer: str, height: int, width: int) -> tuple[int, int]:
    grid = _patches(_patch_embed(_encoder(model)), height, width)
    return grid.height, grid.width


def _gemma_refuses(model: nn.Module, height: float, width: float) -> str | None:
    patch: Any = _patch_embed(_encoder(model)).patch_size
    if height % patch[0] or width % patch[1]:
        return f"pixels that make no whole patches of {patch[0]} x {patch[1]}"
    return None


LANGUAGE_ENCODERS = (
    Host(
        models=("Qwen3VitEncoder", "Qwen3VitClassifier", "DeepseekVitEncoder", "DeepseekVitClassifier"),
        layers=_BLOCKS,
        parts=_encoders,
        watched=_patch_embed,
        probe=patch_embed_grid,
        size=_size,
        refuses=_refuses,
    ),
    Host(
        models=("Gemma4VitEncoder", "Gemma4VitClassifier"),
        layers=_BLOCKS,
        parts=_encoders,
        watched=_patch_embed,
        probe=_gemma_grid,
        others="suffix",  # padding
        reads="patch_coord",
        size=_gemma_size,
        refuses=_gemma_refuses,
    ),
)
