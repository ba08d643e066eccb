"""Which masks of `scaled_dot_product_attention` a processor can honour: key padding over tokens outside the grid."""

import torch
from torch import Tensor

from vision_attn.conversion.grids import Seen
from vision_attn.conversion.state import LayerState
from vision_attn.grid import Grid


def key_padding(attn_mask: Tensor, grid: Grid, state: LayerState) -> Tensor | None:
    """Turn a mask of `scaled_dot_product_attention` into one over prefix and suffix keys.

    Args:
        attn_mask: Bool (True is seen) or additive (0 is seen, -1000 or less is hidden), broadcasts to `[B, H, N, N]`.
        grid: Where the image tokens lie.
        state: The layer, for its name and for the mask that it checked last.

    Returns:
        Bool `[B or 1, prefix + suffix]`, or None if every key is seen.

    Raises:
        ValueError: If the mask depends on query or head, hides grid tokens, or biases the logits.
    """
    if attn_mask.dim() != 4 or attn_mask.shape[-2] != 1 or attn_mask.shape[-1] != grid.tokens:
        raise ValueError(
            f"{state.name}: cannot honour an attention mask of shape {tuple(attn_mask.shape)}: a mask must be key "
            f"padding [B, 1, 1, {grid.tokens}] over tokens outside the grid. Leave out the mask, or the layer (where=)"
        )
    if torch.compiler.is_compiling():
        seen, problem = _read(attn_mask, grid)
        torch._assert_async(~problem.any(), f"{state.name}: the attention mask is not key padding outside the grid")
        return seen if grid.prefix + grid.suffix else None
    if state.padding is not None:
        last, known, result = state.padding
        if last.is_of(attn_mask) and known == grid:
            return result
    seen, problem = _read(attn_mask, grid)
    by_head, hides_grid, biases, hides = torch.cat([problem, ~seen.all()[None]]).tolist()
    for found, what in ((by_head, "differs by head"), (hides_grid, "hides grid tokens"), (biases, "biases the logits")):
        if found:
            raise ValueError(
                f"{state.name}: cannot honour an attention mask that {what}: a mask must be key padding over tokens "
                "outside the grid. Leave out the mask, or the layer (where=)"
            )
    result = seen if hides else None
    state.padding = (Seen(attn_mask), grid, result)
    return result


_HIDDEN = -1e3  # an additive mask hides a key with this or less


def _read(attn_mask: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return the mask `[B, prefix + suffix]` and three flags: differs by head, hides the grid, biases the logits."""
    keys = attn_mask[:, 0, 0]
    seen = keys if keys.dtype == torch.bool else keys > _HIDDEN
    biases = torch.zeros_like(seen) if keys.dtype == torch.bool else seen & (keys != 0)
    flags = [(attn_mask != attn_mask[:, :1]).any(), ~seen[:, grid.image].all(), biases.any()]
    return torch.cat([seen[:, : grid.prefix], seen[:, grid.image.stop :]], 1), torch.stack(flags)
