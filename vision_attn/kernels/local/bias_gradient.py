"""The gradient of a square window's relative bias in Triton, without atomics.

    dbias[ry, rx] = sum of ds_ij over the pairs (i, j) with y_j - y_i = ry - K_y + 1 and x_j - x_i = rx - K_x + 1

A program holds one relative row and a tile of query columns. For a tile of key columns it sums ds over all rows of the
grid first, as two matrix products a row, and adds up the diagonals once at the end.
"""

# ruff: noqa: ANN001, ANN202  # the compiler of a kernel reads no annotations
# mypy: disable-error-code="no-untyped-def"

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from vision_attn.kernels.local.call import Call, token_strides
from vision_attn.kernels.local.tiles import (
    LOG2E,
    bias_of,
    bias_table,
    grid_tokens,
    load_rows,
    square_penalty,
    window_start,
)
from vision_attn.kernels.triton.launching import Kernel, next_power

_COLUMNS = 32


@triton.jit
def _first_row(offset, length, K):
    """The first row whose window starts at most `offset` rows after it."""
    late = tl.where(offset >= -(K // 2), -offset, length - K - offset)
    return tl.minimum(tl.where(offset >= 0, 0, late), length)


@Kernel
@triton.jit
def _bias_gradient(
    q, k, v, do, lse, delta, bias, part, q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, do_b, do_n, do_h,
    N, heads, batch, prefix, height, width, KY, KX, step_y, step_x, scale,
    WIDE: tl.constexpr, BLOCK_K: tl.constexpr, BIAS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    x0, ry, h = tl.program_id(0) * WIDE, tl.program_id(1), tl.program_id(2)
    i = tl.arange(0, WIDE)
    offset = ry - KY + 1
    places = tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_K], tl.float32)
    table = bias_table(bias, h, KY, KX, BIAS)
    for group in tl.range(0, step_y * step_x):
        group_y, group_x = group // step_x, group % step_x
        length_y, length_x = tl.cdiv(height - group_y, step_y), tl.cdiv(width - group_x, step_x)
        qx = x0 + i
        first_y, stop_y = _first_row(offset, length_y, KY), _first_row(offset - KY, length_y, KY)
        x1 = tl.minimum(x0 + WIDE, length_x) - 1
        first_x = window_start(x0, length_x, KX)
        stop_x = tl.where(x0 < length_x, window_start(x1, length_x, KX) + KX, first_x)
        for column in tl.range(first_x, stop_x, WIDE):
            kx = column + i
            acc = tl.zeros([WIDE, WIDE], tl.float32)
            for b in tl.range(0, batch):
                wide_b, wide_h = tl.cast(b, tl.int64), h.to(tl.int64)
                place = (wide_b * heads + h) * N
                for y in tl.range(first_y, stop_y):
                    q_token = grid_tokens(
                        y, tl.minimum(qx, length_x - 1), group_y, group_x, step_y, step_x, prefix, width
                    )
                    k_token = grid_tokens(
                        y + offset, tl.minimum(kx, length_x - 1), group_y, group_x, step_y, step_x, prefix, width
                    )
                    q_rows = load_rows(q + wide_b * q_b + wide_h * q_h, q_token, q_n, D, BLOCK_D)
                    keys = load_rows(k + wide_b * k_b + wide_h * k_h, k_token, k_n, D, BLOCK_D)
                    values = load_rows(v + wide_b * v_b + wide_h * v_h, k_token, v_n, D, BLOCK_D)
                    d_out = load_rows(do + wide_b * do_b + wide_h * do_h, q_token, do_n, D, BLOCK_D)
                    lse_rows = tl.load(lse + place + q_token)
                    delta_rows = tl.load(delta + place + q_token)
                    ys = tl.zeros([WIDE], tl.int32) + y
                    penalty = square_penalty(
                        ys[:, None], qx[:, None], ys[None, :] + offset, kx[None, :], length_y, length_x, KY, KX
                    )
                    s = tl.dot(q_rows, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2E)
                    s += bias_of(
                        table,
                        ys[:, None],
                        qx[:, None],
                        ys[None, :] + offset,
                        kx[None, :],
                        length_y,
                        length_x,
                        KY,
                        KX,
                        BIAS,
                    )
                    p = tl.math.exp2(s + penalty - lse_rows[:, None])
                    dp = tl.dot(d_out, tl.trans(values), input_precision=PRECISION)
                    acc += p * (dp - delta_rows[:, None])
            distance = kx[None, :] - qx[:, None]
            for d in range(1 - WIDE, WIDE):
                value = tl.sum(tl.where(distance == column - x0 + d, acc, 0.0))
                total += tl.where(places == column - x0 + d + KX - 1, value, 0.0)
    rx = 2 * KX - 1
    out = part + ((tl.program_id(0) * heads + h).to(tl.int64) * (2 * KY - 1) + ry) * rx
    tl.store(out + places, total, mask=places < rx)


def bias_gradient(call: Call, do: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """Return the gradient of the bias, `[H, 2 * K_y - 1, 2 * K_x - 1]`."""
    assert call.bias is not None
    q, k, v, bias = call.q, call.k, call.v, call.bias
    B, N, H, D = q.shape
    height, width, prefix, _ = call.size
    tiles = math.ceil(math.ceil(width / call.steps[1]) / _COLUMNS)
    part = q.new_empty((tiles, *bias.shape), dtype=torch.float32)
    _bias_gradient[(tiles, bias.shape[1], H)](
        q, k, v, do, lse, delta, bias, part, *token_strides(q), *token_strides(k), *token_strides(v),
        *token_strides(do), N, H, B, prefix, height, width, *call.kernel, *call.steps, call.scale, WIDE=_COLUMNS,
        BLOCK_K=max(16, next_power(bias.shape[2])), BIAS=call.bias_block, D=D,
        BLOCK_D=call.block_d, PRECISION="ieee", num_warps=4, num_stages=1,
    )  # fmt: skip
    return part.sum(0).to(bias.dtype)
