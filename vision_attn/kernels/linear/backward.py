"""The backward of linear attention in Triton: gradients of the queries and of the state, then of keys and values.

    u_i = (S - z m) do_i,   e_i = phi(q_i) . u_i / den_i - eps m . do_i / den_i,   dphi(q_i) = (u_i - e_i z) / den_i
    dS = sum_i phi(q_i) / den_i do_i^T,   y = -sum_i phi(q_i) / den_i e_i
    dv_j = w_j dS^T phi(k_j),   dphi(k_j) = w_j (dS (v_j - m) + y)

(rotation left out; den is the normaliser, m see `tiles.py`.) The first launch reads q and do and writes
dq, the last reads k and v and writes dk and dv: seven tensors in all, which is the floor. o is not needed. Where a
state does not fit in the registers beside all that, q and do are read once more.
"""

# ruff: noqa: ANN001, ANN202, PLR0912, PLR0915  # the compiler of a kernel reads no annotations
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from vision_attn.kernels.linear.forward import Call, config, loading, merged, state_parts
from vision_attn.kernels.linear.tiles import (
    LANES,
    Launch,
    centred,
    column,
    cut,
    divisor,
    feature_sums,
    inverse,
    lane_sums,
    mapped,
    power,
    put_rows,
    slope,
    state_block,
    steps,
    tile_rows,
    token_rows,
    turned,
    unit_of,
    weighed,
)
from vision_attn.kernels.triton.launching import Bound, Kernel, planned
from vision_attn.kernels.triton.plan import Plan

# 16 bits up to 128 channels: tuned on an H200 with triton 3.6; else chosen by registers and shared memory.
# Keys: bytes of an element, channels of the features and of the values at most.
_QUERIES: dict[tuple[int, int, int], Launch] = {
    (2, 64, 64): Launch(64, 4, 3, 4, Launch(64, 4, 3, 4)),
    (2, 128, 128): Launch(64, 4, 2, 4, Launch(64, 4, 3, 4)),
    (2, 256, 256): Launch(16, 8, 1, 4),
    (4, 64, 64): Launch(32, 8, 2, 2),
    (4, 128, 128): Launch(32, 8, 1, 1),
    (4, 256, 256): Launch(16, 8, 1, 4),
}
_KEYS: dict[tuple[int, int, int], Launch] = {
    (2, 64, 64): Launch(64, 4, 2, 8, Launch(64, 4, 4, 6)),
    (2, 128, 128): Launch(64, 4, 3, 2),
    (2, 256, 256): Launch(16, 8, 1, 4),
    (4, 64, 64): Launch(32, 8, 2, 4),
    (4, 128, 128): Launch(32, 8, 1, 4),
    (4, 256, 256): Launch(16, 8, 1, 4),
}
_FUSED = 64 * 64  # elements of a state that the program of a query's gradient can hold


