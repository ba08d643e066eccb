"""The backward of window attention in Triton: a launch whose programs own queries, and one whose programs own keys.

    p = 2^(s - lse),   ds = p (dO v^T - delta),   delta = dO . o
    dq = scale ds k,   dk = scale ds^T q,   dv = p^T dO

The gradients of the shared keys are a third launch, see `pairs.py`.
"""

# ruff: noqa: ANN001, ANN202  # the compiler of a kernel reads no annotations
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from vision_attn.kernels.triton.cells import (
    Cells,
    cell_logits,
    first_slot,
    in_halo,
    near_slots_of,
    neighbors_of,
    shared_logits,
    slots_of,
    wide_slots_of,
)
from vision_attn.kernels.triton.launching import Kernel, strides_of
from vision_attn.kernels.triton.pairs import Pairs, key_gradients, weights_of
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
    q, k, v, o, do, lse, delta, dq, q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, do_b, do_n, do_h,
    sk, sv, sk_b, sk_n, sk_h, sv_b, sv_n, sv_h, mask, mask_b, outside, height, width, cell_h, cell_w, halo_h, halo_w,
    heads, batch_heads, scale, SHARED: tl.constexpr, MASK: tl.constexpr, HALO: tl.constexpr, SLOTS: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TWO: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients dq, and delta of a tile of queries.

    Inputs: q, k, v, do `[B, n, H, D]` of the grid's n tokens, shared keys sk and values sv `[B, outside, H, D]`, each
    with strides `_b, _n, _h`; o like q, contiguous; lse `[1 + TWO, B, H, n]`; mask `[B, outside]` with its stride.
    Outputs: dq `[B, n, H, D]`, delta `[B, H, n]`.
    Grid: as in the forward.
    """
    b, h, bh, _, block = program_of(heads, batch_heads, 1)
    tokens = height * width
    cell, row = slots_of(block * ROWS, height, width, cell_h, cell_w, SLOTS, ROWS)  # [ROWS]
    q_rows = load_rows_below(head_of(q, b, h, q_b, q_h), row, tokens, q_n, 0, D, BLOCK_D)  # [ROWS, BLOCK_D]
    do_rows = load_rows_below(head_of(do, b, h, do_b, do_h), row, tokens, do_n, 0, D, BLOCK_D)  # [ROWS, BLOCK_D]
    o_rows = load_rows_below(
        own_head(o, b, h, tokens, heads, D), row, tokens, heads * D, 0, D, BLOCK_D
    )  # [ROWS, BLOCK_D]
    delta_rows = tl.sum(do_rows.to(tl.float32) * o_rows.to(tl.float32), 1)  # [ROWS]
    low, place = tl.cast(batch_heads, tl.int64) * tokens, bh.to(tl.int64) * tokens + row
    lse_rows, low_rows = load_lse(lse, place, low, row < tokens, TWO)  # [ROWS]
    tl.store(delta + place, delta_rows, mask=row < tokens)
    dq_rows = tl.zeros([ROWS, BLOCK_D], tl.float32)  # [ROWS, BLOCK_D]
    start = first_slot(block, ROWS, TILES)
    KEY_TILES: tl.constexpr = TILES * HALO // SLOTS if HALO else TILES
    for j in tl.range(0, KEY_TILES):
        if HALO:
            other, column = wide_slots_of(
                start // SLOTS * HALO + j * ROWS, height, width, cell_h, cell_w, halo_h, halo_w, HALO, ROWS
            )  # [ROWS]
        else:
            other, column = slots_of(start + j * ROWS, height, width, cell_h, cell_w, SLOTS, ROWS)  # [ROWS]
        k_rows = load_rows_below(head_of(k, b, h, k_b, k_h), column, tokens, k_n, 0, D, BLOCK_D)  # [ROWS, BLOCK_D]
        v_rows = load_rows_below(head_of(v, b, h, v_b, v_h), column, tokens, v_n, 0, D, BLOCK_D)  # [ROWS, BLOCK_D]
        s = cell_logits(q_rows, k_rows, cell, other, column, tokens, scale, PRECISION)  # [ROWS, ROWS]
        ds = ds_of(weights_of(s, lse_rows, low_rows, TWO), do_rows, v_rows, delta_rows, PRECISION)  # [ROWS, ROWS]
        dq_rows += tl.dot(ds.to(k_rows.dtype), k_rows, input_precision=PRECISION)
    if SHARED:
        for j in tl.range(0, outside, ROWS):
            column = j + tl.arange(0, ROWS)  # [ROWS]
            k_rows = load_rows_below(
                head_of(sk, b, h, sk_b, sk_h), column, outside, sk_n, 0, D, BLOCK_D
            )  # [ROWS, BLOCK_D]
            v_rows = load_rows_below(
                head_of(sv, b, h, sv_b, sv_h), column, outside, sv_n, 0, D, BLOCK_D
            )  # [ROWS, BLOCK_D]
            s = shared_logits(
                q_rows, k_rows, row, column, outside, b, h, mask, mask_b, scale, tokens, MASK, PRECISION
            )  # [ROWS, ROWS]
            ds = ds_of(weights_of(s, lse_rows, low_rows, TWO), do_rows, v_rows, delta_rows, PRECISION)  # [ROWS, ROWS]
            dq_rows += tl.dot(ds.to(k_rows.dtype), k_rows, input_precision=PRECISION)
    store_rows_below(own_head(dq, b, h, tokens, heads, D), row, tokens, heads * D, 0, dq_rows * scale, D, BLOCK_D)


@Kernel
@triton.jit
def _key_gradients(
    q, k, v, do, lse, delta, dk, dv, q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, do_b, do_n, do_h,
    height, width, cell_h, cell_w, halo_h, halo_w, heads, batch_heads, scale, HALO: tl.constexpr, SLOTS: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TWO: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients dk and dv of a tile of the grid's keys.

    Inputs: q, k, v, do `[B, n, H, D]`, each with strides `_b, _n, _h`; lse `[1 + TWO, B, H, n]`, delta `[B, H, n]`.
    Outputs: dk, dv `[B, n, H, D]`.
    Grid: as in the forward. With a `HALO` the queries of all cells are walked in whose halo a key may be.
    """
    b, h, bh, _, block = program_of(heads, batch_heads, 1)
    tokens = height * width
    other, column = slots_of(block * ROWS, height, width, cell_h, cell_w, SLOTS, ROWS)  # [ROWS]
    k_rows = load_rows_below(head_of(k, b, h, k_b, k_h), column, tokens, k_n, 0, D, BLOCK_D)  # [ROWS, BLOCK_D]
    v_rows = load_rows_below(head_of(v, b, h, v_b, v_h), column, tokens, v_n, 0, D, BLOCK_D)  # [ROWS, BLOCK_D]
    low = tl.cast(batch_heads, tl.int64) * tokens
    lse += bh.to(tl.int64) * tokens
    delta += bh.to(tl.int64) * tokens
    dk_rows = tl.zeros([ROWS, BLOCK_D], tl.float32)  # [ROWS, BLOCK_D]
    dv_rows = tl.zeros([ROWS, BLOCK_D], tl.float32)  # [ROWS, BLOCK_D]
    start = first_slot(block, ROWS, TILES)
    count = TILES * neighbors_of(cell_h, cell_w, halo_h, halo_w) if HALO else TILES
    for i in tl.range(0, count):
        if HALO:
            cell, row = near_slots_of(
                start + i % TILES * ROWS, i // TILES, height, width, cell_h, cell_w, halo_h, halo_w, SLOTS, ROWS
            )  # [ROWS]
        else:
            cell, row = slots_of(start + i * ROWS, height, width, cell_h, cell_w, SLOTS, ROWS)  # [ROWS]
        q_rows = load_rows_below(head_of(q, b, h, q_b, q_h), row, tokens, q_n, 0, D, BLOCK_D)  # [ROWS, BLOCK_D]
        do_rows = load_rows_below(head_of(do, b, h, do_b, do_h), row, tokens, do_n, 0, D, BLOCK_D)  # [ROWS, BLOCK_D]
        lse_rows, low_rows = load_lse(lse, row, low, row < tokens, TWO)  # [ROWS]
        delta_rows = tl.load(delta + row, mask=row < tokens, other=0.0)  # [ROWS]
        s = cell_logits(q_rows, k_rows, cell, other, column, tokens, scale, PRECISION)  # [ROWS, ROWS]
        seen = (row < tokens)[:, None]  # [ROWS, 1]
        if HALO:
            seen &= in_halo(row, column, width, cell_h, cell_w, halo_h, halo_w)  # [ROWS, ROWS]
        p = tl.where(seen, weights_of(s, lse_rows, low_rows, TWO), 0.0)  # [ROWS, ROWS]
        dv_rows += tl.dot(tl.trans(p.to(do_rows.dtype)), do_rows, input_precision=PRECISION)
        ds = ds_of(p, do_rows, v_rows, delta_rows, PRECISION)  # [ROWS, ROWS]
        dk_rows += tl.dot(tl.trans(ds.to(q_rows.dtype)), q_rows, input_precision=PRECISION)
    store_rows_below(own_head(dk, b, h, tokens, heads, D), column, tokens, heads * D, 0, dk_rows * scale, D, BLOCK_D)
    store_rows_below(own_head(dv, b, h, tokens, heads, D), column, tokens, heads * D, 0, dv_rows, D, BLOCK_D)


