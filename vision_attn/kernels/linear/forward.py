"""The forward of linear attention in Triton: partial states of keys and values, their merge, and the output.

Three launches. The first reads k and v once and leaves a float32 state for each part of the keys; the second adds the
parts in a fixed order (see `tiles.py`); the third reads q once and writes o once.
"""

# ruff: noqa: ANN001, ANN202, PLR0912, PLR0915  # the compiler of a kernel reads no annotations
# mypy: disable-error-code="no-untyped-def"

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vision_attn.kernels.launches import Launch
from vision_attn.kernels.linear.call import Call, fitting_plan
from vision_attn.kernels.linear.tiles import (
    LOWEST,
    await_previous,
    centred,
    divisor,
    feature_sums,
    lane_sums,
    mapped,
    power,
    release,
    turned,
    weighed,
)
from vision_attn.kernels.triton.launching import (
    LANES,
    Bound,
    Kernel,
    cut,
    dependent,
    hopper,
    planned,
    tensor_memory,
    unit_strides_of,
)
from vision_attn.kernels.triton.rows import (
    NO_KEY,
    Box,
    Plan,
    head_of,
    load_rows_below,
    load_tile_below,
    own_head,
    program_of,
    sequence_box,
    store_rows_below,
    unit_head_of,
    unit_of,
    uses_boxes,
)


