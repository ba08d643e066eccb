"""timm's vision transformers: class and register tokens first, then the patches in row-major order."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vision_attn.grid import Grid
from vision_attn.hosts.host import Found, Host, is_a, one_or_each


def _patch_embed(model: nn.Module) -> nn.Module:
    """Return the patch embedding, which sees the image however the model is called (also by `forward_features`)."""
    return model.patch_embed  # type: ignore[return-value]


def patch_embed_grid(module: nn.Module, inputs: Mapping[str, Any]) -> Grid | str:
    """Return the grid of a patch embedding, without the tokens before it."""
    return Grid(*module.dynamic_feat_size(inputs["x"].shape[-2:]))  # type: ignore[operator]


def _problem(model: nn.Module) -> str | None:
    for name, module in model.named_modules():
        if is_a(module, "DiffAttention"):
            return f"{name} is a DiffAttention, whose two attention maps no processor can replace"
    if getattr(getattr(model, "patch_drop", None), "prob", 0):
        return "patch_drop leaves out tokens of the grid in training: set model.patch_drop = torch.nn.Identity() first"
    return None


def patch_embed_size(model: Any, layer: str, height: int, width: int) -> tuple[int, int]:
    """Return the grid of an image of this size."""
    found: tuple[int, int] = model.patch_embed.dynamic_feat_size((height, width))  # an incomplete patch may be padded
    return found


def patch_embed_refuses(model: Any, height: float, width: float) -> str | None:
    """Ask the patch embedding, which refuses sizes by an assertion."""
    embed = copy.deepcopy(model.patch_embed).to("meta")
    first = next(module for module in embed.modules() if isinstance(module, nn.Conv2d))
    image = torch.empty(1, first.in_channels, int(height), int(width), device="meta", dtype=first.weight.dtype)
    try:
        embed(image)
    except AssertionError as error:
        return str(error)
    return None


def _embeds(model: nn.Module) -> nn.Module:
    return model.embeds  # type: ignore[return-value]


def _naflex(module: nn.Module, inputs: Mapping[str, Any]) -> Found:
    """Return the grid of images, or read those of samples that come as patches with coordinates, the padding last."""
    coordinates, valid = inputs.get("patch_coord"), inputs.get("patch_valid")
    prefix: Any = module.num_prefix_tokens
    if coordinates is None:
        height, width = module.dynamic_feat_size(inputs["x"].shape[-2:])  # type: ignore[operator]
        return Grid(height, width, prefix)
    return grids_of_coordinates(coordinates, valid, prefix)


def grids_of_coordinates(coordinates: Tensor, valid: Tensor | None, prefix: int = 0) -> Found:
    """Return the grid of each sample, or the one of all; or why the patches are no grids.

    Args:
        coordinates: Row and column of each patch, `[B, N, 2]`.
        valid: Bool `[B, N]`, False for padding; None if there is none.
        prefix: Tokens before the patches.
    """
    whole = torch.ones(coordinates.shape[:2], dtype=torch.bool, device="cpu") if valid is None else valid.bool().cpu()
    grids = []
    for own, real in zip(coordinates.cpu(), whole, strict=True):
        tokens = int(real.sum())
        height, width = (own[real].amax(0) + 1).tolist() if tokens else (0, 0)
        rows = torch.cartesian_prod(torch.arange(height, device="cpu"), torch.arange(width, device="cpu"))
        if not real[:tokens].all() or height * width != tokens or not torch.equal(own[:tokens].long(), rows):
            return "the patches of a sample are not the rows of a grid, followed by padding"
        grids.append(Grid(height, width, prefix))
    return one_or_each(grids)


def _naflex_problem(model: nn.Module) -> str | None:
    if getattr(model, "patch_drop", None) is not None:
        return "patch_drop leaves out tokens of the grid in training: set model.patch_drop = None first"
    return None


def _naflex_size(model: Any, layer: str, height: int, width: int) -> tuple[int, int]:
    found: tuple[int, int] = model.embeds.dynamic_feat_size((height, width))
    return found


def features_grid(module: nn.Module, inputs: Mapping[str, Any]) -> Grid | str:
    """Return the grid of a block that gets its tokens as `[B, height, width, C]`."""
    return Grid(*next(iter(inputs.values())).shape[1:3])


def global_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the blocks of SAM's image encoder that attend over the whole grid; the others attend in windows."""
    return [(name, block) for name, block in model.named_modules() if getattr(block, "window_size", None) == 0]


def _transformers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the blocks of VOLO that attend over the whole grid, between outlook attention and class attention."""
    return [(name, block) for name, block in model.named_modules() if is_a(block, "Transformer")]


def _volo_size(model: Any, layer: str, height: int, width: int) -> tuple[int, int]:
    """Return the grid behind the patch embedding and the downsampling by 2."""
    return height // 16, width // 16


VITS = (
    Host(
        models=("VisionTransformer", "Eva"),
        layers=("blocks.*.attn", "blocks.*.attns.*.attn"),
        watched=_patch_embed,
        probe=patch_embed_grid,
        others="prefix",
        size=patch_embed_size,
        refuses=patch_embed_refuses,
        problem=_problem,
    ),
    Host(
        models=("Beit", "VisionTransformerRelPos"),
        layers=("blocks.*.attn",),
        watched=_patch_embed,
        probe=patch_embed_grid,
        others="prefix",
        biases=True,
        size=patch_embed_size,
        refuses=patch_embed_refuses,
    ),
    Host(
        models=("NaFlexVit",),
        layers=("blocks.*.attn",),
        watched=_embeds,
        probe=_naflex,
        others="suffix",
        reads="patch_coord",
        size=_naflex_size,
        problem=_naflex_problem,
    ),
    Host(
        models=("VisionTransformerSAM",),
        layers=("attn",),
        parts=global_blocks,
        probe=features_grid,
        biases=True,
        axes=(3, 4),
        size=patch_embed_size,
        refuses=patch_embed_refuses,
    ),
    Host(models=("VOLO",), layers=("attn",), parts=_transformers, probe=features_grid, size=_volo_size),
)
