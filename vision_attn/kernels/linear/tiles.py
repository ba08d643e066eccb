"""Triton pieces that the kernels of linear attention share: features, their sums and rotation, the state of a head.

The state of a head is S, the mean over the keys of features times values, and its norm z, that of the features alone:

    o_i = phi(q_i)^T S / den_i,    den_i = phi(q_i) . z + eps

Where channels are not rotated, products take S - z m^T instead, and m, the mean of the values, is added afterwards. So
products hold only the differences that make up the gradients of q and k; rounding S would drown them. float16 cannot
hold S: there features are multiplied by c = max(z, eps), and S is divided by it, so that phi c / den is at most one and
S / c no larger than the values. For channels that are rotated in pairs, c is the sum of the pair.
"""

# ruff: noqa: ANN001, ANN202, SIM108  # the compiler of a kernel reads no annotations
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from vision_attn.kernels.triton.rows import LOG2E, load_rows_below

# Where a running maximum of the global query's logits starts: hidden ones are minus infinity, and differences must be
# finite.
LOWEST = tl.constexpr(-1e30)


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
def state_block(base, first, F: tl.constexpr, BLOCK_F: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """Columns `first ..` of one head's state `[F, D]`, as `[BLOCK_F, BLOCK]`."""
    f = tl.arange(0, BLOCK_F)  # [BLOCK_F]
    return load_rows_below(base, f, F, D, first, D, BLOCK)


@triton.jit
def centred(
    state, z, c, first, dtype: tl.constexpr, F: tl.constexpr, BLOCK_F: tl.constexpr, D: tl.constexpr,
    BLOCK: tl.constexpr, ROTARY: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Columns `first ..` of S - z m^T in `dtype`, divided by c if `SCALED`, and m `[BLOCK]`; m is zero if `ROTARY`."""
    S = state_block(state, first, F, BLOCK_F, D, BLOCK)  # [BLOCK_F, BLOCK]
    mean = tl.zeros([BLOCK], tl.float32)  # [BLOCK]
    if not ROTARY:
        mean = tl.sum(S, 0) / tl.maximum(tl.sum(z, 0), 1e-30)
        S = S - z[:, None] * mean[None, :]
    if SCALED:
        S = S * inverse(c)[:, None]
    return S.to(dtype), mean


@triton.jit
def inverse(c):
    """1 / c of each feature `[BLOCK_F]`; zero where there is none."""
    return tl.where(c > 0.0, 1.0 / tl.where(c > 0.0, c, 1.0), 0.0)


@triton.jit
def power(x):
    """Return e^x for a difference x of logits; a large logit would lose its last bits if it were multiplied first."""
    return tl.math.exp2(x * LOG2E)


@triton.jit
def _decay(x):
    """Return e^x up to 1."""
    return tl.math.exp2(tl.minimum(x * LOG2E, 0.0))


@triton.jit
def mapped(x, MAP: tl.constexpr):
    """Return phi(x) in float32, of any shape."""
    x = x.to(tl.float32)
    if MAP == "elu":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + _decay(x)
    elif MAP == "relu":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return x


@triton.jit
def slope(x, MAP: tl.constexpr):
    """Return phi'(x), of any shape."""
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
    """Even and odd channels, `[rows, columns / 2]` both."""
    return tl.split(x.reshape(x.shape[0], x.shape[1] // 2, 2))


@triton.jit
def turned(x, cos, sin, row, stop, stride, F: tl.constexpr, BLOCK_F: tl.constexpr, BACK: tl.constexpr):
    """Rotate channels (2i, 2i + 1) of rows x `[rows, BLOCK_F]`; `BACK` is the transposed rotation."""
    c0, c1 = _pairs(load_rows_below(cos, row, stop, stride, 0, F, BLOCK_F).to(tl.float32))  # [rows, BLOCK_F / 2]
    s0, s1 = _pairs(load_rows_below(sin, row, stop, stride, 0, F, BLOCK_F).to(tl.float32))  # [rows, BLOCK_F / 2]
    x0, x1 = _pairs(x)  # [rows, BLOCK_F / 2]
    if BACK:
        y = tl.join(x0 * c0 + x1 * s1, x1 * c1 - x0 * s0)
    else:
        y = tl.join(x0 * c0 - x1 * s0, x1 * c1 + x0 * s1)
    return y.reshape(x.shape[0], x.shape[1])


@triton.jit
def divisor(norm, floor, F: tl.constexpr, BLOCK_F: tl.constexpr, ROTARY: tl.constexpr):
    """Norm z and divisor c of all features, `[BLOCK_F]` both; zero where there is none."""
    f = tl.arange(0, BLOCK_F)  # [BLOCK_F]
    z = tl.load(norm + f, mask=f < F, other=0.0)  # [BLOCK_F]
    c = z
    if ROTARY:
        z0, z1 = tl.split(z.reshape(BLOCK_F // 2, 2))  # [BLOCK_F / 2]
        c = tl.join(z0 + z1, z0 + z1).reshape(BLOCK_F)
    return z, tl.where(f < F, tl.maximum(c, floor), 0.0)


@triton.jit
def lane_sums(x, LANES: tl.constexpr):
    """Add the rows of x that one thread holds, to `[LANES, columns]`."""
    return tl.sum(x.reshape(x.shape[0] // LANES, LANES, x.shape[1]), 0)


@triton.jit
def column(x, LANES: tl.constexpr):
    """Take x `[rows]` as the first of `LANES` columns, the others zero: a product takes it beside its matrix."""
    return tl.where(tl.arange(0, LANES)[None, :] == 0, x[:, None], 0.0)


@triton.jit
def feature_sums(phi, other, EXACT: tl.constexpr, SCALED: tl.constexpr, LANES: tl.constexpr):
    """Sum 16-bit features `[rows, BLOCK_F]` over tokens, each times `other` `[rows]`, by a product.

    The columns `[BLOCK_F, LANES]` of the result add up to the sum. `EXACT` takes `other` in two parts: one would be
    rounded too coarsely.
    """
    most = 1.0
    if EXACT and SCALED:
        most = tl.max(tl.abs(other), 0)
        most = tl.where(most > 0.0, most, 1.0)
        other *= 1.0 / most
    factors = column(other, LANES)  # [rows, LANES]
    if EXACT:
        high = other.to(phi.dtype).to(tl.float32)  # [rows]
        factors = tl.where(tl.arange(0, LANES)[None, :] == 1, (other - high)[:, None], column(high, LANES))
    return tl.dot(tl.trans(phi), factors.to(phi.dtype)) * most


@triton.jit
def weighed(phi, row, stop, query, weight, w_n, WEIGHT: tl.constexpr, GLOBAL: tl.constexpr):
    """The weight of each key `[rows]`, and with a global query its logit; phi is `[rows, BLOCK_F]`."""
    w = tl.where(row < stop, 1.0, 0.0)  # [rows]
    if WEIGHT:
        w = tl.load(weight + row.to(tl.int64) * w_n, mask=row < stop, other=0.0).to(tl.float32)
    logit = w
    if GLOBAL:
        logit = tl.sum(phi * query[None, :], 1)  # [rows]
        logit = tl.where((row < stop) & (w != 0.0), logit, float("-inf"))
    return w, logit
