"""Portable local attention in plain PyTorch: O(N * window) memory, any device, tuned for a CPU.

The grid is cut into strips, and each strip into tiles of queries. The keys that a strip can see are copied once, column
by column, into a buffer where the box of keys of every tile is one contiguous, overlapping view. So a strip is two
batched matrix products and a softmax; the keys that all queries share (prefix, suffix, pooled) are one more product
without a copy. Queries outside the grid are dense and left to `scaled_dot_product_attention`.

The grid part is a custom operator whose backward computes the weights again: autograd keeps nothing but its inputs.
A dilated window is an undilated one on each of the dilation's sub-grids. What else PyTorch may want of the operator,
`plain.py` answers.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_attn.grid import Grid
from vision_attn.kernels.backend import custom_op
from vision_attn.kernels.dense import dense_attention, full_mask, outside, with_dense_rows
from vision_attn.kernels.local.plain import plain_attention
from vision_attn.kernels.local.strips import Strip, strips, subgrids

if TYPE_CHECKING:
    from vision_attn.kernels.local import Window

_HIDDEN = -1e30
_MAX_SCORES = 1 << 23  # logits computed at a time: 32 MiB in float32


def local_attention_torch(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, window: "Window", mask: Tensor | None, scale: float
) -> Tensor:
    """Run `local_attention` on checked inputs."""
    image, covers = grid.image, window.covers(grid)
    pooled = window.pooled or (k[:, :0], v[:, :0])
    if window.cell and covers:  # no token is outside the disc
        pooled = pooled[0][:, :0], pooled[1][:, :0]
    if covers and window.bias is None:
        keys, values = torch.cat([k, pooled[0]], 1), torch.cat([v, pooled[1]], 1)
        o = dense_attention(q[:, image], keys, values, mask=full_mask(mask, grid, pooled[0].shape[1]), scale=scale)
    else:
        k_shared, v_shared = (torch.cat([outside(t, grid), p], 1) for t, p in zip((k, v), pooled, strict=True))
        hidden = None
        if mask is not None:
            hidden = F.pad((~mask).to(torch.promote_types(q.dtype, torch.float32)) * _HIDDEN, (0, pooled[0].shape[1]))
        o = _grid_attention(
            q[:, image], k[:, image], v[:, image], k_shared, v_shared, window.bias, hidden,
            [grid.height, grid.width], *window.geometry(grid), window.cell, scale,
        )  # fmt: skip
    return with_dense_rows(o, q, k, v, grid, mask=mask, scale=scale)


@custom_op("vision_attn::local_grid", plain_attention)
def _grid_attention(
    q: Tensor, k: Tensor, v: Tensor, k_shared: Tensor, v_shared: Tensor, bias: Tensor | None, hidden: Tensor | None,
    size: Sequence[int], radius: float, kernel: Sequence[int], steps: Sequence[int], cell: int, scale: float,
) -> Tensor:  # fmt: skip
    """Grid queries `[B, height * width, H, D]` over their windows and the shared keys `[B, M, H, D]`.

    With `cell` > 0 the last shared keys are those of cells, counted as their tokens outside the disc.
    """
    o = q.new_empty(q.shape)
    if o.numel() == 0:
        return o
    k_all, v_all = _heads_first(k_shared), _heads_first(v_shared)
    weights = None
    for sub in subgrids(size, steps, q.device):
        q_sub, k_sub, v_sub, o_sub = (sub.take(t) for t in (q, k, v, o))
        for strip in strips(q_sub.shape, radius, kernel, q.device):
            queries, keys, values = strip.queries(q_sub) * scale, strip.keys(k_sub), strip.keys(v_sub)
            out, mass = torch.empty_like(queries), strip.mass(cell, _HIDDEN, queries.dtype)
            for c in _chunks(queries, keys, k_all):
                weights = _weights(strip, c, queries[c], keys[c], k_all[c], bias, hidden, mass, weights)
                _mix(weights, values[c], v_all[c], out[c])
            strip.put_queries(out, o_sub)
        sub.put(o_sub, o)
    return o


@_grid_attention.register_fake
def _(q: Tensor, *args: object) -> Tensor:
    return q.new_empty(q.shape)


@custom_op("vision_attn::local_grid_backward")
def _grid_attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, k_shared: Tensor, v_shared: Tensor, bias: Tensor | None,
    hidden: Tensor | None, size: Sequence[int], radius: float, kernel: Sequence[int], steps: Sequence[int],
    cell: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, k_shared, v_shared and bias (empty without one)."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = (q.new_empty(q.shape, dtype=dtype) for _ in range(3))
    k_all, v_all = _heads_first(k_shared), _heads_first(v_shared)
    dk_all, dv_all = torch.zeros_like(k_all), torch.zeros_like(v_all)
    dbias = torch.zeros_like(bias, dtype=dtype) if bias is not None else q.new_empty(0)
    parts = () if q.numel() == 0 else subgrids(size, steps, q.device)
    for sub in parts:
        q_sub, k_sub, v_sub, do_sub = (sub.take(t) for t in (q, k, v, do))
        dq_sub, dk_sub, dv_sub = (q_sub.new_zeros(q_sub.shape, dtype=dtype) for _ in range(3))
        for strip in strips(q_sub.shape, radius, kernel, q.device):
            queries, keys, values = strip.queries(q_sub) * scale, strip.keys(k_sub), strip.keys(v_sub)
            do_rows = strip.queries(do_sub)
            d_queries, mass = torch.empty_like(queries), strip.mass(cell, _HIDDEN, queries.dtype)
            dk_buffer, dv_buffer = strip.buffer(dtype).zero_(), strip.buffer(dtype).zero_()
            for c in _chunks(queries, keys, k_all):
                weights = _weights(strip, c, queries[c], keys[c], k_all[c], bias, hidden, mass)
                d_weights = _scores(do_rows[c], values[c], v_all[c])
                d_scores = torch._softmax_backward_data(d_weights, weights, -1, dtype)
                _mix(d_scores, keys[c], k_all[c], d_queries[c])
                strip.add_keys(_mix_back(d_scores, queries[c], dk_all[c]), dk_buffer, c)
                strip.add_keys(_mix_back(weights, do_rows[c], dv_all[c]), dv_buffer, c)
                if bias is not None:
                    strip.add_bias(d_scores[..., k_all.shape[1] :], dbias, c)
            strip.put_queries(d_queries.mul_(scale), dq_sub)
            strip.put_keys(dk_buffer, dk_sub)
            strip.put_keys(dv_buffer, dv_sub)
        for part, whole in ((dq_sub, dq), (dk_sub, dk), (dv_sub, dv)):
            sub.put(part, whole)
    dq, dk, dv = (t.to(q.dtype) for t in (dq, dk, dv))
    dk_shared, dv_shared = (_heads_last(t, k_shared) for t in (dk_all, dv_all))
    return dq, dk, dv, dk_shared, dv_shared, dbias.to(bias.dtype if bias is not None else q.dtype)


@_grid_attention_backward.register_fake
def _(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, k_shared: Tensor, v_shared: Tensor, bias: Tensor | None, *args: object
) -> tuple[Any, ...]:
    shapes = [q.shape, q.shape, q.shape, k_shared.shape, k_shared.shape]
    return *(q.new_empty(shape) for shape in shapes), q.new_empty(0) if bias is None else bias.new_empty(bias.shape)


_grid_attention.register_gradient(_grid_attention_backward)


def _heads_first(t: Tensor) -> Tensor:
    """`[B, M, H, D]` to `[B * H, M, D]`, in float32 at least."""
    return t.transpose(1, 2).flatten(0, 1).to(torch.promote_types(t.dtype, torch.float32)).contiguous()


def _heads_last(t: Tensor, like: Tensor) -> Tensor:
    return t.unflatten(0, (like.shape[0], like.shape[2])).transpose(1, 2).to(like.dtype).contiguous()


def _chunks(queries: Tensor, keys: Tensor, shared: Tensor) -> list[slice]:
    """Cut B * H so that one chunk's logits stay below `_MAX_SCORES`."""
    heads, tiles, length, _ = queries.shape
    step = max(1, _MAX_SCORES // (tiles * length * (keys.shape[2] + shared.shape[1])))
    return [slice(i, min(i + step, heads)) for i in range(0, heads, step)]


def _scores(queries: Tensor, keys: Tensor, shared: Tensor, memory: Tensor | None = None) -> Tensor:
    """Products with the shared keys, then with the box: `[heads, tiles, L, M + S]`, in `memory` if that fits."""
    M = shared.shape[1]
    shape = (*queries.shape[:3], M + keys.shape[2])
    scores = memory if memory is not None and memory.shape == shape else queries.new_empty(shape)
    torch.bmm(queries.flatten(0, 1), keys.flatten(0, 1).mT, out=scores.flatten(0, 1)[..., M:])
    if M:
        torch.bmm(queries.flatten(1, 2), shared.mT, out=scores.flatten(1, 2)[..., :M])
    return scores


def _weights(
    strip: Strip, c: slice, queries: Tensor, keys: Tensor, shared: Tensor, bias: Tensor | None, hidden: Tensor | None,
    mass: Tensor, memory: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Softmax over the shared keys and the box: `[heads, tiles, L, M + S]`, in `memory` if that fits."""
    scores, M = _scores(queries, keys, shared, memory), shared.shape[1]
    if hidden is not None:
        scores[..., :M] += strip.per_head(hidden, c)[:, None, None]
    if mass.shape[2]:
        scores[..., M - mass.shape[2] : M].unflatten(1, (-1, strip.columns)).add_(mass)
    scores[..., M:].unflatten(1, (-1, strip.columns)).add_(strip.hidden(_HIDDEN, scores.dtype))
    if bias is not None:
        scores[..., M:] += strip.bias(bias, c)[:, None]
    return torch.softmax(scores, -1, out=scores)


def _mix(weights: Tensor, values: Tensor, shared: Tensor, out: Tensor) -> None:
    """Write the weighted sum of shared and box values into `out`."""
    M = shared.shape[1]
    torch.bmm(weights.flatten(0, 1)[..., M:], values.flatten(0, 1), out=out.flatten(0, 1))
    if M:
        out.flatten(1, 2).baddbmm_(weights.flatten(1, 2)[..., :M], shared)


def _mix_back(weights: Tensor, do_rows: Tensor, d_shared: Tensor) -> Tensor:
    """Return the gradient of the box values `[heads * tiles, S, D]`; add that of the shared ones to `d_shared`."""
    M = d_shared.shape[1]
    if M:
        d_shared.baddbmm_(weights.flatten(1, 2)[..., :M].mT, do_rows.flatten(1, 2))
    return torch.bmm(weights.flatten(0, 1)[..., M:].mT, do_rows.flatten(0, 1))
