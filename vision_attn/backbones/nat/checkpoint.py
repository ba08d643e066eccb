"""Reads the checkpoints of the NAT families in the authors' four layouts and in that of transformers."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vision_attn.backbones.checkpoints import Rule, refuse_mismatch, rename, unwrap


def _next_stage(match: re.Match[str]) -> str:
    """Rename a downsampling: the authors have it at the end of a level, timm at the start of the next stage."""
    return f"stages.{int(match[1]) + 1}.downsample."


OFFICIAL: tuple[Rule, ...] = (
    (r"^(?:levels|layers)\.(\d+)\.downsample\.", _next_stage),
    (r"^(?:levels|layers)\.", "stages."),
    (r"\.gamma([12])$", r".ls\1.gamma"),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)
TRANSFORMERS: tuple[Rule, ...] = (
    (r"^(?:nat|dinat)\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^encoder\.levels\.(\d+)\.downsample\.", _next_stage),
    (r"^encoder\.levels\.(\d+)\.layers\.", r"stages.\1.blocks."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.self\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head.fc."),
)


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Turn a checkpoint of any layout into one in the model's layout.

    Args:
        checkpoint: Tensors by name as the authors (also in detectors), transformers or this package save them, or a
            wrapper around them.
        model: The model that loads them.

    Returns:
        The tensors under the model's names.

    Raises:
        ValueError: If the checkpoint is of another variant; the error names the first few differences.
    """
    state_dict = _of_detector(unwrap(checkpoint), model)
    if any(".layernorm_before." in name for name in state_dict):
        state_dict = _joined(rename(state_dict, TRANSFORMERS))
    else:
        state_dict = rename(state_dict, OFFICIAL)
    state_dict = {name: t for name, t in state_dict.items() if not name.endswith(".relative_position_index")}
    refuse_mismatch(state_dict, model)
    return state_dict


def _of_detector(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return the backbone of a detector or of a segmentation model; other checkpoints are returned as they are.

    It has a norm for each stage, `norm0` to `norm3`, where a classifier has one after the last stage, and no head: the
    model keeps its own.
    """
    inside = {name.removeprefix("backbone."): t for name, t in state_dict.items() if name.startswith("backbone.")}
    norms = sorted({int(found[1]) for name in inside if (found := re.match(r"norm(\d+)\.", name))})
    if not norms:
        return inside or state_dict
    kept = {name: t for name, t in inside.items() if not re.match(r"norm\d+\.", name)}
    for kind in ("weight", "bias"):
        kept[f"norm.{kind}"] = inside[f"norm{norms[-1]}.{kind}"]
    return kept | {name: t for name, t in model.state_dict().items() if name.startswith("head.")}


def _joined(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join the tensors of query, key and value, and split the pair of layer scales."""
    joined = {}
    for name, tensor in state_dict.items():
        if ".attn.query." in name:
            parts = [tensor, *(state_dict.get(name.replace("query", part), tensor[:0]) for part in ("key", "value"))]
            joined[name.replace("query", "qkv")] = torch.cat(parts)
        elif name.endswith(".layer_scale_parameters"):
            for i, gamma in enumerate(tensor, start=1):
                joined[name.replace("layer_scale_parameters", f"ls{i}.gamma")] = gamma
        elif ".attn.key." not in name and ".attn.value." not in name:
            joined[name] = tensor
    return joined
