"""What Triton kernels share: rows of tensors they load and store, the online softmax, tokens outside a grid, TMA boxes.

Rows are tokens of one head. In all kernels `b` and `h` are a batch entry and a head, `bh` is the number of both, `row`
are tokens that queries have and `column` tokens that keys have. Logits are in base 2, and so is a log-sum-exp.

The loops of the tokens outside a grid are the longest of a launch: their programs come first, and where few heads would
leave them running alone, their keys are split and the parts merged.
"""

# ruff: noqa: ANN001, ANN202, E741, SIM108  # the compiler of a kernel reads no annotations
# mypy: disable-error-code="no-untyped-def"

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vision_attn.kernels.launches import Launch
from vision_attn.kernels.triton.launching import Bound, Kernel, block_of, hopper, multiprocessors, strides_of

LOG2E = tl.constexpr(1.4426950408889634)
HIDDEN = tl.constexpr(-1e30)  # the logit of a key that a query does not see
# Where a running maximum starts: below any true logit, far above any hidden one. A maximum over hidden logits alone
# would be the rounded product of one of them, and the fused multiply-add of the exponent its rounding error: infinite.
START = tl.constexpr(-1e16)
NO_KEY = tl.constexpr(1e-30)  # the least sum of weights: a program may meet hidden keys alone, or none


@triton.jit
def program_of(heads, batch_heads, BLOCKS):
    """What this program owns: batch entry, head, number of both, block (of `BLOCKS`) and part.

    Heads are neighbours in the launch, as they are in memory.
    """
    pid = tl.program_id(0)
    bh = pid % batch_heads
    rest = pid // batch_heads
    block, part = rest % BLOCKS, rest // BLOCKS
    return bh // heads, bh % heads, bh, block, part


@triton.jit
def head_of(base, b, h, b_stride, h_stride):
    """Where a head of a tensor starts, given its strides."""
    return base + (b.to(tl.int64) * b_stride + h.to(tl.int64) * h_stride)


@triton.jit
def own_head(base, b, h, tokens, heads, D):
    """Where a head of a contiguous `[B, N, H, D]` starts: of outputs and gradients."""
    return base + (b.to(tl.int64) * tokens * heads + h) * D


@triton.jit
def unit_of(base):
    """Elements in 16 bytes; see `unit_strides_of`."""
    return 128 // base.dtype.element_ty.primitive_bitwidth


@triton.jit
def unit_head_of(base, b, h, b_stride, h_stride):
    """Where a head of a tensor starts, given its strides in units of 16 bytes."""
    return base + (b.to(tl.int64) * b_stride + h.to(tl.int64) * h_stride) * unit_of(base)


