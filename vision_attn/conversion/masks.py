"""Attention masks of hosts: which keys are padding. A mask must say no more than that, unless it is a bias."""

from typing import Any

import torch
from torch import Tensor

from vision_attn.conversion.grids import Seen
from vision_attn.conversion.state import LayerState
from vision_attn.grid import Grid

_HIDDEN = -1e3  # an additive mask hides a key with this or less
_PROBLEMS = ("differs by head", "hides grid tokens", "biases the logits", "differs by query")


def stays_dense(attn_mask: Any, state: LayerState) -> bool:
    """Whether a mask keeps a layer of this host dense."""
    means = state.host.mask_means_dense
    return means is True or (means == "added" and attn_mask.dtype != torch.bool)


def is_bias(attn_mask: Tensor | None) -> bool:
    """Whether a mask is a number for each pair of tokens."""
    return attn_mask is not None and attn_mask.dtype != torch.bool and attn_mask.shape[-2] != 1


def key_padding(attn_mask: Tensor, grid: Grid | tuple[Grid, ...], state: LayerState) -> Any:
    """Turn a mask of `scaled_dot_product_attention` into one over prefix and suffix keys.

    Args:
        attn_mask: Bool (True is seen) or additive (0 is seen, -1000 or less is hidden), broadcasts to `[B, H, N, N]`:
            one row for all queries, or a row for each, where those of padding may differ because nobody sees them.
        grid: Where the image tokens lie, or where in each sample.
        state: The layer, for its name and for the mask that its model checked last.

    Returns:
        Bool `[B or 1, prefix + suffix]`, or None if every key is seen; a list of these, if samples have their grids.

    Raises:
        ValueError: If the mask depends on query or head, hides grid tokens, or biases the logits.
    """
    tokens = (grid if isinstance(grid, Grid) else grid[0]).tokens
    if attn_mask.dim() != 4 or attn_mask.shape[-2] not in (1, tokens) or attn_mask.shape[-1] != tokens:
        raise ValueError(
            f"{state.name}: cannot honour an attention mask of shape {tuple(attn_mask.shape)}: a mask must be key "
            f"padding [B, 1, 1, {tokens}] over tokens outside the grid. Leave out the mask, or the layer (where=)"
        )
    if torch.compiler.is_compiling():
        assert isinstance(grid, Grid)  # grids of samples are in the values of a tensor
        seen, problem = _read(attn_mask, grid)
        torch._assert_async(~problem.any(), f"{state.name}: the attention mask is not key padding outside the grid")
        return seen if grid.prefix + grid.suffix else None
    if (found := state.shared.padding) is not None:
        last, known, result = found
        if last.is_of(attn_mask) and known == grid:
            return result
    if isinstance(grid, Grid):
        result = _padding(attn_mask, grid, state)
    else:
        each = attn_mask.expand(len(grid), -1, -1, -1).split(1)
        result = [_padding(own, place, state) for own, place in zip(each, grid, strict=True)]
    state.shared.padding = (Seen(attn_mask), grid, result)
    return result


def _padding(attn_mask: Tensor, grid: Grid, state: LayerState) -> Tensor | None:
    """Read a mask for one grid; None if every key is seen."""
    seen, problem = _read(attn_mask, grid)
    *problems, hides = torch.cat([problem, ~seen.all()[None]]).tolist()
    for found, what in zip(problems, _PROBLEMS, strict=True):
        if found:
            raise ValueError(
                f"{state.name}: cannot honour an attention mask that {what}: a mask must be key padding over tokens "
                "outside the grid. Leave out the mask, or the layer (where=)"
            )
    return seen if hides else None


def _read(attn_mask: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return the mask `[B, prefix + suffix]`, and a flag for each of `_PROBLEMS`."""
    if attn_mask.stride(1) == 0:
        attn_mask = attn_mask[:, :1]
    if attn_mask.stride(2) == 0:
        attn_mask = attn_mask[:, :, :1]
    keys = attn_mask[:, 0, grid.prefix if attn_mask.shape[-2] != 1 else 0]  # what the grid's first token sees
    seen = keys if keys.dtype == torch.bool else keys > _HIDDEN
    biases = torch.zeros_like(seen) if keys.dtype == torch.bool else seen & (keys != 0)
    flags = [(attn_mask != attn_mask[:, :1]).any(), ~seen[:, grid.image].all(), biases.any()]
    differs = (attn_mask[:, 0] != keys[:, None]).any(-1)  # [B, N] or [B, 1]
    flags.append((differs & seen).any())
    return torch.cat([seen[:, : grid.prefix], seen[:, grid.image.stop :]], 1), torch.stack(flags)
