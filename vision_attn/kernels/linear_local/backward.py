"""The backward of linear-local attention in Triton, without atomics.

    w_ij = 2^(s_ij log2(e) - lse_i) in the window,   r_i = 1 / the normaliser,   delta_i = dO_i . o_i
    ds_ij = w_ij (dO_i . v_j - delta_i),   da_i = r_i ((S - S_w) dO_i - delta_i (z - z_w))
    db_j = (G - G_w) v_j - (y - y_w),   dv_j = sum_i w_ij dO_i + (G - G_w)^T b_j,   G = sum_i r_i a_i dO_i^T

S and z are the sums of the forward, y is sum_i r_i delta_i a_i, and `_w` is the part of a token's own window. The
softmax has no normaliser of its own, so a shift of a query's logits counts. The greatest of them is taken away from
all; its gradient goes to its key, the first one of equals:

    dm_i = -sum_j ds_ij = a_i . da_i

Launches: the gradients of the queries and of their features; G and y, by the kernels of linear attention; the gradients
of the keys, the values and their features; those of the shared keys.
"""

# ruff: noqa: ANN001, ANN202, PLR0915  # the compiler of a kernel reads no annotations
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vision_attn.kernels.launches import Launch
from vision_attn.kernels.linear import linear_state
from vision_attn.kernels.linear_local.forward import features_of
from vision_attn.kernels.triton.cells import Cells, cell_logits, first_slot, shared_logits, slots_of
from vision_attn.kernels.triton.launching import Kernel, strides_of, thrice
from vision_attn.kernels.triton.pairs import Pairs, key_gradients, weights_of
from vision_attn.kernels.triton.rows import (
    START,
    ds_of,
    head_of,
    load_lse,
    load_rows_below,
    own_head,
    program_of,
    store_rows_below,
)


@triton.jit
def _greatest(s, column, top, at):
    """Update the greatest logit of each row, top `[rows]`, and its key, at `[rows]`: the first one of equals."""
    most = tl.max(s, 1)  # [rows]
    first = tl.min(tl.where(s == most[:, None], column[None, :], 2147483647), 1)  # [rows]
    return tl.maximum(top, most), tl.where(most > top, first, at)


@triton.jit
def _within(do_rows, v_rows, delta_rows, cell, other, PRECISION: tl.constexpr):
    """What a weight's gradient is, dO . v - delta `[queries, keys]`, in one window; zero elsewhere."""
    x = tl.dot(do_rows, tl.trans(v_rows), input_precision=PRECISION) - delta_rows[:, None]  # [queries, keys]
    return tl.where(cell[:, None] == other[None, :], x, 0.0)


