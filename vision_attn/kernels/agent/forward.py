"""The forward of attention between few tokens and many in Triton, for both stages of agent attention.

    o = softmax(c_m q k^T + bias) v,    c_m = first_scale for the first keys, scale for the others

Few queries over many keys: the keys are split, and the parts merged by their log-sum-exp. Many queries over few keys:
one launch. The bias `[H, N, first]` is read once, in place.
"""

# ruff: noqa: ANN001, ANN202, E741  # the compiler of a kernel reads no annotations
# mypy: disable-error-code="no-untyped-def"

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vision_attn.kernels.linear.tiles import (
    LOG2E,
    Launch,
    block_of,
    precision_of,
    put_rows,
    token_rows,
)
from vision_attn.kernels.triton.launching import Kernel, multiprocessors

HIDDEN = tl.constexpr(-1e30)
START = tl.constexpr(-1e16)  # of a running maximum: above what is hidden, below any logit


@dataclass(frozen=True)
class Blocks:
    """Queries of a tile, and the launch over keys."""

    rows: int
    launch: Launch


# Not tuned: chosen offline by registers and shared memory for sm_90 with triton 3.7.1.
# Keys: bytes of an element, channels at most.
_FORWARD: dict[tuple[int, int], Blocks] = {
    (2, 64): Blocks(64, Launch(64, 4, 3, 4)),
    (2, 128): Blocks(64, Launch(64, 4, 2, 2)),
    (2, 256): Blocks(64, Launch(32, 8, 2, 1)),
    (4, 64): Blocks(32, Launch(32, 4, 2, 4)),
    (4, 128): Blocks(32, Launch(32, 4, 2, 2)),
    (4, 256): Blocks(16, Launch(16, 8, 1, 1)),
}


@dataclass(frozen=True)
class Pairs:
    """The inputs of one call, checked. `bias` is `[H, N, first]`, `seen` uint8 `[B, M]` or `[1, M]`."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    seen: Tensor | None
    first: int
    scales: tuple[float, float]

    def numbers(self) -> dict[str, Any]:
        """What all kernels take by name."""
        bias, seen, D = self.bias, self.seen, self.q.shape[-1]
        b = (0, 0, 0) if bias is None else bias.stride()
        return dict(
            bias=self.q if bias is None else bias, bias_h=b[0], bias_n=b[1], bias_m=b[2],
            seen=self.q if seen is None else seen, seen_b=0 if seen is None or seen.shape[0] == 1 else seen.stride(0),
            first=self.first, first_scale=self.scales[0], scale=self.scales[1], queries=self.q.shape[1],
            tokens=self.k.shape[1], heads=self.q.shape[2], batch_heads=self.q.shape[0] * self.q.shape[2],
            BIAS=bias is not None, SEEN=seen is not None, D=D, BLOCK_D=block_of(D), PRECISION=precision_of(self.q),
        )  # fmt: skip


def choice(q: Tensor, table: dict[tuple[int, int], Any]) -> Any:
    """Return the first entry that fits dtype and channels."""
    return next(c for (b, d), c in table.items() if b == q.element_size() and block_of(q.shape[-1]) <= d)


def parts_of(tokens: int, programs: int, launch: Launch, t: Tensor) -> tuple[int, int]:
    """Into how many parts, and of what length, a loop over `tokens` is cut: none where the programs fill the GPU."""
    want = multiprocessors(t) * launch.programs // max(programs, 1)
    parts = max(1, min(want, tokens // (4 * launch.length)))
    size = math.ceil(tokens / parts / launch.length) * launch.length
    return math.ceil(tokens / size), size


@triton.jit
def logits(
    q, k, row, column, stop, b, h, bias, bias_h, bias_n, bias_m, seen, seen_b, first, first_scale, scale, queries,
    BIAS: tl.constexpr, SEEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits in base 2 `[rows, columns]`, hidden where nothing is seen, and the factor of each column."""
    factor = tl.where(column < first, first_scale, scale)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (factor * LOG2E)[None, :]
    if BIAS:
        place = h * bias_h + row.to(tl.int64)[:, None] * bias_n + column.to(tl.int64)[None, :] * bias_m
        there = (row < queries)[:, None] & (column < first)[None, :]
        s += tl.load(bias + place, mask=there, other=0.0).to(tl.float32) * LOG2E
    visible = column < stop
    if SEEN:
        visible = visible & (tl.load(seen + b * seen_b + column, mask=column < stop, other=0) != 0)
    return tl.where(visible[None, :], s, HIDDEN), factor


