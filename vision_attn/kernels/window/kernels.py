"""Attention inside windows that do not overlap, in Triton: forward, and the gradients.

Tokens are walked window by window, in slots: a window of L tokens has as many slots as the next power of two, so a tile
of queries holds many small windows (and sees no key of another one) or a part of a large one. Keys that all queries
share come after the own ones, in the same softmax; their gradients are those of attention between few tokens and many.
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

from vision_attn.kernels.agent.backward import key_gradients
from vision_attn.kernels.agent.forward import HIDDEN, START, Pairs, choice, logits
from vision_attn.kernels.linear.tiles import LOG2E, block_of, precision_of, put_rows, token_rows
from vision_attn.kernels.triton.launching import Kernel, next_power

# Not tuned: chosen offline by registers and shared memory for sm_90 with triton 3.7.1.
# Keys: bytes of an element, channels at most. Slots of a tile and warps: forward, dq, dk and dv.
_TILES: dict[tuple[int, int], tuple[tuple[int, int], ...]] = {
    (2, 64): ((64, 4), (64, 4), (64, 4)),
    (2, 128): ((64, 4), (64, 8), (64, 8)),
    (2, 256): ((32, 8), (32, 8), (32, 8)),
    (4, 64): ((32, 4), (32, 4), (32, 4)),
    (4, 128): ((32, 4), (16, 4), (16, 4)),
    (4, 256): ((16, 8), (16, 8), (16, 8)),
}


@dataclass(frozen=True)
class Cells:
    """The inputs of one call, checked. q, k and v are the grid's tokens; `seen` is uint8 `[B, E]` or `[1, E]`."""

    q: Tensor
    k: Tensor
    v: Tensor
    shared_k: Tensor | None
    shared_v: Tensor | None
    seen: Tensor | None
    size: tuple[int, int]
    cell: tuple[int, int]
    scale: float

    @property
    def slots(self) -> int:
        """Slots of a cell."""
        return max(2, next_power(self.cell[0] * self.cell[1]))

    def tiles(self, rows: int) -> int:
        """Tiles of all cells."""
        cells = math.prod(math.ceil(s / c) for s, c in zip(self.size, self.cell, strict=True))
        return math.ceil(cells * self.slots / rows)

    def shared(self) -> dict[str, Any]:
        """The shared keys, by the names of the kernels' arguments."""
        k, v, seen = self.shared_k, self.shared_v, self.seen
        if k is None or v is None:
            k, v, E = self.k, self.v, 0
        else:
            E = k.shape[1]
        seen_b = 0 if seen is None or seen.shape[0] == 1 else seen.stride(0)
        k_strides = dict(zip(("sk_b", "sk_n", "sk_h"), k.stride()[:3], strict=True))
        v_strides = dict(zip(("sv_b", "sv_n", "sv_h"), v.stride()[:3], strict=True))
        tensors = dict(sk=k, sv=v, seen=self.q if seen is None else seen)
        return dict(**tensors, **k_strides, **v_strides, seen_b=seen_b, outside=E, SHARED=E > 0, SEEN=seen is not None)

    def numbers(self) -> dict[str, Any]:
        """The geometry, by the names of the kernels' arguments."""
        B, _, H, D = self.q.shape
        return dict(
            height=self.size[0], width=self.size[1], cell_h=self.cell[0], cell_w=self.cell[1], heads=H,
            batch_heads=B * H, scale=self.scale, SLOTS=self.slots, D=D, BLOCK_D=block_of(D),
            PRECISION=precision_of(self.q),
        )  # fmt: skip


@triton.jit
def places_of(slot, height, width, cell_h, cell_w, SLOTS: tl.constexpr):
    """The cell of each slot and its token; height * width where there is none."""
    cell, i = slot // SLOTS, slot % SLOTS
    across = tl.cdiv(width, cell_w)
    y, x = cell // across * cell_h + i // cell_w, cell % across * cell_w + i % cell_w
    there = (i < cell_h * cell_w) & (y < height) & (x < width)
    return cell, tl.where(there, y * width + x, height * width)