@Kernel
@triton.jit
def _query_gradients(
    q, do, state, norm, cos, sin, dq, part, factors, inverses, part_kappa, means, q_box, do_box,
    q_b, q_n, q_h, do_b, do_n, do_h, cos_n, tokens, heads, batch_heads, length, eps, floor,
    FUSED: tl.constexpr, GLOBAL: tl.constexpr, SCALED: tl.constexpr, TMA: tl.constexpr, LEN: tl.constexpr,
    STAGES: tl.constexpr, LANES: tl.constexpr, MAP: tl.constexpr, ROTARY: tl.constexpr, F: tl.constexpr,
    BLOCK_F: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Dq of a part of the queries, and their part of dS and y; not `FUSED`: 1 / den and the factor of y instead."""
    pid = tl.program_id(0)
    bh = pid % batch_heads
    slice_ = pid // batch_heads
    D_BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    batch, head = bh // heads, bh % heads
    b, h = batch.to(tl.int64), head.to(tl.int64)
    q += (b * q_b + h * q_h) * unit_of(q)
    do += (b * do_b + h * do_h) * unit_of(do)
    dq += (b * tokens * heads + h) * F
    state += bh.to(tl.int64) * F * D
    z, c = divisor(norm + bh * F, floor, F, BLOCK_F, ROTARY)
    f = tl.arange(0, BLOCK_F)
    dtype: tl.constexpr = q.dtype.element_ty
    SPLIT: tl.constexpr = dtype != tl.float32
    s, mean = centred(state, z, c, 0, dtype, F, BLOCK_F, D, BLOCK_D, ROTARY, SCALED)
    d = tl.arange(0, BLOCK_D)
    tl.store(means + bh * D + d, mean, mask=(d < D) & (slice_ == 0))
    mean_column = column(mean, LANES).to(dtype)
    acc = tl.zeros([BLOCK_F, BLOCK_D], tl.float32)
    sums = tl.zeros([LANES, BLOCK_F], tl.float32)
    columns = tl.zeros([BLOCK_F, LANES], tl.float32)
    kappa = tl.zeros([LEN], tl.float32)
    stop = tl.minimum(tokens, (slice_ + 1) * length)
    for j in tl.range(slice_ * length, stop, LEN, num_stages=STAGES):
        row = j + tl.arange(0, LEN)
        x = tile_rows(q, q_box, batch, head, j, stop, q_n * unit_of(q), 0, LEN, F, BLOCK_F, TMA)
        g = tile_rows(do, do_box, batch, head, j, stop, do_n * unit_of(do), 0, LEN, D, BLOCK_D, TMA)
        phi = mapped(x, MAP)
        norms = tl.sum(phi * z[None, :], 1)
        share = 1.0 / (norms + eps)
        u = tl.dot(g, tl.trans(s), input_precision=PRECISION)
        common = tl.zeros([LEN], tl.float32)
        if not ROTARY:
            common = tl.sum(tl.dot(g, mean_column, input_precision=PRECISION), 1)
        for block in tl.static_range(1, D_BLOCKS):
            more = token_rows(do, row, stop, do_n * unit_of(do), block * BLOCK_D, D, BLOCK_D)
            other, middle = centred(
                state, z, c, block * BLOCK_D, dtype, F, BLOCK_F, D, BLOCK_D, ROTARY, SCALED
            )  # fmt: skip
            u += tl.dot(more, tl.trans(other), input_precision=PRECISION)
            common += tl.sum(more.to(tl.float32) * middle[None, :], 1)
            tl.store(means + bh * D + block * BLOCK_D + d, middle, mask=(block * BLOCK_D + d < D) & (slice_ == 0))
        if SCALED:
            u *= c[None, :]
        if ROTARY:
            u = turned(u, cos, sin, row, stop, cos_n, F, BLOCK_F, True)
        # rows from `stop` on have do = 0, so e = 0
        e = (tl.sum(phi * u, 1) - eps * common) * share
        dphi = (u - e[:, None] * z[None, :]) * share[:, None]
        put_rows(dq, row, stop, heads * F, 0, dphi * slope(x, MAP), F, BLOCK_F)
        if GLOBAL:
            kappa += (e + common) * share
        if FUSED:
            p = phi * share[:, None]
            if SCALED:
                p *= c[None, :]
            if not SPLIT:
                sums -= lane_sums(p * e[:, None], LANES)
                if ROTARY:
                    p = turned(p, cos, sin, row, stop, cos_n, F, BLOCK_F, False)
                acc += tl.dot(tl.trans(p.to(dtype)), g, input_precision=PRECISION)
            else:
                low = p.to(dtype)
                columns -= feature_sums(low, e, True, SCALED, LANES)
                if ROTARY:
                    low = turned(p, cos, sin, row, stop, cos_n, F, BLOCK_F, False).to(dtype)
                acc += tl.dot(tl.trans(low), g)
        else:
            place = bh.to(tl.int64) * tokens + row
            tl.store(inverses + place, share, mask=row < stop)
            tl.store(factors + place, -e, mask=row < stop)
    place = slice_.to(tl.int64) * batch_heads + bh
    if FUSED:
        added = tl.sum(columns, 1) if SPLIT else tl.sum(sums, 0)
        if SCALED:
            acc *= inverse(c)[:, None]
            added *= inverse(c)
        part += place * (F * D + F)
        put_rows(part, f, F, D, 0, acc, D, BLOCK_D)
        tl.store(part + F * D + f, added, mask=f < F)
    if GLOBAL:
        tl.store(part_kappa + place, eps * tl.sum(kappa, 0))


@triton.jit
def _less_mean(y, s, means, first, size, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Y - s m, with s as products take it, so that its rounding cancels."""
    d = first + tl.arange(0, BLOCK_D)
    mean = tl.load(means + d, mask=d < D, other=0.0)
    return y - tl.sum(s.to(tl.float32) * mean[None, :], 1) * size


@Kernel
@triton.jit
def _key_gradients(
    k, v, weight, query, cos, sin, dstate, y, scale, tops, kappa, means, dk, dv, dweight, part_query, k_box,
    v_box, k_b, k_n, k_h, v_b, v_n, v_h, w_b, w_n, w_h, cos_n, tokens, heads, batch_heads, length,
    WEIGHT: tl.constexpr, GLOBAL: tl.constexpr, SCALED: tl.constexpr, WEIGHT_GRADIENT: tl.constexpr,
    TMA: tl.constexpr, LEN: tl.constexpr, STAGES: tl.constexpr, LANES: tl.constexpr, MAP: tl.constexpr,
    ROTARY: tl.constexpr, F: tl.constexpr, BLOCK_F: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, dv and the gradient of the weights of a part of the keys, and its part of the global query's."""
    pid = tl.program_id(0)
    bh = pid % batch_heads
    slice_ = pid // batch_heads
    D_BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    batch, head = bh // heads, bh % heads
    b, h = batch.to(tl.int64), head.to(tl.int64)
    k += (b * k_b + h * k_h) * unit_of(k)
    v += (b * v_b + h * v_h) * unit_of(v)
    weight += b * w_b + h * w_h
    dk += (b * tokens * heads + h) * F
    dv += (b * tokens * heads + h) * D
    dweight += b * tokens * heads + h
    dstate += bh.to(tl.int64) * F * D
    means += bh * D
    f = tl.arange(0, BLOCK_F)
    size = tl.load(scale + bh) if SCALED else 1.0
    g = tl.zeros([BLOCK_F], tl.float32)
    top, total, mean_logit = 0.0, 1.0, 0.0
    if GLOBAL:
        g = tl.load(query + bh * F + f, mask=f < F, other=0.0)
        top, total, mean_logit = tl.load(tops + bh * 2), tl.load(tops + bh * 2 + 1), tl.load(kappa + bh)
    s = state_block(dstate, 0, F, BLOCK_F, D, BLOCK_D)
    added = tl.load(y + bh * F + f, mask=f < F, other=0.0)
    if not ROTARY:
        for block in tl.static_range(0, D_BLOCKS):
            columns = state_block(dstate, block * BLOCK_D, F, BLOCK_F, D, BLOCK_D)
            added = _less_mean(added, columns, means, block * BLOCK_D, size, D, BLOCK_D)
    sums = tl.zeros([LANES, BLOCK_F], tl.float32)
    shared = tl.zeros([LANES, BLOCK_F], tl.float32)
    rest = tl.zeros([LEN], tl.float32)
    stop = tl.minimum(tokens, (slice_ + 1) * length)
    for j in tl.range(slice_ * length, stop, LEN, num_stages=STAGES):
        row = j + tl.arange(0, LEN)
        x = tile_rows(k, k_box, batch, head, j, stop, k_n * unit_of(k), 0, LEN, F, BLOCK_F, TMA)
        values = tile_rows(v, v_box, batch, head, j, stop, v_n * unit_of(v), 0, LEN, D, BLOCK_D, TMA)
        phi = mapped(x, MAP)
        w, logit = weighed(phi, row, stop, g, weight, w_n, WEIGHT, GLOBAL)
        share = power(logit - top) / total if GLOBAL else tl.full([LEN], 1.0, tl.float32)
        both = share * w
        rho = phi
        if ROTARY:
            rho = turned(rho, cos, sin, row, stop, cos_n, F, BLOCK_F, False)
        back = both * size
        if SCALED:
            if F < BLOCK_F:
                rho = tl.where((f < F)[None, :], rho, 0.0)
            most = tl.max(tl.abs(rho), 1)
            most = tl.where(most > 0.0, most, 1.0)
            rho = rho * (1.0 / most)[:, None]
            back *= most
        low = rho.to(values.dtype)
        rows = tl.dot(low, s, input_precision=PRECISION)
        if SCALED or WEIGHT or GLOBAL:
            rows *= back[:, None]
        put_rows(dv, row, stop, heads * D, 0, rows, D, BLOCK_D)
        a = tl.dot(values, tl.trans(s), input_precision=PRECISION)
        for block in tl.static_range(1, D_BLOCKS):
            more = token_rows(v, row, stop, v_n * unit_of(v), block * BLOCK_D, D, BLOCK_D)
            columns = state_block(dstate, block * BLOCK_D, F, BLOCK_F, D, BLOCK_D)
            rows = tl.dot(low, columns, input_precision=PRECISION)
            put_rows(dv, row, stop, heads * D, block * BLOCK_D, rows * back[:, None], D, BLOCK_D)
            a += tl.dot(more, tl.trans(columns), input_precision=PRECISION)
        if ROTARY:
            a = turned(a, cos, sin, row, stop, cos_n, F, BLOCK_F, True)
        if SCALED:
            a *= size
        a += added[None, :]
        dphi = a
        if WEIGHT or GLOBAL:
            dphi = a * both[:, None]
        if WEIGHT_GRADIENT or GLOBAL:
            inner = tl.sum(a * phi, 1)
            if WEIGHT_GRADIENT:
                place = row.to(tl.int64) * heads
                tl.store(dweight + place, (share * inner).to(dweight.dtype.element_ty), mask=row < stop)
            if GLOBAL:
                dlogit = share * (w * inner - mean_logit)
                dphi += dlogit[:, None] * g[None, :]
                sums += lane_sums(dlogit[:, None] * phi, LANES)
                shared += lane_sums(share[:, None] * phi, LANES)
                rest += dlogit
        put_rows(dk, row, stop, heads * F, 0, dphi * slope(x, MAP), F, BLOCK_F)
    if GLOBAL:
        part_query += (slice_.to(tl.int64) * batch_heads + bh) * 3 * F + f
        tl.store(part_query, tl.sum(sums, 0), mask=f < F)
        tl.store(part_query + F, tl.sum(shared, 0), mask=f < F)
        tl.store(part_query + 2 * F, tl.zeros([BLOCK_F], tl.float32) + tl.sum(rest, 0), mask=f < F)


@planned
def _plan_queries(call: Call, launch: Launch, do: Tensor) -> tuple[Plan, bool]:
    """Plan a launch of `_query_gradients`, and tell whether it holds the state's gradient too."""
    q, constants = call.q, call.constants()
    B, N, H, _ = q.shape
    fused = constants["BLOCK_F"] * do.shape[-1] <= _FUSED
    launch, boxes = loading(launch, (q, do), (constants["BLOCK_F"], constants["BLOCK_D"]))
    parts, length = cut(N, B * H, launch, q, 4 if fused else 1)
    named = dict(
        FUSED=fused, GLOBAL=call.query is not None, SCALED=call.scaled, TMA=boxes[0] is not None, LEN=launch.length,
        STAGES=launch.stages, LANES=LANES, num_warps=launch.warps, **constants,
    )  # fmt: skip
    numbers = *steps(q), *steps(do), call.rotary()[2], N, H, B * H, length, call.eps, call.floor
    return Plan(Bound(_query_gradients, (parts * B * H,), numbers, named), parts, boxes), fused


@planned
def _plan_keys(call: Call, launch: Launch, weight_gradient: bool) -> Plan:
    k, v, weight, constants = call.k, call.v, call.weight, call.constants()
    B, M, H, _ = k.shape
    launch, boxes = loading(launch, (k, v), (constants["BLOCK_F"], constants["BLOCK_D"]))
    parts, length = cut(M, B * H, launch, k, 1)
    named = dict(
        WEIGHT=weight is not None, GLOBAL=call.query is not None, SCALED=call.scaled, WEIGHT_GRADIENT=weight_gradient,
        TMA=boxes[0] is not None, LEN=launch.length, STAGES=launch.stages, LANES=LANES, num_warps=launch.warps,
        **constants,
    )  # fmt: skip
    w = (0, 0, 0) if weight is None else weight.stride()
    numbers = *steps(k), *steps(v), *w, call.rotary()[2], M, H, B * H, length
    return Plan(Bound(_key_gradients, (parts * B * H,), numbers, named), parts, boxes)


def backward(
    call: Call, do: Tensor, state: Tensor, norm: Tensor, tops: Tensor, weight_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, the weights and the global query; empty for what is None or not wanted."""
    q, k, v = call.q, call.k, call.v
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    weight = call.weight
    dweight = q.new_empty(k.shape[:3] if weight_gradient else (0,), dtype=q.dtype if weight is None else weight.dtype)
    dquery = norm.new_empty(norm.shape if call.query is not None else (0,))
    if not dq.numel() or not dv.numel():
        return dq.zero_(), dk.zero_(), dv.zero_(), dweight.zero_(), dquery.zero_()
    means = norm.new_empty((*k.shape[:1], *v.shape[2:]))
    dstate, y, kappa = _state_gradients(call, do, state, norm, dq, means)
    B, _, H, F = k.shape
    size = norm
    if call.scaled:  # float16 has no range for sums over all queries
        size = dstate.abs().amax((2, 3)).clamp_(min=1e-30)
        dstate = (dstate / size[:, :, None, None]).to(q.dtype)
    plan = _plan_keys(call, config(call, _KEYS), weight_gradient)
    part_query = norm.new_empty((plan.parts, B, H, 3, F)) if call.query is not None else norm
    plan.run(
        k, v, norm if weight is None else weight, norm if call.query is None else call.query, *call.rotary()[:2],
        dstate, y, size, tops, kappa, means, dk, dv, dweight, part_query, boxed=(k, v),
    )  # fmt: skip
    if call.query is not None:
        # gradients of a softmax sum to zero: what rounding leaves is taken out
        straight, shared, rest = part_query.sum(0).unbind(2)
        dquery = straight - rest * shared
    return dq, dk, dv, dweight, dquery


def _state_gradients(
    call: Call, do: Tensor, state: Tensor, norm: Tensor, dq: Tensor, means: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Fill dq and the means of the state; return dS, y `[B, H, F]`, and eps times the sum of delta / den `[B, H]`."""
    q = call.q
    B, N, H, F = q.shape
    plan, fused = _plan_queries(call, config(call, _QUERIES), do)
    part, factors, inverses, kappa = norm, norm, norm, norm
    if fused:
        part = norm.new_empty((plan.parts, B, H, F * do.shape[-1] + F))
    else:
        inverses, factors = (norm.new_empty((B, H, N)).transpose(1, 2) for _ in range(2))
    if call.query is not None:
        kappa = norm.new_empty((plan.parts, B, H))
    plan.run(q, do, state, norm, *call.rotary()[:2], dq, part, factors, inverses, kappa, means, boxed=(q, do))
    if call.query is not None:
        kappa = kappa.sum(0)
    if not fused:
        part, _ = state_parts(call, q, do, inverses, factors, None)
    factor = 1.0 / call.k.shape[1] if call.query is None else 1.0
    dstate, y, _ = merged(call, part, None, torch.float32 if call.scaled else q.dtype, factor)
    return dstate, y, kappa
