"""The Hedgehog's features in Triton: a product with each head's matrix and two softmaxes of it, in one launch."""

# ruff: noqa: ANN001, ANN202  # the compiler of a kernel reads no annotations
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from vision_attn.kernels.hedgehog.op import LEAST
from vision_attn.kernels.launches import Launch
from vision_attn.kernels.triton.launching import Kernel, block_of, cut, launch_of, strides_of, thrice
from vision_attn.kernels.triton.rows import LOG2E, head_of, load_rows_below, own_head, program_of, store_rows_below


@triton.jit
def _softmax(y, there, LEAST: tl.constexpr):
    """The softmax of each row over the columns that are `there`, `y` `[rows, BLOCK_D]` in base 2."""
    y = tl.where(there, y, -float("inf"))
    p = tl.math.exp2(y - tl.max(y, 1)[:, None])  # [rows, BLOCK_D]
    return tl.maximum(p * (1.0 / tl.sum(p, 1))[:, None], LEAST)


@Kernel
@triton.jit
def _features(
    x, weight, o, x_b, x_n, x_h, tokens, heads, batch_heads, length, ROWS: tl.constexpr, STAGES: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, LEAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Features of a part of one head's tokens.

    Inputs: x `[B, tokens, H, D]` with strides `_b, _n, _h`, weight `[H, D, D]`.
    Outputs: o `[B, tokens, H, 2 D]`.
    Launch: parts of `length` tokens, in steps of `ROWS`.
    """
    b, h, _, _, part = program_of(heads, batch_heads, 1)
    x, o = head_of(x, b, h, x_b, x_h), own_head(o, b, h, tokens, heads, 2 * D)
    d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    there = (d < D)[None, :]
    matrix = load_rows_below(weight + h.to(tl.int64) * D * D, d, D, D, 0, D, BLOCK_D)  # [BLOCK_D, BLOCK_D]
    NARROW: tl.constexpr = x.dtype.element_ty != tl.float32
    factor = LOG2E
    if NARROW:  # two 16-bit products: one would round W too coarsely
        most = tl.max(tl.max(tl.abs(matrix), 1), 0)
        most = tl.where(most > 1e-30, most, 1.0)  # the inverse of a smaller one may be infinite
        matrix *= 1.0 / most
        factor = most * LOG2E
        high = matrix.to(x.dtype.element_ty)  # [BLOCK_D, BLOCK_D]
        low = (matrix - high.to(tl.float32)).to(x.dtype.element_ty)  # [BLOCK_D, BLOCK_D]
    first = part * length
    stop = tl.minimum(tokens, first + length)
    for j in tl.range(first, stop, ROWS, num_stages=STAGES):
        row = j + tl.arange(0, ROWS)  # [ROWS]
        x_rows = load_rows_below(x, row, stop, x_n, 0, D, BLOCK_D)  # [ROWS, BLOCK_D]
        if NARROW:
            y = tl.dot(x_rows, low, tl.dot(x_rows, high)) * factor  # [ROWS, BLOCK_D]
        else:
            y = tl.dot(x_rows, matrix, input_precision=PRECISION) * factor  # [ROWS, BLOCK_D]
        store_rows_below(o, row, stop, heads * 2 * D, 0, _softmax(y, there, LEAST), D, BLOCK_D)
        store_rows_below(o + D, row, stop, heads * 2 * D, 0, _softmax(-y, there, LEAST), D, BLOCK_D)


def forward(x: Tensor, weight: Tensor) -> Tensor:
    """Return the features `[B, N, H, 2 D]`; `weight` is float32 `[H, D, D]`."""
    B, N, H, D = x.shape
    o = x.new_empty((B, N, H, 2 * D))
    if not o.numel():
        return o
    args = x, weight, o, *strides_of(x), N, H, B * H

    def named(launch: Launch) -> dict[str, Any]:
        return dict(
            ROWS=launch.length, STAGES=launch.stages, D=D, BLOCK_D=block_of(D), LEAST=LEAST, PRECISION=thrice(x),
            num_warps=launch.warps,
        )  # fmt: skip

    launch = launch_of(
        "hedgehog.features", x, (), lambda launch: _features.needs(*args, length=launch.length, **named(launch))
    )
    parts, length = cut(N, B * H, launch, x, least=1)
    _features[(parts * B * H,)](*args, length, **named(launch))
    return o
