"""Softmax inside windows and linear attention outside of them, in Triton: the forward.

What lies outside a window is the whole grid without the window. The sums over the grid are the state of linear
attention, from its own kernels; a second launch walks the windows as `window/kernels.py` does, and takes the
linear part of each window's own keys away where it adds their softmax part.
"""

# ruff: noqa: ANN001, ANN202, E741  # the compiler of a kernel reads no annotations
# mypy: disable-error-code="no-untyped-def"

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from vision_attn.kernels.agent.forward import START, choice
from vision_attn.kernels.linear.forward import Call, merged, state_parts
from vision_attn.kernels.linear.tiles import block_of, put_rows, token_rows
from vision_attn.kernels.triton.launching import Kernel
from vision_attn.kernels.window.kernels import Cells, meet_shared, places_of, scores_of, update

# Up to 128 channels of 16 bits found on one H200 with torch 2.11.0 and triton 3.6.0, the others chosen by registers and
# shared memory. Keys: bytes of an element, channels at most. Slots of a tile, warps, pipeline stages, features that are
# multiplied at a time.
_TILES: dict[tuple[int, int], tuple[int, int, int, int]] = {
    (2, 64): (64, 4, 1, 64),
    (2, 128): (64, 4, 1, 32),
    (2, 256): (32, 8, 2, 64),
    (4, 64): (16, 4, 2, 64),
    (4, 128): (16, 8, 2, 64),
    (4, 256): (16, 8, 2, 64),
}


@Kernel
@triton.jit
def _forward(
    q, k, v, a, b_, state, norm, gate, o, q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, a_b, a_n, a_h, b_b, b_n, b_h,
    sk, sv, sk_b, sk_n, sk_h, sv_b, sv_n, sv_h, seen, seen_b, outside, height, width, cell_h, cell_w, heads,
    batch_heads, scale, SHARED: tl.constexpr, SEEN: tl.constexpr, FAR: tl.constexpr, SLOTS: tl.constexpr,
    ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, F: tl.constexpr, BLOCK_F: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of queries. Without `FAR` the window is the whole grid."""
    pid = tl.program_id(0)
    bh = pid % batch_heads
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    tokens = height * width
    slot = pid // batch_heads * ROWS + tl.arange(0, ROWS)
    cell, row = places_of(slot, height, width, cell_h, cell_w, SLOTS)
    q += b * q_b + h * q_h
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    a += b * a_b + h * a_h
    b_ += b * b_b + h * b_h
    # TF32 holds 16-bit features exactly, and their products with sums twice as well as 16 bits would
    WIDE: tl.constexpr = "tf32x3" if v.dtype.element_ty == tl.float32 else "tf32"
    x = token_rows(q, row, tokens, q_n, 0, D, BLOCK_D)
    m = tl.full([ROWS], START, tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    far = tl.zeros([ROWS, BLOCK_D], tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    COUNT: tl.constexpr = SLOTS // ROWS if SLOTS > ROWS else 1
    start = pid // batch_heads // COUNT * COUNT * ROWS
    for j in tl.range(0, COUNT):
        other, column = places_of(start + j * ROWS + tl.arange(0, ROWS), height, width, cell_h, cell_w, SLOTS)
        keys = token_rows(k, column, tokens, k_n, 0, D, BLOCK_D)
        values = token_rows(v, column, tokens, v_n, 0, D, BLOCK_D)
        s = scores_of(x, keys, cell, other, column, tokens, scale, PRECISION)
        m, l, acc = update(s, values, m, l, acc, PRECISION)
        if FAR:
            own = tl.zeros([ROWS, ROWS], tl.float32)
            for f in tl.range(0, F, BLOCK_F):
                left = token_rows(a, row, tokens, a_n, f, F, BLOCK_F)
                right = token_rows(b_, column, tokens, b_n, f, F, BLOCK_F)
                own = tl.dot(left, tl.trans(right), own, input_precision=PRECISION)
            own = tl.where(cell[:, None] == other[None, :], own, 0.0)
            weight -= tl.sum(own, 1)
            far -= tl.dot(own, values.to(tl.float32), input_precision=WIDE)
    if SHARED:
        m, l, acc = meet_shared(
            x, m, l, acc, sk + b * sk_b + h * sk_h, sv + b * sv_b + h * sv_h, sk_n, sv_n, seen, seen_b, outside, row, b,
            h, tokens, scale, SEEN, ROWS, D, BLOCK_D, PRECISION,
        )  # fmt: skip
    if FAR:
        state += bh.to(tl.int64) * F * D
        for f in tl.range(0, F, BLOCK_F):
            n = f + tl.arange(0, BLOCK_F)
            left = token_rows(a, row, tokens, a_n, f, F, BLOCK_F).to(tl.float32)
            sums = token_rows(state, n, F, D, 0, D, BLOCK_D)
            far += tl.dot(left, sums, input_precision=WIDE)
            weight += tl.sum(left * tl.load(norm + bh * F + n, mask=n < F, other=0.0)[None, :], 1)
    g = tl.load(gate + h)
    total = tl.maximum(g * l + weight, 1e-30)  # a slot without a token has no key
    put_rows(o + (b * tokens * heads + h) * D, row, tokens, heads * D, 0, (g * acc + far) / total[:, None], D, BLOCK_D)


def forward(call: Cells, a: Tensor, b: Tensor, gate: Tensor) -> Tensor:
    """Return the output of the grid's tokens `[B, n, H, D]`; `a` and `b` are features `[B, n, H, F]`."""
    q, k, v = call.q, call.k, call.v
    B, _, H, _ = q.shape
    F = a.shape[-1]
    o = q.new_empty(q.shape)
    if not o.numel():
        return o
    sums = Call(a, b, v, None, None, None, None, "none", 0.0)
    part, _ = state_parts(sums, b, v, None, None, None)
    state, norm, _ = merged(sums, part, None, torch.float32, 1.0)
    rows, warps, stages, features = choice(q, _TILES)
    strides = [stride for t in (q, k, v, a, b) for stride in t.stride()[:3]]
    cells = math.prod(math.ceil(s / c) for s, c in zip(call.size, call.cell, strict=True))
    _forward[(call.tiles(rows) * B * H,)](
        q, k, v, a, b, state, norm, gate, o, *strides, **call.shared(), **call.numbers(), FAR=cells > 1, ROWS=rows,
        F=F, BLOCK_F=min(block_of(F), features), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return o