@Kernel
@triton.jit
def _query_gradients(
    q, k, v, a, b_, state, norm, o, do, lse, shares, dq, da, delta, top, dtop,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, a_b, a_n, a_h, b_b, b_n, b_h, do_b, do_n, do_h,
    sk, sv, sk_b, sk_n, sk_h, sv_b, sv_n, sv_h, mask, mask_b, outside, height, width, cell_h, cell_w, heads,
    batch_heads, scale, SHARED: tl.constexpr, MASK: tl.constexpr, FAR: tl.constexpr, SLOTS: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, F: tl.constexpr,
    BLOCK_F: tl.constexpr, TWO: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradients dq and da of a tile of queries, and what the gradients of the keys need of them.

    Inputs: q, k, v, do `[B, n, H, D]` of the grid's n tokens, features a and b_ `[B, n, H, F]`, shared keys sk and
    values sv `[B, outside, H, D]`, each with strides `_b, _n, _h`; o like q, contiguous; state `[B, H, F, D]` and norm
    `[B, H, F]`; lse `[1 + TWO, B, H, n]`, shares `[B, H, n]`; mask `[B, outside]` with its stride.
    Outputs: dq `[B, n, H, D]`, da `[B, n, H, F]`; delta `[B, H, n]`, the key of the greatest logit top `[B, H, n]`, a
    token of the grid or n plus a shared key, and what its logit gets, dtop `[B, H, n]`.
    Grid: `height` x `width` tokens in cells of `cell_h` x `cell_w`, of `SLOTS` slots, walked in `TILES` of `ROWS`.
    """
    b, h, bh, _, block = program_of(heads, batch_heads, 1)
    tokens = height * width
    cell, row = slots_of(block * ROWS, height, width, cell_h, cell_w, SLOTS, ROWS)  # [ROWS]
    k, v = head_of(k, b, h, k_b, k_h), head_of(v, b, h, v_b, v_h)
    a, b_ = head_of(a, b, h, a_b, a_h), head_of(b_, b, h, b_b, b_h)
    sk, sv = head_of(sk, b, h, sk_b, sk_h), head_of(sv, b, h, sv_b, sv_h)
    q_rows = load_rows_below(head_of(q, b, h, q_b, q_h), row, tokens, q_n, 0, D, BLOCK_D)  # [ROWS, BLOCK_D]
    do_rows = load_rows_below(head_of(do, b, h, do_b, do_h), row, tokens, do_n, 0, D, BLOCK_D)  # [ROWS, BLOCK_D]
    o_rows = load_rows_below(
        own_head(o, b, h, tokens, heads, D), row, tokens, heads * D, 0, D, BLOCK_D
    )  # [ROWS, BLOCK_D]
    delta_rows = tl.sum(do_rows.to(tl.float32) * o_rows.to(tl.float32), 1)  # [ROWS]
    low, place = tl.cast(batch_heads, tl.int64) * tokens, bh.to(tl.int64) * tokens + row
    lse_rows, low_rows = load_lse(lse, place, low, row < tokens, TWO)  # [ROWS]
    there = tl.where(row < tokens, 1.0, 0.0)  # [ROWS]
    most, at = tl.full([ROWS], START, tl.float32), tl.zeros([ROWS], tl.int32)  # [ROWS]
    mass, near = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)  # [ROWS]
    dq_rows = tl.zeros([ROWS, BLOCK_D], tl.float32)  # [ROWS, BLOCK_D]
    start = first_slot(block, ROWS, TILES)
    for j in tl.range(0, TILES):
        other, column = slots_of(start + j * ROWS, height, width, cell_h, cell_w, SLOTS, ROWS)  # [ROWS]
        k_rows = load_rows_below(k, column, tokens, k_n, 0, D, BLOCK_D)  # [ROWS, BLOCK_D]
        v_rows = load_rows_below(v, column, tokens, v_n, 0, D, BLOCK_D)  # [ROWS, BLOCK_D]
        s = cell_logits(q_rows, k_rows, cell, other, column, tokens, scale, PRECISION)  # [ROWS, ROWS]
        most, at = _greatest(s, column, most, at)
        p = weights_of(s, lse_rows, low_rows, TWO) * there[:, None]  # [ROWS, ROWS]
        ds = ds_of(p, do_rows, v_rows, delta_rows, PRECISION)  # [ROWS, ROWS]
        mass += tl.sum(p, 1)
        near += tl.sum(ds, 1)
        dq_rows += tl.dot(ds.to(k_rows.dtype), k_rows, input_precision=PRECISION)
    if SHARED:
        for j in tl.range(0, outside, ROWS):
            column = j + tl.arange(0, ROWS)  # [ROWS]
            k_rows = load_rows_below(sk, column, outside, sk_n, 0, D, BLOCK_D)  # [ROWS, BLOCK_D]
            v_rows = load_rows_below(sv, column, outside, sv_n, 0, D, BLOCK_D)  # [ROWS, BLOCK_D]
            s = shared_logits(
                q_rows, k_rows, row, column, outside, b, h, mask, mask_b, scale, tokens, MASK, PRECISION
            )  # [ROWS, ROWS]
            most, at = _greatest(s, tokens + column, most, at)
            p = weights_of(s, lse_rows, low_rows, TWO) * there[:, None]  # [ROWS, ROWS]
            ds = ds_of(p, do_rows, v_rows, delta_rows, PRECISION)  # [ROWS, ROWS]
            mass += tl.sum(p, 1)
            near += tl.sum(ds, 1)
            dq_rows += tl.dot(ds.to(k_rows.dtype), k_rows, input_precision=PRECISION)
    dtop_rows = tl.zeros([ROWS], tl.float32)  # [ROWS]
    if FAR:
        far = tl.zeros([ROWS], tl.float32)  # [ROWS]
        state += bh.to(tl.int64) * F * D
        share = tl.load(shares + place, mask=row < tokens, other=0.0)  # [ROWS]
        for f in tl.range(0, F, BLOCK_F):
            n = f + tl.arange(0, BLOCK_F)  # [BLOCK_F]
            sums = load_rows_below(state, n, F, D, 0, D, BLOCK_D)  # [BLOCK_F, BLOCK_D]
            z = tl.load(norm + bh * F + n, mask=n < F, other=0.0)  # [BLOCK_F]
            da_rows = tl.dot(do_rows.to(tl.float32), tl.trans(sums), input_precision=WIDE)  # [ROWS, BLOCK_F]
            da_rows -= delta_rows[:, None] * z[None, :]
            for j in tl.range(0, TILES):
                other, column = slots_of(start + j * ROWS, height, width, cell_h, cell_w, SLOTS, ROWS)  # [ROWS]
                v_rows = load_rows_below(v, column, tokens, v_n, 0, D, BLOCK_D)  # [ROWS, BLOCK_D]
                b_rows = load_rows_below(b_, column, tokens, b_n, f, F, BLOCK_F)  # [ROWS, BLOCK_F]
                x = _within(do_rows, v_rows, delta_rows, cell, other, PRECISION)  # [ROWS, ROWS]
                da_rows -= tl.dot(x, b_rows.to(tl.float32), input_precision=WIDE)
            da_rows *= share[:, None]
            a_rows = load_rows_below(a, row, tokens, a_n, f, F, BLOCK_F).to(tl.float32)  # [ROWS, BLOCK_F]
            far += tl.sum(a_rows * da_rows, 1)
            store_rows_below(own_head(da, b, h, tokens, heads, F), row, tokens, heads * F, f, da_rows, F, BLOCK_F)
        # both are dm but for the rounding of delta, which each has by its part of the weight: here it cancels
        dtop_rows = mass * far - (1.0 - mass) * near
        k_rows = load_rows_below(k, at, tokens, k_n, 0, D, BLOCK_D).to(tl.float32)  # [ROWS, BLOCK_D]
        if SHARED:
            beside = tl.where(at < tokens, outside, at - tokens)  # [ROWS]
            k_rows += load_rows_below(sk, beside, outside, sk_n, 0, D, BLOCK_D).to(tl.float32)
        dq_rows += dtop_rows[:, None] * k_rows
    store_rows_below(own_head(dq, b, h, tokens, heads, D), row, tokens, heads * D, 0, dq_rows * scale, D, BLOCK_D)
    tl.store(delta + place, delta_rows, mask=row < tokens)
    tl.store(top + place, at, mask=row < tokens)
    tl.store(dtop + place, dtop_rows, mask=row < tokens)


@Kernel
@triton.jit
def _key_gradients(
    q, k, v, a, b_, do, lse, shares, delta, top, dtop, dstate, dnorm, dk, dv, db,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, a_b, a_n, a_h, b_b, b_n, b_h, do_b, do_n, do_h,
    height, width, cell_h, cell_w, heads, batch_heads, scale, FAR: tl.constexpr, SLOTS: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, F: tl.constexpr,
    BLOCK_F: tl.constexpr, TWO: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradients dk, dv and db of a tile of the grid's keys.

    Inputs: q, k, v, do `[B, n, H, D]`, features a and b_ `[B, n, H, F]`, each with strides `_b, _n, _h`; lse
    `[1 + TWO, B, H, n]`, shares, delta, top, dtop `[B, H, n]`; dstate `[B, H, F, D]` and dnorm `[B, H, F]`: G and y.
    Outputs: dk, dv `[B, n, H, D]`, db `[B, n, H, F]`.
    Grid: `height` x `width` tokens in cells of `cell_h` x `cell_w`, of `SLOTS` slots, walked in `TILES` of `ROWS`.
    """
    b, h, bh, _, block = program_of(heads, batch_heads, 1)
    tokens = height * width
    other, column = slots_of(block * ROWS, height, width, cell_h, cell_w, SLOTS, ROWS)  # [ROWS]
    q, do = head_of(q, b, h, q_b, q_h), head_of(do, b, h, do_b, do_h)
    a, b_ = head_of(a, b, h, a_b, a_h), head_of(b_, b, h, b_b, b_h)
    k_rows = load_rows_below(head_of(k, b, h, k_b, k_h), column, tokens, k_n, 0, D, BLOCK_D)  # [ROWS, BLOCK_D]
    v_rows = load_rows_below(head_of(v, b, h, v_b, v_h), column, tokens, v_n, 0, D, BLOCK_D)  # [ROWS, BLOCK_D]
    low, head = tl.cast(batch_heads, tl.int64) * tokens, bh.to(tl.int64) * tokens
    dk_rows = tl.zeros([ROWS, BLOCK_D], tl.float32)  # [ROWS, BLOCK_D]
    dv_rows = tl.zeros([ROWS, BLOCK_D], tl.float32)  # [ROWS, BLOCK_D]
    start = first_slot(block, ROWS, TILES)
    for i in tl.range(0, TILES):
        cell, row = slots_of(start + i * ROWS, height, width, cell_h, cell_w, SLOTS, ROWS)  # [ROWS]
        q_rows = load_rows_below(q, row, tokens, q_n, 0, D, BLOCK_D)  # [ROWS, BLOCK_D]
        do_rows = load_rows_below(do, row, tokens, do_n, 0, D, BLOCK_D)  # [ROWS, BLOCK_D]
        place, there = head + row, row < tokens  # [ROWS]
        lse_rows, low_rows = load_lse(lse, place, low, there, TWO)  # [ROWS]
        delta_rows = tl.load(delta + place, mask=there, other=0.0)  # [ROWS]
        s = cell_logits(q_rows, k_rows, cell, other, column, tokens, scale, PRECISION)  # [ROWS, ROWS]
        p = tl.where(there[:, None], weights_of(s, lse_rows, low_rows, TWO), 0.0)  # [ROWS, ROWS]
        dv_rows += tl.dot(tl.trans(p.to(do_rows.dtype)), do_rows, input_precision=PRECISION)
        ds = ds_of(p, do_rows, v_rows, delta_rows, PRECISION)  # [ROWS, ROWS]
        if FAR:
            at = tl.load(top + place, mask=there, other=-1)  # [ROWS]
            more = tl.load(dtop + place, mask=there, other=0.0)  # [ROWS]
            ds += tl.where(at[:, None] == column[None, :], more[:, None], 0.0)
            share = tl.load(shares + place, mask=there, other=0.0)  # [ROWS]
            own = tl.zeros([ROWS, ROWS], tl.float32)  # [ROWS, ROWS]
            for f in tl.range(0, F, BLOCK_F):
                a_rows = load_rows_below(a, row, tokens, a_n, f, F, BLOCK_F)  # [ROWS, BLOCK_F]
                b_rows = load_rows_below(b_, column, tokens, b_n, f, F, BLOCK_F)  # [ROWS, BLOCK_F]
                own = tl.dot(a_rows, tl.trans(b_rows), own, input_precision=PRECISION)
            own = tl.where(cell[:, None] == other[None, :], own * share[:, None], 0.0)
            dv_rows -= tl.dot(tl.trans(own), do_rows.to(tl.float32), input_precision=WIDE)
        dk_rows += tl.dot(tl.trans(ds.to(q_rows.dtype)), q_rows, input_precision=PRECISION)
    store_rows_below(own_head(dk, b, h, tokens, heads, D), column, tokens, heads * D, 0, dk_rows * scale, D, BLOCK_D)
    if FAR:
        dstate += bh.to(tl.int64) * F * D
        db = own_head(db, b, h, tokens, heads, F)
        for f in tl.range(0, F, BLOCK_F):
            n = f + tl.arange(0, BLOCK_F)  # [BLOCK_F]
            sums = load_rows_below(dstate, n, F, D, 0, D, BLOCK_D)  # [BLOCK_F, BLOCK_D]
            y = tl.load(dnorm + bh * F + n, mask=n < F, other=0.0)  # [BLOCK_F]
            b_rows = load_rows_below(b_, column, tokens, b_n, f, F, BLOCK_F).to(tl.float32)  # [ROWS, BLOCK_F]
            dv_rows += tl.dot(b_rows, sums, input_precision=WIDE)
            db_rows = tl.dot(v_rows.to(tl.float32), tl.trans(sums), input_precision=WIDE) - y[None, :]
            for i in tl.range(0, TILES):
                cell, row = slots_of(start + i * ROWS, height, width, cell_h, cell_w, SLOTS, ROWS)  # [ROWS]
                do_rows = load_rows_below(do, row, tokens, do_n, 0, D, BLOCK_D)  # [ROWS, BLOCK_D]
                delta_rows = tl.load(delta + head + row, mask=row < tokens, other=0.0)  # [ROWS]
                share = tl.load(shares + head + row, mask=row < tokens, other=0.0)  # [ROWS]
                a_rows = load_rows_below(a, row, tokens, a_n, f, F, BLOCK_F).to(tl.float32)  # [ROWS, BLOCK_F]
                x = _within(do_rows, v_rows, delta_rows, cell, other, PRECISION) * share[:, None]  # [ROWS, ROWS]
                db_rows -= tl.dot(tl.trans(x), a_rows, input_precision=WIDE)
            store_rows_below(db, column, tokens, heads * F, f, db_rows, F, BLOCK_F)
    store_rows_below(own_head(dv, b, h, tokens, heads, D), column, tokens, heads * D, 0, dv_rows, D, BLOCK_D)


def backward(
    call: Cells, a: Tensor, b: Tensor, gate: Tensor, state: Tensor, norm: Tensor, whole: bool, do: Tensor, o: Tensor,
    lse: Tensor, shares: Tensor,
) -> list[Tensor]:  # fmt: skip
    """Return the gradients of q, k, v, a, b, the shared keys and values, state, norm and gate.

    Args:
        call: Queries, keys and values.
        a: Features of the queries `[B, n, H, F]`.
        b: Features of the keys, like `a`.
        gate: Weights of the softmax part `[H]`.
        state: Sum of features times values `[B, H, F, D]`.
        norm: Sum of the features `[B, H, F]`.
        whole: Whether both have a gradient; if not, theirs are empty.
        do: Gradient of the output.
        o: Output.
        lse: From the forward.
        shares: From the forward.
    """
    q, k, v = call.q, call.k, call.v
    F, far = a.shape[-1], whole or call.count > 1
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    da, db = (t.new_empty(t.shape) if far else t.new_zeros(t.shape) for t in (a, b))
    shared_dk, shared_dv = (q.new_zeros((0,) if t is None else t.shape) for t in (call.shared_k, call.shared_v))
    d_state, d_norm = (t.new_zeros(t.shape if whole else (0,)) for t in (state, norm))
    if not q.numel():
        return [dq, dk, dv, da, db, shared_dk, shared_dv, d_state, d_norm, torch.zeros_like(gate)]
    delta, dtop = (torch.empty_like(shares) for _ in range(2))
    top = torch.empty_like(shares, dtype=torch.int32)
    strides = strides_of(q, k, v, a, b, do)
    about: dict[str, Any] = dict(FAR=far, F=F, TWO=len(lse) == 2, WIDE=thrice(q))

    def more(launch: Launch) -> dict[str, Any]:
        return dict(BLOCK_F=features_of(F, launch), **about)

    args = q, k, v, a, b, state, norm, o, do, lse, shares, dq, da, delta, top, dtop, *strides
    shared = call.shared()
    programs, named = call.launch(
        "linear_local.queries", _query_gradients, args, lambda launch: more(launch) | shared, (F, far)
    )
    _query_gradients[(programs,)](*args, **named)
    G, y = state, norm
    if far:
        share, sum_weight = (t.transpose(1, 2) for t in (shares, delta))
        G, y = linear_state(a, do, share, sum_weight=sum_weight)
    # sums that are given are not those of these keys: only what their window takes away is
    of_keys = (torch.zeros_like(G), torch.zeros_like(y)) if whole else (G, y)
    args = q, k, v, a, b, do, lse, shares, delta, top, dtop, *of_keys, dk, dv, db, *strides
    programs, named = call.launch("linear_local.keys", _key_gradients, args, more, (F, far))
    _key_gradients[(programs,)](*args, **named)
    if call.shared_k is not None and call.shared_v is not None:
        greatest = (top - q.shape[1], dtop) if far else None
        pairs = Pairs(q, call.shared_k, call.shared_v, None, call.mask, 0, (call.scale, call.scale), greatest)
        shared_dk, shared_dv = key_gradients(pairs, do, lse, delta)
    if whole:
        d_state, d_norm = G, -y
    return [dq, dk, dv, da, db, shared_dk, shared_dv, d_state, d_norm, -dtop.sum((0, 2)) / gate]
