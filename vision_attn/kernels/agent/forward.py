"""The forward of agent attention in Triton: attention from few tokens to many, and from many to few.

    o = softmax(c_m q k^T + bias) v,    c_m = first_scale for the first keys, scale for the others

Few queries over many keys: the keys are split, and the parts merged by their log-sum-exp. Many queries over few keys:
one launch. The bias `[H, N, first]` is read once, in place.
"""

# ruff: noqa: ANN001, ANN202, E741  # the compiler of a kernel reads no annotations
# mypy: disable-error-code="no-untyped-def"

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from vision_attn.kernels.triton.launching import Kernel, block_of, floats_of, strides_of
from vision_attn.kernels.triton.pairs import Pairs, logits_of, update_softmax
from vision_attn.kernels.triton.rows import (
    HIDDEN,
    NO_KEY,
    START,
    head_of,
    load_lse,
    load_rows_below,
    own_head,
    program_of,
    store_lse,
    store_rows_below,
)


@Kernel
@triton.jit
def _attend(
    q, k, v, o, lse, part_o, part_lse, q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, bias, bias_h, bias_n, bias_m,
    mask, mask_b, first, first_scale, scale, queries, tokens, heads, batch_heads, blocks, length,
    BIAS: tl.constexpr, MASK: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, LEN: tl.constexpr,
    STAGES: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TWO: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of a tile of queries over a part of the keys.

    Inputs: q `[B, queries, H, D]`, k, v `[B, tokens, H, D]`, each with strides `_b, _n, _h`; bias `[H, queries, first]`
    and mask `[B, tokens]` with theirs.
    Outputs: o like q and lse `[1 + TWO, B, H, queries]`, or with `SPLIT` part_o `[parts, B, H, queries, D]` and
    part_lse `[1 + TWO, parts, B, H, queries]`.
    Logits: `first_scale` for the `first` keys, `scale` for the others.
    Launch: `blocks` of `ROWS` queries, parts of `length` keys, in steps of `LEN`.
    """
    b, h, bh, block, part = program_of(heads, batch_heads, blocks)
    k, v = head_of(k, b, h, k_b, k_h), head_of(v, b, h, v_b, v_h)
    row = block * ROWS + tl.arange(0, ROWS)  # [ROWS]
    q_rows = load_rows_below(head_of(q, b, h, q_b, q_h), row, queries, q_n, 0, D, BLOCK_D)  # [ROWS, BLOCK_D]
    m = tl.full([ROWS], START, tl.float32)  # [ROWS]
    l = tl.zeros([ROWS], tl.float32)  # [ROWS]
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)  # [ROWS, BLOCK_D]
    stop = tl.minimum(tokens, (part + 1) * length)
    for j in tl.range(part * length, stop, LEN, num_stages=STAGES):
        column = j + tl.arange(0, LEN)  # [LEN]
        k_rows = load_rows_below(k, column, stop, k_n, 0, D, BLOCK_D)  # [LEN, BLOCK_D]
        v_rows = load_rows_below(v, column, stop, v_n, 0, D, BLOCK_D)  # [LEN, BLOCK_D]
        s, _ = logits_of(
            q_rows, k_rows, row, column, stop, b, h, bias, bias_h, bias_n, bias_m, mask, mask_b, first, first_scale,
            scale, queries, BIAS, MASK, PRECISION,
        )  # fmt: skip
        m, l, acc = update_softmax(s, v_rows, m, l, acc, PRECISION)
    total = tl.maximum(l, NO_KEY)  # [ROWS]
    acc = acc * (1.0 / total)[:, None]
    if SPLIT:
        place = (part.to(tl.int64) * batch_heads + bh) * queries
        store_rows_below(part_o + place * D, row, queries, D, 0, acc, D, BLOCK_D)
        low = tl.num_programs(0).to(tl.int64) // blocks * queries
        store_lse(part_lse, place + row, low, m, total, row < queries, TWO)
    else:
        store_rows_below(own_head(o, b, h, queries, heads, D), row, queries, heads * D, 0, acc, D, BLOCK_D)
        low = tl.cast(batch_heads, tl.int64) * queries
        store_lse(lse, bh.to(tl.int64) * queries + row, low, m, total, row < queries, TWO)


@Kernel
@triton.jit
def _join(
    part_o, part_lse, o, lse, parts, queries, heads, batch_heads, ROWS: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    """Merge parts of some queries by their log-sum-exp.

    Inputs: part_o `[parts, B, H, queries, D]`, part_lse `[1 + TWO, parts, B, H, queries]`.
    Outputs: o `[B, queries, H, D]`, lse `[1 + TWO, B, H, queries]`.
    """
    bh = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    low = tl.cast(batch_heads, tl.int64) * queries
    m = tl.full([ROWS], HIDDEN, tl.float32)  # [ROWS]
    l = tl.zeros([ROWS], tl.float32)  # [ROWS]
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)  # [ROWS, BLOCK_D]
    for i in tl.range(0, parts, num_stages=4):
        place = (i * batch_heads + bh).to(tl.int64) * queries
        lse_rows, rest = load_lse(part_lse, place + row, low * parts, row < queries, TWO)  # [ROWS]
        rows = load_rows_below(part_o + place * D, row, queries, D, 0, D, BLOCK_D)  # [ROWS, BLOCK_D]
        top = tl.maximum(m, lse_rows)  # [ROWS]
        weight = tl.math.exp2(lse_rows - top + rest if TWO else lse_rows - top)  # [ROWS]
        shrink = tl.math.exp2(m - top)  # [ROWS]
        l = l * shrink + weight
        acc = acc * shrink[:, None] + rows * weight[:, None]
        m = top
    base = own_head(o, bh // heads, bh % heads, queries, heads, D)
    store_rows_below(base, row, queries, heads * D, 0, acc / l[:, None], D, BLOCK_D)
    store_lse(lse, bh.to(tl.int64) * queries + row, low, m, l, row < queries, TWO)


def forward(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Return the output `[B, N, H, D]` and its log-sum-exp in base 2, `[floats, B, H, N]` in float32."""
    q, k, v = pairs.q, pairs.k, pairs.v
    B, N, H, D = q.shape
    o, lse = q.new_empty(q.shape), q.new_empty((floats_of(q), B, H, N), dtype=torch.float32)
    if not o.numel():
        return o, lse
    inputs, strides = (q, k, v, o, lse), strides_of(q, k, v)
    programs, parts, named = pairs.launch(
        "agent.forward", _attend, lambda parts: (*inputs, lse.dtype if parts > 1 else o, lse, *strides), N, k.shape[1],
        split=True, TWO=len(lse) == 2,
    )  # fmt: skip
    part_o, part_lse = o, lse
    if parts > 1:
        part_o, part_lse = lse.new_empty((parts, B, H, N, D)), lse.new_empty((len(lse), parts, B, H, N))
    _attend[(programs,)](*inputs, part_o, part_lse, *strides, **named)
    if parts > 1:
        _join[(math.ceil(N / 16), B * H)](
            part_o,
            part_lse,
            o,
            lse,
            parts,
            N,
            H,
            B * H,
            ROWS=16,
            D=D,
            BLOCK_D=block_of(D),
            TWO=len(lse) == 2,
            num_warps=4,
        )
    return o, lse
