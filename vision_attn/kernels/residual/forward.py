"""The residual networks in Triton: a product, the norm with the activation, and a product, each of all networks.

The weights of two networks lie where their parameters do, so a program takes the addresses of both and chooses.
"""

# ruff: noqa: ANN001, ANN202  # the compiler of a kernel reads no annotations
# mypy: disable-error-code="no-untyped-def"

import math
from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from vision_attn.kernels.launches import Launch
from vision_attn.kernels.residual.op import WIDEST
from vision_attn.kernels.triton.launching import Kernel, block_of, launch_of, next_power
from vision_attn.kernels.triton.rows import load_rows, load_rows_below, store_rows_below

_ELEMENTS = 4096  # of a tile that is normalised
_GROUP = 8  # tiles of rows that share the weights in the GPU's cache


@triton.jit
def _slice(base, index, stop, k, K: tl.constexpr, BLOCK: tl.constexpr):
    """Channels `k ..` of rows `index`, all below `stop`, as `[len(index), BLOCK]`; zero from channel K on."""
    if K % BLOCK == 0:
        rows = load_rows(base + k, index, K, BLOCK, BLOCK)
    else:
        rows = load_rows_below(base, index, stop, K, k, K, BLOCK)
    return rows


@Kernel
@triton.jit
def _product(
    a, a_2, weight, weight_2, bias, bias_2, x, o, o_2, tokens, K: tl.constexpr, WIDTH: tl.constexpr,
    NETWORKS: tl.constexpr, ADD: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile of a W^T + b of one network; if `ADD`, of x + (a W^T + b), rounded where PyTorch rounds.

    Inputs: a `[tokens, K]`, weight `[WIDTH, K]` and bias `[WIDTH]` of each network; x `[tokens, WIDTH]`, if `ADD`.
    Outputs: o `[tokens, WIDTH]` of each network.
    Launch: tiles of `M` tokens and `N` channels, which walk `BLOCK_K` channels of a at a time.
    """
    across = tl.cdiv(WIDTH, N) * NETWORKS
    down = tl.cdiv(tokens, M)
    pid = tl.program_id(0)
    top = pid // (GROUP * across) * GROUP
    tall = tl.minimum(down - top, GROUP)
    rest = pid % (GROUP * across)
    place = rest // tall
    network = place // tl.cdiv(WIDTH, N)
    row = (top + rest % tall) * M + tl.arange(0, M)  # [M]
    first = place % tl.cdiv(WIDTH, N) * N
    if NETWORKS == 2:
        a, weight = tl.where(network == 0, a, a_2), tl.where(network == 0, weight, weight_2)
        bias, o = tl.where(network == 0, bias, bias_2), tl.where(network == 0, o, o_2)
    index = tl.minimum(row, tokens - 1)  # [M]
    channel = tl.minimum(first + tl.arange(0, N), WIDTH - 1)  # [N]
    acc = tl.zeros([M, N], tl.float32)  # [M, N]
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        a_rows = _slice(a, index, tokens, k, K, BLOCK_K)  # [M, BLOCK_K]
        w_rows = _slice(weight, channel, WIDTH, k, K, BLOCK_K)  # [N, BLOCK_K]
        acc = tl.dot(a_rows, tl.trans(w_rows), acc)
    acc += tl.load(bias + channel).to(tl.float32)[None, :]
    if ADD:
        y = acc.to(o.dtype.element_ty).to(tl.float32)  # [M, N]
        acc = y + load_rows_below(x, row, tokens, WIDTH, first, WIDTH, N).to(tl.float32)
    store_rows_below(o, row, tokens, WIDTH, first, acc, WIDTH, N)


@Kernel
@triton.jit
def _activate(
    h, weight, weight_2, bias, bias_2, tokens, eps, slope, WIDTH: tl.constexpr, NETWORKS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Normalise some tokens of one network in place, and scale what is below zero by `slope`.

    Inputs: weight and bias `[WIDTH]` of each network.
    Inputs and outputs: h `[NETWORKS, tokens, WIDTH]`.
    Launch: `ROWS` tokens.
    """
    blocks = tl.cdiv(tokens, ROWS)
    network = tl.program_id(0) // blocks
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)  # [ROWS]
    if NETWORKS == 2:
        weight, bias = tl.where(network == 0, weight, weight_2), tl.where(network == 0, bias, bias_2)
    h += network.to(tl.int64) * tokens * WIDTH
    d = tl.arange(0, BLOCK)  # [BLOCK]
    there = d < WIDTH
    rows = load_rows_below(h, row, tokens, WIDTH, 0, WIDTH, BLOCK).to(tl.float32)  # [ROWS, BLOCK]
    mean = tl.sum(rows, 1) / WIDTH  # [ROWS]
    rows = tl.where(there[None, :], rows - mean[:, None], 0.0)
    share = tl.rsqrt(tl.sum(rows * rows, 1) / WIDTH + eps)  # [ROWS]
    gain = tl.load(weight + d, mask=there, other=0.0).to(tl.float32)  # [BLOCK]
    shift = tl.load(bias + d, mask=there, other=0.0).to(tl.float32)  # [BLOCK]
    rows = rows * share[:, None] * gain[None, :] + shift[None, :]
    rows = rows.to(h.dtype.element_ty).to(tl.float32)  # [ROWS, BLOCK]
    store_rows_below(h, row, tokens, WIDTH, 0, tl.where(rows > 0, rows, rows * slope), WIDTH, BLOCK)


