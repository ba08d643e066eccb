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

from vision_attn.kernels.launches import Launch
from vision_attn.kernels.linear import wide
from vision_attn.kernels.linear.call import Call, fitting_plan
from vision_attn.kernels.linear.forward import loading, merged, state_parts
from vision_attn.kernels.linear.tiles import (
    centred,
    column,
    divisor,
    feature_sums,
    inverse,
    lane_sums,
    mapped,
    power,
    slope,
    state_block,
    turned,
    weighed,
)
from vision_attn.kernels.triton.launching import LANES, Bound, Kernel, cut, planned, unit_strides_of
from vision_attn.kernels.triton.rows import (
    Plan,
    head_of,
    load_rows_below,
    load_tile_below,
    own_head,
    program_of,
    store_rows_below,
    unit_head_of,
    unit_of,
)

_FUSED = 64 * 64  # elements of a state that the program of a query's gradient can hold


@Kernel
@triton.jit
def _query_gradients(
    q, do, state, norm, cos, sin, dq, part_sums, factors, inverses, part_kappa, means, q_box, do_box,
    q_b, q_n, q_h, do_b, do_n, do_h, cos_n, tokens, heads, batch_heads, length, eps, floor,
    FUSED: tl.constexpr, GLOBAL: tl.constexpr, SCALED: tl.constexpr, TMA: tl.constexpr, LEN: tl.constexpr,
    STAGES: tl.constexpr, LANES: tl.constexpr, MAP: tl.constexpr, ROTARY: tl.constexpr, F: tl.constexpr,
    BLOCK_F: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients dq of a part of the queries, and their part of dS and y; not `FUSED`: 1 / den and the factor of y.

    Inputs: q `[B, tokens, H, F]`, do `[B, tokens, H, D]`, each with strides `_b, _n, _h` in units of 16 bytes; state
    `[B, H, F, D]`, norm `[B, H, F]`; cos, sin `[tokens, F]`.
    Outputs: dq `[B, tokens, H, F]`; means of the values `[B, H, D]`; if `FUSED` part_sums `[parts, B, H, F * D + F]`,
    else factors and inverses `[B, H, tokens]`; if `GLOBAL` part_kappa `[parts, B, H]`.
    Launch: parts of `length` queries, in steps of `LEN`; blocks of `BLOCK_D` values one after another.
    """
    D_BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    b, h, bh, _, part = program_of(heads, batch_heads, 1)
    q, do = unit_head_of(q, b, h, q_b, q_h), unit_head_of(do, b, h, do_b, do_h)
    dq = own_head(dq, b, h, tokens, heads, F)
    state += bh.to(tl.int64) * F * D
    z, c = divisor(norm + bh * F, floor, F, BLOCK_F, ROTARY)  # [BLOCK_F]
    f = tl.arange(0, BLOCK_F)  # [BLOCK_F]
    dtype: tl.constexpr = q.dtype.element_ty
    SPLIT: tl.constexpr = dtype != tl.float32
    S, mean = centred(state, z, c, 0, dtype, F, BLOCK_F, D, BLOCK_D, ROTARY, SCALED)  # [BLOCK_F, BLOCK_D], [BLOCK_D]
    d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    tl.store(means + bh * D + d, mean, mask=(d < D) & (part == 0))
    mean_column = column(mean, LANES).to(dtype)  # [BLOCK_D, LANES]
    dS = tl.zeros([BLOCK_F, BLOCK_D], tl.float32)  # [BLOCK_F, BLOCK_D]
    sums = tl.zeros([LANES, BLOCK_F], tl.float32)  # [LANES, BLOCK_F]
    columns = tl.zeros([BLOCK_F, LANES], tl.float32)  # [BLOCK_F, LANES]
    kappa = tl.zeros([LEN], tl.float32)  # [LEN]
    stop = tl.minimum(tokens, (part + 1) * length)
    for j in tl.range(part * length, stop, LEN, num_stages=STAGES):
        row = j + tl.arange(0, LEN)  # [LEN]
        q_rows = load_tile_below(q, q_box, b, h, j, stop, q_n * unit_of(q), 0, LEN, F, BLOCK_F, TMA)  # [LEN, BLOCK_F]
        do_rows = load_tile_below(
            do, do_box, b, h, j, stop, do_n * unit_of(do), 0, LEN, D, BLOCK_D, TMA
        )  # [LEN, BLOCK_D]
        phi = mapped(q_rows, MAP)  # [LEN, BLOCK_F]
        norms = tl.sum(phi * z[None, :], 1)  # [LEN]
        share = 1.0 / (norms + eps)  # [LEN]
        u = tl.dot(do_rows, tl.trans(S), input_precision=PRECISION)  # [LEN, BLOCK_F]
        common = tl.zeros([LEN], tl.float32)  # [LEN]
        if not ROTARY:
            common = tl.sum(tl.dot(do_rows, mean_column, input_precision=PRECISION), 1)
        for block in tl.static_range(1, D_BLOCKS):
            more = load_rows_below(do, row, stop, do_n * unit_of(do), block * BLOCK_D, D, BLOCK_D)  # [LEN, BLOCK_D]
            other, middle = centred(
                state, z, c, block * BLOCK_D, dtype, F, BLOCK_F, D, BLOCK_D, ROTARY, SCALED
            )  # [BLOCK_F, BLOCK_D], [BLOCK_D]
            u += tl.dot(more, tl.trans(other), input_precision=PRECISION)
            common += tl.sum(more.to(tl.float32) * middle[None, :], 1)
            tl.store(means + bh * D + block * BLOCK_D + d, middle, mask=(block * BLOCK_D + d < D) & (part == 0))
        if SCALED:
            u *= c[None, :]
        if ROTARY:
            u = turned(u, cos, sin, row, stop, cos_n, F, BLOCK_F, True)
        # rows from `stop` on have dO = 0, so e = 0
        e = (tl.sum(phi * u, 1) - eps * common) * share  # [LEN]
        dphi = (u - e[:, None] * z[None, :]) * share[:, None]  # [LEN, BLOCK_F]
        store_rows_below(dq, row, stop, heads * F, 0, dphi * slope(q_rows, MAP), F, BLOCK_F)
        if GLOBAL:
            kappa += (e + common) * share
        if FUSED:
            p = phi * share[:, None]  # [LEN, BLOCK_F]
            if SCALED:
                p *= c[None, :]
            if not SPLIT:
                sums -= lane_sums(p * e[:, None], LANES)
                if ROTARY:
                    p = turned(p, cos, sin, row, stop, cos_n, F, BLOCK_F, False)
                dS += tl.dot(tl.trans(p.to(dtype)), do_rows, input_precision=PRECISION)
            else:
                low = p.to(dtype)  # [LEN, BLOCK_F]
                columns -= feature_sums(low, e, True, SCALED, LANES)
                if ROTARY:
                    low = turned(p, cos, sin, row, stop, cos_n, F, BLOCK_F, False).to(dtype)
                dS += tl.dot(tl.trans(low), do_rows)
        else:
            place = bh.to(tl.int64) * tokens + row
            tl.store(inverses + place, share, mask=row < stop)
            tl.store(factors + place, -e, mask=row < stop)
    place = part.to(tl.int64) * batch_heads + bh
    if FUSED:
        y = tl.sum(columns, 1) if SPLIT else tl.sum(sums, 0)  # [BLOCK_F]
        if SCALED:
            dS *= inverse(c)[:, None]
            y *= inverse(c)
        part_sums += place * (F * D + F)
        store_rows_below(part_sums, f, F, D, 0, dS, D, BLOCK_D)
        tl.store(part_sums + F * D + f, y, mask=f < F)
    if GLOBAL:
        tl.store(part_kappa + place, eps * tl.sum(kappa, 0))


@triton.jit
def _less_mean(y, dS, means, first, size, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return y - dS m `[BLOCK_F]`, with dS `[BLOCK_F, BLOCK_D]` as products take it, so that its rounding cancels."""
    d = first + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    mean = tl.load(means + d, mask=d < D, other=0.0)  # [BLOCK_D]
    return y - tl.sum(dS.to(tl.float32) * mean[None, :], 1) * size


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
    """Gradients dk, dv and the gradient of the weights of a part of the keys, and its part of the global query's.

    Inputs: k `[B, tokens, H, F]`, v `[B, tokens, H, D]`, each with strides `_b, _n, _h` in units of 16 bytes; weight
    `[B, tokens, H]` with strides `w_`; query `[B, H, F]`; cos, sin `[tokens, F]`; dstate `[B, H, F, D]`, which `SCALED`
    is to be multiplied by scale `[B, H]`; y `[B, H, F]`; tops `[B, H, 2]`; kappa `[B, H]`; means `[B, H, D]`.
    Outputs: dk, dv like k, v; dweight `[B, tokens, H]`; part_query `[parts, B, H, 3, F]`.
    Launch: parts of `length` keys, in steps of `LEN`; blocks of `BLOCK_D` values one after another.
    """
    D_BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    b, h, bh, _, part = program_of(heads, batch_heads, 1)
    k, v = unit_head_of(k, b, h, k_b, k_h), unit_head_of(v, b, h, v_b, v_h)
    weight = head_of(weight, b, h, w_b, w_h)
    dk, dv = own_head(dk, b, h, tokens, heads, F), own_head(dv, b, h, tokens, heads, D)
    dweight = own_head(dweight, b, h, tokens, heads, 1)
    dstate += bh.to(tl.int64) * F * D
    means += bh * D
    f = tl.arange(0, BLOCK_F)  # [BLOCK_F]
    size = tl.load(scale + bh) if SCALED else 1.0
    g = tl.zeros([BLOCK_F], tl.float32)  # [BLOCK_F]
    top, total, mean_logit = 0.0, 1.0, 0.0
    if GLOBAL:
        g = tl.load(query + bh * F + f, mask=f < F, other=0.0)
        top, total, mean_logit = tl.load(tops + bh * 2), tl.load(tops + bh * 2 + 1), tl.load(kappa + bh)
    dS = state_block(dstate, 0, F, BLOCK_F, D, BLOCK_D)  # [BLOCK_F, BLOCK_D]
    added = tl.load(y + bh * F + f, mask=f < F, other=0.0)  # [BLOCK_F]
    if not ROTARY:
        for block in tl.static_range(0, D_BLOCKS):
            columns = state_block(dstate, block * BLOCK_D, F, BLOCK_F, D, BLOCK_D)  # [BLOCK_F, BLOCK_D]
            added = _less_mean(added, columns, means, block * BLOCK_D, size, D, BLOCK_D)
    sums = tl.zeros([LANES, BLOCK_F], tl.float32)  # [LANES, BLOCK_F]
    shared = tl.zeros([LANES, BLOCK_F], tl.float32)  # [LANES, BLOCK_F]
    rest = tl.zeros([LEN], tl.float32)  # [LEN]
    stop = tl.minimum(tokens, (part + 1) * length)
    for j in tl.range(part * length, stop, LEN, num_stages=STAGES):
        row = j + tl.arange(0, LEN)  # [LEN]
        k_rows = load_tile_below(k, k_box, b, h, j, stop, k_n * unit_of(k), 0, LEN, F, BLOCK_F, TMA)  # [LEN, BLOCK_F]
        v_rows = load_tile_below(v, v_box, b, h, j, stop, v_n * unit_of(v), 0, LEN, D, BLOCK_D, TMA)  # [LEN, BLOCK_D]
        phi = mapped(k_rows, MAP)  # [LEN, BLOCK_F]
        w, logit = weighed(phi, row, stop, g, weight, w_n, WEIGHT, GLOBAL)  # [LEN]
        share = power(logit - top) / total if GLOBAL else tl.full([LEN], 1.0, tl.float32)  # [LEN]
        both = share * w  # [LEN]
        rho = phi  # [LEN, BLOCK_F]
        if ROTARY:
            rho = turned(rho, cos, sin, row, stop, cos_n, F, BLOCK_F, False)
        back = both * size  # [LEN]
        if SCALED:
            if F < BLOCK_F:
                rho = tl.where((f < F)[None, :], rho, 0.0)
            most = tl.max(tl.abs(rho), 1)  # [LEN]
            most = tl.where(most > 0.0, most, 1.0)
            rho = rho * (1.0 / most)[:, None]
            back *= most
        low = rho.to(v_rows.dtype)  # [LEN, BLOCK_F]
        dv_rows = tl.dot(low, dS, input_precision=PRECISION)  # [LEN, BLOCK_D]
        if SCALED or WEIGHT or GLOBAL:
            dv_rows *= back[:, None]
        store_rows_below(dv, row, stop, heads * D, 0, dv_rows, D, BLOCK_D)
        a = tl.dot(v_rows, tl.trans(dS), input_precision=PRECISION)  # [LEN, BLOCK_F]
        for block in tl.static_range(1, D_BLOCKS):
            more = load_rows_below(v, row, stop, v_n * unit_of(v), block * BLOCK_D, D, BLOCK_D)  # [LEN, BLOCK_D]
            columns = state_block(dstate, block * BLOCK_D, F, BLOCK_F, D, BLOCK_D)  # [BLOCK_F, BLOCK_D]
            dv_rows = tl.dot(low, columns, input_precision=PRECISION)  # [LEN, BLOCK_D]
            store_rows_below(dv, row, stop, heads * D, block * BLOCK_D, dv_rows * back[:, None], D, BLOCK_D)
            a += tl.dot(more, tl.trans(columns), input_precision=PRECISION)
        if ROTARY:
            a = turned(a, cos, sin, row, stop, cos_n, F, BLOCK_F, True)
        if SCALED:
            a *= size
        a += added[None, :]
        dphi = a  # [LEN, BLOCK_F]
        if WEIGHT or GLOBAL:
            dphi = a * both[:, None]
        if WEIGHT_GRADIENT or GLOBAL:
            inner = tl.sum(a * phi, 1)  # [LEN]
            if WEIGHT_GRADIENT:
                place = row.to(tl.int64) * heads
                tl.store(dweight + place, (share * inner).to(dweight.dtype.element_ty), mask=row < stop)
            if GLOBAL:
                dlogit = share * (w * inner - mean_logit)  # [LEN]
                dphi += dlogit[:, None] * g[None, :]
                sums += lane_sums(dlogit[:, None] * phi, LANES)
                shared += lane_sums(share[:, None] * phi, LANES)
                rest += dlogit
        store_rows_below(dk, row, stop, heads * F, 0, dphi * slope(k_rows, MAP), F, BLOCK_F)
    if GLOBAL:
        part_query += (part.to(tl.int64) * batch_heads + bh) * 3 * F + f
        tl.store(part_query, tl.sum(sums, 0), mask=f < F)
        tl.store(part_query + F, tl.sum(shared, 0), mask=f < F)
        tl.store(part_query + 2 * F, tl.zeros([BLOCK_F], tl.float32) + tl.sum(rest, 0), mask=f < F)


def _fused(call: Call) -> bool:
    """Whether the program of a query's gradient holds the state's gradient too."""
    return not call.wide and call.blocks[0] * call.v.shape[-1] <= _FUSED


@planned
def _plan_queries(call: Call, do: Tensor) -> Plan:
    q, made = call.q, torch.float32
    tensors = q, do, made, made, *call.rotary()[:2], q.dtype, *[made] * 5
    return fitting_plan(call, "linear.queries", lambda launch: _plan_query_launch(call, launch, do), tensors, (q, do))


def _plan_query_launch(call: Call, launch: Launch, do: Tensor) -> Plan:
    q, constants = call.q, call.constants()
    B, N, H, _ = q.shape
    fused = _fused(call)
    launch, boxes = loading(launch, (q, do), (constants["BLOCK_F"], constants["BLOCK_D"]))
    parts, length = cut(N, B * H, launch, q, least=4 if fused else 1)
    named = dict(
        FUSED=fused, GLOBAL=call.query is not None, SCALED=call.scaled, TMA=boxes[0] is not None, LEN=launch.length,
        STAGES=launch.stages, LANES=LANES, num_warps=launch.warps, **constants,
    )  # fmt: skip
    numbers = *unit_strides_of(q, do), call.rotary()[2], N, H, B * H, length, call.eps, call.floor
    return Plan(Bound(_query_gradients, (parts * B * H,), numbers, named), parts, boxes, launch)


@planned
def _plan_keys(call: Call, state: torch.dtype, weight_gradient: bool) -> Plan:
    """Plan a launch of `_key_gradients`; `state` is the dtype of the state's gradient."""
    k, v, made, weight = call.k, call.v, torch.float32, call.weight
    tensors = (
        k, v, made if weight is None else weight, made, *call.rotary()[:2], state, *[made] * 5, k.dtype, v.dtype,
        k.dtype if weight is None else weight.dtype, made,
    )  # fmt: skip
    return fitting_plan(
        call, "linear.keys", lambda launch: _plan_key_launch(call, launch, weight_gradient), tensors, (k, v)
    )


def _plan_key_launch(call: Call, launch: Launch, weight_gradient: bool) -> Plan:
    k, v, weight, constants = call.k, call.v, call.weight, call.constants()
    B, M, H, _ = k.shape
    launch, boxes = loading(launch, (k, v), (constants["BLOCK_F"], constants["BLOCK_D"]))
    parts, length = cut(M, B * H, launch, k, least=1)
    named = dict(
        WEIGHT=weight is not None, GLOBAL=call.query is not None, SCALED=call.scaled, WEIGHT_GRADIENT=weight_gradient,
        TMA=boxes[0] is not None, LEN=launch.length, STAGES=launch.stages, LANES=LANES, num_warps=launch.warps,
        **constants,
    )  # fmt: skip
    w = (0, 0, 0) if weight is None else weight.stride()
    numbers = *unit_strides_of(k, v), *w, call.rotary()[2], M, H, B * H, length
    return Plan(Bound(_key_gradients, (parts * B * H,), numbers, named), parts, boxes, launch)


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
    if call.scaled:  # float16 cannot hold sums over all queries
        size = dstate.abs().amax((2, 3)).clamp_(min=1e-30)
        dstate = (dstate / size[:, :, None, None]).to(q.dtype)
    if call.wide:
        wide.fill_key_gradients(call, dstate, y, size, means, dk, dv, dweight, weight_gradient)
        return dq, dk, dv, dweight, dquery
    plan = _plan_keys(call, dstate.dtype, weight_gradient)
    part_query = norm.new_empty((plan.parts, B, H, 3, F)) if call.query is not None else norm
    plan.run(
        k, v, norm if weight is None else weight, norm if call.query is None else call.query, *call.rotary()[:2],
        dstate, y, size, tops, kappa, means, dk, dv, dweight, part_query, boxed=(k, v),
    )  # fmt: skip
    if call.query is not None:
        # the gradients of a softmax sum to zero: take out what rounding leaves of the sum
        straight, shared, rest = part_query.sum(0).unbind(2)
        dquery = straight - rest * shared
    return dq, dk, dv, dweight, dquery


def _state_gradients(
    call: Call, do: Tensor, state: Tensor, norm: Tensor, dq: Tensor, means: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Fill dq and the means of the state; return dS, y `[B, H, F]`, and eps times the sum of delta / den `[B, H]`."""
    q = call.q
    B, N, H, F = q.shape
    fused = _fused(call)
    part, factors, inverses, kappa = norm, norm, norm, norm
    if not fused:
        inverses, factors = (norm.new_empty((B, H, N)).transpose(1, 2) for _ in range(2))
    if call.wide:
        wide.fill_query_gradients(call, do, state, norm, dq, factors, inverses, means)
    else:
        plan = _plan_queries(call, do)
        if fused:
            part = norm.new_empty((plan.parts, B, H, F * do.shape[-1] + F))
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
