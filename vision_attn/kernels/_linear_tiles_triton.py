"""Triton pieces that the kernels of linear attention share: tiles of tokens, features, rotation, launch sizes.

For range and precision in 16 bits the state is kept as weighted means of the values, one for each feature f:

    S'_f = S_f / c_f,    p_if = phi_f(q_i) c_f / (phi(q_i) . z + eps),    o_i = sum_f p_if S'_f

with z the mean of the weighted features of the keys, S the mean of features times values and c = max(z, eps): then
0 <= p <= 1, and S' is no larger than the values. Where channels are rotated in pairs, c is the sum of the pair; where
they are not, products take S' without its mean over the features, which would otherwise drown the differences that make
up the gradients of q and k.
"""

# ruff: noqa: ANN001, ANN202, SIM108  # the compiler of a kernel reads no annotations
# mypy: disable-error-code="no-untyped-def"

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
# Where a running maximum starts: below any logit, and so far above minus infinity that differences are finite.
LOWEST = tl.constexpr(-1e30)
MAPS = ("none", "elu", "relu")
LANES = 16  # rows of sums over tokens that no two threads share; they are added up once, at the end


@dataclass(frozen=True)
class Launch:
    """Tokens of a tile, warps, pipeline stages, and programs on one multiprocessor that the launch aims at."""

    length: int
    warps: int
    stages: int
    programs: int


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
    state, z, first, dtype: tl.constexpr, F: tl.constexpr, BLOCK_F: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    ROTARY: tl.constexpr,
):  # fmt: skip
    """Columns `first ..` of one head's state in `dtype` less their mean over the features, and the mean `[BLOCK]`."""
    s = state_block(state, first, F, BLOCK_F, D, BLOCK)
    if ROTARY:
        mean = tl.zeros([BLOCK], tl.float32)
    else:
        share = z / tl.maximum(tl.sum(z, 0), 1e-30)
        mean = tl.sum(s * share[:, None], 0)
        s = tl.where((tl.arange(0, BLOCK_F) < F)[:, None], s - mean[None, :], 0.0)
    return s.to(dtype), mean


@triton.jit
def power(x):
    """e^x for a difference x of logits: multiplied before it is taken, a large logit would lose what float32 has."""
    return tl.math.exp2(x * LOG2E)


@triton.jit
def mapped(x, MAP: tl.constexpr):
    """phi(x) in float32."""
    x = x.to(tl.float32)
    if MAP == "elu":
        x = tl.where(x > 0.0, x + 1.0, power(tl.minimum(x, 0.0)))
    elif MAP == "relu":
        x = tl.maximum(x, 0.0)
    return x


@triton.jit
def slope(x, phi, MAP: tl.constexpr):
    """phi'(x)."""
    if MAP == "elu":
        change = tl.where(x > 0.0, 1.0, phi)
    elif MAP == "relu":
        change = tl.where(x > 0.0, 1.0, 0.0)
    else:
        change = tl.full(phi.shape, 1.0, tl.float32)
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
    return max(16, triton.next_power_of_2(channels))


def value_block(block_f: int, block_d: int, size: int) -> int:
    """Channels of the values that one program takes: its part of the state must fit in registers and shared memory."""
    return min(block_d, (64 if block_f > 128 else 128) if size == 2 else 4096 // max(block_f, 64))


def multiprocessors(t: Tensor) -> int:
    """Multiprocessors of the GPU; in the interpreter, those of an H200."""
    return torch.cuda.get_device_properties(t.device).multi_processor_count if t.is_cuda else 132


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
    """Three TF32 products keep float32's accuracy on tensor cores; other dtypes ignore it."""
    return "tf32x3" if t.dtype == torch.float32 else "tf32"


def packed(t: Tensor) -> Tensor:
    """`t` with neighbouring channels in memory; a copy only where they are not."""
    return t if t.stride(-1) == 1 else t.contiguous()
