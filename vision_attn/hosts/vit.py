"""timm's vision transformers: class and register tokens first, then the patches in row-major order."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vision_attn.grid import Grid
from vision_attn.hosts.host import Host


def _patch_embed(model: nn.Module) -> nn.Module:
    """Return the patch embedding, which sees the image however the model is called (also by `forward_features`)."""
    return model.patch_embed  # type: ignore[return-value]


def _grid(module: nn.Module, inputs: Mapping[str, Any]) -> Grid | str:
    return Grid(*module.dynamic_feat_size(inputs["x"].shape[-2:]))  # type: ignore[operator]


def _problem(model: nn.Module) -> str | None:
    for name, module in model.named_modules():
        if type(module).__name__ == "DiffAttention":
            return f"{name} is a DiffAttention, whose two attention maps no processor can replace"
    if getattr(getattr(model, "patch_drop", None), "prob", 0):
        return "patch_drop leaves out tokens of the grid in training: set model.patch_drop = torch.nn.Identity() first"
    return None


def _size(model: Any, layer: str, height: int, width: int) -> tuple[int, int]:
    found: tuple[int, int] = model.patch_embed.dynamic_feat_size((height, width))  # an incomplete patch may be padded
    return found


def _refuses(model: Any, height: float, width: float) -> str | None:
    """Ask the patch embedding, which refuses sizes by an assertion."""
    embed = copy.deepcopy(model.patch_embed).to("meta")
    first = next(module for module in embed.modules() if isinstance(module, nn.Conv2d))
    image = torch.empty(1, first.in_channels, int(height), int(width), device="meta", dtype=first.weight.dtype)
    try:
        embed(image)
    except AssertionError as error:
        return str(error)
    return None


VITS = (
    Host(
        models=("VisionTransformer", "Eva"),
        layers=("blocks.*.attn", "blocks.*.attns.*.attn"),
        watched=_patch_embed,
        probe=_grid,
        others="prefix",
        size=_size,
        refuses=_refuses,
        problem=_problem,
    ),
)
