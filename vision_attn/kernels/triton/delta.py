"""What the softmax takes from the gradient of every weight: delta_i = dO_i . o_i - dlse_i log2(e), of each query."""

# the compiler of a kernel reads no annotations
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def"

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from vision_attn.kernels.triton.launching import Kernel, block_of, strides_of
from vision_attn.kernels.triton.rows import LOG2E, head_of, load_rows, own_head


@Kernel
@triton.jit
def _delta(
    do, o, dlse, delta, do_b, do_n, do_h, N, heads, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    DLSE: tl.constexpr,
):  # fmt: skip
    """Compute delta_i = dO_i . o_i - dlse_i log2(e), of some queries.

    Inputs: do `[B, N, H, D]` with strides `_b, _n, _h`, o like it, contiguous; dlse `[B, H, N]`.
    Outputs: delta `[B, H, N]`.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    bh = tl.program_id(1)
    b, h = bh // heads, bh % heads
    index, place = tl.minimum(row, N - 1), bh.to(tl.int64) * N + row  # [ROWS]
    do_rows = load_rows(head_of(do, b, h, do_b, do_h), index, do_n, D, BLOCK_D).to(tl.float32)  # [ROWS, BLOCK_D]
    o_rows = load_rows(own_head(o, b, h, N, heads, D), index, heads * D, D, BLOCK_D).to(tl.float32)  # [ROWS, BLOCK_D]
    delta_rows = tl.sum(do_rows * o_rows, 1)  # [ROWS]
    if DLSE:
        delta_rows -= tl.load(dlse + place, mask=row < N, other=0.0) * LOG2E
    tl.store(delta + place, delta_rows, mask=row < N)


def delta_of(do: Tensor, o: Tensor, dlse: Tensor | None, lse: Tensor) -> Tensor:
    """Return delta, float32 `[B, H, N]`, of do and o `[B, N, H, D]`, and dlse and lse `[B, H, N]`."""
    B, N, H, D = o.shape
    delta = torch.empty_like(lse)
    _delta[(math.ceil(N / 32), B * H)](
        do, o, lse if dlse is None else dlse.contiguous(), delta, *strides_of(do), N, H, ROWS=32, D=D,
        BLOCK_D=block_of(D), DLSE=dlse is not None, num_warps=4,
    )  # fmt: skip
    return delta
