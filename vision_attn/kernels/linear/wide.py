"""Linear attention over more features than one program holds: output and gradients in Triton.

The kernels are those of `forward.py` and `backward.py`, but walk the features in blocks: once for the normaliser, and
again for what is divided by it. The state is theirs. There is no rotation and no global query.
"""

# ruff: noqa: ANN001, ANN202  # the compiler of a kernel reads no annotations
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vision_attn.kernels.launches import Launch
from vision_attn.kernels.linear.call import Call, fitting_plan
from vision_attn.kernels.linear.tiles import inverse, mapped, slope
from vision_attn.kernels.triton.launching import Bound, Kernel, block_of, cut, planned, precision_of, unit_strides_of
from vision_attn.kernels.triton.rows import (
    Plan,
    head_of,
    load_rows_below,
    own_head,
    program_of,
    store_rows_below,
    unit_head_of,
    unit_of,
)


@triton.jit
def _values_mean(state, norm, F: tl.constexpr, BLOCK_F: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The mean of a head's values `[BLOCK_D]`, weighed by the features of their keys."""
    mean, total = tl.zeros([BLOCK_D], tl.float32), tl.full((), 0.0, tl.float32)
    for first in tl.range(0, F, BLOCK_F):
        f = first + tl.arange(0, BLOCK_F)  # [BLOCK_F]
        mean += tl.sum(load_rows_below(state, f, F, D, 0, D, BLOCK_D), 0)
        total += tl.sum(tl.load(norm + f, mask=f < F, other=0.0), 0)
    return mean / tl.maximum(total, 1e-30)


@triton.jit
def _block(
    state, norm, mean, first, floor, dtype: tl.constexpr, F: tl.constexpr, BLOCK_F: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Rows `first ..` of S - z m^T in `dtype` `[BLOCK_F, BLOCK_D]`, divided by c if `SCALED`; z and c `[BLOCK_F]`."""
    f = first + tl.arange(0, BLOCK_F)  # [BLOCK_F]
    z = tl.load(norm + f, mask=f < F, other=0.0)  # [BLOCK_F]
    c = tl.where(f < F, tl.maximum(z, floor), 0.0)  # [BLOCK_F]
    S = load_rows_below(state, f, F, D, 0, D, BLOCK_D) - z[:, None] * mean[None, :]  # [BLOCK_F, BLOCK_D]
    if SCALED:
        S = S * inverse(c)[:, None]
    return S.to(dtype), z, c


@Kernel
@triton.jit
def _output(
    q, state, norm, o, q_b, q_n, q_h, tokens, heads, batch_heads, length, eps, floor, SCALED: tl.constexpr,
    LEN: tl.constexpr, STAGES: tl.constexpr, MAP: tl.constexpr, F: tl.constexpr, BLOCK_F: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output of a part of the queries.

    Inputs: q `[B, tokens, H, F]` with strides `_b, _n, _h` in units of 16 bytes; state `[B, H, F, D]`, norm
    `[B, H, F]`.
    Outputs: o `[B, tokens, H, D]`.
    Launch: parts of `length` queries, in steps of `LEN`; `BLOCK_F` features at a time.
    """
    b, h, bh, _, part = program_of(heads, batch_heads, 1)
    q, o = unit_head_of(q, b, h, q_b, q_h), own_head(o, b, h, tokens, heads, D)
    state += bh.to(tl.int64) * F * D
    norm += bh * F
    mean = _values_mean(state, norm, F, BLOCK_F, D, BLOCK_D)  # [BLOCK_D]
    stop = tl.minimum(tokens, (part + 1) * length)
    for j in tl.range(part * length, stop, LEN):
        row = j + tl.arange(0, LEN)  # [LEN]
        norms = tl.zeros([LEN], tl.float32)  # [LEN]
        for first in tl.range(0, F, BLOCK_F):
            f = first + tl.arange(0, BLOCK_F)  # [BLOCK_F]
            z = tl.load(norm + f, mask=f < F, other=0.0)  # [BLOCK_F]
            phi = mapped(load_rows_below(q, row, stop, q_n * unit_of(q), first, F, BLOCK_F), MAP)  # [LEN, BLOCK_F]
            norms += tl.sum(phi * z[None, :], 1)
        share = 1.0 / (norms + eps)  # [LEN]
        o_rows = tl.zeros([LEN, BLOCK_D], tl.float32)  # [LEN, BLOCK_D]
        for first in tl.range(0, F, BLOCK_F, num_stages=STAGES):
            S, z, c = _block(state, norm, mean, first, floor, q.dtype.element_ty, F, BLOCK_F, D, BLOCK_D, SCALED)
            phi = mapped(load_rows_below(q, row, stop, q_n * unit_of(q), first, F, BLOCK_F), MAP)  # [LEN, BLOCK_F]
            phi *= share[:, None]
            if SCALED:
                phi *= c[None, :]
            o_rows += tl.dot(phi.to(S.dtype), S, input_precision=PRECISION)
        o_rows += (norms * share)[:, None] * mean[None, :]
        store_rows_below(o, row, stop, heads * D, 0, o_rows, D, BLOCK_D)


@Kernel
@triton.jit
def _query_gradients(
    q, do, state, norm, dq, factors, inverses, means, q_b, q_n, q_h, do_b, do_n, do_h, tokens, heads, batch_heads,
    length, eps, floor, SCALED: tl.constexpr, LEN: tl.constexpr, STAGES: tl.constexpr, MAP: tl.constexpr,
    F: tl.constexpr, BLOCK_F: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients dq of a part of the queries, 1 / den and the factor of y.

    Inputs: q `[B, tokens, H, F]`, do `[B, tokens, H, D]`, each with strides `_b, _n, _h` in units of 16 bytes; state
    `[B, H, F, D]`, norm `[B, H, F]`.
    Outputs: dq `[B, tokens, H, F]`; means of the values `[B, H, D]`; factors and inverses `[B, H, tokens]`.
    Launch: parts of `length` queries, in steps of `LEN`; `BLOCK_F` features at a time.
    """
    b, h, bh, _, part = program_of(heads, batch_heads, 1)
    q, do = unit_head_of(q, b, h, q_b, q_h), unit_head_of(do, b, h, do_b, do_h)
    dq = own_head(dq, b, h, tokens, heads, F)
    dtype: tl.constexpr = q.dtype.element_ty
    state += bh.to(tl.int64) * F * D
    norm += bh * F
    mean = _values_mean(state, norm, F, BLOCK_F, D, BLOCK_D)  # [BLOCK_D]
    d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    tl.store(means + bh * D + d, mean, mask=(d < D) & (part == 0))
    stop = tl.minimum(tokens, (part + 1) * length)
    for j in tl.range(part * length, stop, LEN):
        row = j + tl.arange(0, LEN)  # [LEN]
        do_rows = load_rows_below(do, row, stop, do_n * unit_of(do), 0, D, BLOCK_D)  # [LEN, BLOCK_D]
        # rounded as products take it, so that it cancels what they hold
        common = tl.sum(do_rows.to(tl.float32) * mean.to(dtype).to(tl.float32)[None, :], 1)  # [LEN]
        norms, inner = tl.zeros([LEN], tl.float32), tl.zeros([LEN], tl.float32)  # [LEN]
        for first in tl.range(0, F, BLOCK_F, num_stages=STAGES):
            S, z, c = _block(state, norm, mean, first, floor, dtype, F, BLOCK_F, D, BLOCK_D, SCALED)
            phi = mapped(load_rows_below(q, row, stop, q_n * unit_of(q), first, F, BLOCK_F), MAP)  # [LEN, BLOCK_F]
            u = tl.dot(do_rows, tl.trans(S), input_precision=PRECISION)  # [LEN, BLOCK_F]
            if SCALED:
                u *= c[None, :]
            norms += tl.sum(phi * z[None, :], 1)
            inner += tl.sum(phi * u, 1)
        share = 1.0 / (norms + eps)  # [LEN]
        e = (inner - eps * common) * share  # [LEN]
        for first in tl.range(0, F, BLOCK_F, num_stages=STAGES):
            S, z, c = _block(state, norm, mean, first, floor, dtype, F, BLOCK_F, D, BLOCK_D, SCALED)
            q_rows = load_rows_below(q, row, stop, q_n * unit_of(q), first, F, BLOCK_F)  # [LEN, BLOCK_F]
            u = tl.dot(do_rows, tl.trans(S), input_precision=PRECISION)  # [LEN, BLOCK_F]
            if SCALED:
                u *= c[None, :]
            dphi = (u - e[:, None] * z[None, :]) * share[:, None]  # [LEN, BLOCK_F]
            store_rows_below(dq, row, stop, heads * F, first, dphi * slope(q_rows, MAP), F, BLOCK_F)
        place = bh.to(tl.int64) * tokens + row
        tl.store(inverses + place, share, mask=row < stop)
        tl.store(factors + place, -e, mask=row < stop)


@Kernel
@triton.jit
def _key_gradients(
    k, v, weight, dstate, y, scale, means, dk, dv, dweight, k_b, k_n, k_h, v_b, v_n, v_h, w_b, w_n, w_h, tokens, heads,
    batch_heads, length, WEIGHT: tl.constexpr, SCALED: tl.constexpr, WEIGHT_GRADIENT: tl.constexpr, LEN: tl.constexpr,
    STAGES: tl.constexpr, MAP: tl.constexpr, F: tl.constexpr, BLOCK_F: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients dk, dv and the gradient of the weights of a part of the keys.

    Inputs: k `[B, tokens, H, F]`, v `[B, tokens, H, D]`, each with strides `_b, _n, _h` in units of 16 bytes; weight
    `[B, tokens, H]` with strides `w_`; dstate `[B, H, F, D]`, which `SCALED` is to be multiplied by scale `[B, H]`; y
    `[B, H, F]`; means `[B, H, D]`.
    Outputs: dk, dv like k, v; dweight `[B, tokens, H]`.
    Launch: parts of `length` keys, in steps of `LEN`; `BLOCK_F` features at a time.
    """
    b, h, bh, _, part = program_of(heads, batch_heads, 1)
    k, v = unit_head_of(k, b, h, k_b, k_h), unit_head_of(v, b, h, v_b, v_h)
    dk, dv = own_head(dk, b, h, tokens, heads, F), own_head(dv, b, h, tokens, heads, D)
    dstate += bh.to(tl.int64) * F * D
    size = tl.load(scale + bh) if SCALED else 1.0
    d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    mean = tl.load(means + bh * D + d, mask=d < D, other=0.0)  # [BLOCK_D]
    stop = tl.minimum(tokens, (part + 1) * length)
    for j in tl.range(part * length, stop, LEN):
        row = j + tl.arange(0, LEN)  # [LEN]
        v_rows = load_rows_below(v, row, stop, v_n * unit_of(v), 0, D, BLOCK_D)  # [LEN, BLOCK_D]
        w = tl.where(row < stop, 1.0, 0.0)  # [LEN]
        if WEIGHT:
            there = head_of(weight, b, h, w_b, w_h) + row.to(tl.int64) * w_n
            w = tl.load(there, mask=row < stop, other=0.0).to(tl.float32)
        dv_rows = tl.zeros([LEN, BLOCK_D], tl.float32)  # [LEN, BLOCK_D]
        inner = tl.zeros([LEN], tl.float32)  # [LEN]
        for first in tl.range(0, F, BLOCK_F, num_stages=STAGES):
            f = first + tl.arange(0, BLOCK_F)  # [BLOCK_F]
            k_rows = load_rows_below(k, row, stop, k_n * unit_of(k), first, F, BLOCK_F)  # [LEN, BLOCK_F]
            phi = tl.where((f < F)[None, :], mapped(k_rows, MAP), 0.0)  # [LEN, BLOCK_F]
            dS = load_rows_below(dstate, f, F, D, 0, D, BLOCK_D)  # [BLOCK_F, BLOCK_D]
            # with dS as products take it, so that its rounding cancels
            added = tl.load(y + bh * F + f, mask=f < F, other=0.0)  # [BLOCK_F]
            added -= tl.sum(dS.to(tl.float32) * mean[None, :], 1) * size
            most = tl.full([LEN], 1.0, tl.float32)  # [LEN]
            if SCALED:
                most = tl.max(tl.abs(phi), 1)
                most = tl.where(most > 0.0, most, 1.0)
            low = (phi * (1.0 / most)[:, None]).to(v_rows.dtype)  # [LEN, BLOCK_F]
            dv_rows += tl.dot(low, dS, input_precision=PRECISION) * most[:, None]
            a = tl.dot(v_rows, tl.trans(dS), input_precision=PRECISION) * size + added[None, :]  # [LEN, BLOCK_F]
            inner += tl.sum(a * phi, 1)
            store_rows_below(dk, row, stop, heads * F, first, a * w[:, None] * slope(k_rows, MAP), F, BLOCK_F)
        store_rows_below(dv, row, stop, heads * D, 0, dv_rows * (w * size)[:, None], D, BLOCK_D)
        if WEIGHT_GRADIENT:
            place = own_head(dweight, b, h, tokens, heads, 1) + row.to(tl.int64) * heads
            tl.store(place, inner.to(dweight.dtype.element_ty), mask=row < stop)


def _named(call: Call, launch: Launch) -> dict[str, Any]:
    F, D = call.k.shape[-1], call.v.shape[-1]
    return dict(
        SCALED=call.scaled, LEN=launch.length, STAGES=launch.stages, MAP=call.map, F=F, BLOCK_F=launch.features, D=D,
        BLOCK_D=block_of(D), PRECISION=precision_of(call.q), num_warps=launch.warps,
    )  # fmt: skip


def _plan(
    call: Call, name: str, kernel: Kernel, tensors: tuple[Any, ...], strided: tuple[Tensor, ...],
    more: tuple[float, ...], strides: tuple[int, ...] = (), **constants: bool,
) -> Plan:  # fmt: skip
    """Plan the launch that fits, over tokens of the first strided tensor; `more` are the numbers after the length."""
    B, N, H, _ = strided[0].shape

    def of(launch: Launch) -> Plan:
        parts, length = cut(N, B * H, launch, strided[0], least=1)
        numbers = *unit_strides_of(*strided), *strides, N, H, B * H, length, *more
        return Plan(Bound(kernel, (parts * B * H,), numbers, _named(call, launch) | constants), parts, (), launch)

    return fitting_plan(call, name, of, tensors, ())


@planned
def _plan_output(call: Call) -> Plan:
    q, made = call.q, torch.float32
    return _plan(call, "linear.wide_output", _output, (q, made, made, q.dtype), (q,), (call.eps, call.floor))


@planned
def _plan_queries(call: Call, do: Tensor) -> Plan:
    q, made = call.q, torch.float32
    tensors = q, do, made, made, q.dtype, made, made, made
    return _plan(call, "linear.wide_queries", _query_gradients, tensors, (q, do), (call.eps, call.floor))


@planned
def _plan_keys(call: Call, state: torch.dtype, weight_gradient: bool) -> Plan:
    k, v, weight, made = call.k, call.v, call.weight, torch.float32
    w = made if weight is None else weight
    dtype = k.dtype if weight is None else weight.dtype
    tensors = k, v, w, state, made, made, made, k.dtype, v.dtype, dtype
    strides = (0, 0, 0) if weight is None else weight.stride()
    return _plan(
        call, "linear.wide_keys", _key_gradients, tensors, (k, v), (), strides, WEIGHT=weight is not None,
        WEIGHT_GRADIENT=weight_gradient,
    )  # fmt: skip


def fill_output(call: Call, state: Tensor, norm: Tensor, o: Tensor) -> None:
    """Write the output, as its namesake in `forward.py`."""
    _plan_output(call).run(call.q, state, norm, o, boxed=())


def fill_query_gradients(
    call: Call, do: Tensor, state: Tensor, norm: Tensor, dq: Tensor, factors: Tensor, inverses: Tensor, means: Tensor
) -> None:
    """Write dq, and what the state's gradient takes: `[B, N, H]` factors and inverses, means `[B, H, D]`."""
    _plan_queries(call, do).run(call.q, do, state, norm, dq, factors, inverses, means, boxed=())


def fill_key_gradients(
    call: Call, dstate: Tensor, y: Tensor, size: Tensor, means: Tensor, dk: Tensor, dv: Tensor, dweight: Tensor,
    weight_gradient: bool,
) -> None:  # fmt: skip
    """Write dk, dv and, if wanted, the gradient of the weights; `size` multiplies a state of float16."""
    weight = y if call.weight is None else call.weight
    plan = _plan_keys(call, dstate.dtype, weight_gradient)
    plan.run(call.k, call.v, weight, dstate, y, size, means, dk, dv, dweight, boxed=())
