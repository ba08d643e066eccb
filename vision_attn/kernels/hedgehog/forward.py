"""The Hedgehog's features in Triton: a product with each head's matrix and two softmaxes of it, in one launch."""

# ruff: noqa: ANN001, ANN202  # the compiler of a kernel reads no annotations
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl
from torch import Tensor

from vision_attn.kernels.agent.forward import choice
from vision_attn.kernels.hedgehog.op import LEAST
from vision_attn.kernels.linear.tiles import LOG2E, Launch, block_of, cut, put_rows, token_rows
from vision_attn.kernels.triton.launching import Kernel

# 16 bits found on one H200 with torch 2.11.0 and triton 3.6.0, float32 chosen by registers and shared memory.
# Keys: bytes of an element, channels at most.
_LAUNCHES: dict[tuple[int, int], Launch] = {
    (2, 64): Launch(64, 4, 3, 8),
    (2, 128): Launch(64, 4, 1, 2),
    (4, 64): Launch(64, 4, 1, 4),
    (4, 128): Launch(64, 8, 1, 1),
}


@triton.jit
def _softmax(y, there, LEAST: tl.constexpr):
    """The softmax of each row over the columns that are `there`, `y` in base 2."""
    y = tl.where(there, y, -float("inf"))
    p = tl.math.exp2(y - tl.max(y, 1)[:, None])
    return tl.maximum(p * (1.0 / tl.sum(p, 1))[:, None], LEAST)


@Kernel
@triton.jit
def _features(
    x, weight, o, x_b, x_n, x_h, tokens, heads, batch_heads, length, ROWS: tl.constexpr, STAGES: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """Features of a part of one head's tokens."""
    pid = tl.program_id(0)
    bh = pid % batch_heads
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    x += b * x_b + h * x_h
    o += (b * tokens * heads + h) * 2 * D
    d = tl.arange(0, BLOCK_D)
    there = (d < D)[None, :]
    matrix = token_rows(weight + h * D * D, d, D, D, 0, D, BLOCK_D)
    NARROW: tl.constexpr = x.dtype.element_ty != tl.float32
    factor = LOG2E
    if NARROW:  # two 16-bit products: one would round W too coarsely
        most = tl.max(tl.max(tl.abs(matrix), 1), 0)
        most = tl.where(most > 1e-30, most, 1.0)  # of smaller ones the inverse may be infinite
        matrix *= 1.0 / most
        factor = most * LOG2E
        high = matrix.to(x.dtype.element_ty)
        low = (matrix - high.to(tl.float32)).to(x.dtype.element_ty)
    first = pid // batch_heads * length
    stop = tl.minimum(tokens, first + length)
    for j in tl.range(first, stop, ROWS, num_stages=STAGES):
        row = j + tl.arange(0, ROWS)
        values = token_rows(x, row, stop, x_n, 0, D, BLOCK_D)
        if NARROW:
            y = tl.dot(values, low, tl.dot(values, high)) * factor
        else:
            y = tl.dot(values, matrix, input_precision="tf32x3") * factor
        put_rows(o, row, stop, heads * 2 * D, 0, _softmax(y, there, LEAST), D, BLOCK_D)
        put_rows(o + D, row, stop, heads * 2 * D, 0, _softmax(-y, there, LEAST), D, BLOCK_D)


def forward(x: Tensor, weight: Tensor) -> Tensor:
    """Return the features `[B, N, H, 2 D]`; `weight` is float32 `[H, D, D]`."""
    B, N, H, D = x.shape
    o = x.new_empty((B, N, H, 2 * D))
    if not o.numel():
        return o
    launch = choice(x, _LAUNCHES)
    parts, length = cut(N, B * H, launch, x, 1)
    _features[(parts * B * H,)](
        x, weight, o, *x.stride()[:3], N, H, B * H, length, ROWS=launch.length, STAGES=launch.stages, D=D,
        BLOCK_D=block_of(D), LEAST=LEAST, num_warps=launch.warps,
    )  # fmt: skip
    return o
