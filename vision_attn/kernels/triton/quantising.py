"""Keys and values in 8 bits, in Triton, in the order in which attention in 8 bits reads them.

Tokens are cut into blocks of 64 slots: see `Blocks` in `vision_attn/kernels/eight_bits.py`, which says what is rounded
how. Three launches: sums of keys and the greatest values of each part of the tokens; the mean and the scales of each
head; the blocks, of which a program writes one of keys or of values, so that many loads are under way.

    k8 [B, H, blocks, 64, BLOCK_D],    v8 [B, H, blocks, BLOCK_D, 64]

Queries are read once, so the program that attends with a block of them quantises it (`round_queries`).

A product of 8 bits wants neighbouring bytes along what it sums over, so the values of a block lie transposed. Their
slots are in the order in which a thread that computed weights hands them to the next product (`position`), so that no
weight changes threads.
"""

# ruff: noqa: ANN001, ANN202  # the compiler of a kernel reads no annotations
# mypy: disable-error-code="no-untyped-def"

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vision_attn.kernels import launches
from vision_attn.kernels.eight_bits import SLOTS, Blocks, sampled
from vision_attn.kernels.triton.launching import Kernel, strides_of
from vision_attn.kernels.triton.rows import (
    HIDDEN,
    head_of,
    load_rows,
    load_rows_below,
    program_of,
    seen_tokens,
    store_rows,
)

_SLOTS = tl.constexpr(SLOTS)
_LEAST = tl.constexpr(1e-20)
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds a float32 to whole numbers, ties to even
_PARTS = 64  # of the tokens, at most


@triton.jit
def rounded(x):
    """The nearest numbers of e4m3 in float32, ties to even; 448 at most.

    For the interpreter, whose conversion from float32 is wrong; it converts right what is in e4m3 already.
    """
    bits = x.to(tl.int32, bitcast=True)
    near = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    small = (x + 24576.0) - 24576.0  # multiples of 2^-9
    return tl.where(tl.abs(x) < 0.015625, small, near)