@triton.jit
def scores_of(x, keys, cell, other, token, stop, scale, PRECISION: tl.constexpr):
    """Logits in base 2 of queries in `cell` and keys of the cells `other`."""
    s = tl.dot(x, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2E)
    return tl.where((cell[:, None] == other[None, :]) & (token < stop)[None, :], s, HIDDEN)


@triton.jit
def update(s, values, m, l, acc, PRECISION: tl.constexpr):
    """Add a tile of keys to an online softmax: its maximum m, sum l and weighed values acc."""
    top = tl.maximum(m, tl.max(s, 1))
    p = tl.math.exp2(s - top[:, None])
    shrink = tl.math.exp2(m - top)
    l = l * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None] + tl.dot(p.to(values.dtype), values, input_precision=PRECISION)
    return top, l, acc


@triton.jit
def meet_shared(
    x, m, l, acc, keys_of, values_of, k_n, v_n, seen, seen_b, outside, row, b, h, tokens, scale, SEEN: tl.constexpr,
    ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take the keys that all queries share into the softmax of a tile of queries."""
    for j in tl.range(0, outside, ROWS):
        column = j + tl.arange(0, ROWS)
        keys = token_rows(keys_of, column, outside, k_n, 0, D, BLOCK_D)
        values = token_rows(values_of, column, outside, v_n, 0, D, BLOCK_D)
        s, _ = logits(
            x, keys, row, column, outside, b, h, seen, 0, 0, 0, seen, seen_b, 0, scale, scale, tokens, False, SEEN,
            PRECISION,
        )  # fmt: skip
        m, l, acc = update(s, values, m, l, acc, PRECISION)
    return m, l, acc


@Kernel
@triton.jit
def _forward(
    q, k, v, o, lse, q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, sk, sv, sk_b, sk_n, sk_h, sv_b, sv_n, sv_h,
    seen, seen_b, outside, height, width, cell_h, cell_w, heads, batch_heads, scale,
    SHARED: tl.constexpr, SEEN: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of queries."""
    pid = tl.program_id(0)
    bh = pid % batch_heads
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    tokens = height * width
    slot = pid // batch_heads * ROWS + tl.arange(0, ROWS)
    cell, row = places_of(slot, height, width, cell_h, cell_w, SLOTS)
    x = token_rows(q + b * q_b + h * q_h, row, tokens, q_n, 0, D, BLOCK_D)
    m = tl.full([ROWS], START, tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    COUNT: tl.constexpr = SLOTS // ROWS if SLOTS > ROWS else 1
    start = pid // batch_heads // COUNT * COUNT * ROWS
    for j in tl.range(0, COUNT):
        other, column = places_of(start + j * ROWS + tl.arange(0, ROWS), height, width, cell_h, cell_w, SLOTS)
        keys = token_rows(k + b * k_b + h * k_h, column, tokens, k_n, 0, D, BLOCK_D)
        values = token_rows(v + b * v_b + h * v_h, column, tokens, v_n, 0, D, BLOCK_D)
        s = scores_of(x, keys, cell, other, column, tokens, scale, PRECISION)
        m, l, acc = update(s, values, m, l, acc, PRECISION)
    if SHARED:
        m, l, acc = meet_shared(
            x, m, l, acc, sk + b * sk_b + h * sk_h, sv + b * sv_b + h * sv_h, sk_n, sv_n, seen, seen_b, outside, row, b,
            h, tokens, scale, SEEN, ROWS, D, BLOCK_D, PRECISION,
        )  # fmt: skip
    total = tl.maximum(l, 1e-30)  # a slot without a token has no key
    acc = acc * (1.0 / total)[:, None]
    put_rows(o + (b * tokens * heads + h) * D, row, tokens, heads * D, 0, acc, D, BLOCK_D)
    tl.store(lse + bh.to(tl.int64) * tokens + row, m + tl.log2(total), mask=row < tokens)


@Kernel
@triton.jit
def _query_gradients(
    q, k, v, o, do, lse, delta, dq, q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, do_b, do_n, do_h,
    sk, sv, sk_b, sk_n, sk_h, sv_b, sv_n, sv_h, seen, seen_b, outside, height, width, cell_h, cell_w, heads,
    batch_heads, scale, SHARED: tl.constexpr, SEEN: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Dq of a tile of queries, and do . o."""
    pid = tl.program_id(0)
    bh = pid % batch_heads
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    tokens = height * width
    slot = pid // batch_heads * ROWS + tl.arange(0, ROWS)
    cell, row = places_of(slot, height, width, cell_h, cell_w, SLOTS)
    x = token_rows(q + b * q_b + h * q_h, row, tokens, q_n, 0, D, BLOCK_D)
    g = token_rows(do + b * do_b + h * do_h, row, tokens, do_n, 0, D, BLOCK_D)
    rows = token_rows(o + (b * tokens * heads + h) * D, row, tokens, heads * D, 0, D, BLOCK_D)
    inner = tl.sum(g.to(tl.float32) * rows.to(tl.float32), 1)
    level = tl.load(lse + bh.to(tl.int64) * tokens + row, mask=row < tokens, other=0.0)
    tl.store(delta + bh.to(tl.int64) * tokens + row, inner, mask=row < tokens)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    COUNT: tl.constexpr = SLOTS // ROWS if SLOTS > ROWS else 1
    start = pid // batch_heads // COUNT * COUNT * ROWS
    for j in tl.range(0, COUNT):
        other, column = places_of(start + j * ROWS + tl.arange(0, ROWS), height, width, cell_h, cell_w, SLOTS)
        keys = token_rows(k + b * k_b + h * k_h, column, tokens, k_n, 0, D, BLOCK_D)
        values = token_rows(v + b * v_b + h * v_h, column, tokens, v_n, 0, D, BLOCK_D)
        p = tl.math.exp2(scores_of(x, keys, cell, other, column, tokens, scale, PRECISION) - level[:, None])
        ds = p * (tl.dot(g, tl.trans(values), input_precision=PRECISION) - inner[:, None])
        acc += tl.dot(ds.to(keys.dtype), keys, input_precision=PRECISION)
    if SHARED:
        for j in tl.range(0, outside, ROWS):
            column = j + tl.arange(0, ROWS)
            keys = token_rows(sk + b * sk_b + h * sk_h, column, outside, sk_n, 0, D, BLOCK_D)
            values = token_rows(sv + b * sv_b + h * sv_h, column, outside, sv_n, 0, D, BLOCK_D)
            s, _ = logits(
                x, keys, row, column, outside, b, h, q, 0, 0, 0, seen, seen_b, 0, scale, scale, tokens, False, SEEN,
                PRECISION,
            )  # fmt: skip
            p = tl.math.exp2(s - level[:, None])
            ds = p * (tl.dot(g, tl.trans(values), input_precision=PRECISION) - inner[:, None])
            acc += tl.dot(ds.to(keys.dtype), keys, input_precision=PRECISION)
    put_rows(dq + (b * tokens * heads + h) * D, row, tokens, heads * D, 0, acc * scale, D, BLOCK_D)


@Kernel
@triton.jit
def _key_gradients(
    q, k, v, do, lse, delta, dk, dv, q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, do_b, do_n, do_h,
    height, width, cell_h, cell_w, heads, batch_heads, scale, SLOTS: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Dk and dv of a tile of the grid's keys."""
    pid = tl.program_id(0)
    bh = pid % batch_heads
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    tokens = height * width
    slot = pid // batch_heads * ROWS + tl.arange(0, ROWS)
    other, column = places_of(slot, height, width, cell_h, cell_w, SLOTS)
    keys = token_rows(k + b * k_b + h * k_h, column, tokens, k_n, 0, D, BLOCK_D)
    values = token_rows(v + b * v_b + h * v_h, column, tokens, v_n, 0, D, BLOCK_D)
    lse += bh.to(tl.int64) * tokens
    delta += bh.to(tl.int64) * tokens
    key_acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    value_acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    COUNT: tl.constexpr = SLOTS // ROWS if SLOTS > ROWS else 1
    start = pid // batch_heads // COUNT * COUNT * ROWS
    for i in tl.range(0, COUNT):
        cell, row = places_of(start + i * ROWS + tl.arange(0, ROWS), height, width, cell_h, cell_w, SLOTS)
        x = token_rows(q + b * q_b + h * q_h, row, tokens, q_n, 0, D, BLOCK_D)
        g = token_rows(do + b * do_b + h * do_h, row, tokens, do_n, 0, D, BLOCK_D)
        level = tl.load(lse + row, mask=row < tokens, other=0.0)
        inner = tl.load(delta + row, mask=row < tokens, other=0.0)
        s = scores_of(x, keys, cell, other, column, tokens, scale, PRECISION)
        p = tl.where((row < tokens)[:, None], tl.math.exp2(s - level[:, None]), 0.0)
        value_acc += tl.dot(tl.trans(p.to(g.dtype)), g, input_precision=PRECISION)
        ds = p * (tl.dot(g, tl.trans(values), input_precision=PRECISION) - inner[:, None])
        key_acc += tl.dot(tl.trans(ds.to(x.dtype)), x, input_precision=PRECISION)
    base = (b * tokens * heads + h) * D
    put_rows(dk + base, column, tokens, heads * D, 0, key_acc * scale, D, BLOCK_D)
    put_rows(dv + base, column, tokens, heads * D, 0, value_acc, D, BLOCK_D)


def forward(call: Cells) -> tuple[Tensor, Tensor]:
    """Return the output `[B, N, H, D]` and its log-sum-exp in base 2, `[B, H, N]` in float32."""
    q, k, v = call.q, call.k, call.v
    B, N, H, _ = q.shape
    o, lse = q.new_empty(q.shape), q.new_empty((B, H, N), dtype=torch.float32)
    if o.numel():
        rows, warps = choice(q, _TILES)[0]
        _forward[(B * H * call.tiles(rows),)](
            q, k, v, o, lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], ROWS=rows, num_warps=warps,
            **call.shared(), **call.numbers(),
        )  # fmt: skip
    return o, lse


def backward(call: Cells, do: Tensor, o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v and of the shared keys and values; the last are empty if there are none."""
    q, k, v = call.q, call.k, call.v
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    shared_dk, shared_dv = (q.new_zeros((0,) if t is None else t.shape) for t in (call.shared_k, call.shared_v))
    if not q.numel():
        return dq, dk, dv, shared_dk, shared_dv
    BH, delta = q.shape[0] * q.shape[2], torch.empty_like(lse)
    strides = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3]
    _, (rows, warps), (columns, key_warps) = choice(q, _TILES)
    _query_gradients[(BH * call.tiles(rows),)](
        q, k, v, o, do, lse, delta, dq, *strides, ROWS=rows, num_warps=warps, **call.shared(), **call.numbers()
    )
    _key_gradients[(BH * call.tiles(columns),)](
        q, k, v, do, lse, delta, dk, dv, *strides, ROWS=columns, num_warps=key_warps, **call.numbers()
    )
    if call.shared_k is not None and call.shared_v is not None:
        pairs = Pairs(q, call.shared_k, call.shared_v, None, call.seen, 0, (call.scale, call.scale))
        shared_dk, shared_dv = key_gradients(pairs, do, lse, delta)
    return dq, dk, dv, shared_dk, shared_dv
