"""What the launches of attention in 8 bits share, in Triton: blocks, their products, and the tokens outside the grid.

`vision_attn/kernels/eight_bits.py` says what they compute; they read what `quantising.py` wrote: blocks of 64 tokens,
each of which is one piece of memory with one scale. A program quantises its own queries.
"""

# ruff: noqa: ANN001, E741  # the compiler of a kernel reads no annotations
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from vision_attn.kernels import launches
from vision_attn.kernels.backend import LaunchError
from vision_attn.kernels.eight_bits import SLOTS
from vision_attn.kernels.launches import Launch
from vision_attn.kernels.triton.launching import hopper
from vision_attn.kernels.triton.quantising import EightBits, position, round_queries, rounded
from vision_attn.kernels.triton.rows import (
    LOG2E,
    NO_KEY,
    Box,
    Plan,
    merge_outside,
    outside_program,
    outside_tokens,
    own_head,
    store_lse,
    store_rows,
)

_SLOTS = tl.constexpr(SLOTS)
_START = tl.constexpr(-1e10)  # where a running maximum starts: below any true logit, far above any hidden one
# an integer below 2^22 added to these bits of a float32 becomes its mantissa: two instructions that run at full rate
_BITS, _VALUE = tl.constexpr(0x4B400000), tl.constexpr(12582912.0)


@triton.jit
def nothing_met(BLOCK_D: tl.constexpr):
    """The online softmax of 64 queries that have met no key: maximum `[64]`, sums `[64, 8]`, values `[64, BLOCK_D]`."""
    m = tl.full([_SLOTS], _START, tl.float32)  # [64]
    l = tl.zeros([_SLOTS, 8], tl.float32)  # [64, 8]
    acc = tl.zeros([_SLOTS, BLOCK_D], tl.float32)  # [64, BLOCK_D]
    return m, l, acc


@triton.jit
def values_met(l, acc, v_scale, BLOCK_D: tl.constexpr):
    """Sums of weights `[64]` and the output `[64, BLOCK_D]` of an online softmax, with the scales of v's head."""
    total = tl.maximum(tl.sum(l, 1), NO_KEY)  # [64], a part may hold hidden keys alone
    d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    return total, acc * (1.0 / total)[:, None] * tl.load(v_scale + d)[None, :]


@triton.jit
def load_block(base, box, place, ROWS: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr):
    """Block `place` of `[blocks, ROWS, WIDTH]`."""
    if TMA:
        rows = box.load([place * ROWS, 0])
    else:
        n, d = tl.arange(0, ROWS), tl.arange(0, WIDTH)  # [ROWS], [WIDTH]
        rows = tl.load(base + place.to(tl.int64) * (ROWS * WIDTH) + n[:, None] * WIDTH + d[None, :])
    return rows


@triton.jit
def rounded_logits(q_rows, k_rows, c, INT8: tl.constexpr, INTERPRETED: tl.constexpr):
    """Logits of a block of queries and one of keys in base 2, `[64, 64]`."""
    if INT8:
        whole = tl.dot(q_rows, tl.trans(k_rows))  # [64, 64]
        s = (whole + _BITS).to(tl.float32, bitcast=True) - _VALUE
    elif INTERPRETED:
        s = tl.dot(q_rows.to(tl.float32), tl.trans(k_rows.to(tl.float32)), input_precision="ieee")
    else:
        s = tl.dot(q_rows, tl.trans(k_rows))
    return s * c


