"""The launch of multipole attention in 8 bits, in Triton: see `eight_bit.py` for what it computes.

It is laid out as `forward.py`. But it reads blocks of tokens as `triton/quantising.py` wrote them, cell by cell, and
blocks of means as they are copied here: see `mean_blocks.py`. Each is one piece of memory.
"""

# ruff: noqa: ANN001, ANN202, E741  # the compiler of a kernel reads no annotations
# mypy: disable-error-code="no-untyped-def"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vision_attn.kernels.eight_bits import CELL, SLOTS, Blocks
from vision_attn.kernels.launches import Launch, fitting
from vision_attn.kernels.multipole.masses import masses
from vision_attn.kernels.multipole.mean_blocks import MeanBlocks
from vision_attn.kernels.multipole.op import Call
from vision_attn.kernels.multipole.tiles import (
    exact_block,
    exact_count,
    grid_program,
    neighbourhood,
    tile_tokens,
)
from vision_attn.kernels.triton.eight_bits import (
    attend_outside,
    block_boxes,
    check_blocks,
    flat,
    kind_of,
    load_block,
    meet_blocks,
    nothing_met,
    refuse_other_gpus,
    rounded_logits,
    run_blocks,
    update_rounded,
    values_met,
)
from vision_attn.kernels.triton.launching import Bound, Kernel, next_power, planned, strides_of
from vision_attn.kernels.triton.quantising import (
    EightBits,
    interpreted,
    quantise,
    round_queries,
    store_keys,
    store_values,
)
from vision_attn.kernels.triton.rows import (
    HIDDEN,
    LOG2E,
    Plan,
    head_of,
    load_rows,
    own_head,
    program_of,
    splits,
    store_rows,
)

_SIDE, _SLOTS = tl.constexpr(CELL), tl.constexpr(SLOTS)


