"""The backward of attention between few tokens and many in Triton: one launch whose programs own queries, one keys.

    p = 2^(s - lse),   ds = p (do v^T - do . o),   dq = c ds k,   dk = c ds^T q,   dv = p^T do,   dbias = ds

Where the owners are few, the loop over the others is split; parts are added in a fixed order.
"""

# ruff: noqa: ANN001, ANN202  # the compiler of a kernel reads no annotations
# mypy: disable-error-code="no-untyped-def"

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from vision_attn.kernels.agent.forward import Blocks, Pairs, choice, logits, parts_of
from vision_attn.kernels.linear.tiles import Launch, put_rows, token_rows
from vision_attn.kernels.triton.launching import Kernel

# Not tuned: chosen offline by registers and shared memory for sm_90 with triton 3.7.1.
# Keys: bytes of an element, channels at most. `rows` are the tokens that a program owns.
_QUERIES: dict[tuple[int, int], Blocks] = {
    (2, 64): Blocks(64, Launch(64, 4, 2, 4)),
    (2, 128): Blocks(64, Launch(32, 4, 2, 2)),
    (2, 256): Blocks(32, Launch(32, 8, 1, 1)),
    (4, 64): Blocks(32, Launch(32, 4, 1, 4)),
    (4, 128): Blocks(16, Launch(16, 4, 1, 2)),
    (4, 256): Blocks(16, Launch(16, 8, 1, 1)),
}
_KEYS: dict[tuple[int, int], Blocks] = {
    (2, 64): Blocks(64, Launch(64, 4, 2, 4)),
    (2, 128): Blocks(64, Launch(32, 8, 1, 2)),  # pipelined, triton 3.6 gives wrong gradients of k at 256 agents
    (2, 256): Blocks(32, Launch(32, 8, 1, 1)),
    (4, 64): Blocks(32, Launch(32, 4, 1, 4)),
    (4, 128): Blocks(16, Launch(16, 4, 1, 2)),
    (4, 256): Blocks(16, Launch(16, 8, 1, 1)),
}


