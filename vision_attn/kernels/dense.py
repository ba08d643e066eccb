"""Dense attention over `[B, N, H, D]` tensors, and the tokens outside a grid, which attend to everything."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_attn.grid import Grid


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, *, seen: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Attend from each query to every key.

        o = softmax(scale * q k^T) v

    Args:
        q: Queries `[B, N, H, D]`.
        k: Keys `[B, M, H, D]`.
        v: Values `[B, M, H, D]`.
        seen: Bool, broadcasts to `[B, H, N, M]`; False hides a key.
        scale: Factor of the logits, `D ** -0.5` if None.

    Returns:
        `[B, N, H, D]`.
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale).transpose(1, 2)


def seen_keys(mask: Tensor | None, grid: Grid, extra: int = 0) -> Tensor | None:
    """Widen a key mask over prefix and suffix to all tokens and `extra` keys more.

    Args:
        mask: Bool `[B, prefix + suffix]` or None.
        grid: Where the image tokens lie.
        extra: Number of keys after the sequence.

    Returns:
        Bool `[B, 1, 1, N + extra]`, or None for None.
    """
    if mask is None:
        return None
    parts = [mask[:, : grid.prefix], mask.new_ones(len(mask), grid.image_tokens), mask[:, grid.prefix :]]
    return torch.cat([*parts, mask.new_ones(len(mask), extra)], 1)[:, None, None]


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
    return around(dense_attention(outside(q, grid), k, v, seen=seen_keys(mask, grid), scale=scale), o, grid)
