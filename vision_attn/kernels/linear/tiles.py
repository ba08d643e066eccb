"""Triton pieces that the kernels of linear attention share: tiles of tokens, features, rotation, launch sizes.

The state of a head is S, the mean over the keys of features times values, and its norm z, that of the features alone:

    o_i = phi(q_i)^T S / den_i,    den_i = phi(q_i) . z + eps

Where channels are not rotated, products take S - z m^T instead, and m is added afterwards: with m the mean of the
values, what is left are the differences that make up the gradients of q and k, which rounding S would drown. float16
has no range for S: there features are multiplied by c = max(z, eps), and S is divided by it, so that phi c / den is at
most one and S / c no larger than the values. Of channels that are rotated in pairs, c is the sum of the pair.
"""

# ruff: noqa: ANN001, ANN202, SIM108  # the compiler of a kernel reads no annotations
# mypy: disable-error-code="no-untyped-def"

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from vision_attn.kernels.triton.launching import hopper, multiprocessors, next_power

LOG2E = tl.constexpr(1.4426950408889634)
# Where a running maximum starts: below any logit, and so far above minus infinity that differences are finite.
LOWEST = tl.constexpr(-1e30)
MAPS = ("none", "elu", "relu")
LANES = 16  # rows of sums over tokens that no two threads share; they are added up once, at the end


@dataclass(frozen=True)
class Launch:
    """Tokens of a tile, warps, pipeline stages, programs on one multiprocessor; `boxes` is taken where TMA can load."""

    length: int
    warps: int
    stages: int
    programs: int
    boxes: "Launch | None" = None


@triton.jit
def release(OVERLAP: tl.constexpr):
    """Let the next launch start where this one leaves room; it waits before it reads what this one writes."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def await_previous(OVERLAP: tl.constexpr):
    """Wait until the launch before this one has ended and its writes are seen."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


@triton.jit
def unit_of(base):
    """Elements in 16 bytes; see `steps`."""
    return 128 // base.dtype.element_ty.primitive_bitwidth


@triton.jit
def token_rows(base, row, stop, stride, first, D: tl.constexpr, BLOCK: tl.constexpr):
    """Channels `first .. first + BLOCK - 1` of tokens `row`; zero from `stop` and from D on, `[len(row), BLOCK]`."""
    d = first + tl.arange(0, BLOCK)
    pointers = base + row.to(tl.int64)[:, None] * stride + d[None, :]
    if D % BLOCK == 0:
        rows = tl.load(pointers, mask=(row < stop)[:, None], other=0.0)
    else:
        rows = tl.load(pointers, mask=(row < stop)[:, None] & (d < D)[None, :], other=0.0)
    return rows