@triton.jit
def update_rounded(s, v_columns, m, l, acc, INTERPRETED: tl.constexpr):
    """Add a block of keys to an online softmax over logits s `[64, 64]`, with values `[BLOCK_D, 64]`."""
    top = tl.maximum(m, tl.ceil(tl.max(s, 1)) - 8)  # [64]
    p = tl.math.exp2(s - top[:, None])  # [64, 64]
    shrink = tl.math.exp2(m - top)  # [64]
    l = l * shrink[:, None] + tl.sum(p.reshape(p.shape[0], p.shape[1] // 8, 8), 1)
    p = position(p)
    if INTERPRETED:
        part = tl.dot(rounded(p), tl.trans(v_columns.to(tl.float32)), input_precision="ieee")
    else:
        part = tl.dot(p.to(tl.float8e4nv), tl.trans(v_columns))
    # tensor cores add in fewer bits than float32: tiles are added outside of them
    return top, l, acc * shrink[:, None] + part


@triton.jit
def meet_blocks(
    q_rows, c, m, l, acc, k8, v8, k_box, v_box, k_scale, hidden, start, first, stop, BLOCK_D: tl.constexpr,
    TMA: tl.constexpr, INT8: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Meet the blocks `first .. stop - 1` of the head whose blocks begin at `start`."""
    ahead = tl.load(k_scale + start + first)
    for j in tl.range(first, stop):
        k_rows = load_block(k8, k_box, start + j, _SLOTS, BLOCK_D, TMA)  # [64, BLOCK_D]
        s = rounded_logits(q_rows, k_rows, c * ahead, INT8, INTERPRETED)  # [64, 64]
        ahead = tl.load(k_scale + start + tl.minimum(j + 1, stop - 1))
        s += tl.load(hidden + j * _SLOTS + tl.arange(0, _SLOTS))[None, :]
        v_columns = load_block(v8, v_box, start + j, BLOCK_D, _SLOTS, TMA)  # [BLOCK_D, 64]
        m, l, acc = update_rounded(s, v_columns, m, l, acc, INTERPRETED)
    return m, l, acc


@triton.jit
def attend_outside(
    pid, q, places, k8, v8, k_scale, v_scale, hidden, o, part_o, part_lse, k_box, v_box,
    q_b, q_n, q_h, N, heads, batch, prefix, image, outside, blocks, outside_blocks, scale, part_length, parts,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr, INT8: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Output of a block of the tokens outside the grid over a part of the blocks of keys.

    Inputs: q `[B, N, H, D]` with its strides; the others as of `EightBits`. Boxes of one block, with `TMA` only.
    Outputs: o `[B, N, H, D]`; part_o `[parts, B, H, outside, D]` and part_lse if there are several parts.
    Launch: program `pid` of those of the tokens outside the grid, each over `part_length` blocks.
    """
    b, h, bh, part, rank, keep, _ = outside_program(pid, outside, heads, N, prefix, image, _SLOTS, parts)
    m, l, acc = nothing_met(BLOCK_D)
    start = bh * blocks
    q_rows, q_scale = round_queries(
        q, places, b, h, pid % outside_blocks, q_b, q_n, q_h, D, BLOCK_D, INT8, INTERPRETED
    )  # [64, BLOCK_D]
    first = part * part_length
    m, l, acc = meet_blocks(
        q_rows, scale * LOG2E * q_scale, m, l, acc, k8, v8, k_box, v_box, k_scale,
        hidden + b.to(tl.int64) * blocks * _SLOTS, start, first, tl.minimum(first + part_length, blocks),
        BLOCK_D, TMA, INT8, INTERPRETED,
    )  # fmt: skip
    total, acc = values_met(l, acc, v_scale + bh * BLOCK_D, BLOCK_D)
    if parts == 1:
        token = outside_tokens(rank, prefix, image)  # [64]
        store_rows(own_head(o, b, h, N, heads, D), token, heads * D, acc, keep, D, BLOCK_D)
    else:
        place = (part * batch * heads + bh).to(tl.int64) * outside
        store_rows(part_o + place * D, rank, D, acc, keep, D, BLOCK_D)
        store_lse(part_lse, place + rank, 0, m, total, keep, False)


def refuse_other_gpus(t: Tensor) -> None:
    """Refuse a GPU that has no products of 8 bits.

    Raises:
        LaunchError: If that of `t` has none.
    """
    for reason in launches.target_of(t.device).without_eight_bits:
        raise LaunchError(reason)


def kind_of(precision: str) -> torch.dtype:
    """Return the dtype of q and k."""
    return torch.int8 if precision == "int8" else torch.float8_e4m3fn


def check_blocks(launch: Launch) -> None:
    """Refuse a launch whose tiles are not the blocks.

    Raises:
        LaunchError: If they are others.
    """
    if (launch.rows, launch.length) != (SLOTS, SLOTS):
        raise LaunchError(f"a block of 8 bits has {SLOTS} tokens, not {launch.rows} or {launch.length}")


def flat(*blocks: Tensor) -> tuple[Tensor, ...]:
    """Return blocks `[B, H, blocks, rows, columns]` as the rows of one matrix each."""
    return tuple(t.flatten(0, 3) for t in blocks)


def block_boxes(*blocks: Tensor) -> tuple[Box | None, ...]:
    """Return boxes of one block of each tensor; None where TMA does not fetch them."""
    if not hopper(blocks[0]):
        return (None,) * len(blocks)
    return tuple(Box(0, [t[..., 0].numel(), t.shape[-1]], [t.shape[-1], 1], [t.shape[-2], t.shape[-1]]) for t in blocks)


def run_blocks(
    plan: Plan, x: EightBits, q: Tensor, outside: int, prefix: int, others: tuple[Tensor, ...],
    boxed: tuple[Tensor, ...],
) -> Tensor:  # fmt: skip
    """Launch a kernel whose first tensors are those of a local one, then `others`; return its output `[B, N, H, D]`."""
    B, N, H, D = q.shape
    o, part_o, part_lse = q.new_empty(q.shape), x.k_scale, x.k_scale
    if plan.parts > 1:
        part_o = q.new_empty((plan.parts, B, H, outside, D), dtype=torch.float32)
        part_lse = q.new_empty((1, plan.parts, B, H, outside), dtype=torch.float32)
    tensors = q, x.places, x.k, x.v, x.k_scale, x.v_scale, x.hidden, o, part_o, part_lse
    plan.run(*tensors, *others, boxed=boxed)
    if plan.parts > 1:
        merge_outside(part_o, part_lse, o, q.new_empty((1, B, H, N), dtype=torch.float32), prefix)
    return o
