"""What Triton kernels share: what a program owns, how rows are loaded and stored, and the online softmax.

Rows are tokens of one head. In all kernels `b` and `h` are a batch entry and a head, `bh` is the number of both, `row`
are tokens that queries have and `column` tokens that keys have. Logits are in base 2, and so is a log-sum-exp.
"""

# ruff: noqa: ANN001, E741, SIM108  # the compiler of a kernel reads no annotations
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

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
def ds_of(p, do_rows, v_rows, delta_rows, PRECISION: tl.constexpr):
    """The gradient of the logits `[rows, columns]` for weights p: p (dO v^T - delta)."""
    dp = tl.dot(do_rows, tl.trans(v_rows), input_precision=PRECISION)  # [rows, columns]
    return p * (dp - delta_rows[:, None])