def backward(call: Cells, do: Tensor, o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v and of the shared keys and values; the last are empty if there are none."""
    q, k, v = call.q, call.k, call.v
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    shared_dk, shared_dv = (q.new_zeros((0,) if t is None else t.shape) for t in (call.shared_k, call.shared_v))
    if not q.numel():
        return dq, dk, dv, shared_dk, shared_dv
    delta, strides = torch.empty_like(lse[0]), strides_of(q, k, v, do)
    about = call.around() | dict(TWO=len(lse) == 2)
    args, more = (q, k, v, o, do, lse, delta, dq, *strides), call.shared() | about
    programs, named = call.launch("window.queries", _query_gradients, args, lambda _: more, (call.halo,))
    _query_gradients[(programs,)](*args, **named)
    args = q, k, v, do, lse, delta, dk, dv, *strides
    programs, named = call.launch("window.keys", _key_gradients, args, lambda _: about, (call.halo,))
    _key_gradients[(programs,)](*args, **named)
    if call.shared_k is not None and call.shared_v is not None:
        pairs = Pairs(q, call.shared_k, call.shared_v, None, call.mask, 0, (call.scale, call.scale))
        shared_dk, shared_dv = key_gradients(pairs, do, lse, delta)
    return dq, dk, dv, shared_dk, shared_dv
