"""The mean of mapped features over tokens in Triton: one pass over q, and one for its gradient.

m = sum_i w_i phi(q_i) / sum_i w_i
"""

# ruff: noqa: ANN001, ANN202  # the compiler of a kernel reads no annotations
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vision_attn.kernels.launches import Launch
from vision_attn.kernels.linear.tiles import lane_sums, mapped, slope
from vision_attn.kernels.triton.launching import LANES, Kernel, block_of, cut, launch_of, unit_strides_of
from vision_attn.kernels.triton.rows import (
    head_of,
    load_rows_below,
    own_head,
    program_of,
    store_rows_below,
    unit_head_of,
    unit_of,
)


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
    part_sums, part_total, mean, total, scaled, parts, batch_heads, scale, PARTS: tl.constexpr, SCALE: tl.constexpr,
    F: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Add the parts of one head and divide; with `SCALE` also multiply.

    Inputs: part_sums `[parts, B, H, F]`, part_total `[parts, B, H]`.
    Outputs: mean and, times `scale`, scaled `[B, H, F]`, total `[B, H]`.
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
    m = sums / weights  # [BLOCK_F]
    tl.store(mean + bh * F + f, m, mask=f < F)
    if SCALE:
        tl.store(scaled + bh * F + f, m * scale, mask=f < F)
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


def _launch(
    q: Tensor, kernel: Kernel, tensors: tuple[Any, ...], weight: Tensor | None, **more: Any
) -> tuple[Launch, tuple[Any, ...], dict[str, Any]]:
    """Return the launch that fits, the numbers after the tensors but for the length of a part, and all by name."""
    B, N, H, F = q.shape
    numbers = *unit_strides_of(q), *((0, 0, 0) if weight is None else weight.stride()), N, H, B * H
    more |= dict(WEIGHT=weight is not None, F=F, BLOCK_F=block_of(F))

    def named(launch: Launch) -> dict[str, Any]:
        return dict(LEN=launch.length, STAGES=launch.stages, num_warps=launch.warps, **more)

    constants = kernel, None if weight is None else weight.dtype, *more.values()
    launch = launch_of(
        "linear.mean", q, constants,
        lambda launch: kernel.needs(*tensors, *numbers, length=launch.length, **named(launch)),
    )  # fmt: skip
    return launch, numbers, named(launch)


def feature_sums(q: Tensor, weight: Tensor | None, map_: str) -> tuple[Tensor, Tensor]:
    """Return the mean `[B, H, F]` and the sum of the weights `[B, H]`, in float32; `weight` is `[B, N, H]`."""
    return _averaged(q, weight, map_, None)[:2]


def scaled_mean(q: Tensor, weight: Tensor | None, map_: str, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return `scale` times what `feature_sums` returns first, and that."""
    mean, total, scaled = _averaged(q, weight, map_, scale)
    return scaled, mean, total


def _averaged(q: Tensor, weight: Tensor | None, map_: str, scale: float | None) -> tuple[Tensor, Tensor, Tensor]:
    B, N, H, F = q.shape
    if not q.numel():
        mean, total, scaled = (q.new_zeros((B, H, *rest), dtype=torch.float32) for rest in ((F,), (), (F,)))
        return mean, total, scaled
    inputs, made = (q, q if weight is None else weight), torch.float32
    launch, numbers, named = _launch(q, _sums, (*inputs, made, made), weight, LANES=LANES, MAP=map_)
    parts, length = cut(N, B * H, launch, q, least=4)
    part, totals = (q.new_empty((parts, B, H, *rest), dtype=torch.float32) for rest in ((F,), ()))
    _sums[(parts * B * H,)](*inputs, part, totals, *numbers, length, **named)
    mean, total = part.new_empty((B, H, F)), part.new_empty((B, H))
    scaled = mean if scale is None else part.new_empty((B, H, F))
    _mean[(B * H,)](
        part, totals, mean, total, scaled, parts, B * H, scale or 0.0, PARTS=64, SCALE=scale is not None, F=F,
        BLOCK_F=block_of(F), num_warps=8,
    )  # fmt: skip
    return mean, total, scaled


def feature_sums_gradient(
    q: Tensor, weight: Tensor | None, mean: Tensor, total: Tensor, dmean: Tensor, map_: str, weight_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of q and of the weights; the latter is empty if it is not wanted."""
    B, N, H, _ = q.shape
    dq = q.new_empty(q.shape)
    dweight = q.new_empty((B, N, H) if weight_gradient else (0,), dtype=q.dtype if weight is None else weight.dtype)
    if not q.numel():
        return dq, dweight
    tensors = q, q if weight is None else weight, mean, total, dmean.contiguous(), dq, dweight
    launch, numbers, named = _launch(q, _sums_gradient, tensors, weight, MAP=map_, WEIGHT_GRADIENT=weight_gradient)
    parts, length = cut(N, B * H, launch, q, least=1)
    _sums_gradient[(parts * B * H,)](*tensors, *numbers, length, **named)
    return dq, dweight