@Kernel
@triton.jit
def _round_means(
    means_k, means_v, k_mean, v_scale, slots, k8, v8, k_scale, mk_b, mk_n, mk_h, mv_b, mv_n, mv_h,
    heads, batch_heads, blocks, D: tl.constexpr, BLOCK_D: tl.constexpr, INT8: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One block of means of one head in 8 bits, a scale for each mean key.

    Inputs: means_k, means_v `[B, M, H, D]` with strides `_b, _n, _h`; k_mean, v_scale `[B, H, BLOCK_D]`; slots
    `[blocks, 64]` as of `MeanBlocks`.
    Outputs: k8 `[B, H, blocks, 64, BLOCK_D]`, v8 `[B, H, blocks, BLOCK_D, 64]`; k_scale `[B, H, blocks, 64]`.
    """
    b, h, bh, block, _ = program_of(heads, batch_heads, blocks)
    row = tl.load(slots + block * _SLOTS + tl.arange(0, _SLOTS))  # [64]
    keep, row = row >= 0, tl.maximum(row, 0)
    place, d = bh.to(tl.int64) * blocks + block, tl.arange(0, BLOCK_D)
    k_rows = load_rows(head_of(means_k, b, h, mk_b, mk_h), row, mk_n, D, BLOCK_D).to(tl.float32)  # [64, BLOCK_D]
    k_rows = tl.where(keep[:, None], k_rows - tl.load(k_mean + bh * BLOCK_D + d)[None, :], 0.0)
    store_keys(k8, k_scale, k_rows, place, True, BLOCK_D, INT8, INTERPRETED)
    v_rows = load_rows(head_of(means_v, b, h, mv_b, mv_h), row, mv_n, D, BLOCK_D).to(tl.float32)  # [64, BLOCK_D]
    v_rows = tl.where(keep[:, None], v_rows, 0.0)
    store_values(v8, v_scale + bh * BLOCK_D, v_rows, place, BLOCK_D, INTERPRETED)


@Kernel
@triton.jit
def _forward(
    q, places, k8, v8, k_scale, v_scale, hidden, o, part_o, part_lse, means_k, means_v, means_scale, met, masses,
    chosen, k_box, v_box, means_k_box, means_v_box, q_b, q_n, q_h,
    N, heads, batch, prefix, height, width, outside, cell, near, rows, columns, blocks, outside_blocks, mean_blocks,
    levels, scale, row_programs, part_length, together, parts,
    SPLIT: tl.constexpr, EXACT: tl.constexpr, EXACT_BLOCK: tl.constexpr, MEANS: tl.constexpr, EACH: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIKE: tl.constexpr, RAGGED: tl.constexpr, TMA: tl.constexpr,
    INT8: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Output of a block of queries: of a tile of a cell, or of tokens outside the grid over a part of the blocks.

    Inputs and outputs of tokens: see `attend_outside`. Of means: means_k, means_v, means_scale as `_round_means` writes
    them; met `[C, levels * EACH]`, the blocks that a cell meets; masses `[B * H, C, levels * MEANS]`, added to the
    logits of their first `MEANS` slots of each level, or `[1, C, levels * MEANS]` if all heads are `ALIKE`.
    And chosen `[B, H, C, EXACT]`. Boxes of one block, with `TMA` only.
    Launch: `row_programs` programs for the tokens outside the grid, each over `part_length` blocks, then those of the
    tiles, `together` heads in turn. A head has `blocks` blocks of tokens, the first `outside_blocks` of those outside
    the grid, then `SPLIT` x `SPLIT` for each cell; and `mean_blocks` blocks of means.
    """
    pid = tl.program_id(0)
    whole = (height, width, prefix, cell, rows, columns)
    if pid < row_programs:
        attend_outside(
            pid, q, places, k8, v8, k_scale, v_scale, hidden, o, part_o, part_lse, k_box, v_box, q_b, q_n, q_h,
            N, heads, batch, prefix, height * width, outside, blocks, outside_blocks, scale, part_length, parts,
            D, BLOCK_D, TMA, INT8, INTERPRETED,
        )  # fmt: skip
    else:
        b, h, bh, own, cell_y, cell_x, y0, x0 = grid_program(
            pid - row_programs, heads, together, whole, 0, rows * columns, _SIDE, SPLIT
        )
        m, l, acc = nothing_met(BLOCK_D)
        n = tl.arange(0, _SLOTS)  # [64]
        start, inner = bh * blocks, (y0 - cell_y * cell) // _SIDE * SPLIT + (x0 - cell_x * cell) // _SIDE
        first = start + outside_blocks
        q_rows, q_scale = round_queries(
            q, places, b, h, outside_blocks + own * (SPLIT * SPLIT) + inner, q_b, q_n, q_h, D, BLOCK_D, INT8,
            INTERPRETED,
        )  # fmt: skip
        c = scale * LOG2E * q_scale
        hidden += b.to(tl.int64) * blocks * _SLOTS
        m, l, acc = meet_blocks(
            q_rows, c, m, l, acc, k8, v8, k_box, v_box, k_scale, hidden, start, 0, outside_blocks,
            BLOCK_D, TMA, INT8, INTERPRETED,
        )  # fmt: skip
        first_y, first_x, across, near_cells = neighbourhood(cell_y, cell_x, near, 0, rows, whole)
        chosen += (bh.to(tl.int64) * rows * columns + own) * EXACT
        count = (near_cells + exact_count(chosen, rows * columns, EXACT, EXACT_BLOCK)) * (SPLIT * SPLIT)
        place = first + exact_block(0, near_cells, first_y, first_x, across, chosen, columns, SPLIT)
        ahead = tl.load(k_scale + place)
        for i in tl.range(0, count):
            place = first + exact_block(i, near_cells, first_y, first_x, across, chosen, columns, SPLIT)
            k_rows = load_block(k8, k_box, place, _SLOTS, BLOCK_D, TMA)  # [64, BLOCK_D]
            v_columns = load_block(v8, v_box, place, BLOCK_D, _SLOTS, TMA)  # [BLOCK_D, 64]
            s = rounded_logits(q_rows, k_rows, c * ahead, INT8, INTERPRETED)  # [64, 64]
            if RAGGED:
                s += tl.load(hidden + (place - start) * _SLOTS + n)[None, :]
            # the scale of the next block is there when its product is
            following = tl.minimum(i + 1, count - 1)
            place = first + exact_block(following, near_cells, first_y, first_x, across, chosen, columns, SPLIT)
            ahead = tl.load(k_scale + place)
            m, l, acc = update_rounded(s, v_columns, m, l, acc, INTERPRETED)
        met += own.to(tl.int64) * levels * EACH
        masses += (tl.where(ALIKE, 0, bh).to(tl.int64) * rows * columns + own) * levels * MEANS
        start, count = bh * mean_blocks, levels * EACH
        scales, bias = _of_means(means_scale, masses, met, start, 0, count, MEANS, EACH)
        for i in tl.range(0, count):
            place = start + tl.load(met + i)
            k_rows = load_block(means_k, means_k_box, place, _SLOTS, BLOCK_D, TMA)  # [64, BLOCK_D]
            v_columns = load_block(means_v, means_v_box, place, BLOCK_D, _SLOTS, TMA)  # [BLOCK_D, 64]
            s = rounded_logits(q_rows, k_rows, (c * scales)[None, :], INT8, INTERPRETED) + bias[None, :]  # [64, 64]
            scales, bias = _of_means(means_scale, masses, met, start, i + 1, count, MEANS, EACH)
            m, l, acc = update_rounded(s, v_columns, m, l, acc, INTERPRETED)
        _, acc = values_met(l, acc, v_scale + bh * BLOCK_D, BLOCK_D)
        token, keep = tile_tokens(y0, x0, cell_y, cell_x, whole, _SIDE)  # [64]
        store_rows(own_head(o, b, h, N, heads, D), token, heads * D, acc, keep, D, BLOCK_D)


@triton.jit
def _of_means(means_scale, masses, met, start, i, count, MEANS: tl.constexpr, EACH: tl.constexpr):
    """The scales of block i of the means that a cell meets, and what is added to their logits `[64]`."""
    n = tl.arange(0, _SLOTS)  # [64]
    slot = i % EACH * _SLOTS + n  # [64]
    keep = (slot < MEANS) & (i < count)
    place = start + tl.load(met + i, mask=i < count, other=0)
    scales = tl.load(means_scale + place.to(tl.int64) * _SLOTS + n, mask=keep, other=0.0)
    return scales, tl.load(masses + i // EACH * MEANS + slot, mask=keep, other=HIDDEN)


def forward(call: Call, precision: str) -> Tensor:
    """Return the output `[B, N, H, D]` with q, k and the means of k in `precision`."""
    q = call.q
    refuse_other_gpus(q)
    if not q.numel():
        return q.new_empty(q.shape)
    kind, block_d = kind_of(precision), max(call.block_d, 32)  # what a product of 8 bits sums over at least
    x = quantise(call.k, call.v, call.mask, _blocks(call), block_d, kind)
    means = _rounded_means(call, x, block_d, kind)
    added = masses(call.chosen, call.mass, call.size, means.blocks.tiles)
    if not means.blocks.count:
        added = means.scale
    others = means.k, means.v, means.scale, means.blocks.met(q.device), added, call.chosen
    plan = _plan(call, x.k, x.v, means.k, means.v)
    return run_blocks(plan, x, q, call.outside, call.size[2], others, flat(x.k, x.v, means.k, means.v))


def _blocks(call: Call) -> Blocks:
    height, width, prefix, suffix, cell, *_ = call.size
    return Blocks((height, width, prefix, suffix), cell=cell)


@dataclass(frozen=True)
class _Means:
    """What `_round_means` writes, see there; of tokens if there are no means."""

    blocks: MeanBlocks
    k: Tensor
    v: Tensor
    scale: Tensor


def _rounded_means(call: Call, x: EightBits, block_d: int, kind: torch.dtype) -> _Means:
    (B, _, H, D), blocks = call.q.shape, MeanBlocks(call.pyramid)
    if not blocks.count:
        return _Means(blocks, x.k, x.v, x.k_scale)
    means = _Means(
        blocks, call.q.new_empty((B, H, blocks.count, SLOTS, block_d), dtype=kind),
        call.q.new_empty((B, H, blocks.count, block_d, SLOTS), dtype=torch.float8_e4m3fn),
        call.q.new_empty((B, H, blocks.count, SLOTS), dtype=torch.float32),
    )  # fmt: skip
    _round_means[(blocks.count * B * H,)](
        call.means_k, call.means_v, x.k_mean, x.v_scale, blocks.slots(call.q.device), means.k, means.v, means.scale,
        *strides_of(call.means_k, call.means_v), H, B * H, blocks.count, D=D, BLOCK_D=block_d,
        INT8=kind == torch.int8, INTERPRETED=interpreted(call.q), num_warps=4,
    )  # fmt: skip
    return means


@planned
def _plan(call: Call, k8: Tensor, v8: Tensor, means_k8: Tensor, means_v8: Tensor) -> Plan:
    """Plan the launch that fits, for keys like `k8` and values like `v8`."""
    made, whole = torch.float32, torch.int32
    tokens = call.q, whole, k8, v8, *[made] * 3, call.q.dtype, made, made
    tensors = *tokens, means_k8, means_v8, made, whole, made, call.chosen

    def attempt(launch: Launch) -> tuple[Plan, int]:
        check_blocks(launch)
        plan = _plan_launch(call, launch, (k8, v8, means_k8, means_v8))
        return plan.needs(*tensors, boxed=flat(k8, v8, means_k8, means_v8))

    return fitting("multipole.eight_bit", call.q, attempt, channels=call.block_d)


def _plan_launch(call: Call, launch: Launch, rounded: tuple[Tensor, Tensor, Tensor, Tensor]) -> Plan:
    B, H, count, _, block_d = rounded[0].shape
    height, width, prefix, _, cell, near, _ = call.size
    blocks, means, exact = _blocks(call), MeanBlocks(call.pyramid), call.chosen.shape[3]
    programs, tiles = B * H * blocks.outside, B * H * blocks.cells
    met = ((2 * near + 1) ** 2 + exact) * blocks.split**2 + means.rows.levels * means.each + blocks.outside
    parts, length = splits(call.q, programs, count * SLOTS, tiles * met * SLOTS, SLOTS)
    boxes = block_boxes(*rounded)
    named = dict(
        N=call.q.shape[1], heads=H, batch=B, prefix=prefix, height=height, width=width, outside=call.outside,
        cell=cell, near=near, rows=call.pyramid.cells[0], columns=call.pyramid.cells[1], blocks=count,
        outside_blocks=blocks.outside, mean_blocks=means.count, levels=means.rows.levels, scale=call.scale,
        row_programs=programs * parts, part_length=length // SLOTS, together=call.together, parts=parts,
        SPLIT=blocks.split, EXACT=exact, EXACT_BLOCK=next_power(max(1, exact)), MEANS=means.width,
        EACH=means.each, D=call.q.shape[3], BLOCK_D=block_d, ALIKE=call.alike, RAGGED=call.ragged(CELL),
        TMA=boxes[0] is not None, INT8=rounded[0].dtype == torch.int8, INTERPRETED=interpreted(call.q),
        **launch.options,
    )  # fmt: skip
    return Plan(Bound(_forward, (programs * parts + tiles,), strides_of(call.q), named), parts, boxes, launch)
