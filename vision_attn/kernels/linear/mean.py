"""The mean of mapped features over tokens in Triton: one pass over q, and one for its gradient.

m = sum_i w_i phi(q_i) / sum_i w_i
"""

# ruff: noqa: ANN001, ANN202  # the compiler of a kernel reads no annotations
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from vision_attn.kernels.linear.tiles import lane_sums, mapped, slope
from vision_attn.kernels.triton.launching import LANES, Kernel, Launch, block_of, cut, unit_strides_of
from vision_attn.kernels.triton.rows import (
    head_of,
    load_rows_below,
    own_head,
    program_of,
    store_rows_below,
    unit_head_of,
    unit_of,
)

# By channels at most. Up to 128: tuned on an H200 with triton 3.6.
_MEAN: dict[int, Launch] = {64: Launch(64, 4, 3, 4), 128: Launch(64, 4, 3, 4), 256: Launch(16, 4, 3, 8)}


@Kernel
@triton.jit
def _sums(
    q, weight, part_sums, part_total, q_b, q_n, q_h, w_b, w_n, w_h, tokens, heads, batch_heads, length,
    WEIGHT: tl.constexpr, LEN: tl.constexpr, STAGES: tl.constexpr, LANES: tl.constexpr, MAP: tl.constexpr,
    F: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Sum features and weights over a part of the tokens.

    Inputs: q `[B, tokens, H, F]` with strides `_b, _n, _h` in units of 16 bytes; weight `[B, tokens, H]` with strides
    `w_`.
    Outputs: part_sums `[parts, B, H, F]`, part_total `[parts, B, H]`.
    Launch: parts of `length` tokens, in steps of `LEN`.
    """
    b, h, bh, _, part = program_of(heads, batch_heads, 1)
    q, weight = unit_head_of(q, b, h, q_b, q_h), head_of(weight, b, h, w_b, w_h)
    sums = tl.zeros([LANES, BLOCK_F], tl.float32)  # [LANES, BLOCK_F]
    total = tl.zeros([LEN], tl.float32)  # [LEN]
    stop = tl.minimum(tokens, (part + 1) * length)
    for j in tl.range(part * length, stop, LEN, num_stages=STAGES):
        row = j + tl.arange(0, LEN)  # [LEN]
        w = tl.where(row < stop, 1.0, 0.0)  # [LEN]
        if WEIGHT:
            w = tl.load(weight + row.to(tl.int64) * w_n, mask=row < stop, other=0.0).to(tl.float32)
        q_rows = load_rows_below(q, row, stop, q_n * unit_of(q), 0, F, BLOCK_F)  # [LEN, BLOCK_F]
        sums += lane_sums(mapped(q_rows, MAP) * w[:, None], LANES)
        total += w
    f = tl.arange(0, BLOCK_F)  # [BLOCK_F]
    place = part.to(tl.int64) * batch_heads + bh
    tl.store(part_sums + place * F + f, tl.sum(sums, 0), mask=f < F)
    tl.store(part_total + place, tl.sum(total, 0))


@Kernel
@triton.jit
def _mean(
    part_sums, part_total, mean, total, parts, batch_heads, PARTS: tl.constexpr, F: tl.constexpr, BLOCK_F: tl.constexpr
):  # fmt: skip
    """Add the parts of one head and divide.

    Inputs: part_sums `[parts, B, H, F]`, part_total `[parts, B, H]`.
    Outputs: mean `[B, H, F]`, total `[B, H]`.
    Launch: `PARTS` parts at a time.
    """
    bh = tl.program_id(0).to(tl.int64)
    f = tl.arange(0, BLOCK_F)  # [BLOCK_F]
    sums = tl.zeros([BLOCK_F], tl.float32)  # [BLOCK_F]
    weights = tl.full((), 0.0, tl.float32)
    for first in tl.range(0, parts, PARTS):
        n = first + tl.arange(0, PARTS)  # [PARTS]
        place = n * batch_heads + bh  # [PARTS]
        sums += tl.sum(load_rows_below(part_sums + bh * F, n, parts, batch_heads * F, 0, F, BLOCK_F), 0)
        weights += tl.sum(tl.load(part_total + place, mask=n < parts, other=0.0), 0)
    tl.store(mean + bh * F + f, sums / weights, mask=f < F)
    tl.store(total + bh, weights)


@Kernel
@triton.jit
def _sums_gradient(
    q, weight, mean, total, dmean, dq, dweight, q_b, q_n, q_h, w_b, w_n, w_h, tokens, heads, batch_heads, length,
    WEIGHT: tl.constexpr, WEIGHT_GRADIENT: tl.constexpr, LEN: tl.constexpr, STAGES: tl.constexpr, MAP: tl.constexpr,
    F: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Compute dq_i = w_i phi'(q_i) dm / sum w,    dw_i = (phi(q_i) - m) . dm / sum w, of a part of the tokens.

    Inputs: q `[B, tokens, H, F]` with strides `_b, _n, _h` in units of 16 bytes; weight `[B, tokens, H]` with strides
    `w_`; mean, dmean `[B, H, F]`, total `[B, H]`.
    Outputs: dq `[B, tokens, H, F]`, dweight `[B, tokens, H]`.
    Launch: parts of `length` tokens, in steps of `LEN`.
    """
    b, h, bh, _, part = program_of(heads, batch_heads, 1)
    q, weight = unit_head_of(q, b, h, q_b, q_h), head_of(weight, b, h, w_b, w_h)
    dq, dweight = own_head(dq, b, h, tokens, heads, F), own_head(dweight, b, h, tokens, heads, 1)
    f = tl.arange(0, BLOCK_F)  # [BLOCK_F]
    m = tl.load(mean + bh * F + f, mask=f < F, other=0.0)  # [BLOCK_F]
    g = tl.load(dmean + bh * F + f, mask=f < F, other=0.0) / tl.load(total + bh)  # [BLOCK_F]
    stop = tl.minimum(tokens, (part + 1) * length)
    for j in tl.range(part * length, stop, LEN, num_stages=STAGES):
        row = j + tl.arange(0, LEN)  # [LEN]
        q_rows = load_rows_below(q, row, stop, q_n * unit_of(q), 0, F, BLOCK_F)  # [LEN, BLOCK_F]
        phi = mapped(q_rows, MAP)  # [LEN, BLOCK_F]
        dq_rows = g[None, :] * slope(q_rows, MAP)  # [LEN, BLOCK_F]
        if WEIGHT:
            w = tl.load(weight + row.to(tl.int64) * w_n, mask=row < stop, other=0.0).to(tl.float32)  # [LEN]
            dq_rows *= w[:, None]
        if WEIGHT_GRADIENT:
            inner = tl.sum((phi - m[None, :]) * g[None, :], 1)  # [LEN]
            tl.store(dweight + row.to(tl.int64) * heads, inner.to(dweight.dtype.element_ty), mask=row < stop)
        store_rows_below(dq, row, stop, heads * F, 0, dq_rows, F, BLOCK_F)


def feature_sums(q: Tensor, weight: Tensor | None, map_: str) -> tuple[Tensor, Tensor]:
    """Return the mean `[B, H, F]` and the sum of the weights `[B, H]`, in float32; `weight` is `[B, N, H]`."""
    B, N, H, F = q.shape
    block = block_of(F)
    launch = next(c for most, c in _MEAN.items() if block <= most)
    if not q.numel():
        return q.new_zeros((B, H, F), dtype=torch.float32), q.new_zeros((B, H), dtype=torch.float32)
    parts, length = cut(N, B * H, launch, q, least=4)
    part, totals = (q.new_empty((parts, B, H, *rest), dtype=torch.float32) for rest in ((F,), ()))
    _sums[(parts * B * H,)](
        q, q if weight is None else weight, part, totals, *unit_strides_of(q),
        *((0, 0, 0) if weight is None else weight.stride()), N, H, B * H, length, WEIGHT=weight is not None,
        LEN=launch.length, STAGES=launch.stages, LANES=LANES, MAP=map_, F=F, BLOCK_F=block, num_warps=launch.warps,
    )  # fmt: skip
    mean, total = part.new_empty((B, H, F)), part.new_empty((B, H))
    _mean[(B * H,)](part, totals, mean, total, parts, B * H, PARTS=64, F=F, BLOCK_F=block, num_warps=8)
    return mean, total


def feature_sums_gradient(
    q: Tensor, weight: Tensor | None, mean: Tensor, total: Tensor, dmean: Tensor, map_: str, weight_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of q and of the weights; the latter is empty if it is not wanted."""
    B, N, H, F = q.shape
    block = block_of(F)
    launch = next(c for most, c in _MEAN.items() if block <= most)
    dq = q.new_empty(q.shape)
    dweight = q.new_empty((B, N, H) if weight_gradient else (0,), dtype=q.dtype if weight is None else weight.dtype)
    if not q.numel():
        return dq, dweight
    parts, length = cut(N, B * H, launch, q, least=1)
    _sums_gradient[(parts * B * H,)](
        q, q if weight is None else weight, mean, total, dmean.contiguous(), dq, dweight, *unit_strides_of(q),
        *((0, 0, 0) if weight is None else weight.stride()), N, H, B * H, length, WEIGHT=weight is not None,
        WEIGHT_GRADIENT=weight_gradient, LEN=launch.length, STAGES=launch.stages, MAP=map_, F=F, BLOCK_F=block,
        num_warps=launch.warps,
    )  # fmt: skip
    return dq, dweight
