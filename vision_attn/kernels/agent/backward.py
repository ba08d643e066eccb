"""The backward of agent attention in Triton: one launch whose programs own queries, one whose programs own keys.

    p = 2^(s - lse),   ds = p (dO v^T - delta),   delta = dO . o
    dq = c ds k,   dk = c ds^T q,   dv = p^T dO,   dbias = ds

Where a launch owns few tokens, its loop over the others is split; parts are added in a fixed order.
"""

# ruff: noqa: ANN001, ANN202  # the compiler of a kernel reads no annotations
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from vision_attn.kernels.triton.launching import Kernel, added, strides_of
from vision_attn.kernels.triton.pairs import Pairs, key_gradients, logits_of, weights_of
from vision_attn.kernels.triton.rows import (
    ds_of,
    head_of,
    load_lse,
    load_rows_below,
    own_head,
    program_of,
    store_rows_below,
)


@Kernel
@triton.jit
def _query_gradients(
    q, k, v, o, do, lse, delta, dq, dbias, q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, do_b, do_n, do_h,
    bias, bias_h, bias_n, bias_m, mask, mask_b, first, first_scale, scale, queries, tokens, heads, batch_heads,
    blocks, length, BIAS: tl.constexpr, MASK: tl.constexpr, ROWS: tl.constexpr, LEN: tl.constexpr,
    STAGES: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TWO: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients dq of a tile of queries from a part of the keys, delta, and the bias's gradient of each batch entry.

    Inputs: q, do `[B, queries, H, D]`, k, v `[B, tokens, H, D]`, each with strides `_b, _n, _h`; o like q, contiguous;
    lse `[1 + TWO, B, H, queries]`; bias `[H, queries, first]` and mask `[B, tokens]` with their strides.
    Outputs: dq `[parts, B, queries, H, D]`, delta `[B, H, queries]`, dbias `[B, H, queries, first]`.
    Logits: `first_scale` for the `first` keys, `scale` for the others.
    Launch: `blocks` of `ROWS` queries, parts of `length` keys, in steps of `LEN`.
    """
    b, h, bh, block, part = program_of(heads, batch_heads, blocks)
    k, v = head_of(k, b, h, k_b, k_h), head_of(v, b, h, v_b, v_h)
    row = block * ROWS + tl.arange(0, ROWS)  # [ROWS]
    q_rows = load_rows_below(head_of(q, b, h, q_b, q_h), row, queries, q_n, 0, D, BLOCK_D)  # [ROWS, BLOCK_D]
    do_rows = load_rows_below(head_of(do, b, h, do_b, do_h), row, queries, do_n, 0, D, BLOCK_D)  # [ROWS, BLOCK_D]
    o_rows = load_rows_below(
        own_head(o, b, h, queries, heads, D), row, queries, heads * D, 0, D, BLOCK_D
    )  # [ROWS, BLOCK_D]
    delta_rows = tl.sum(do_rows.to(tl.float32) * o_rows.to(tl.float32), 1)  # [ROWS]
    low, place = tl.cast(batch_heads, tl.int64) * queries, bh.to(tl.int64) * queries + row
    lse_rows, low_rows = load_lse(lse, place, low, row < queries, TWO)  # [ROWS]
    tl.store(delta + bh.to(tl.int64) * queries + row, delta_rows, mask=(row < queries) & (part == 0))
    dq_rows = tl.zeros([ROWS, BLOCK_D], tl.float32)  # [ROWS, BLOCK_D]
    stop = tl.minimum(tokens, (part + 1) * length)
    for j in tl.range(part * length, stop, LEN, num_stages=STAGES):
        column = j + tl.arange(0, LEN)  # [LEN]
        k_rows = load_rows_below(k, column, stop, k_n, 0, D, BLOCK_D)  # [LEN, BLOCK_D]
        v_rows = load_rows_below(v, column, stop, v_n, 0, D, BLOCK_D)  # [LEN, BLOCK_D]
        s, factor = logits_of(
            q_rows, k_rows, row, column, stop, b, h, bias, bias_h, bias_n, bias_m, mask, mask_b, first, first_scale,
            scale, queries, BIAS, MASK, PRECISION,
        )  # fmt: skip
        p = weights_of(s, lse_rows, low_rows, TWO)  # [ROWS, LEN]
        ds = ds_of(p, do_rows, v_rows, delta_rows, PRECISION)  # [ROWS, LEN]
        if BIAS:
            biases = (bh.to(tl.int64) * queries + row)[:, None] * first + column[None, :]
            there = (row < queries)[:, None] & (column < tl.minimum(first, stop))[None, :]
            tl.store(dbias + biases, ds.to(dbias.dtype.element_ty), mask=there)
        dq_rows += tl.dot((ds * factor[None, :]).to(k_rows.dtype), k_rows, input_precision=PRECISION)
    dq += ((part.to(tl.int64) * (batch_heads // heads) + b) * queries * heads + h) * D
    store_rows_below(dq, row, queries, heads * D, 0, dq_rows, D, BLOCK_D)


def backward(pairs: Pairs, do: Tensor, o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v and the bias; the last is empty if there is none."""
    q, k, v, bias = pairs.q, pairs.k, pairs.v, pairs.bias
    wide = torch.float32
    dbias = q.new_empty((1, 0))
    if bias is not None:
        dbias = bias.new_zeros((len(q), *bias.shape), dtype=wide if len(q) != 1 else bias.dtype)
    if not q.numel():
        return q.new_empty(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape), added(dbias, dbias.dtype)
    delta = torch.empty_like(lse[0])
    inputs, strides = (q, k, v, o, do, lse, delta), strides_of(q, k, v, do)
    programs, parts, named = pairs.launch(
        "agent.queries", _query_gradients, lambda parts: (*inputs, wide if parts > 1 else q.dtype, dbias, *strides),
        q.shape[1], k.shape[1], TWO=len(lse) == 2,
    )  # fmt: skip
    dq = q.new_empty((parts, *q.shape), dtype=wide if parts > 1 else q.dtype)
    _query_gradients[(programs,)](*inputs, dq, dbias, *strides, **named)
    dk, dv = key_gradients(pairs, do, lse, delta)
    return added(dq, q.dtype), dk, dv, added(dbias, q.dtype if bias is None else bias.dtype)
