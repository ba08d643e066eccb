"""Attention from any queries to any keys: what agent attention has in common with windows that share keys.

    o = softmax(c_m q k^T + bias) v,    c_m = first_scale for the first keys, scale for the others

Here are the inputs of a call, the logits, and the launch for the gradients of keys and values.
"""

# ruff: noqa: ANN001, ANN202, E741  # the compiler of a kernel reads no annotations
# mypy: disable-error-code="no-untyped-def"

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vision_attn.kernels.launches import Launch
from vision_attn.kernels.triton.launching import (
    Kernel,
    added,
    block_of,
    cut,
    launch_of,
    precision_of,
    strides_of,
)
from vision_attn.kernels.triton.rows import (
    HIDDEN,
    LOG2E,
    ds_of,
    head_of,
    load_lse,
    load_rows_below,
    program_of,
    store_rows_below,
)


@dataclass(frozen=True)
class Pairs:
    """The inputs of one call, checked. `bias` is `[H, N, first]`, `mask` uint8 `[B, M]` or `[1, M]`.

    In a backward, `greatest` is a key of each query `[B, H, N]` (none if it is below 0), and what is added to its ds.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    mask: Tensor | None
    first: int
    scales: tuple[float, float]
    greatest: tuple[Tensor, Tensor] | None = None

    def numbers(self) -> dict[str, Any]:
        """Return the arguments that all kernels take by name."""
        bias, mask, D = self.bias, self.mask, self.q.shape[-1]
        b = (0, 0, 0) if bias is None else bias.stride()
        return dict(
            bias=self.q if bias is None else bias, bias_h=b[0], bias_n=b[1], bias_m=b[2],
            mask=self.q if mask is None else mask, mask_b=0 if mask is None or mask.shape[0] == 1 else mask.stride(0),
            first=self.first, first_scale=self.scales[0], scale=self.scales[1], queries=self.q.shape[1],
            tokens=self.k.shape[1], heads=self.q.shape[2], batch_heads=self.q.shape[0] * self.q.shape[2],
            BIAS=bias is not None, MASK=mask is not None, D=D, BLOCK_D=block_of(D), PRECISION=precision_of(self.q),
        )  # fmt: skip

    def launch(
        self, name: str, kernel: Kernel, args: Callable[[int], Sequence[Any]], owned: int, walked: int, *,
        split: bool = False, **more: Any,
    ) -> tuple[int, int, dict[str, Any]]:  # fmt: skip
        """Plan a launch whose programs own some tokens and walk others: programs, parts, and arguments by name.

        Args:
            name: Operator and kernel.
            kernel: The kernel.
            args: Takes the number of parts and returns its arguments in order; a dtype stands for a tensor that is yet
                to be made.
            owned: Tokens that programs own.
            walked: Tokens that they walk.
            split: Whether the kernel has to know if there are several parts.
            more: Further constants.
        """
        numbers = self.numbers()
        batch_heads = numbers["batch_heads"]

        def planned(launch: Launch) -> tuple[int, int, dict[str, Any]]:
            blocks = math.ceil(owned / launch.rows)
            parts, length = cut(walked, batch_heads * blocks, launch, self.q, least=4, fill=False)
            named = dict(
                blocks=blocks, length=length, ROWS=launch.rows, LEN=launch.length, STAGES=launch.stages,
                num_warps=launch.warps, **numbers, **(dict(SPLIT=parts > 1) if split else {}), **more,
            )  # fmt: skip
            return parts * blocks * batch_heads, parts, named

        about = None if self.bias is None else self.bias.dtype, self.mask is None, *more.values()

        def needs(launch: Launch) -> int:
            _, parts, named = planned(launch)
            return kernel.needs(*args(parts), **named)

        return planned(launch_of(name, self.q, about, needs))


@triton.jit
def update_softmax(s, v_rows, m, l, acc, PRECISION: tl.constexpr):
    """Add a tile of keys to an online softmax.

    Logits s `[rows, columns]`, values `[columns, BLOCK_D]`; maximum m and sum l `[rows]`, weighed values acc
    `[rows, BLOCK_D]`.
    """
    top = tl.maximum(m, tl.max(s, 1))  # [rows]
    p = tl.math.exp2(s - top[:, None])  # [rows, columns]
    shrink = tl.math.exp2(m - top)  # [rows]
    l = l * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None] + tl.dot(p.to(v_rows.dtype), v_rows, input_precision=PRECISION)
    return top, l, acc


@triton.jit
def weights_of(s, lse_rows, low_rows, TWO: tl.constexpr):
    """The weights `[rows, columns]` of logits s, given the log-sum-exp of the rows: see `load_lse`."""
    s -= lse_rows[:, None]
    if TWO:
        s -= low_rows[:, None]
    return tl.math.exp2(s)


@triton.jit
def logits_of(
    q_rows, k_rows, row, column, stop, b, h, bias, bias_h, bias_n, bias_m, mask, mask_b, first, first_scale, scale,
    queries, BIAS: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits in base 2 `[rows, columns]`, hidden where nothing is seen, and the factor of each column."""
    factor = tl.where(column < first, first_scale, scale)  # [columns]
    s = tl.dot(q_rows, tl.trans(k_rows), input_precision=PRECISION) * (factor * LOG2E)[None, :]  # [rows, columns]
    if BIAS:
        place = h.to(tl.int64) * bias_h + row.to(tl.int64)[:, None] * bias_n + column.to(tl.int64)[None, :] * bias_m
        there = (row < queries)[:, None] & (column < first)[None, :]
        s += tl.load(bias + place, mask=there, other=0.0).to(tl.float32) * LOG2E
    seen = column < stop  # [columns]
    if MASK:
        seen = seen & (tl.load(mask + b.to(tl.int64) * mask_b + column, mask=column < stop, other=0) != 0)
    return tl.where(seen[None, :], s, HIDDEN), factor


