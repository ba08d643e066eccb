"""The backward of linear attention in Triton: gradients of the queries and of the state, then of keys and values.

    t_i = S' do_i,   delta_i = p_i . t_i,   dphi(q_i) = (c t_i - delta_i z) / den_i
    dS' = sum_i p_i do_i^T,   y_f = -sum_i phi_f(q_i) c_f (delta_i - m . do_i) / den_i
    rho_jf = w_j phi_f(k_j) / c_f,   dv_j = sum_f rho_jf dS'_f,   dphi(k_j) = w_j (dS' (v_j - m) + y) / c

(r left out; den is the normaliser, m the mean of S' over the features.) The first launch reads q and do and writes dq,
the last reads k and v and writes dk and dv: seven tensors in all, which is the floor. o is not needed. Where a state
does not fit in the registers of one program, q and do are read once more.
"""

# ruff: noqa: ANN001, ANN202, PLR0915  # the compiler of a kernel reads no annotations
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from vision_attn.kernels._linear_forward_triton import Call, config, merged, state_parts
from vision_attn.kernels._linear_tiles_triton import (
    LANES,
    Launch,
    centred,
    cut,
    divisor,
    lane_sums,
    mapped,
    power,
    put_rows,
    slope,
    state_block,
    token_rows,
    turned,
    weighed,
)

# Not tuned: chosen offline by registers and shared memory for sm_90 with triton 3.7.1.
# Keys: bytes of an element, channels of the features and of the values at most.
_QUERIES: dict[tuple[int, int, int], Launch] = {
    (2, 64, 64): Launch(32, 4, 3, 3),
    (2, 128, 128): Launch(32, 8, 2, 1),
    (2, 256, 256): Launch(16, 8, 1, 4),
    (4, 64, 64): Launch(32, 8, 2, 2),
    (4, 128, 128): Launch(32, 8, 1, 1),
    (4, 256, 256): Launch(16, 8, 1, 4),
}
_KEYS: dict[tuple[int, int, int], Launch] = {
    (2, 64, 64): Launch(64, 8, 2, 4),
    (2, 128, 128): Launch(32, 8, 2, 4),
    (2, 256, 256): Launch(16, 8, 1, 4),
    (4, 64, 64): Launch(32, 8, 2, 4),
    (4, 128, 128): Launch(32, 8, 1, 4),
    (4, 256, 256): Launch(16, 8, 1, 4),
}


