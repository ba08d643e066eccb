"""Softmax inside windows and linear attention outside of them, in Triton: the forward.

Outside a window lies the whole grid without the window. The sums over the grid are the state of linear attention, from
its own kernels; a second launch walks the windows in slots (see `cells.py`), and takes the linear part of each window's
own keys away where it adds their softmax part.
"""

# ruff: noqa: ANN001, ANN202, E741  # the compiler of a kernel reads no annotations
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vision_attn.kernels.launches import Launch
from vision_attn.kernels.triton.cells import Cells, cell_logits, first_slot, meet_shared, slots_of
from vision_attn.kernels.triton.launching import Kernel, block_of, floats_of, precision_of, strides_of, thrice
from vision_attn.kernels.triton.pairs import update_softmax
from vision_attn.kernels.triton.rows import (
    NO_KEY,
    START,
    head_of,
    load_rows_below,
    own_head,
    program_of,
    store_lse,
    store_rows_below,
)


@Kernel
@triton.jit
def _forward(
    q, k, v, a, b_, state, norm, gate, o, lse, shares,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, a_b, a_n, a_h, b_b, b_n, b_h,
    sk, sv, sk_b, sk_n, sk_h, sv_b, sv_n, sv_h, mask, mask_b, outside, height, width, cell_h, cell_w, heads,
    batch_heads, scale, SHARED: tl.constexpr, MASK: tl.constexpr, FAR: tl.constexpr, SLOTS: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, F: tl.constexpr,
    BLOCK_F: tl.constexpr, TWO: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Output of a tile of queries, and what its backward needs; without `FAR` the window is the whole grid.

    Inputs: q, k, v `[B, n, H, D]` of the grid's n tokens, features a of queries and b_ of keys `[B, n, H, F]`, shared
    keys sk and values sv `[B, outside, H, D]`, each with strides `_b, _n, _h`; mask `[B, outside]` with its own; state
    `[B, H, F, D]` and norm `[B, H, F]` of the grid; gate `[H]`.
    Outputs: o `[B, n, H, D]`, shares `[B, H, n]`, one over the normaliser; lse `[1 + TWO, B, H, n]`, so that the weight
    of a key in the window is 2^(s - lse), see `store_lse`.
    Grid: `height` x `width` tokens in cells of `cell_h` x `cell_w`, of `SLOTS` slots, walked in `TILES` of `ROWS`.
    """
    b, h, bh, _, block = program_of(heads, batch_heads, 1)
    tokens = height * width
    cell, row = slots_of(block * ROWS, height, width, cell_h, cell_w, SLOTS, ROWS)  # [ROWS]
    k, v = head_of(k, b, h, k_b, k_h), head_of(v, b, h, v_b, v_h)
    a, b_ = head_of(a, b, h, a_b, a_h), head_of(b_, b, h, b_b, b_h)
    q_rows = load_rows_below(head_of(q, b, h, q_b, q_h), row, tokens, q_n, 0, D, BLOCK_D)  # [ROWS, BLOCK_D]
    m = tl.full([ROWS], START, tl.float32)  # [ROWS]
    l = tl.zeros([ROWS], tl.float32)  # [ROWS]
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)  # [ROWS, BLOCK_D]
    far = tl.zeros([ROWS, BLOCK_D], tl.float32)  # [ROWS, BLOCK_D]
    far_weight = tl.zeros([ROWS], tl.float32)  # [ROWS]
    start = first_slot(block, ROWS, TILES)
    for j in tl.range(0, TILES):
        other, column = slots_of(start + j * ROWS, height, width, cell_h, cell_w, SLOTS, ROWS)  # [ROWS]
        k_rows = load_rows_below(k, column, tokens, k_n, 0, D, BLOCK_D)  # [ROWS, BLOCK_D]
        v_rows = load_rows_below(v, column, tokens, v_n, 0, D, BLOCK_D)  # [ROWS, BLOCK_D]
        s = cell_logits(q_rows, k_rows, cell, other, column, tokens, scale, PRECISION)  # [ROWS, ROWS]
        m, l, acc = update_softmax(s, v_rows, m, l, acc, PRECISION)
        if FAR:
            own = tl.zeros([ROWS, ROWS], tl.float32)  # [ROWS, ROWS]
            for f in tl.range(0, F, BLOCK_F):
                a_rows = load_rows_below(a, row, tokens, a_n, f, F, BLOCK_F)  # [ROWS, BLOCK_F]
                b_rows = load_rows_below(b_, column, tokens, b_n, f, F, BLOCK_F)  # [ROWS, BLOCK_F]
                own = tl.dot(a_rows, tl.trans(b_rows), own, input_precision=PRECISION)
            own = tl.where(cell[:, None] == other[None, :], own, 0.0)
            far_weight -= tl.sum(own, 1)
            far -= tl.dot(own, v_rows.to(tl.float32), input_precision=WIDE)
    if SHARED:
        m, l, acc = meet_shared(
            q_rows, m, l, acc, head_of(sk, b, h, sk_b, sk_h), head_of(sv, b, h, sv_b, sv_h), sk_n, sv_n, mask, mask_b,
            outside, row, b, h, tokens, scale, MASK, ROWS, D, BLOCK_D, PRECISION,
        )  # fmt: skip
    if FAR:
        state += bh.to(tl.int64) * F * D
        for f in tl.range(0, F, BLOCK_F):
            n = f + tl.arange(0, BLOCK_F)  # [BLOCK_F]
            a_rows = load_rows_below(a, row, tokens, a_n, f, F, BLOCK_F).to(tl.float32)  # [ROWS, BLOCK_F]
            sums = load_rows_below(state, n, F, D, 0, D, BLOCK_D)  # [BLOCK_F, BLOCK_D]
            far += tl.dot(a_rows, sums, input_precision=WIDE)
            far_weight += tl.sum(a_rows * tl.load(norm + bh * F + n, mask=n < F, other=0.0)[None, :], 1)
    g = tl.load(gate + h)
    total = tl.maximum(g * l + far_weight, NO_KEY)  # [ROWS], a slot without a token has no key
    place, low = bh.to(tl.int64) * tokens + row, tl.cast(batch_heads, tl.int64) * tokens
    tl.store(shares + place, 1.0 / total, mask=row < tokens)
    store_lse(lse, place, low, m, total / g, row < tokens, TWO)
    o_rows = (g * acc + far) / total[:, None]  # [ROWS, BLOCK_D]
    store_rows_below(own_head(o, b, h, tokens, heads, D), row, tokens, heads * D, 0, o_rows, D, BLOCK_D)


def forward(
    call: Cells, a: Tensor, b: Tensor, gate: Tensor, state: Tensor, norm: Tensor, far: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output of the grid's tokens `[B, n, H, D]`, and for the backward lse and shares: see `_forward`.

    Args:
        call: Queries, keys and values.
        a: Features of the queries `[B, n, H, F]`.
        b: Features of the keys, like `a`.
        gate: Weights of the softmax part `[H]`.
        state: Sum of features times values `[B, H, F, D]`, of the grid or of a larger one.
        norm: Sum of the features `[B, H, F]`.
        far: Whether the sums are over more than each token's window.
    """
    q, k, v = call.q, call.k, call.v
    (B, n, H, _), F = q.shape, a.shape[-1]
    o, shares = q.new_empty(q.shape), q.new_empty((B, H, n), dtype=torch.float32)
    lse = shares.new_empty((floats_of(q), B, H, n))
    if not o.numel():
        return o, lse, shares
    args, shared = (q, k, v, a, b, state, norm, gate, o, lse, shares, *strides_of(q, k, v, a, b)), call.shared()

    # TF32 holds 16-bit features exactly, and their products with sums twice as well as 16 bits would
    wide = thrice(q) if q.dtype == torch.float32 else precision_of(q)

    def more(launch: Launch) -> dict[str, Any]:
        return dict(FAR=far, F=F, BLOCK_F=features_of(F, launch), TWO=len(lse) == 2, WIDE=wide, **shared)

    programs, named = call.launch("linear_local.forward", _forward, args, more, (F, far))
    _forward[(programs,)](*args, **named)
    return o, lse, shares


def features_of(F: int, launch: Launch) -> int:
    """Return how many of F features are multiplied at a time."""
    return min(block_of(F), launch.features)