@Kernel
@triton.jit
def _key_gradients(
    q, k, v, do, lse, delta, top, dtop, dk, dv, q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, do_b, do_n, do_h,
    bias, bias_h, bias_n, bias_m, mask, mask_b, first, first_scale, scale, queries, tokens, heads, batch_heads,
    blocks, length, BIAS: tl.constexpr, MASK: tl.constexpr, ROWS: tl.constexpr, LEN: tl.constexpr,
    STAGES: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TWO: tl.constexpr, GREATEST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients dk and dv of a tile of keys from a part of the queries.

    Inputs: q, do `[B, queries, H, D]`, k, v `[B, tokens, H, D]`, each with strides `_b, _n, _h`; lse
    `[1 + TWO, B, H, queries]`, delta `[B, H, queries]`; bias `[H, queries, first]` and mask `[B, tokens]` with theirs;
    if `GREATEST` top and dtop `[B, H, queries]`, see `Pairs`.
    Outputs: dk, dv `[parts, B, tokens, H, D]`.
    Logits: `first_scale` for the `first` keys, `scale` for the others.
    Launch: `blocks` of `ROWS` keys, parts of `length` queries, in steps of `LEN`.
    """
    b, h, bh, block, part = program_of(heads, batch_heads, blocks)
    q, do = head_of(q, b, h, q_b, q_h), head_of(do, b, h, do_b, do_h)
    low = tl.cast(batch_heads, tl.int64) * queries
    lse += bh.to(tl.int64) * queries
    delta += bh.to(tl.int64) * queries
    column = block * ROWS + tl.arange(0, ROWS)  # [ROWS]
    k_rows = load_rows_below(head_of(k, b, h, k_b, k_h), column, tokens, k_n, 0, D, BLOCK_D)  # [ROWS, BLOCK_D]
    v_rows = load_rows_below(head_of(v, b, h, v_b, v_h), column, tokens, v_n, 0, D, BLOCK_D)  # [ROWS, BLOCK_D]
    dk_rows = tl.zeros([ROWS, BLOCK_D], tl.float32)  # [ROWS, BLOCK_D]
    dv_rows = tl.zeros([ROWS, BLOCK_D], tl.float32)  # [ROWS, BLOCK_D]
    stop = tl.minimum(queries, (part + 1) * length)
    for i in tl.range(part * length, stop, LEN, num_stages=STAGES):
        row = i + tl.arange(0, LEN)  # [LEN]
        q_rows = load_rows_below(q, row, stop, q_n, 0, D, BLOCK_D)  # [LEN, BLOCK_D]
        # zero from `stop` on: these rows add nothing
        do_rows = load_rows_below(do, row, stop, do_n, 0, D, BLOCK_D)  # [LEN, BLOCK_D]
        lse_rows, low_rows = load_lse(lse, row, low, row < stop, TWO)  # [LEN]
        delta_rows = tl.load(delta + row, mask=row < stop, other=0.0)  # [LEN]
        s, _ = logits_of(
            q_rows, k_rows, row, column, tokens, b, h, bias, bias_h, bias_n, bias_m, mask, mask_b, first, first_scale,
            scale, queries, BIAS, MASK, PRECISION,
        )  # fmt: skip
        p = tl.where((row < stop)[:, None], weights_of(s, lse_rows, low_rows, TWO), 0.0)  # [LEN, ROWS]
        dv_rows += tl.dot(tl.trans(p.to(do_rows.dtype)), do_rows, input_precision=PRECISION)
        ds = ds_of(p, do_rows, v_rows, delta_rows, PRECISION)  # [LEN, ROWS]
        if GREATEST:
            at = tl.load(top + bh.to(tl.int64) * queries + row, mask=row < stop, other=-1)  # [LEN]
            more = tl.load(dtop + bh.to(tl.int64) * queries + row, mask=row < stop, other=0.0)  # [LEN]
            ds += tl.where(at[:, None] == column[None, :], more[:, None], 0.0)
        dk_rows += tl.dot(tl.trans(ds.to(q_rows.dtype)), q_rows, input_precision=PRECISION)
    factor = tl.where(column < first, first_scale, scale)  # [ROWS]
    place = ((part.to(tl.int64) * (batch_heads // heads) + b) * tokens * heads + h) * D
    store_rows_below(dk + place, column, tokens, heads * D, 0, dk_rows * factor[:, None], D, BLOCK_D)
    store_rows_below(dv + place, column, tokens, heads * D, 0, dv_rows, D, BLOCK_D)


def key_gradients(pairs: Pairs, do: Tensor, lse: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of k and v, given the log-sum-exp `[floats, B, H, N]` and delta = dO . o `[B, H, N]`."""
    q, k, v = pairs.q, pairs.k, pairs.v
    greatest = pairs.greatest or (delta, delta)
    inputs, strides = (q, k, v, do, lse, delta, *greatest), strides_of(q, k, v, do)

    def dtype(parts: int) -> torch.dtype:
        return torch.float32 if parts > 1 else k.dtype

    programs, parts, named = pairs.launch(
        "pairs.keys", _key_gradients, lambda parts: (*inputs, *[dtype(parts)] * 2, *strides), k.shape[1], q.shape[1],
        TWO=len(lse) == 2, GREATEST=pairs.greatest is not None,
    )  # fmt: skip
    dk, dv = (k.new_empty((parts, *k.shape), dtype=dtype(parts)) for _ in range(2))
    _key_gradients[(programs,)](*inputs, dk, dv, *strides, **named)
    return added(dk, k.dtype), added(dv, v.dtype)