@triton.jit
def _query_gradients(
    q, do, state, norm, cos, sin, dq, part, part_sum, inverses, part_kappa, means,
    q_b, q_n, q_h, do_b, do_n, do_h, cos_n, tokens, heads, batch_heads, length, eps, floor,
    FUSED: tl.constexpr, GLOBAL: tl.constexpr, LEN: tl.constexpr, STAGES: tl.constexpr, LANES: tl.constexpr,
    MAP: tl.constexpr, ROTARY: tl.constexpr, F: tl.constexpr, BLOCK_F: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Dq of a part of the queries, and their part of dS' and y; not `FUSED`: 1 / den and the factor of y instead."""
    pid = tl.program_id(0)
    bh = pid % batch_heads
    slice_ = pid // batch_heads
    D_BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    q += b * q_b + h * q_h
    do += b * do_b + h * do_h
    dq += (b * tokens * heads + h) * F
    state += bh.to(tl.int64) * F * D
    z, c = divisor(norm + bh * F, floor, F, BLOCK_F, ROTARY)
    f = tl.arange(0, BLOCK_F)
    s, mean = centred(state, z, 0, q.dtype.element_ty, F, BLOCK_F, D, BLOCK_D, ROTARY)
    d = tl.arange(0, BLOCK_D)
    tl.store(means + bh * D + d, mean, mask=(d < D) & (slice_ == 0))
    acc = tl.zeros([BLOCK_F, BLOCK_D], tl.float32)
    sums = tl.zeros([LANES, BLOCK_F], tl.float32)
    kappa = tl.zeros([LEN], tl.float32)
    stop = tl.minimum(tokens, (slice_ + 1) * length)
    for j in tl.range(slice_ * length, stop, LEN, num_stages=STAGES):
        row = j + tl.arange(0, LEN)
        x = token_rows(q, row, stop, q_n, 0, F, BLOCK_F)
        g = token_rows(do, row, stop, do_n, 0, D, BLOCK_D)
        phi = mapped(x, MAP)
        inverse = 1.0 / (tl.sum(phi * z[None, :], 1) + eps)
        plain = phi * c[None, :] * inverse[:, None]
        p = plain
        if ROTARY:
            p = turned(p, cos, sin, row, stop, cos_n, F, BLOCK_F, False)
        t = tl.dot(g, tl.trans(s), input_precision=PRECISION)
        common = tl.sum(g.to(tl.float32) * mean[None, :], 1)
        for block in tl.static_range(1, D_BLOCKS):
            more = token_rows(do, row, stop, do_n, block * BLOCK_D, D, BLOCK_D)
            columns, middle = centred(
                state, z, block * BLOCK_D, q.dtype.element_ty, F, BLOCK_F, D, BLOCK_D, ROTARY
            )  # fmt: skip
            t += tl.dot(more, tl.trans(columns), input_precision=PRECISION)
            common += tl.sum(more.to(tl.float32) * middle[None, :], 1)
            tl.store(means + bh * D + block * BLOCK_D + d, middle, mask=(block * BLOCK_D + d < D) & (slice_ == 0))
        t += common[:, None]
        delta = tl.sum(p * t, 1)
        down = delta * inverse
        t = t * c[None, :] * inverse[:, None]
        if ROTARY:
            t = turned(t, cos, sin, row, stop, cos_n, F, BLOCK_F, True)
        dphi = t - down[:, None] * z[None, :]
        put_rows(dq, row, stop, heads * F, 0, dphi * slope(x.to(tl.float32), phi, MAP), F, BLOCK_F)
        if FUSED:  # rows from `stop` on have do = 0, so delta = 0
            sums -= lane_sums(plain * (delta - common)[:, None], LANES)
            acc += tl.dot(tl.trans(p.to(g.dtype)), g, input_precision=PRECISION)
        else:
            place = b * tokens * heads + h + row.to(tl.int64) * heads
            tl.store(inverses + place, inverse, mask=row < stop)
            tl.store(part_sum + place, (common - delta) * inverse, mask=row < stop)
        if GLOBAL:
            kappa += down
    place = slice_.to(tl.int64) * batch_heads + bh
    if FUSED:
        put_rows(part + place * F * D, f, F, D, 0, acc, D, BLOCK_D)
        tl.store(part_sum + place * F + f, tl.sum(sums, 0), mask=f < F)
    if GLOBAL:
        tl.store(part_kappa + place, eps * tl.sum(kappa, 0))


@triton.jit
def _key_gradients(
    k, v, weight, query, cos, sin, dstate, y, scale, norm, tops, kappa, means, dk, dv, dweight, part_query,
    k_b, k_n, k_h, v_b, v_n, v_h, w_b, w_n, w_h, cos_n, tokens, heads, batch_heads, length, floor, factor,
    WEIGHT: tl.constexpr, GLOBAL: tl.constexpr, SCALED: tl.constexpr, WEIGHT_GRADIENT: tl.constexpr,
    LEN: tl.constexpr, STAGES: tl.constexpr, LANES: tl.constexpr, MAP: tl.constexpr, ROTARY: tl.constexpr,
    F: tl.constexpr, BLOCK_F: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, dv and the gradient of the weights of a part of the keys, and its part of the global query's."""
    pid = tl.program_id(0)
    bh = pid % batch_heads
    slice_ = pid // batch_heads
    D_BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    weight += b * w_b + h * w_h
    dk += (b * tokens * heads + h) * F
    dv += (b * tokens * heads + h) * D
    dweight += b * tokens * heads + h
    dstate += bh.to(tl.int64) * F * D
    _, c = divisor(norm + bh * F, floor, F, BLOCK_F, ROTARY)
    c_inverse = tl.where(c > 0.0, 1.0 / tl.maximum(c, floor), 0.0)
    f = tl.arange(0, BLOCK_F)
    added = tl.load(y + bh * F + f, mask=f < F, other=0.0)
    size = tl.load(scale + bh) if SCALED else 1.0
    g = tl.zeros([BLOCK_F], tl.float32)
    top, total, mean_logit = 0.0, 1.0, 0.0
    if GLOBAL:
        g = tl.load(query + bh * F + f, mask=f < F, other=0.0)
        top, total, mean_logit = tl.load(tops + bh * 2), tl.load(tops + bh * 2 + 1), tl.load(kappa + bh)
    d = tl.arange(0, BLOCK_D)
    mean = tl.load(means + bh * D + d, mask=d < D, other=0.0)
    s = state_block(dstate, 0, F, BLOCK_F, D, BLOCK_D)
    sums = tl.zeros([LANES, BLOCK_F], tl.float32)
    shared = tl.zeros([LANES, BLOCK_F], tl.float32)
    rest = tl.zeros([LEN], tl.float32)
    stop = tl.minimum(tokens, (slice_ + 1) * length)
    for j in tl.range(slice_ * length, stop, LEN, num_stages=STAGES):
        row = j + tl.arange(0, LEN)
        x = token_rows(k, row, stop, k_n, 0, F, BLOCK_F)
        values = token_rows(v, row, stop, v_n, 0, D, BLOCK_D)
        phi = mapped(x, MAP)
        w, logit = weighed(phi, row, stop, g, weight, w_n, WEIGHT, GLOBAL)
        share = power(logit - top) / total if GLOBAL else tl.full([LEN], factor, tl.float32)
        both = share * w
        rho = phi * c_inverse[None, :] * both[:, None]
        if ROTARY:
            rho = turned(rho, cos, sin, row, stop, cos_n, F, BLOCK_F, False)
        back = tl.full([LEN], 1.0, tl.float32) * size
        if SCALED:
            most = tl.max(tl.abs(rho), 1)
            most = tl.where(most > 0.0, most, 1.0)
            rho = rho * (1.0 / most)[:, None]
            back = most * size
        low = rho.to(values.dtype)
        rows = tl.dot(low, s, input_precision=PRECISION)
        put_rows(dv, row, stop, heads * D, 0, rows * back[:, None], D, BLOCK_D)
        if not ROTARY:
            values = (values.to(tl.float32) - mean[None, :]).to(values.dtype)
        a = tl.dot(values, tl.trans(s), input_precision=PRECISION)
        for block in tl.static_range(1, D_BLOCKS):
            more = token_rows(v, row, stop, v_n, block * BLOCK_D, D, BLOCK_D)
            if not ROTARY:
                there = block * BLOCK_D + d < D
                middle = tl.load(means + bh * D + block * BLOCK_D + d, mask=there, other=0.0)
                more = (more.to(tl.float32) - middle[None, :]).to(more.dtype)
            columns = state_block(dstate, block * BLOCK_D, F, BLOCK_F, D, BLOCK_D)
            rows = tl.dot(low, columns, input_precision=PRECISION)
            put_rows(dv, row, stop, heads * D, block * BLOCK_D, rows * back[:, None], D, BLOCK_D)
            a += tl.dot(more, tl.trans(columns), input_precision=PRECISION)
        if ROTARY:
            a = turned(a, cos, sin, row, stop, cos_n, F, BLOCK_F, True)
        a = (a * size + added[None, :]) * c_inverse[None, :]
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
        put_rows(dk, row, stop, heads * F, 0, dphi * slope(x.to(tl.float32), phi, MAP), F, BLOCK_F)
    if GLOBAL:
        part_query += (slice_.to(tl.int64) * batch_heads + bh) * 3 * F + f
        tl.store(part_query, tl.sum(sums, 0), mask=f < F)
        tl.store(part_query + F, tl.sum(shared, 0), mask=f < F)
        tl.store(part_query + 2 * F, tl.zeros([BLOCK_F], tl.float32) + tl.sum(rest, 0), mask=f < F)


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
    B, M, H, F = k.shape
    scaled, size = q.dtype == torch.float16, norm
    if scaled:  # float16 has no range for sums over all queries
        size = dstate.abs().amax((2, 3)).clamp_(min=1e-30)
        dstate = (dstate / size[:, :, None, None]).to(q.dtype)
    launch = config(call, _KEYS)
    parts, length = cut(M, B * H, launch, k, 1)
    part_query = norm.new_empty((parts, B, H, 3, F)) if call.query is not None else norm
    _key_gradients[(parts * B * H,)](
        k, v, norm if weight is None else weight, norm if call.query is None else call.query, *call.rotary()[:2],
        dstate, y, size, norm, tops, kappa, means, dk, dv, dweight, part_query, *k.stride()[:3], *v.stride()[:3],
        *((0, 0, 0) if weight is None else weight.stride()), call.rotary()[2], M, H, B * H, length, call.floor, 1.0 / M,
        WEIGHT=weight is not None, GLOBAL=call.query is not None, SCALED=scaled, WEIGHT_GRADIENT=weight_gradient,
        LEN=launch.length, STAGES=launch.stages, LANES=LANES, num_warps=launch.warps, **call.constants(),
    )  # fmt: skip
    if call.query is not None:
        # gradients of a softmax sum to zero: what rounding leaves is taken out
        straight, shared, rest = part_query.sum(0).unbind(2)
        dquery = straight - rest * shared
    return dq, dk, dv, dweight, dquery


def _state_gradients(
    call: Call, do: Tensor, state: Tensor, norm: Tensor, dq: Tensor, means: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Fill dq and the means of the state; return dS', y `[B, H, F]`, and eps times the sum of delta / den `[B, H]`."""
    q = call.q
    B, N, H, F = q.shape
    D = do.shape[-1]
    launch, constants = config(call, _QUERIES), call.constants()
    fused = constants["BLOCK_D"] >= D
    parts, length = cut(N, B * H, launch, q, 4 if fused else 1)
    part, sums, inverses, kappa = norm, norm, norm, norm
    if fused:
        part, sums = norm.new_empty((parts, B, H, F, D)), norm.new_empty((parts, B, H, F))
    else:
        inverses, sums = norm.new_empty((B, N, H)), norm.new_empty((B, N, H))
    if call.query is not None:
        kappa = norm.new_empty((parts, B, H))
    _query_gradients[(parts * B * H,)](
        q, do, state, norm, *call.rotary()[:2], dq, part, sums, inverses, kappa, means, *q.stride()[:3],
        *do.stride()[:3], call.rotary()[2], N, H, B * H, length, call.eps, call.floor, FUSED=fused,
        GLOBAL=call.query is not None, LEN=launch.length, STAGES=launch.stages, LANES=LANES,
        num_warps=launch.warps, **constants,
    )  # fmt: skip
    if call.query is not None:
        kappa = kappa.sum(0)
    kind = "sums"
    if not fused:
        part, sums, _ = state_parts(call, q, do, inverses, sums, None)
        kind = "times"
    dtype = torch.float32 if q.dtype == torch.float16 else q.dtype
    dstate, y, _ = merged(call, (part, sums, None), kind, norm, dtype)
    return dstate, y, kappa