@Kernel
@triton.jit
def _state(
    k, v, weight, sum_weight, query, cos, sin, part_sums, part_top, k_box, v_box,
    k_b, k_n, k_h, v_b, v_n, v_h, w_b, w_n, w_h, cos_n, tokens, heads, batch_heads, length,
    WEIGHT: tl.constexpr, SUM_WEIGHT: tl.constexpr, GLOBAL: tl.constexpr, SCALED: tl.constexpr,
    OVERLAP: tl.constexpr, TMA: tl.constexpr, LEN: tl.constexpr, STAGES: tl.constexpr, LANES: tl.constexpr,
    PRODUCTS: tl.constexpr, MAP: tl.constexpr, ROTARY: tl.constexpr, F: tl.constexpr, BLOCK_F: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum r phi(k) v^T and phi(k) over a part of the keys, each weighed.

    Inputs: k `[B, tokens, H, F]`, v `[B, tokens, H, D]`, each with strides `_b, _n, _h` in units of 16 bytes; weight
    and sum_weight, which weighs the second sum once more, `[B, tokens, H]` with strides `w_`; query `[B, H, F]`; cos,
    sin `[tokens, F]`.
    Outputs: part_sums `[parts, B, H, F * D + F]`; part_top `[parts, B, H, 2]`, maximum and total of the query's logits.
    Launch: blocks of `BLOCK_F` features (one if there is a query or a rotation) and `BLOCK_D` values, parts of `length`
    keys, in steps of `LEN`; sums of features by `PRODUCTS` where they may be.
    """
    D_BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    F_BLOCKS: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    b, h, bh, block, part = program_of(heads, batch_heads, D_BLOCKS * F_BLOCKS)
    first = block // D_BLOCKS * BLOCK_F if F_BLOCKS > 1 else 0
    block = block % D_BLOCKS if F_BLOCKS > 1 else block
    k, v = unit_head_of(k, b, h, k_b, k_h), unit_head_of(v, b, h, v_b, v_h)
    weight, sum_weight = head_of(weight, b, h, w_b, w_h), head_of(sum_weight, b, h, w_b, w_h)
    f = first + tl.arange(0, BLOCK_F)  # [BLOCK_F]
    g = tl.load(query + bh * F + f, mask=f < F, other=0.0) if GLOBAL else 0.0  # [BLOCK_F]
    ALIKE: tl.constexpr = PRODUCTS and v.dtype.element_ty != tl.float32 and not ROTARY
    acc = tl.zeros([BLOCK_F, BLOCK_D], tl.float32)  # [BLOCK_F, BLOCK_D]
    sums = tl.zeros([LANES, BLOCK_F], tl.float32)  # [LANES, BLOCK_F]
    columns = tl.zeros([BLOCK_F, LANES], tl.float32)  # [BLOCK_F, LANES]
    top, total = tl.full((), LOWEST, tl.float32), tl.full((), 0.0, tl.float32)
    stop = tl.minimum(tokens, (part + 1) * length)
    for j in tl.range(part * length, stop, LEN, num_stages=STAGES):
        row = j + tl.arange(0, LEN)  # [LEN]
        k_rows = load_tile_below(
            k, k_box, b, h, j, stop, k_n * unit_of(k), first, LEN, F, BLOCK_F, TMA
        )  # [LEN, BLOCK_F]
        v_rows = load_tile_below(
            v, v_box, b, h, j, stop, v_n * unit_of(v), block * BLOCK_D, LEN, D, BLOCK_D, TMA
        )  # [LEN, BLOCK_D]
        phi = mapped(k_rows, MAP)  # [LEN, BLOCK_F]
        w, logit = weighed(phi, row, stop, g, weight, w_n, WEIGHT, GLOBAL)  # [LEN]
        if GLOBAL:
            high = tl.maximum(top, tl.max(logit, 0))
            share = power(logit - high)  # [LEN]
            shrink = power(top - high)
            total = total * shrink + tl.sum(share, 0)
            acc *= shrink
            sums *= shrink
            columns *= shrink
            w *= share
            top = high
        if WEIGHT or GLOBAL or not ALIKE:
            phi *= w[:, None]
        plain = phi  # [LEN, BLOCK_F]
        if ROTARY:
            phi = turned(phi, cos, sin, row, stop, cos_n, F, BLOCK_F, False)
        most = 1.0
        if SCALED:  # float16 cannot hold features that are all small or all large
            there = row < stop  # elsewhere the feature is phi(0), which may be larger
            if F % BLOCK_F != 0:
                phi = tl.where((f < F)[None, :], phi, 0.0)
            most = tl.max(tl.where(there, tl.max(tl.abs(phi), 1), 0.0), 0)
            most = tl.where(most > 0.0, most, 1.0)
            phi = phi * tl.where(there, 1.0 / most, 0.0)[:, None]
        low = phi.to(v_rows.dtype)  # [LEN, BLOCK_F]
        # a fresh product for each tile: a long sum inside the tensor cores would lose bits that float32 keeps
        acc += tl.dot(tl.trans(low), v_rows, input_precision=PRECISION) * most
        other = tl.where(row < stop, 1.0, 0.0)  # [LEN]
        if SUM_WEIGHT:
            other = tl.load(sum_weight + row.to(tl.int64) * w_n, mask=row < stop, other=0.0)
        if ALIKE:  # rounded alike, equal values have equal means over all features
            columns += feature_sums(low, other, SUM_WEIGHT, SCALED, LANES) * most
        else:
            if not ROTARY:
                plain = low.to(tl.float32) * most
            if SUM_WEIGHT:
                plain *= other[:, None]
            sums += lane_sums(plain, LANES)
    release(OVERLAP)
    place = part.to(tl.int64) * batch_heads + bh
    part_sums += place * (F * D + F)
    store_rows_below(part_sums, f, F, D, block * BLOCK_D, acc, D, BLOCK_D)
    if block == 0:
        norm = tl.sum(columns, 1) if ALIKE else tl.sum(sums, 0)  # [BLOCK_F]
        tl.store(part_sums + F * D + f, norm, mask=f < F)
        if GLOBAL:
            tl.store(part_top + place * 2, top)
            tl.store(part_top + place * 2 + 1, total)


@Kernel
@triton.jit
def _merge(
    part_sums, part_top, state, norm, tops, parts, batch_heads, factor,
    GLOBAL: tl.constexpr, OVERLAP: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr, F: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """Add the parts of some columns of one head's state and norm, times `factor`.

    Inputs: part_sums `[parts, B, H, F * D + F]`; part_top `[parts, B, H, 2]`.
    Outputs: state `[B, H, F, D]`, norm `[B, H, F]`; tops `[B, H, 2]`, maximum and total of the query's logits.
    Launch: `COLUMNS` numbers of `PARTS` parts at a time.
    """
    release(OVERLAP)
    await_previous(OVERLAP)
    bh = tl.program_id(0).to(tl.int64)
    WIDTH: tl.constexpr = F * D + F
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    n = tl.arange(0, PARTS)  # [PARTS]
    top, total = tl.full((), LOWEST, tl.float32), tl.full((), 0.0, tl.float32)
    if GLOBAL:
        for first in tl.range(0, parts, PARTS):
            place = (first + n) * batch_heads + bh  # [PARTS]
            maxima = tl.load(part_top + place * 2, mask=first + n < parts, other=LOWEST)  # [PARTS]
            totals = tl.load(part_top + place * 2 + 1, mask=first + n < parts, other=0.0)  # [PARTS]
            high = tl.maximum(top, tl.max(maxima, 0))
            total = total * power(top - high) + tl.sum(totals * power(maxima - high), 0)
            top = high
        total = tl.maximum(total, NO_KEY)
        if tl.program_id(1) == 0:
            tl.store(tops + bh * 2, top)
            tl.store(tops + bh * 2 + 1, total)
    acc = tl.zeros([COLUMNS], tl.float32)  # [COLUMNS]
    for first in tl.range(0, parts, PARTS):
        place = (first + n) * batch_heads + bh  # [PARTS]
        there = first + n < parts
        rows = tl.load(
            part_sums + place[:, None] * WIDTH + column[None, :],
            mask=there[:, None] & (column < WIDTH)[None, :],
            other=0.0,
        )  # [PARTS, COLUMNS]
        if GLOBAL:
            rows *= power(tl.load(part_top + place * 2, mask=there, other=LOWEST) - top)[:, None]
        acc += tl.sum(rows, 0)
    acc *= factor / total if GLOBAL else factor
    tl.store(state + bh * F * D + column, acc.to(state.dtype.element_ty), mask=column < F * D)
    tl.store(norm + bh * F + column - F * D, acc, mask=(column >= F * D) & (column < WIDTH))


@Kernel
@triton.jit
def _output(
    q, state, norm, cos, sin, o, q_box, q_b, q_n, q_h, cos_n, tokens, heads, batch_heads, length, eps, floor,
    SCALED: tl.constexpr, OVERLAP: tl.constexpr, TMA: tl.constexpr, LEN: tl.constexpr, STAGES: tl.constexpr,
    MAP: tl.constexpr, ROTARY: tl.constexpr, F: tl.constexpr, BLOCK_F: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output of a part of the queries.

    Inputs: q `[B, tokens, H, F]` with strides `_b, _n, _h` in units of 16 bytes; state `[B, H, F, D]`, norm
    `[B, H, F]`; cos, sin `[tokens, F]`.
    Outputs: o `[B, tokens, H, D]`.
    Launch: blocks of `BLOCK_D` values, parts of `length` queries, in steps of `LEN`.
    """
    D_BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    b, h, bh, block, part = program_of(heads, batch_heads, D_BLOCKS)
    q, o = unit_head_of(q, b, h, q_b, q_h), own_head(o, b, h, tokens, heads, D)
    stop = tl.minimum(tokens, (part + 1) * length)
    if not TMA:
        first = part * length + tl.arange(0, LEN)  # [LEN]
        following = load_rows_below(q, first, stop, q_n * unit_of(q), 0, F, BLOCK_F)  # [LEN, BLOCK_F]
    await_previous(OVERLAP)  # the first queries are on their way
    norm += bh * F
    z, c = divisor(norm, floor, F, BLOCK_F, ROTARY)  # [BLOCK_F]
    state += bh.to(tl.int64) * F * D
    S, mean = centred(
        state, z, c, block * BLOCK_D, q.dtype.element_ty, F, BLOCK_F, D, BLOCK_D, ROTARY, SCALED
    )  # [BLOCK_F, BLOCK_D], [BLOCK_D]
    for j in tl.range(part * length, stop, LEN, num_stages=STAGES):
        row = j + tl.arange(0, LEN)  # [LEN]
        if TMA:
            q_rows = q_box.load([b, j, h, 0]).reshape(LEN, BLOCK_F)  # [LEN, BLOCK_F]
        else:
            q_rows = following
            # on its way while this tile is computed
            following = load_rows_below(q, row + LEN, stop, q_n * unit_of(q), 0, F, BLOCK_F)
        p = mapped(q_rows, MAP)  # [LEN, BLOCK_F]
        norms = tl.sum(p * z[None, :], 1)  # [LEN]
        share = 1.0 / (norms + eps)  # [LEN]
        p *= share[:, None]
        if SCALED:
            p *= c[None, :]
        if ROTARY:
            p = turned(p, cos, sin, row, stop, cos_n, F, BLOCK_F, False)
        o_rows = tl.dot(p.to(S.dtype), S, input_precision=PRECISION)  # [LEN, BLOCK_D]
        if not ROTARY:
            o_rows += (norms * share)[:, None] * mean[None, :]
        store_rows_below(o, row, stop, heads * D, block * BLOCK_D, o_rows, D, BLOCK_D)


def loading(launch: Launch, tensors: Sequence[Tensor], blocks: Sequence[int]) -> tuple[Launch, tuple[Box | None, ...]]:
    """Return the launch that suits how `[B, N, H, D]` tensors can be loaded, and the tiles that TMA fetches of them."""
    if launch.boxes is None or not uses_boxes(tensors):
        return launch, (None,) * len(tensors)
    launch = launch.boxes
    return launch, tuple(sequence_box(t, launch.length, block) for t, block in zip(tensors, blocks, strict=True))


@planned
def _plan_state(call: Call, k: Tensor, v: Tensor, weight: Tensor | None, summed: bool, asked: bool) -> Plan:
    """Plan a launch of `_state`; `summed` and `asked` are whether there is a second weight and a global query."""
    made = torch.float32
    w = made if weight is None else weight
    tensors = k, v, w, made if summed else w, made, *call.rotary()[:2], made, made
    name = "linear.heavy_state" if call.scaled or asked else "linear.state"

    def plan(launch: Launch) -> Plan:
        return _plan_state_launch(call, launch, k, v, weight, summed, asked)

    return fitting_plan(call, name, plan, tensors, (k, v))


def _plan_state_launch(
    call: Call, launch: Launch, k: Tensor, v: Tensor, weight: Tensor | None, summed: bool, asked: bool
) -> Plan:
    B, M, H, _ = k.shape
    constants = call.constants()
    blocks = math.ceil(v.shape[-1] / constants["BLOCK_D"]) * math.ceil(k.shape[-1] / constants["BLOCK_F"])
    launch, boxes = loading(launch, (k, v), (constants["BLOCK_F"], constants["BLOCK_D"]))
    parts, length = cut(M, B * H * blocks, launch, k, least=4)
    w = (0, 0, 0) if weight is None else weight.stride()
    named = dict(
        WEIGHT=weight is not None, SUM_WEIGHT=summed, GLOBAL=asked, SCALED=call.scaled, OVERLAP=hopper(k),
        TMA=boxes[0] is not None, LEN=launch.length, STAGES=launch.stages, LANES=LANES, num_warps=launch.warps,
        # triton 3.6 cannot schedule two products of one left side in tensor memory
        PRODUCTS=not tensor_memory(k), **constants,
    )  # fmt: skip
    numbers = *unit_strides_of(k, v), *w, call.rotary()[2], M, H, B * H, length
    return Plan(Bound(_state, (parts * blocks * B * H,), numbers, named), parts, boxes, launch)


@planned
def _plan_output(call: Call) -> Plan:
    q, made = call.q, torch.float32
    tensors = q, made, made, *call.rotary()[:2], q.dtype
    name = "linear.scaled_output" if call.scaled else "linear.output"
    return fitting_plan(call, name, lambda launch: _plan_output_launch(call, launch), tensors, (q,))


def _plan_output_launch(call: Call, launch: Launch) -> Plan:
    B, N, H, _ = call.q.shape
    constants = call.constants()
    blocks = math.ceil(call.v.shape[-1] / constants["BLOCK_D"])
    launch, boxes = loading(launch, (call.q,), (constants["BLOCK_F"],))
    parts, length = cut(N, B * H * blocks, launch, call.q, least=1)
    named = dict(
        SCALED=call.scaled, TMA=boxes[0] is not None, LEN=launch.length, STAGES=launch.stages, num_warps=launch.warps,
        **constants, **dependent(call.q),
    )  # fmt: skip
    numbers = *unit_strides_of(call.q), call.rotary()[2], N, H, B * H, length, call.eps, call.floor
    return Plan(Bound(_output, (parts * blocks * B * H,), numbers, named), parts, boxes, launch)


@planned
def _plan_merge(call: Call, part: Tensor, dtype: torch.dtype, factor: float, asked: bool) -> Bound:
    """Plan a launch of `_merge` to a state of `dtype`; `asked` is whether there is a global query."""
    count, B, H, width = part.shape
    named = dict(
        GLOBAL=asked, PARTS=16, COLUMNS=128, F=call.k.shape[-1], D=call.v.shape[-1], num_warps=1, **dependent(part)
    )
    return Bound(_merge, (B * H, math.ceil(width / 128)), (count, B * H, factor), named)


def state_parts(
    call: Call, k: Tensor, v: Tensor, weight: Tensor | None, sum_weight: Tensor | None, query: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return state and norm of parts `[parts, B, H, F * D + F]`; for `query` maximum and total `[parts, B, H, 2]`."""
    B, _, H, F = k.shape
    plan = _plan_state(call, k, v, weight, sum_weight is not None, query is not None)
    part = k.new_empty((plan.parts, B, H, F * v.shape[-1] + F), dtype=torch.float32)
    part_top = None if query is None else part.new_empty((plan.parts, B, H, 2))
    w = part if weight is None else weight
    plan.run(
        k, v, w, w if sum_weight is None else sum_weight, part if query is None else query, *call.rotary()[:2], part,
        part if part_top is None else part_top, boxed=(k, v),
    )  # fmt: skip
    return part, part_top


def merged(
    call: Call, part: Tensor, part_top: Tensor | None, dtype: torch.dtype, factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `factor` times state `[B, H, F, D]` and norm `[B, H, F]`; maximum and total of the logits `[B, H, 2]`."""
    _, B, H, _ = part.shape
    F, D = call.k.shape[-1], call.v.shape[-1]
    state, norm = part.new_empty((B, H, F, D), dtype=dtype), part.new_empty((B, H, F))
    tops = part.new_empty((B, H, 2) if part_top is not None else (0,))
    launch = _plan_merge(call, part, dtype, factor, part_top is not None)
    launch(part, part if part_top is None else part_top, state, norm, tops)
    return state, norm, tops


def forward(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the output `[B, N, H, D]`, the state, its norm z, and maximum and total of the global query's logits."""
    q, k, v = call.q, call.k, call.v
    B, N, H, F = q.shape
    D = v.shape[-1]
    o = q.new_empty((B, N, H, D))
    if not o.numel() or not k.shape[1]:
        state, norm = (q.new_zeros(shape, dtype=torch.float32) for shape in ((B, H, F, D), (B, H, F)))
        return o.zero_(), state, norm, norm.new_zeros((B, H, 2) if call.query is not None else (0,))
    part, part_top = state_parts(call, k, v, call.weight, None, call.query)
    factor = 1.0 / k.shape[1] if call.query is None else 1.0
    state, norm, tops = merged(call, part, part_top, torch.float32, factor)
    if call.wide:
        from vision_attn.kernels.linear.wide import fill_output as fill_wide_output  # noqa: PLC0415

        fill_wide_output(call, state, norm, o)
    else:
        fill_output(call, state, norm, o)
    return o, state, norm, tops


def fill_output(call: Call, state: Tensor, norm: Tensor, o: Tensor) -> None:
    """Write the output `[B, N, H, D]` of queries over a state `[B, H, F, D]` and its norm `[B, H, F]`, both means."""
    plan = _plan_output(call)
    plan.run(call.q, state, norm, *call.rotary()[:2], o, boxed=(call.q,))