@triton.jit
def tile_rows(
    base, box, b, h, token, stop, stride, first, LEN: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """`LEN` tokens from `token` on, like `token_rows`; with `TMA`, `stop` is a multiple of `LEN` or the last token."""
    if TMA:
        rows = box.load([b, token, h, first]).reshape(LEN, BLOCK)
    else:
        rows = token_rows(base, token + tl.arange(0, LEN), stop, stride, first, D, BLOCK)
    return rows


@triton.jit
def put_rows(base, row, stop, stride, first, rows, D: tl.constexpr, BLOCK: tl.constexpr):
    """Write what `token_rows` reads, in the dtype of `base`."""
    d = first + tl.arange(0, BLOCK)
    pointers = base + row.to(tl.int64)[:, None] * stride + d[None, :]
    tl.store(pointers, rows.to(base.dtype.element_ty), mask=(row < stop)[:, None] & (d < D)[None, :])


@triton.jit
def state_block(base, first, F: tl.constexpr, BLOCK_F: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """Columns `first ..` of one head's state `[F, D]`, as `[BLOCK_F, BLOCK]`."""
    f = tl.arange(0, BLOCK_F)
    return token_rows(base, f, F, D, first, D, BLOCK)


@triton.jit
def centred(
    state, z, c, first, dtype: tl.constexpr, F: tl.constexpr, BLOCK_F: tl.constexpr, D: tl.constexpr,
    BLOCK: tl.constexpr, ROTARY: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Columns `first ..` of S - z m^T in `dtype`, divided by c if `SCALED`, and m `[BLOCK]`; m is zero if `ROTARY`."""
    s = state_block(state, first, F, BLOCK_F, D, BLOCK)
    mean = tl.zeros([BLOCK], tl.float32)
    if not ROTARY:
        mean = tl.sum(s, 0) / tl.maximum(tl.sum(z, 0), 1e-30)
        s = s - z[:, None] * mean[None, :]
    if SCALED:
        s = s * inverse(c)[:, None]
    return s.to(dtype), mean


@triton.jit
def inverse(c):
    """1 / c; zero for features that there are not."""
    return tl.where(c > 0.0, 1.0 / tl.where(c > 0.0, c, 1.0), 0.0)


@triton.jit
def power(x):
    """e^x for a difference x of logits: multiplied before it is taken, a large logit would lose what float32 has."""
    return tl.math.exp2(x * LOG2E)


@triton.jit
def _decay(x):
    """e^x up to 1."""
    return tl.math.exp2(tl.minimum(x * LOG2E, 0.0))


@triton.jit
def mapped(x, MAP: tl.constexpr):
    """phi(x) in float32."""
    x = x.to(tl.float32)
    if MAP == "elu":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + _decay(x)
    elif MAP == "relu":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return x


@triton.jit
def slope(x, MAP: tl.constexpr):
    """phi'(x)."""
    x = x.to(tl.float32)
    if MAP == "elu":
        change = _decay(x)
    elif MAP == "relu":
        change = tl.where(x > 0.0, 1.0, 0.0)
    else:
        change = tl.full(x.shape, 1.0, tl.float32)
    return change


@triton.jit
def _pairs(x):
    return tl.split(x.reshape(x.shape[0], x.shape[1] // 2, 2))


@triton.jit
def turned(x, cos, sin, row, stop, stride, F: tl.constexpr, BLOCK_F: tl.constexpr, BACK: tl.constexpr):
    """Rotate channels (2i, 2i + 1) of rows; `BACK` is the transposed rotation."""
    c0, c1 = _pairs(token_rows(cos, row, stop, stride, 0, F, BLOCK_F).to(tl.float32))
    s0, s1 = _pairs(token_rows(sin, row, stop, stride, 0, F, BLOCK_F).to(tl.float32))
    x0, x1 = _pairs(x)
    if BACK:
        y = tl.join(x0 * c0 + x1 * s1, x1 * c1 - x0 * s0)
    else:
        y = tl.join(x0 * c0 - x1 * s0, x1 * c1 + x0 * s1)
    return y.reshape(x.shape[0], x.shape[1])


@triton.jit
def divisor(norm, floor, F: tl.constexpr, BLOCK_F: tl.constexpr, ROTARY: tl.constexpr):
    """Z and c of all features; zero where there is none."""
    f = tl.arange(0, BLOCK_F)
    z = tl.load(norm + f, mask=f < F, other=0.0)
    c = z
    if ROTARY:
        z0, z1 = tl.split(z.reshape(BLOCK_F // 2, 2))
        c = tl.join(z0 + z1, z0 + z1).reshape(BLOCK_F)
    return z, tl.where(f < F, tl.maximum(c, floor), 0.0)


@triton.jit
def lane_sums(x, LANES: tl.constexpr):
    """Add rows that one thread holds, to `[LANES, columns]`."""
    return tl.sum(x.reshape(x.shape[0] // LANES, LANES, x.shape[1]), 0)


@triton.jit
def column(x, LANES: tl.constexpr):
    """X as the first of `LANES` columns, the others zero: what a product takes beside its matrix."""
    return tl.where(tl.arange(0, LANES)[None, :] == 0, x[:, None], 0.0)


@triton.jit
def feature_sums(phi, other, EXACT: tl.constexpr, SCALED: tl.constexpr, LANES: tl.constexpr):
    """Sum 16-bit features over tokens, each times `other`, by a product: its columns `[features, LANES]` add up to it.

    `EXACT` takes `other` in two parts, for one would be rounded too coarsely.
    """
    most = 1.0
    if EXACT and SCALED:
        most = tl.max(tl.abs(other), 0)
        most = tl.where(most > 0.0, most, 1.0)
        other *= 1.0 / most
    factors = column(other, LANES)
    if EXACT:
        high = other.to(phi.dtype).to(tl.float32)
        factors = tl.where(tl.arange(0, LANES)[None, :] == 1, (other - high)[:, None], column(high, LANES))
    return tl.dot(tl.trans(phi), factors.to(phi.dtype)) * most


@triton.jit
def weighed(phi, row, stop, query, weight, w_n, WEIGHT: tl.constexpr, GLOBAL: tl.constexpr):
    """The weight of each key, and with a global query its logit."""
    w = tl.where(row < stop, 1.0, 0.0)
    if WEIGHT:
        w = tl.load(weight + row.to(tl.int64) * w_n, mask=row < stop, other=0.0).to(tl.float32)
    logit = w
    if GLOBAL:
        logit = tl.sum(phi * query[None, :], 1)
        logit = tl.where((row < stop) & (w != 0.0), logit, float("-inf"))
    return w, logit


def block_of(channels: int) -> int:
    """Channels of a tile: the next power of two, at least 16."""
    return max(16, next_power(channels))


def value_block(block_f: int, block_d: int, size: int) -> int:
    """Channels of the values that one program takes: its part of the state must fit in registers and shared memory."""
    return min(block_d, (64 if block_f > 128 else 128) if size == 2 else 4096 // max(block_f, 64))


def dependent(t: Tensor) -> dict[str, bool]:
    """Launch options of a kernel that calls `await_previous`."""
    return dict(OVERLAP=True, launch_pdl=True) if hopper(t) else dict(OVERLAP=False)


def cut(tokens: int, rows: int, launch: Launch, t: Tensor, least: int) -> tuple[int, int]:
    """Into how many parts, and of what length, `tokens` are cut so that `rows` sequences fill the GPU.

    Args:
        tokens: Length of a sequence.
        rows: Programs that each part of all sequences has.
        launch: Tokens of a tile, and programs on one multiprocessor.
        t: A tensor on the GPU.
        least: Tiles of a part at least: fewer are not worth what a part costs.
    """
    want = math.ceil(multiprocessors(t) * launch.programs / rows)
    parts = max(1, min(want, tokens // (least * launch.length)))
    size = math.ceil(tokens / parts / launch.length) * launch.length
    return math.ceil(tokens / size), size


def precision_of(t: Tensor) -> str:
    """Three TF32 products keep float32's accuracy on tensor cores up to 128 channels; other dtypes ignore it."""
    if t.dtype != torch.float32:
        return "tf32"
    return "tf32x3" if t.shape[-1] <= 128 else "ieee"


def aligned(t: Tensor) -> Tensor:
    """`t` with channels that lie side by side from a multiple of 16 bytes on; a copy only where they do not."""
    unit = 16 // t.element_size()
    if t.data_ptr() % 16 == 0 and _in_units(t.shape, t.stride(), unit):
        return t
    padded = t.new_empty((*t.shape[:-1], math.ceil(t.shape[-1] / unit) * unit))
    return padded[..., : t.shape[-1]].copy_(t)


@lru_cache(4096)
def _in_units(shape: tuple[int, ...], strides: tuple[int, ...], unit: int) -> bool:
    """Whether channels lie side by side, and all else a multiple of `unit` elements apart."""
    return strides[-1] == 1 and all(s % unit == 0 for n, s in zip(shape[:-1], strides[:-1], strict=True) if n > 1)


def steps(t: Tensor) -> tuple[int, ...]:
    """Strides of an `aligned` tensor's batch, tokens and heads in units of 16 bytes: so many are loaded at once."""
    unit = 16 // t.element_size()
    return tuple(0 if n == 1 else s // unit for n, s in zip(t.shape[:3], t.stride()[:3], strict=True))
