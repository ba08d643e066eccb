"""The Hedgehog's features in Triton: a product with each head's matrix and two softmaxes of it, in one launch."""

# ruff: noqa: ANN001, ANN202  # the compiler of a kernel reads no annotations
# mypy: disable-error-code="no-untyped-def"

import math

import triton
import triton.language as tl
from torch import Tensor

from vision_attn.kernels._hedgehog_triton import LEAST
from vision_attn.kernels._launches import Kernel
from vision_attn.kernels._linear_tiles_triton import LOG2E, block_of, put_rows, token_rows

# Not tuned: chosen offline by registers and shared memory for sm_90 with triton 3.6.0.
# Keys: channels at most. Tokens of a tile and warps.
_TILES: dict[int, tuple[int, int]] = {64: (64, 4), 128: (64, 8)}


@triton.jit
def _softmax(y, there, LEAST: tl.constexpr):
    """The softmax of each row over the columns that are `there`, `y` in base 2."""
    y = tl.where(there, y, -float("inf"))
    p = tl.math.exp2(y - tl.max(y, 1)[:, None])
    return tl.maximum(p * (1.0 / tl.sum(p, 1))[:, None], LEAST)


@Kernel
@triton.jit
def _features(
    x, weight, o, x_b, x_n, x_h, tokens, heads, blocks, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    LEAST: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    bh = pid // blocks
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    row = pid % blocks * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    values = token_rows(x + b * x_b + h * x_h, row, tokens, x_n, 0, D, BLOCK_D).to(tl.float32)
    matrix = token_rows(weight + h * D * D, d, D, D, 0, D, BLOCK_D)
    y = tl.dot(values, matrix, input_precision="tf32x3") * LOG2E
    there = (d < D)[None, :]
    o += (b * tokens * heads + h) * 2 * D
    put_rows(o, row, tokens, heads * 2 * D, 0, _softmax(y, there, LEAST), D, BLOCK_D)
    put_rows(o + D, row, tokens, heads * 2 * D, 0, _softmax(-y, there, LEAST), D, BLOCK_D)


def forward(x: Tensor, weight: Tensor) -> Tensor:
    """Return the features `[B, N, H, 2 D]`; `weight` is float32 `[H, D, D]`."""
    B, N, H, D = x.shape
    o = x.new_empty((B, N, H, 2 * D))
    if not o.numel():
        return o
    rows, warps = next(tile for most, tile in _TILES.items() if most >= D)
    blocks = math.ceil(N / rows)
    _features[(blocks * B * H,)](
        x, weight, o, *x.stride()[:3], N, H, blocks, ROWS=rows, D=D, BLOCK_D=block_of(D), LEAST=LEAST, num_warps=warps,
    )  # fmt: skip
    return o