@Kernel
@triton.jit
def _attend(
    q, k, v, o, lse, part, part_lse, q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, bias, bias_h, bias_n, bias_m,
    seen, seen_b, first, first_scale, scale, queries, tokens, heads, batch_heads, blocks, length,
    BIAS: tl.constexpr, SEEN: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, LEN: tl.constexpr,
    STAGES: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of queries over a part of the keys."""
    pid = tl.program_id(0)
    bh = pid % batch_heads
    block = pid // batch_heads % blocks
    slice_ = pid // batch_heads // blocks
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    row = block * ROWS + tl.arange(0, ROWS)
    x = token_rows(q + b * q_b + h * q_h, row, queries, q_n, 0, D, BLOCK_D)
    m = tl.full([ROWS], START, tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    stop = tl.minimum(tokens, (slice_ + 1) * length)
    for j in tl.range(slice_ * length, stop, LEN, num_stages=STAGES):
        column = j + tl.arange(0, LEN)
        keys = token_rows(k, column, stop, k_n, 0, D, BLOCK_D)
        values = token_rows(v, column, stop, v_n, 0, D, BLOCK_D)
        s, _ = logits(
            x, keys, row, column, stop, b, h, bias, bias_h, bias_n, bias_m, seen, seen_b, first, first_scale, scale,
            queries, BIAS, SEEN, PRECISION,
        )  # fmt: skip
        top = tl.maximum(m, tl.max(s, 1))
        p = tl.math.exp2(s - top[:, None])
        shrink = tl.math.exp2(m - top)
        l = l * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + tl.dot(p.to(values.dtype), values, input_precision=PRECISION)
        m = top
    total = tl.maximum(l, 1e-30)  # a part may hold hidden keys alone
    acc = acc * (1.0 / total)[:, None]
    if SPLIT:
        place = (slice_.to(tl.int64) * batch_heads + bh) * queries
        put_rows(part + place * D, row, queries, D, 0, acc, D, BLOCK_D)
        tl.store(part_lse + place + row, m + tl.log2(total), mask=row < queries)
    else:
        put_rows(o + (b * queries * heads + h) * D, row, queries, heads * D, 0, acc, D, BLOCK_D)
        tl.store(lse + bh.to(tl.int64) * queries + row, m + tl.log2(total), mask=row < queries)


@Kernel
@triton.jit
def _join(
    part, part_lse, o, lse, parts, queries, heads, batch_heads, ROWS: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Merge parts by their log-sum-exp."""
    bh = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m = tl.full([ROWS], HIDDEN, tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for i in tl.range(0, parts, num_stages=4):
        place = (i * batch_heads + bh).to(tl.int64) * queries
        level = tl.load(part_lse + place + row, mask=row < queries, other=0.0)
        rows = token_rows(part + place * D, row, queries, D, 0, D, BLOCK_D)
        top = tl.maximum(m, level)
        weight, shrink = tl.math.exp2(level - top), tl.math.exp2(m - top)
        l = l * shrink + weight
        acc = acc * shrink[:, None] + rows * weight[:, None]
        m = top
    base = o + ((bh // heads).to(tl.int64) * queries * heads + bh % heads) * D
    put_rows(base, row, queries, heads * D, 0, acc / l[:, None], D, BLOCK_D)
    tl.store(lse + bh.to(tl.int64) * queries + row, m + tl.log2(l), mask=row < queries)


def forward(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Return the output `[B, N, H, D]` and its log-sum-exp in base 2, `[B, H, N]` in float32."""
    q, k, v = pairs.q, pairs.k, pairs.v
    B, N, H, D = q.shape
    o, lse = q.new_empty(q.shape), q.new_empty((B, H, N), dtype=torch.float32)
    if not o.numel():
        return o, lse
    tile = choice(q, _FORWARD)
    blocks = math.ceil(N / tile.rows)
    parts, length = parts_of(k.shape[1], B * H * blocks, tile.launch, q)
    part, part_lse = o, lse
    if parts > 1:
        part, part_lse = (lse.new_empty((parts, B, H, N, *rest)) for rest in ((D,), ()))
    _attend[(parts * blocks * B * H,)](
        q, k, v, o, lse, part, part_lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], blocks=blocks,
        length=length, SPLIT=parts > 1, ROWS=tile.rows, LEN=tile.launch.length, STAGES=tile.launch.stages,
        num_warps=tile.launch.warps, **pairs.numbers(),
    )  # fmt: skip
    if parts > 1:
        _join[(math.ceil(N / 16), B * H)](
            part, part_lse, o, lse, parts, N, H, B * H, ROWS=16, D=D, BLOCK_D=block_of(D), num_warps=4
        )
    return o, lse