@triton.jit
def position(rows):
    """Reorder the 64 columns of `rows` from slots to positions: those of each 16 as [2, 4, 2] to [4, 2, 2]."""
    four: tl.constexpr = rows.shape[1] // 16
    return rows.reshape(rows.shape[0], four, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(rows.shape[0], rows.shape[1])


@triton.jit
def eight_bits(x, INT8: tl.constexpr, INTERPRETED: tl.constexpr):
    """Values within the range of int8 or e4m3, rounded to it."""
    if INT8:
        whole = ((x + _ROUND) - _ROUND).to(tl.int8)
    elif INTERPRETED:
        whole = rounded(x).to(tl.float8e4nv)
    else:
        whole = x.to(tl.float8e4nv)
    return whole


@Kernel
@triton.jit
def _statistics(
    k, v, k_sums, v_tops, k_b, k_n, k_h, v_b, v_n, v_h, N, heads, batch_heads, sampled, k_length, v_length,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sums of a part of the sampled keys, and greatest absolute values of a part of the tokens.

    Inputs: k `[B, sampled, H, D]`, v `[B, N, H, D]` with strides `_b, _n, _h`; a part has `k_length` and `v_length`.
    Outputs: k_sums, v_tops `[parts, B, H, BLOCK_D]`.
    """
    b, h, bh, _, part = program_of(heads, batch_heads, 1)
    k, v = head_of(k, b, h, k_b, k_h), head_of(v, b, h, v_b, v_h)
    rows = tl.arange(0, ROWS)  # [ROWS]
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)  # [ROWS, BLOCK_D], added up once: a sum over rows waits for warps
    stop = tl.minimum(sampled, (part + 1) * k_length)
    for i in tl.range(part * k_length, stop, ROWS):
        total += load_rows_below(k, i + rows, stop, k_n, 0, D, BLOCK_D).to(tl.float32)
    top = tl.zeros([ROWS, BLOCK_D], tl.float32)  # [ROWS, BLOCK_D]
    stop = tl.minimum(N, (part + 1) * v_length)
    for i in tl.range(part * v_length, stop, ROWS):
        top = tl.maximum(top, tl.abs(load_rows_below(v, i + rows, stop, v_n, 0, D, BLOCK_D).to(tl.float32)))
    place = (part.to(tl.int64) * batch_heads + bh) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    tl.store(k_sums + place, tl.sum(total, 0))
    tl.store(v_tops + place, tl.max(top, 0))


@Kernel
@triton.jit
def _fold(k_sums, v_tops, k_mean, v_scale, tokens, parts, batch_heads, BLOCK_D: tl.constexpr, ROWS: tl.constexpr):
    """Mean of `tokens` keys, and scales of values, of a head, `[B, H, BLOCK_D]`, of its parts."""
    bh, d = tl.program_id(0), tl.arange(0, BLOCK_D)  # [BLOCK_D]
    total = tl.zeros([BLOCK_D], tl.float32)  # [BLOCK_D]
    top = tl.zeros([BLOCK_D], tl.float32)  # [BLOCK_D]
    for i in tl.range(0, parts, ROWS):
        part = i + tl.arange(0, ROWS)  # [ROWS]
        place = (part[:, None].to(tl.int64) * batch_heads + bh) * BLOCK_D + d[None, :]  # [ROWS, BLOCK_D]
        total += tl.sum(tl.load(k_sums + place, mask=(part < parts)[:, None], other=0.0), 0)
        top = tl.maximum(top, tl.max(tl.load(v_tops + place, mask=(part < parts)[:, None], other=0.0), 0))
    tl.store(k_mean + bh * BLOCK_D + d, tl.div_rn(total, tokens.to(tl.float32)))
    tl.store(v_scale + bh * BLOCK_D + d, tl.div_rn(top, 448.0))


@triton.jit
def _largest(rows, INT8: tl.constexpr):
    """The scales of int8 or e4m3 for the largest of each of some rows `[rows]`, and what to multiply it by."""
    most: tl.constexpr = 127.0 if INT8 else 448.0
    top = tl.maximum(rows, _LEAST)
    return tl.div_rn(top, most), tl.div_rn(most, top)


@triton.jit
def round_queries(
    q, places, b, h, block, q_b, q_n, q_h, D: tl.constexpr, BLOCK_D: tl.constexpr, INT8: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The queries of a block `[64, BLOCK_D]` in 8 bits, and their scale; places `[blocks, 64]` as of `Blocks`."""
    token = tl.load(places + block * _SLOTS + tl.arange(0, _SLOTS))  # [64]
    rows = load_rows(head_of(q, b, h, q_b, q_h), tl.maximum(token, 0), q_n, D, BLOCK_D).to(tl.float32)
    rows = tl.where((token >= 0)[:, None], rows, 0.0)  # [64, BLOCK_D]
    scale, factor = _largest(tl.max(tl.max(tl.abs(rows), 1), 0), INT8)
    return eight_bits(rows * factor, INT8, INTERPRETED), scale


@triton.jit
def store_keys(
    k8, k_scale, rows, place, PER_ROW: tl.constexpr, BLOCK_D: tl.constexpr, INT8: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Write keys `[64, BLOCK_D]` as block `place`, and their scale; `PER_ROW`, one for each of them."""
    n = tl.arange(0, _SLOTS)  # [64]
    top = tl.max(tl.abs(rows), 1)  # [64]
    if PER_ROW:
        scale, factor = _largest(top, INT8)
        tl.store(k_scale + place * _SLOTS + n, scale)
        rows *= factor[:, None]
    else:
        scale, factor = _largest(tl.max(top, 0), INT8)
        tl.store(k_scale + place, scale)
        rows *= factor
    rows = eight_bits(rows, INT8, INTERPRETED)  # [64, BLOCK_D]
    store_rows(k8 + place * _SLOTS * BLOCK_D, n, BLOCK_D, rows, n >= 0, BLOCK_D, BLOCK_D)


@triton.jit
def store_values(v8, v_scale, rows, place, BLOCK_D: tl.constexpr, INTERPRETED: tl.constexpr):
    """Write the values `[64, BLOCK_D]` of block `place`, transposed, with the scales of their head at `v_scale`."""
    d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    rows *= tl.div_rn(1.0, tl.maximum(tl.load(v_scale + d), _LEAST))[None, :]
    columns = position(tl.trans(eight_bits(rows, False, INTERPRETED)))  # [BLOCK_D, 64]
    store_rows(v8 + place * _SLOTS * BLOCK_D, d, _SLOTS, columns, d >= 0, _SLOTS, _SLOTS)


@Kernel
@triton.jit
def _quantise(
    k, v, k_mean, v_scale, mask, places, k8, v8, k_scale, hidden,
    k_b, k_n, k_h, v_b, v_n, v_h, mask_b, N, heads, batch_heads, prefix, image, blocks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, MASK: tl.constexpr, INT8: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One block of one head in 8 bits: of its values, or of its keys.

    Inputs: k, v `[B, N, H, D]` with strides `_b, _n, _h`; k_mean, v_scale `[B, H, BLOCK_D]`; mask `[B, outside]` with
    its stride; places `[blocks, 64]`, the tokens of each block, -1 for none.
    Outputs: k8, v8 as above; k_scale `[B, H, blocks]`; hidden `[B, blocks, 64]`, 0 where a key is seen, hugely negative
    where it is not.
    """
    b, h, bh, block, keys = program_of(heads, batch_heads, blocks)
    n = tl.arange(0, _SLOTS)  # [64]
    token = tl.load(places + block * _SLOTS + n)  # [64]
    keep, token = token >= 0, tl.maximum(token, 0)
    place = bh.to(tl.int64) * blocks + block
    if keys:
        if h == 0:
            seen = keep & seen_tokens(token, N, mask + b * mask_b, prefix, image, MASK)  # [64]
            tl.store(hidden + (b.to(tl.int64) * blocks + block) * _SLOTS + n, tl.where(seen, 0.0, HIDDEN))
        d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
        k_rows = load_rows(head_of(k, b, h, k_b, k_h), token, k_n, D, BLOCK_D).to(tl.float32)  # [64, BLOCK_D]
        k_rows = tl.where(keep[:, None], k_rows - tl.load(k_mean + bh * BLOCK_D + d)[None, :], 0.0)
        store_keys(k8, k_scale, k_rows, place, False, BLOCK_D, INT8, INTERPRETED)
    else:
        v_rows = load_rows(head_of(v, b, h, v_b, v_h), token, v_n, D, BLOCK_D).to(tl.float32)  # [64, BLOCK_D]
        v_rows = tl.where(keep[:, None], v_rows, 0.0)
        store_values(v8, v_scale + bh * BLOCK_D, v_rows, place, BLOCK_D, INTERPRETED)


@dataclass(frozen=True)
class EightBits:
    """What `_quantise` and `_fold` write, see there; and the tokens of each block, which `round_queries` reads."""

    k: Tensor
    v: Tensor
    k_scale: Tensor
    v_scale: Tensor
    hidden: Tensor
    k_mean: Tensor
    places: Tensor


def quantise(k: Tensor, v: Tensor, mask: Tensor | None, blocks: Blocks, block_d: int, kind: torch.dtype) -> EightBits:
    """Return k and v in 8 bits: k in `kind`, int8 or e4m3, and v in e4m3; `mask` is in bytes."""
    B, N, H, D = k.shape
    height, width, prefix, _ = blocks.size
    length = max(256, math.ceil(math.ceil(N / _PARTS) / SLOTS) * SLOTS)
    parts, count = math.ceil(N / length), blocks.count
    some = sampled(k)
    k_length = math.ceil(some.shape[1] / parts)

    def made(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return k.new_empty(shape, dtype=dtype)

    k_sums, v_tops = (made(parts, B, H, block_d) for _ in range(2))
    found = EightBits(
        made(B, H, count, SLOTS, block_d, dtype=kind), made(B, H, count, block_d, SLOTS, dtype=torch.float8_e4m3fn),
        made(B, H, count), made(B, H, block_d), made(B, count, SLOTS), made(B, H, block_d), blocks.places(k.device),
    )  # fmt: skip
    _statistics[(parts * B * H,)](
        some, v, k_sums, v_tops, *strides_of(some, v), N, H, B * H, some.shape[1], k_length, length, D=D,
        BLOCK_D=block_d, ROWS=32, num_warps=4,
    )  # fmt: skip
    _fold[(B * H,)](
        k_sums, v_tops, found.k_mean, found.v_scale, some.shape[1], parts, B * H, BLOCK_D=block_d, ROWS=16, num_warps=4
    )
    _quantise[(2 * count * B * H,)](
        k, v, found.k_mean, found.v_scale, found.hidden if mask is None else mask, found.places, found.k, found.v,
        found.k_scale, found.hidden, *strides_of(k, v), 0 if mask is None else mask.stride(0) * (mask.shape[0] > 1),
        N, H, B * H, prefix, height * width, count, D=D, BLOCK_D=block_d, MASK=mask is not None,
        INT8=kind == torch.int8, INTERPRETED=interpreted(k), num_warps=4,
    )  # fmt: skip
    return found


def interpreted(t: Tensor) -> bool:
    """Whether kernels on `t` are interpreted, which rounds and multiplies e4m3 wrongly."""
    return launches.target_of(t.device) is launches.INTERPRETER