def forward(
    x: Tensor, first: Sequence[Any], second: Sequence[Any] | None, eps: float, slope: float
) -> tuple[Tensor, Tensor]:
    """Return x + f(x) `[B, N, C]` of both networks, the second empty if there is none."""
    networks, tokens, mid = (first, second or first), x.shape[0] * x.shape[1], first[0].shape[0]
    count = 1 if second is None else 2
    y = x.new_empty(x.shape)
    y_2 = x.new_empty((0,) if second is None else x.shape)
    h = x.new_empty((count, tokens, mid))
    if not x.numel():
        return y, y_2
    weight, bias, norm_weight, norm_bias, last_weight, last_bias = zip(*networks, strict=True)
    hidden = h[0], h[count - 1]
    _multiply((x, x), weight, bias, x, hidden, count, add=False)
    rows = max(1, _ELEMENTS // next_power(mid))
    _activate[(math.ceil(tokens / rows) * count,)](
        h, *norm_weight, *norm_bias, tokens, eps, slope, WIDTH=mid, NETWORKS=count, ROWS=rows, BLOCK=next_power(mid),
        num_warps=4,
    )  # fmt: skip
    _multiply(hidden, last_weight, last_bias, x, (y, y_2 if count == 2 else y), count, add=True)
    return y, y_2


def _multiply(
    a: Sequence[Tensor], weight: Sequence[Tensor], bias: Sequence[Tensor], x: Tensor, o: Sequence[Tensor], count: int,
    *, add: bool,
) -> None:  # fmt: skip
    """Write the products of `count` networks, with x if `add`."""
    (width, K), tokens = weight[0].shape, x.shape[0] * x.shape[1]
    args = *a, *weight, *bias, x, *o, tokens
    about = K, width, count, add

    def named(launch: Launch) -> dict[str, Any]:
        tall, wide = launch.own
        return dict(
            K=K, WIDTH=width, NETWORKS=count, ADD=add, M=tall, N=wide, BLOCK_K=min(launch.length, block_of(K)),
            STAGES=launch.stages, GROUP=_GROUP, num_warps=launch.warps,
        )  # fmt: skip

    launch = launch_of(
        "residual.product", x, about, lambda launch: _product.needs(*args, **named(launch)),
        channels=min(block_of(width), WIDEST),
    )  # fmt: skip
    tall, wide = launch.own
    _product[(math.ceil(tokens / tall) * math.ceil(width / wide) * count,)](*args, **named(launch))
