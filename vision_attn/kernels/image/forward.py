"""Means over windows in Triton, a window for each program; and a depth-wise convolution with a gate, in one launch."""

# ruff: noqa: ANN001, ANN202  # the compiler of a kernel reads no annotations
# mypy: disable-error-code="no-untyped-def"

import math
from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from vision_attn.kernels.launches import Launch
from vision_attn.kernels.triton.launching import Kernel, block_of, launch_of, next_power, precision_of, strides_of
from vision_attn.kernels.triton.rows import head_of, load_rows_below, own_head, program_of, store_rows_below

_ELEMENTS = 4096  # of a tile of a window


@Kernel
@triton.jit
def _means(
    t, o, t_b, t_n, t_h, tokens, heads, batch_heads, height, width, prefix, rows, columns, num_y, den_y, num_x, den_x,
    LEN: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The mean of one head over one window.

    Inputs: t `[B, tokens, H, D]` with strides `_b, _n, _h`.
    Outputs: o `[B, rows * columns, H, D]`.
    Grid: `height` x `width` tokens after `prefix`; `rows` x `columns` windows, `num / den` apart along each axis.
    Launch: `LEN` tokens at a time.
    """
    b, h, _, _, window = program_of(heads, batch_heads, 1)
    y, x = window // columns, window % columns
    top, left = y * num_y // den_y, x * num_x // den_x
    bottom = tl.minimum(((y + 1) * num_y + den_y - 1) // den_y, height)
    across = tl.minimum(((x + 1) * num_x + den_x - 1) // den_x, width) - left
    count = (bottom - top) * across
    base = head_of(t, b, h, t_b, t_h)
    acc = tl.zeros([BLOCK_D], tl.float32)  # [BLOCK_D]
    for j in tl.range(0, count, LEN):
        i = j + tl.arange(0, LEN)  # [LEN]
        token = prefix + (top + i // across) * width + left + i % across  # [LEN]
        token = tl.where(i < count, token, tokens)  # [LEN]
        acc += tl.sum(load_rows_below(base, token, tokens, t_n, 0, D, BLOCK_D).to(tl.float32), 0)
    d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    place = own_head(o, b, h, rows * columns, heads, D) + window.to(tl.int64) * heads * D
    tl.store(place + d, (acc / count).to(o.dtype.element_ty), mask=d < D)


@Kernel
@triton.jit
def _depthwise(
    o, v, weight, bias, gate, y, o_b, o_n, o_h, v_b, v_n, v_h, tokens, heads, batch_heads, height, width, prefix,
    K: tl.constexpr, GATE: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Output plus convolution of a tile of tokens of one head, times the gate; rounded where PyTorch rounds.

    Inputs: o, v `[B, tokens, H, D]`, each with strides `_b, _n, _h`; weight `[H * D, K, K]`, bias `[H * D]`, if K is
    above 0; gate `[H, D, D]`, if `GATE`.
    Outputs: y `[B, tokens, H, D]`.
    Grid: `height` x `width` tokens after `prefix`.
    Launch: `ROWS` tokens.
    """
    b, h, _, _, block = program_of(heads, batch_heads, 1)
    dtype: tl.constexpr = v.dtype.element_ty
    v = head_of(v, b, h, v_b, v_h)
    row = block * ROWS + tl.arange(0, ROWS)  # [ROWS]
    d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    y_rows = load_rows_below(head_of(o, b, h, o_b, o_h), row, tokens, o_n, 0, D, BLOCK_D).to(tl.float32)
    if K > 0:
        own = row - prefix  # [ROWS]
        inside = (own >= 0) & (own < height * width)  # [ROWS]
        i, j = own // width, own % width  # [ROWS]
        taps = weight + (h * D + d) * (K * K)  # [BLOCK_D]
        acc = tl.zeros([ROWS, BLOCK_D], tl.float32)  # [ROWS, BLOCK_D]
        for down in tl.range(0, K):
            for right in tl.static_range(0, K):
                di, dj = down - K // 2, right - K // 2
                there = inside & (i + di >= 0) & (i + di < height) & (j + dj >= 0) & (j + dj < width)  # [ROWS]
                near = tl.where(there, row + di * width + dj, tokens)  # [ROWS]
                v_rows = load_rows_below(v, near, tokens, v_n, 0, D, BLOCK_D)  # [ROWS, BLOCK_D]
                tap = tl.load(taps + down * K + right, mask=d < D, other=0.0).to(dtype)  # [BLOCK_D]
                acc += v_rows.to(tl.float32) * tap.to(tl.float32)[None, :]
        offset = tl.load(bias + h * D + d, mask=d < D, other=0.0).to(dtype).to(tl.float32)  # [BLOCK_D]
        local = tl.where(inside[:, None], acc + offset[None, :], 0.0).to(dtype)  # [ROWS, BLOCK_D]
        y_rows = (y_rows + local.to(tl.float32)).to(dtype).to(tl.float32)
    if GATE:
        v_rows = load_rows_below(v, row, tokens, v_n, 0, D, BLOCK_D)  # [ROWS, BLOCK_D]
        matrix = load_rows_below(gate + h * D * D, d, D, D, 0, D, BLOCK_D).to(dtype)  # [BLOCK_D, BLOCK_D]
        g = tl.dot(v_rows, matrix, input_precision=PRECISION).to(dtype)  # [ROWS, BLOCK_D]
        y_rows += (y_rows * g.to(tl.float32)).to(dtype).to(tl.float32)
    store_rows_below(own_head(y, b, h, tokens, heads, D), row, tokens, heads * D, 0, y_rows, D, BLOCK_D)


def means(t: Tensor, size: Sequence[int], counts: Sequence[int], steps: Sequence[int]) -> Tensor:
    """Return the means `[B, windows, H, D]`; `size` is height, width, prefix, for the others see `Windows.along`."""
    B, N, H, D = t.shape
    windows = math.prod(counts)
    o = t.new_empty((B, windows, H, D))
    if o.numel():
        most = math.prod(min(num // den + 2, num) for num, den in (steps[:2], steps[2:]))  # tokens of a window
        length = min(next_power(most), max(_ELEMENTS // block_of(D), 1))
        numbers = *strides_of(t), N, H, B * H, *size, *counts, *steps
        _means[(windows * B * H,)](t, o, *numbers, LEN=length, D=D, BLOCK_D=block_of(D), num_warps=4)
    return o


def depthwise(
    o: Tensor, v: Tensor, weight: Tensor | None, bias: Tensor | None, gate: Tensor | None, size: Sequence[int]
) -> Tensor:
    """Return the sum, and its gate, `[B, N, H, D]`; `size` is height, width, prefix."""
    B, N, H, D = v.shape
    y = v.new_empty(v.shape)
    if not y.numel():
        return y
    K = 0 if weight is None else weight.shape[-1]
    inputs = [v if t is None else t for t in (o, v, weight, bias, gate)]
    numbers = *strides_of(o, v), N, H, B * H, *size

    def named(launch: Launch) -> dict[str, Any]:
        return dict(
            K=K, GATE=gate is not None, ROWS=launch.length, D=D, BLOCK_D=block_of(D), PRECISION=precision_of(v),
            num_warps=launch.warps,
        )  # fmt: skip

    about = K, *[t.dtype for t in inputs[2:]], gate is None
    launch = launch_of(
        "hedgehog.features", v, about, lambda launch: _depthwise.needs(*inputs, y, *numbers, **named(launch))
    )
    _depthwise[(math.ceil(N / launch.length) * B * H,)](*inputs, y, *numbers, **named(launch))
    return y