@triton.jit
def load_rows(base, index, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows `index`, all inside the tensor, as `[len(index), BLOCK_D]`; zero from D on."""
    d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    pointers = base + index.to(tl.int64)[:, None] * stride + d[None, :]  # [len(index), BLOCK_D]
    if D == BLOCK_D:
        rows = tl.load(pointers)
    else:
        rows = tl.load(pointers, mask=d[None, :] < D, other=0.0)
    return rows


@triton.jit
def store_rows(base, index, stride, rows, keep, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write `rows` `[len(index), BLOCK_D]` where `keep`, in the dtype of `base`."""
    d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    pointers = base + index.to(tl.int64)[:, None] * stride + d[None, :]  # [len(index), BLOCK_D]
    tl.store(pointers, rows.to(base.dtype.element_ty), mask=keep[:, None] & (d[None, :] < D))


@triton.jit
def load_rows_below(base, index, stop, stride, first, D: tl.constexpr, BLOCK: tl.constexpr):
    """Channels `first .. first + BLOCK - 1` of rows, `[len(index), BLOCK]`; zero from row `stop` and from D on."""
    d = first + tl.arange(0, BLOCK)  # [BLOCK]
    pointers = base + index.to(tl.int64)[:, None] * stride + d[None, :]  # [len(index), BLOCK]
    if D % BLOCK == 0:
        rows = tl.load(pointers, mask=(index < stop)[:, None], other=0.0)
    else:
        rows = tl.load(pointers, mask=(index < stop)[:, None] & (d < D)[None, :], other=0.0)
    return rows


@triton.jit
def store_rows_below(base, index, stop, stride, first, rows, D: tl.constexpr, BLOCK: tl.constexpr):
    """Write what `load_rows_below` reads, in the dtype of `base`."""
    d = first + tl.arange(0, BLOCK)  # [BLOCK]
    pointers = base + index.to(tl.int64)[:, None] * stride + d[None, :]  # [len(index), BLOCK]
    tl.store(pointers, rows.to(base.dtype.element_ty), mask=(index < stop)[:, None] & (d < D)[None, :])


@triton.jit
def load_tile(
    base, box, b, h, first, stop, stride, LEN: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr
):
    """Tokens `first ..` of a sequence, `[LEN, BLOCK_D]`; from `stop` on they are arbitrary but finite."""
    if TMA:
        rows = box.load([b, first, h, 0]).reshape(LEN, BLOCK_D)
    else:
        rows = load_rows(base, tl.minimum(first + tl.arange(0, LEN), stop - 1), stride, D, BLOCK_D)
    return rows


@triton.jit
def load_tile_below(
    base, box, b, h, token, stop, stride, first, LEN: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Tokens `token ..` of a sequence, `[LEN, BLOCK]`, zero from `stop` on; channels as in `load_rows_below`.

    With `TMA`, `stop` is `token` plus a multiple of `LEN`, or the end of the sequence.
    """
    if TMA:
        rows = box.load([b, token, h, first]).reshape(LEN, BLOCK)
    else:
        rows = load_rows_below(base, token + tl.arange(0, LEN), stop, stride, first, D, BLOCK)
    return rows


@triton.jit
def store_lse(lse, place, low, m, total, keep, TWO: tl.constexpr):
    """Write the log-sum-exp m + log2(total) of some rows; if `TWO`, what rounding takes from it, `low` elements on.

    A float32 in the thousands holds it to 1e-4 only, and every weight of a row would be wrong by as much.
    """
    rest = tl.log2(total)
    high = m + rest
    tl.store(lse + place, high, mask=keep)
    if TWO:
        tl.store(lse + low + place, rest - (high - m), mask=keep)


@triton.jit
def load_lse(lse, place, low, keep, TWO: tl.constexpr):
    """Read what `store_lse` wrote: the log-sum-exp, and what rounding took from it (any number unless `TWO`)."""
    high = tl.load(lse + place, mask=keep, other=0.0)
    rest = high
    if TWO:
        rest = tl.load(lse + low + place, mask=keep, other=0.0)
    return high, rest


@triton.jit
def ds_of(p, do_rows, v_rows, delta_rows, PRECISION: tl.constexpr):
    """The gradient of the logits `[rows, columns]` for weights p: p (dO v^T - delta)."""
    dp = tl.dot(do_rows, tl.trans(v_rows), input_precision=PRECISION)  # [rows, columns]
    return p * (dp - delta_rows[:, None])


@triton.jit
def outside_program(pid, outside, heads, N, prefix, image, M: tl.constexpr, parts):
    """What program `pid` of the tokens outside the grid owns.

    Batch entry, head, number of both, part of its loop; and of each row, `[M]`: its rank among the tokens outside the
    grid, whether there is one, and its place in the sequence, at most the last.
    """
    blocks = tl.cdiv(outside, M)
    bh = pid // (blocks * parts)
    rank = (pid % blocks) * M + tl.arange(0, M)  # [M]
    token = tl.minimum(outside_tokens(rank, prefix, image), N - 1)  # [M]
    return bh // heads, bh % heads, bh, (pid // blocks) % parts, rank, rank < outside, token


@triton.jit
def outside_tokens(rank, prefix, image):
    """Places in the sequence of tokens outside the grid; the rank after the last may be any."""
    return tl.where(rank < prefix, rank, rank + image)


@triton.jit
def seen_tokens(index, stop, mask, prefix, image, MASK: tl.constexpr):
    """Which tokens exist (are below `stop`) and are not hidden by one batch entry's mask."""
    seen = index < stop
    if MASK:
        outside = (index < prefix) | (index >= prefix + image)
        place = tl.where(index < prefix, index, index - image)
        seen = seen & (tl.load(mask + place, mask=seen & outside, other=1) != 0)
    return seen


@triton.jit
def update_raw(s, v_rows, m, l, acc, c, PRECISION: tl.constexpr):
    """Add a tile of keys to an online softmax over raw logits s `[M, LEN]`, which `c` scales to base 2.

    Values `[LEN, BLOCK_D]`; maximum m `[M]`, sum l `[M, SUMS]`, weighed values acc `[M, BLOCK_D]`.
    """
    top = tl.maximum(m, tl.max(s, 1) * c)  # [M]
    p = tl.math.exp2(s * c - top[:, None])  # [M, LEN]
    shrink = tl.math.exp2(m - top)  # [M]
    # eight sums a row that no two threads share: they are added up once, at the end
    if PRECISION == "ieee":  # AMD: its compiler cannot split the rows of a product
        l = l * shrink[:, None] + tl.where(tl.arange(0, l.shape[1])[None, :] == 0, tl.sum(p, 1)[:, None], 0.0)
    else:
        l = l * shrink[:, None] + tl.sum(p.reshape(p.shape[0], p.shape[1] // 8, 8), 1)
    acc = acc * shrink[:, None]
    acc = tl.dot(p.to(v_rows.dtype), v_rows, acc, input_precision=PRECISION)
    return top, l, acc


@triton.jit
def meet_sequence(
    q_rows, m, l, acc, k, v, k_box, v_box, mask, b, h, first, stop, k_n, v_n, prefix, image, c,
    LEN: tl.constexpr, RAGGED: tl.constexpr, MASK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Meet the tokens `first .. stop - 1` of a sequence."""
    for j in tl.range(first, stop, LEN):
        k_rows = load_tile(k, k_box, b, h, j, stop, k_n, LEN, D, BLOCK_D, TMA)  # [LEN, BLOCK_D]
        s = tl.dot(q_rows, tl.trans(k_rows), input_precision=PRECISION)  # [M, LEN]
        if RAGGED or MASK:
            seen = seen_tokens(j + tl.arange(0, LEN), stop, mask, prefix, image, MASK)  # [LEN]
            s = tl.where(seen[None, :], s, HIDDEN)
        v_rows = load_tile(v, v_box, b, h, j, stop, v_n, LEN, D, BLOCK_D, TMA)  # [LEN, BLOCK_D]
        m, l, acc = update_raw(s, v_rows, m, l, acc, c, PRECISION)
    return m, l, acc


@Kernel
@triton.jit
def _merge(
    part_o, part_lse, o, lse, N, heads, batch, prefix, image, outside, parts, ROWS: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    """Merge the parts of the tokens outside the grid by their log-sum-exp.

    Inputs: part_o `[parts, B, H, outside, D]`, part_lse `[1 + TWO, parts, B, H, outside]`.
    Outputs: o `[B, N, H, D]`, lse `[1 + TWO, B, H, N]`.
    """
    rank = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    bh = tl.program_id(1)
    keep = rank < outside
    low = tl.cast(parts, tl.int64) * batch * heads * outside
    top = tl.full([ROWS], HIDDEN, tl.float32)  # [ROWS]
    for i in tl.range(0, parts):
        place = (i * batch * heads + bh).to(tl.int64) * outside
        top = tl.maximum(top, tl.load(part_lse + place + rank, mask=keep, other=0.0))
    total = tl.zeros([ROWS], tl.float32)  # [ROWS]
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)  # [ROWS, BLOCK_D]
    for i in tl.range(0, parts):
        place = (i * batch * heads + bh).to(tl.int64) * outside
        high, rest = load_lse(part_lse, place + rank, low, keep, TWO)  # [ROWS]
        weight = tl.math.exp2(high - top + rest if TWO else high - top)  # [ROWS]
        rows = load_rows(part_o + place * D, tl.minimum(rank, outside - 1), D, D, BLOCK_D)  # [ROWS, BLOCK_D]
        total += weight
        acc += rows * weight[:, None]
    token = outside_tokens(rank, prefix, image)  # [ROWS]
    base = own_head(o, bh // heads, bh % heads, N, heads, D)
    store_rows(base, token, heads * D, acc / total[:, None], keep, D, BLOCK_D)
    store_lse(lse, bh.to(tl.int64) * N + token, tl.cast(batch, tl.int64) * heads * N, top, total, keep, TWO)


def splits(t: Tensor, programs: int, length: int, others: int, block: int) -> tuple[int, int]:
    """Return into how many parts, and of what length, the long loop of the tokens outside a grid is cut.

    Their programs start first, so they may run for half of the launch; where they would run longer they are cut.

    Args:
        t: A tensor on the GPU.
        programs: Programs with a long loop.
        length: Tokens of a long loop.
        others: Tokens met by all other programs together.
        block: Tokens of one step.
    """
    if not programs:
        return 1, length
    share = max((programs * length + others) / multiprocessors(t) / 2, 4 * block)
    parts = max(1, min(math.ceil(length / share), 32))
    step = math.ceil(length / parts / block) * block
    return math.ceil(length / step), step


def merge_outside(part_o: Tensor, part_lse: Tensor, o: Tensor, lse: Tensor, prefix: int) -> None:
    """Merge the parts of the tokens outside the grid into o `[B, N, H, D]` and lse `[B, H, N]`.

    Args:
        part_o: Outputs of the parts `[parts, B, H, outside, D]`.
        part_lse: Their log-sum-exp `[1 or 2, parts, B, H, outside]`, see `store_lse`.
        o: Output of all tokens.
        lse: Log-sum-exp of all tokens, in as many floats.
        prefix: Tokens before the grid.
    """
    B, N, H, D = o.shape
    floats, parts, _, _, outside = part_lse.shape
    _merge[(math.ceil(outside / 16), B * H)](
        part_o,
        part_lse,
        o,
        lse,
        N,
        H,
        B,
        prefix,
        N - outside,
        outside,
        parts,
        16,
        D,
        block_of(D),
        floats == 2,
        num_warps=4,
    )


@Kernel
@triton.jit
def _delta(
    do, o, dlse, delta, do_b, do_n, do_h, N, heads, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    DLSE: tl.constexpr,
):  # fmt: skip
    """Compute delta_i = dO_i . o_i - dlse_i log2(e), of some queries.

    Inputs: do `[B, N, H, D]` with strides `_b, _n, _h`, o like it, contiguous; dlse `[B, H, N]`.
    Outputs: delta `[B, H, N]`.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    bh = tl.program_id(1)
    b, h = bh // heads, bh % heads
    index, place = tl.minimum(row, N - 1), bh.to(tl.int64) * N + row  # [ROWS]
    do_rows = load_rows(head_of(do, b, h, do_b, do_h), index, do_n, D, BLOCK_D).to(tl.float32)  # [ROWS, BLOCK_D]
    o_rows = load_rows(own_head(o, b, h, N, heads, D), index, heads * D, D, BLOCK_D).to(tl.float32)  # [ROWS, BLOCK_D]
    delta_rows = tl.sum(do_rows * o_rows, 1)  # [ROWS]
    if DLSE:
        delta_rows -= tl.load(dlse + place, mask=row < N, other=0.0) * LOG2E
    tl.store(delta + place, delta_rows, mask=row < N)


def delta_of(do: Tensor, o: Tensor, dlse: Tensor | None, lse: Tensor) -> Tensor:
    """Return delta, float32 `[B, H, N]`, of do and o `[B, N, H, D]`, and dlse `[B, H, N]`; lse may be of two floats."""
    B, N, H, D = o.shape
    delta = lse.new_empty((B, H, N))
    _delta[(math.ceil(N / 32), B * H)](
        do, o, lse if dlse is None else dlse.contiguous(), delta, *strides_of(do), N, H, ROWS=32, D=D,
        BLOCK_D=block_of(D), DLSE=dlse is not None, num_warps=4,
    )  # fmt: skip
    return delta


@dataclass(frozen=True)
class Shifted:
    """The address `elements` after the start of a tensor, before it if negative. TMA only counts from it."""

    tensor: Tensor
    elements: int

    @property
    def dtype(self) -> torch.dtype:
        """The tensor's."""
        return self.tensor.dtype

    def data_ptr(self) -> int:
        """Return the address."""
        return self.tensor.data_ptr() + self.elements * self.tensor.element_size()


@dataclass(frozen=True)
class Box:
    """Tiles of a tensor that TMA fetches: where the first starts, and the lengths, strides and tile of each axis.

    TMA takes no registers, and what lies beyond a tensor reads as zero.
    """

    first: int
    shape: list[int]
    strides: list[int]
    tile: list[int]

    def of(self, t: Tensor) -> Any:
        """Return the descriptor of tensor `t`."""
        base: Any = Shifted(t, self.first) if self.first else t
        return _descriptor()(base, self.shape, self.strides, self.tile)


@cache
def _descriptor() -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: PLC0415

    return TensorDescriptor


@dataclass(frozen=True)
class Plan:
    """A launch without its tensors.

    Args:
        launch: The kernel with its numbers.
        parts: Into how many parts its long loops are cut.
        boxes: Tiles of tensors; None where they are read by their strides.
        tiles: How it is launched.
    """

    launch: Bound
    parts: int
    boxes: tuple[Box | None, ...]
    tiles: Launch

    def run(self, *tensors: Tensor, boxed: tuple[Tensor, ...]) -> None:
        """Launch; `boxed` has a tensor for each of the boxes."""
        self.launch(*tensors, boxes=self._boxes(boxed))

    def needs(self, *tensors: Any, boxed: tuple[Tensor, ...]) -> tuple["Plan", int]:
        """Compile, and return the plan and the bytes of shared memory that a block takes: see `Kernel.needs`."""
        return self, self.launch.needs(*tensors, boxes=self._boxes(boxed))

    def _boxes(self, boxed: tuple[Tensor, ...]) -> tuple[Any, ...]:
        return tuple([t if box is None else box.of(t) for t, box in zip(boxed, self.boxes, strict=True)])


def uses_boxes(tensors: Sequence[Tensor]) -> bool:
    """Whether TMA can fetch tiles of these `[B, N, H, D]` tensors: Hopper or later, and 16-byte strides."""
    return hopper(tensors[0]) and all(boxable(t) for t in tensors)


def boxable(t: Tensor) -> bool:
    """Whether the strides of `t` suit TMA."""
    size = t.element_size()
    outer = zip(t.shape[:3], t.stride()[:3], strict=True)
    return t.data_ptr() % 16 == 0 and all(s > 0 and s * size % 16 == 0 for n, s in outer if n > 1)


def sequence_box(t: Tensor, length: int, block_d: int) -> Box:
    """Return boxes of `length` tokens of one head of `[B, N, H, D]`."""
    return Box(0, list(t.shape), box_strides(t), [1, length, 1, block_d])


def box_strides(t: Tensor) -> list[int]:
    """Return strides; that of an axis of one element is free, and TMA wants a multiple of 16 bytes."""
    return [s if n > 1 else 16 * t.shape[-1] for n, s in zip(t.shape[:3], t.stride()[:3], strict=True)] + [1]
