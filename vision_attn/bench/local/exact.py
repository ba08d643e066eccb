"""The definition of local attention for a few rows, in any precision: what candidates are checked against.

It is written from coordinates alone and shares no code with the operator.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vision_attn.grid import Grid
from vision_attn.kernels.local.window import Window


def seen(grid: Grid, window: Window | None, queries: Tensor, keys: Tensor) -> Tensor:
    """Return which keys each query sees.

    Args:
        grid: Where the image tokens lie in the sequence.
        window: Disc or square, or None for dense attention.
        queries: Places in the sequence, `[Q]`.
        keys: Places in the sequence, `[K]`.

    Returns:
        Bool `[Q, K]`; tokens outside the grid see everything and are seen by everything.
    """
    outside = _outside(grid, queries)[:, None] | _outside(grid, keys)[None]
    if window is None:
        return torch.ones_like(outside)
    i, j = queries[:, None] - grid.prefix, keys[None] - grid.prefix
    rows = i.div(grid.width, rounding_mode="floor"), j.div(grid.width, rounding_mode="floor")
    columns = i % grid.width, j % grid.width
    if window.radius is not None:
        near = (rows[0] - rows[1]) ** 2 + (columns[0] - columns[1]) ** 2 < window.radius**2
    else:
        near = _axis(*rows, grid.height, window.kernel[0], window.steps[0])
        near &= _axis(*columns, grid.width, window.kernel[1], window.steps[1])
    return outside | near


def _outside(grid: Grid, places: Tensor) -> Tensor:
    return (places < grid.image.start) | (places >= grid.image.stop)


def _axis(i: Tensor, j: Tensor, length: int, K: int, d: int) -> Tensor:
    group = i % d
    members = (length - group + d - 1).div(d, rounding_mode="floor")
    start = (i.div(d, rounding_mode="floor") - K // 2).clamp(min=0).minimum(members - K)
    place = j.div(d, rounding_mode="floor")
    return (j % d == group) & (place >= start) & (place < start + K)


def attend(q: Tensor, k: Tensor, v: Tensor, sees: Tensor) -> Tensor:
    """Return softmax attention `[B, Q, H, D]` of `q [B, Q, H, D]` over `k, v [B, N, H, D]` where `sees [Q, N]`."""
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhqk,bkhd->bqhd", logits.masked_fill(~sees, -torch.inf).softmax(-1), v)


def attend_rows(
    tensors: Sequence[Tensor], cotangent: Tensor | None, sees: Tensor, rows: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """Compute output rows by the definition, head by head, and the gradients that flow through just these rows.

    Args:
        tensors: q, k, v, `[B, N, H, D]`.
        cotangent: Of the output, like q; None for no gradients.
        sees: Bool `[Q, N]`.
        rows: Places of the queries, `[Q]`.
        dtype: Of the computation.

    Returns:
        o of the rows, then with a cotangent: the gradient of q at the rows, and of k and v, whole. Exact for a row of q
        always, for a key only if all its queries are among the rows.
    """
    parts = []
    for h in range(tensors[0].shape[2]):
        q, k, v = (t[:, :, h : h + 1].to(dtype) for t in tensors)
        leaves = [t.detach().requires_grad_(cotangent is not None) for t in (q[:, rows], k, v)]
        o = attend(leaves[0], leaves[1], leaves[2], sees)
        grads: Sequence[Tensor] = ()
        if cotangent is not None:
            grads = torch.autograd.grad(o, leaves, cotangent[:, rows, h : h + 1].to(dtype))
        parts.append([o.detach(), *grads])
    return [torch.cat(part, 2) for part in zip(*parts, strict=True)]
