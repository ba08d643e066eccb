"""Dense attention over `[B, N, H, D]` tensors, and the tokens outside a grid, which attend to everything."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_attn.grid import Grid


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Attend from each query to every key.

        o = softmax(scale * q k^T + mask) v

    Args:
        q: Queries `[B, N, H, D]`.
        k: Keys `[B, M, H, D]`.
        v: Values `[B, M, H, D]`.
        mask: Broadcasts to `[B, H, N, M]`. Bool: False hides a key. Else a bias, in the dtype of `q`.
        scale: Factor of the logits, `D ** -0.5` if None.

    Returns:
        `[B, N, H, D]`.
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


def full_mask(mask: Tensor | None, grid: Grid, extra: int = 0) -> Tensor | None:
    """Widen a mask of the keys outside the grid to the whole sequence, for `dense_attention`.

    Args:
        mask: Bool `[B, prefix + suffix]` or None.
        grid: Where the image tokens lie.
        extra: Number of keys after the sequence; all are seen.

    Returns:
        Bool `[B, 1, 1, N + extra]`, or None for None.
    """
    if mask is None:
        return None
    whole = around(mask, mask.new_ones(len(mask), grid.image_tokens), grid)
    return torch.cat([whole, mask.new_ones(len(mask), extra)], 1)[:, None, None]


def outside(t: Tensor, grid: Grid) -> Tensor:
    """Return the tokens outside the grid, prefix then suffix: `[B, N, ...]` to `[B, prefix + suffix, ...]`."""
    return torch.cat([t[:, : grid.prefix], t[:, grid.image.stop :]], 1)


def around(rest: Tensor, image: Tensor, grid: Grid) -> Tensor:
    """Put the tokens outside the grid before and after those of an image: undoes `outside`."""
    return torch.cat([rest[:, : grid.prefix], image, rest[:, grid.prefix :]], 1)


def with_dense_rows(
    o: Tensor, q: Tensor, k: Tensor, v: Tensor, grid: Grid, *, mask: Tensor | None, scale: float | None
) -> Tensor:
    """Complete the grid's output by the tokens outside the grid, each of which attends to every token.

    Args:
        o: Output of the grid's tokens `[B, height * width, H, D]`.
        q: Queries of all tokens `[B, N, H, D]`.
        k: Keys of all tokens, like `q`.
        v: Values of all tokens, like `q`.
        grid: Where the image tokens lie.
        mask: Bool `[B, prefix + suffix]`, False for padding keys, or None.
        scale: Factor of the logits, `D ** -0.5` if None.

    Returns:
        `[B, N, H, D]`.
    """
    if not grid.prefix + grid.suffix:
        return o
    return around(dense_attention(outside(q, grid), k, v, mask=full_mask(mask, grid), scale=scale), o, grid)