@Kernel
@triton.jit
def _query_gradients(
    q, k, v, o, do, lse, delta, dq, dbias, q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, do_b, do_n, do_h,
    bias, bias_h, bias_n, bias_m, seen, seen_b, first, first_scale, scale, queries, tokens, heads, batch_heads,
    blocks, length, BIAS: tl.constexpr, SEEN: tl.constexpr, ROWS: tl.constexpr, LEN: tl.constexpr,
    STAGES: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Dq of a tile of queries from a part of the keys, delta, and the bias's gradient of each batch entry."""
    pid = tl.program_id(0)
    bh = pid % batch_heads
    block = pid // batch_heads % blocks
    slice_ = pid // batch_heads // blocks
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    row = block * ROWS + tl.arange(0, ROWS)
    x = token_rows(q + b * q_b + h * q_h, row, queries, q_n, 0, D, BLOCK_D)
    g = token_rows(do + b * do_b + h * do_h, row, queries, do_n, 0, D, BLOCK_D)
    rows = token_rows(o + (b * queries * heads + h) * D, row, queries, heads * D, 0, D, BLOCK_D)
    inner = tl.sum(g.to(tl.float32) * rows.to(tl.float32), 1)
    level = tl.load(lse + bh.to(tl.int64) * queries + row, mask=row < queries, other=0.0)
    tl.store(delta + bh.to(tl.int64) * queries + row, inner, mask=(row < queries) & (slice_ == 0))
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    stop = tl.minimum(tokens, (slice_ + 1) * length)
    for j in tl.range(slice_ * length, stop, LEN, num_stages=STAGES):
        column = j + tl.arange(0, LEN)
        keys = token_rows(k, column, stop, k_n, 0, D, BLOCK_D)
        values = token_rows(v, column, stop, v_n, 0, D, BLOCK_D)
        s, factor = logits(
            x, keys, row, column, stop, b, h, bias, bias_h, bias_n, bias_m, seen, seen_b, first, first_scale, scale,
            queries, BIAS, SEEN, PRECISION,
        )  # fmt: skip
        p = tl.math.exp2(s - level[:, None])
        ds = p * (tl.dot(g, tl.trans(values), input_precision=PRECISION) - inner[:, None])
        if BIAS:
            place = (bh.to(tl.int64) * queries + row)[:, None] * first + column[None, :]
            there = (row < queries)[:, None] & (column < tl.minimum(first, stop))[None, :]
            tl.store(dbias + place, ds.to(dbias.dtype.element_ty), mask=there)
        acc += tl.dot((ds * factor[None, :]).to(keys.dtype), keys, input_precision=PRECISION)
    batch = batch_heads // heads
    dq += ((slice_.to(tl.int64) * batch + b) * queries * heads + h) * D
    put_rows(dq, row, queries, heads * D, 0, acc, D, BLOCK_D)


@Kernel
@triton.jit
def _key_gradients(
    q, k, v, do, lse, delta, dk, dv, q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, do_b, do_n, do_h,
    bias, bias_h, bias_n, bias_m, seen, seen_b, first, first_scale, scale, queries, tokens, heads, batch_heads,
    blocks, length, BIAS: tl.constexpr, SEEN: tl.constexpr, ROWS: tl.constexpr, LEN: tl.constexpr,
    STAGES: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Dk and dv of a tile of keys from a part of the queries."""
    pid = tl.program_id(0)
    bh = pid % batch_heads
    block = pid // batch_heads % blocks
    slice_ = pid // batch_heads // blocks
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    q += b * q_b + h * q_h
    do += b * do_b + h * do_h
    lse += bh.to(tl.int64) * queries
    delta += bh.to(tl.int64) * queries
    column = block * ROWS + tl.arange(0, ROWS)
    keys = token_rows(k + b * k_b + h * k_h, column, tokens, k_n, 0, D, BLOCK_D)
    values = token_rows(v + b * v_b + h * v_h, column, tokens, v_n, 0, D, BLOCK_D)
    key_acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    value_acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    stop = tl.minimum(queries, (slice_ + 1) * length)
    for i in tl.range(slice_ * length, stop, LEN, num_stages=STAGES):
        row = i + tl.arange(0, LEN)
        x = token_rows(q, row, stop, q_n, 0, D, BLOCK_D)
        g = token_rows(do, row, stop, do_n, 0, D, BLOCK_D)  # zero from `stop`: these rows add nothing
        level = tl.load(lse + row, mask=row < stop, other=0.0)
        inner = tl.load(delta + row, mask=row < stop, other=0.0)
        s, _ = logits(
            x, keys, row, column, tokens, b, h, bias, bias_h, bias_n, bias_m, seen, seen_b, first, first_scale,
            scale, queries, BIAS, SEEN, PRECISION,
        )  # fmt: skip
        p = tl.where((row < stop)[:, None], tl.math.exp2(s - level[:, None]), 0.0)
        value_acc += tl.dot(tl.trans(p.to(g.dtype)), g, input_precision=PRECISION)
        ds = p * (tl.dot(g, tl.trans(values), input_precision=PRECISION) - inner[:, None])
        key_acc += tl.dot(tl.trans(ds.to(x.dtype)), x, input_precision=PRECISION)
    factor = tl.where(column < first, first_scale, scale)
    base = ((slice_.to(tl.int64) * (batch_heads // heads) + b) * tokens * heads + h) * D
    put_rows(dk + base, column, tokens, heads * D, 0, key_acc * factor[:, None], D, BLOCK_D)
    put_rows(dv + base, column, tokens, heads * D, 0, value_acc, D, BLOCK_D)


def backward(pairs: Pairs, do: Tensor, o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v and the bias; the last is empty if there is none."""
    q, k, v, bias = pairs.q, pairs.k, pairs.v, pairs.bias
    B, N, H, _ = q.shape
    wide = torch.float32
    dbias = q.new_empty((1, 0))
    if bias is not None:
        dbias = bias.new_zeros((B, *bias.shape), dtype=wide if B != 1 else bias.dtype)
    if not q.numel():
        return q.new_empty(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape), added(dbias, dbias.dtype)
    delta = torch.empty_like(lse)
    tile = choice(q, _QUERIES)
    blocks = math.ceil(N / tile.rows)
    parts, length = parts_of(k.shape[1], B * H * blocks, tile.launch, q)
    dq = q.new_empty((parts, *q.shape), dtype=wide if parts > 1 else q.dtype)
    _query_gradients[(parts * blocks * B * H,)](
        q, k, v, o, do, lse, delta, dq, dbias, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3],
        blocks=blocks, length=length, ROWS=tile.rows, LEN=tile.launch.length, STAGES=tile.launch.stages,
        num_warps=tile.launch.warps, **pairs.numbers(),
    )  # fmt: skip
    dk, dv = key_gradients(pairs, do, lse, delta)
    return added(dq, q.dtype), dk, dv, added(dbias, q.dtype if bias is None else bias.dtype)


def key_gradients(pairs: Pairs, do: Tensor, lse: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of k and v, given the log-sum-exp in base 2 and do . o, `[B, H, N]` both."""
    q, k, v = pairs.q, pairs.k, pairs.v
    B, M, H, _ = k.shape
    tile = choice(q, _KEYS)
    blocks = math.ceil(M / tile.rows)
    parts, length = parts_of(q.shape[1], B * H * blocks, tile.launch, q)
    dk, dv = (k.new_empty((parts, *k.shape), dtype=torch.float32 if parts > 1 else k.dtype) for _ in range(2))
    _key_gradients[(parts * blocks * B * H,)](
        q, k, v, do, lse, delta, dk, dv, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3],
        blocks=blocks, length=length, ROWS=tile.rows, LEN=tile.launch.length, STAGES=tile.launch.stages,
        num_warps=tile.launch.warps, **pairs.numbers(),
    )  # fmt: skip
    return added(dk, k.dtype), added(dv, v.dtype)


def added(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Add parts in a fixed order."""
    return parts[0] if len(parts) == 1 else parts.sum(0).to(dtype)
