"""Resizes position embeddings and biases to maps of another size, in each forward or when a checkpoint is loaded."""

from collections.abc import Mapping
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def resized_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int], mode: str = "bilinear") -> Tensor:
    """Resize position embeddings.

    Args:
        positions: Embeddings `[1, N, C]` of a map, row by row.
        old: Height and width of that map.
        new: Height and width of the new map.
        mode: 'bilinear' or 'bicubic'.

    Returns:
        `[1, height, width, C]`.
    """
    image = positions.unflatten(1, [old[0], old[1]])
    if old[0] == new[0] and old[1] == new[1]:
        return image
    size = [new[0], new[1]]
    return F.interpolate(image.permute(0, 3, 1, 2), size, mode=mode, align_corners=False).permute(0, 2, 3, 1)


def position_names(model: nn.Module) -> set[str]:
    """Return the names of position embeddings, position biases and class tokens, which have no weight decay."""
    kinds = ("an", "na", "ah", "aw", "ha", "wa", "ac", "ca")
    ends = (*(f".{kind}_bias" for kind in kinds), ".relative_position_bias_table", ".pos_embed", ".cls_token")
    return {name for name, _ in model.named_parameters() if name.endswith(ends)}


def resize_for(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Resize a checkpoint's position embeddings and biases to the sizes of a model.

    Rows and columns of agents are resized linearly, tables of relative positions and position embeddings bicubically,
    as the authors do for fine-tuning. The rows and columns of agents tell the shapes of the checkpoint's maps; without
    agents the maps are taken to be square.

    Args:
        state_dict: Tensors under the model's names.
        model: The model that is to hold them; a module with a `pos_embed` has the `size` of its map.

    Returns:
        All tensors; those that cannot be resized are unchanged.
    """
    own, maps = dict(model.named_parameters()), _maps_of(state_dict)
    resized = {}
    for name, tensor in state_dict.items():
        t, want = tensor, own.get(name)
        if want is not None and tensor.dim() == want.dim():
            owner, _, kind = name.rpartition(".")
            if kind == "pos_embed":
                t = _resize_embedding(tensor, want, model.get_submodule(owner).size, maps)  # type: ignore[arg-type]
            elif kind == "relative_position_bias_table":
                t = _resize_table(tensor, want, model.get_submodule(owner).window_size)  # type: ignore[arg-type]
            elif tensor.shape != want.shape:
                t = _resize_line(kind, tensor, want.shape)
        resized[name] = t.to(tensor.dtype)
    return resized


def _maps_of(state_dict: Mapping[str, Tensor]) -> set[tuple[int, int]]:
    """Return height and width of each map for which a checkpoint's agents have rows and columns."""
    rows = {name: t for name, t in state_dict.items() if name.endswith(".ha_bias") and t.dim() == 5}
    columns = {name: state_dict.get(f"{name.removesuffix('ha_bias')}wa_bias") for name in rows}
    return {(t.shape[2], w.shape[3]) for name, t in rows.items() if (w := columns[name]) is not None and w.dim() == 5}


def _resize_line(kind: str, tensor: Tensor, want: torch.Size) -> Tensor:
    """Resize the rows or the columns of agents: `[1, H, A, height, 1]`, or `[1, H, height, 1, A]` of queries."""
    if kind in ("ah_bias", "aw_bias") and tensor.shape[:3] == want[:3]:
        return F.interpolate(tensor[0].float(), tuple(want[3:]), mode="bilinear")[None]
    if kind in ("ha_bias", "wa_bias") and (tensor.shape[1], tensor.shape[4]) == (want[1], want[4]):
        rows = tensor[0].float().permute(0, 3, 1, 2)
        return F.interpolate(rows, tuple(want[2:4]), mode="bilinear").permute(0, 2, 3, 1)[None]
    return tensor


def _resize_table(tensor: Tensor, want: Tensor, window: tuple[int, int]) -> Tensor:
    """Resize relative positions `[N, H]` of a square window to those of `window`."""
    side = isqrt(len(tensor))
    if tensor.shape == want.shape or side**2 != len(tensor) or tensor.shape[1] != want.shape[1]:
        return tensor
    new = (2 * window[0] - 1, 2 * window[1] - 1)
    return resized_positions(tensor[None].float(), (side, side), new, "bicubic")[0].flatten(0, 1)


def _resize_embedding(tensor: Tensor, want: Tensor, size: tuple[int, int], maps: set[tuple[int, int]]) -> Tensor:
    """Resize `[1, N, C]` to a map of `size`. The first tokens, which belong to no cell, are class tokens and stay.

    The number of tokens does not tell the shape of a map: both 7 x 28 and 14 x 14 cells are 196 tokens.
    """
    prefix = want.shape[1] - size[0] * size[1]
    tokens = tensor.shape[1] - prefix
    side = isqrt(max(tokens, 0))
    old = next((one for one in maps if one[0] * one[1] == tokens), (side, side))
    if old == size or tokens < 1 or old[0] * old[1] != tokens or tensor.shape[2] != want.shape[2]:
        return tensor
    image = resized_positions(tensor[:, prefix:].float(), old, size, "bicubic")
    return torch.cat([tensor[:, :prefix].float(), image.flatten(1, 2)], 1)
