"""The residual networks in Triton: two products, each of all networks. The norm and the activation lie between them.

The first product notes the mean of each row over a tile of channels, and the squares about that mean; the second one
merges these, and normalises what it multiplies. The weights of two networks lie where their parameters do, so a program
takes the addresses of both and chooses.
"""

# ruff: noqa: ANN001, ANN202  # the compiler of a kernel reads no annotations
# mypy: disable-error-code="no-untyped-def"

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vision_attn.kernels.launches import Launch
from vision_attn.kernels.residual.op import WIDEST
from vision_attn.kernels.triton.launching import Kernel, block_of, launch_of
from vision_attn.kernels.triton.rows import load_rows, load_rows_below, store_rows_below

_GROUP = 8  # tiles of rows that share the weights in the GPU's cache


@triton.jit
def _tile_of(
    tokens, WIDTH: tl.constexpr, NETWORKS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr
):
    """What this program owns: the network, and the tiles of tokens and of channels."""
    tiles = tl.cdiv(WIDTH, N)
    across, down = tiles * NETWORKS, tl.cdiv(tokens, M)
    pid = tl.program_id(0)
    top = pid // (GROUP * across) * GROUP
    tall = tl.minimum(down - top, GROUP)
    rest = pid % (GROUP * across)
    return rest // tall // tiles, top + rest % tall, rest // tall % tiles


@triton.jit
def _chosen(network, first, second, NETWORKS: tl.constexpr):
    """The address of the network's tensor."""
    return tl.where(network == 0, first, second) if NETWORKS == 2 else first


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
def _hidden(
    x, weight, weight_2, bias, bias_2, h, stats, tokens, K: tl.constexpr, WIDTH: tl.constexpr, NETWORKS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile of h = x W^T + b of one network, rounded, and what the norm needs to know of it.

    Inputs: x `[tokens, K]`; weight `[WIDTH, K]` and bias `[WIDTH]` of each network.
    Outputs: h `[NETWORKS, tokens, WIDTH]`; stats `[NETWORKS, tiles, 2, tokens]`, of each tile of channels the mean and
    the sum of squares about it.
    Launch: tiles of `M` tokens and `N` channels, which walk `BLOCK_K` channels of x at a time.
    """
    network, block, tile = _tile_of(tokens, WIDTH, NETWORKS, M, N, GROUP)
    weight = _chosen(network, weight, weight_2, NETWORKS)
    bias = _chosen(network, bias, bias_2, NETWORKS)
    row = block * M + tl.arange(0, M)  # [M]
    index = tl.minimum(row, tokens - 1)  # [M]
    channel = tl.minimum(tile * N + tl.arange(0, N), WIDTH - 1)  # [N]
    acc = tl.zeros([M, N], tl.float32)  # [M, N]
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        x_rows = _slice(x, index, tokens, k, K, BLOCK_K)  # [M, BLOCK_K]
        w_rows = _slice(weight, channel, WIDTH, k, K, BLOCK_K)  # [N, BLOCK_K]
        acc = tl.dot(x_rows, tl.trans(w_rows), acc)
    rows = (acc + tl.load(bias + channel).to(tl.float32)[None, :]).to(h.dtype.element_ty)  # [M, N]
    h += network.to(tl.int64) * tokens * WIDTH
    store_rows_below(h, row, tokens, WIDTH, tile * N, rows, WIDTH, N)
    there = (tile * N + tl.arange(0, N) < WIDTH)[None, :]
    count = tl.minimum(WIDTH - tile * N, N)
    rows = tl.where(there, rows.to(tl.float32), 0.0)  # [M, N]
    mean = tl.sum(rows, 1) / count  # [M]
    rows = tl.where(there, rows - mean[:, None], 0.0)  # [M, N]
    stats += (network * tl.cdiv(WIDTH, N) + tile).to(tl.int64) * 2 * tokens
    tl.store(stats + row, mean, mask=row < tokens)
    tl.store(stats + tokens + row, tl.sum(rows * rows, 1), mask=row < tokens)


@Kernel
@triton.jit
def _added(
    h, stats, norm_weight, norm_weight_2, norm_bias, norm_bias_2, weight, weight_2, bias, bias_2, x, y, y_2, tokens,
    eps, slope, K: tl.constexpr, WIDTH: tl.constexpr, NETWORKS: tl.constexpr, NOTED: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile of y = x + (activation(norm(h)) W^T + b) of one network, rounded where PyTorch rounds.

    Inputs: h `[NETWORKS, tokens, K]`; stats `[NETWORKS, tiles, 2, tokens]`, of each `NOTED` channels of h the mean and
    the sum of squares about it; x `[tokens, WIDTH]`; norm_weight and norm_bias `[K]`, weight `[WIDTH, K]` and bias
    `[WIDTH]` of each network.
    Outputs: y `[tokens, WIDTH]` of each network.
    Launch: tiles of `M` tokens and `N` channels, which walk `BLOCK_K` channels of h at a time.
    """
    network, block, tile = _tile_of(tokens, WIDTH, NETWORKS, M, N, GROUP)
    norm_weight = _chosen(network, norm_weight, norm_weight_2, NETWORKS)
    norm_bias = _chosen(network, norm_bias, norm_bias_2, NETWORKS)
    weight = _chosen(network, weight, weight_2, NETWORKS)
    bias, y = _chosen(network, bias, bias_2, NETWORKS), _chosen(network, y, y_2, NETWORKS)
    row = block * M + tl.arange(0, M)  # [M]
    index = tl.minimum(row, tokens - 1)  # [M]
    channel = tl.minimum(tile * N + tl.arange(0, N), WIDTH - 1)  # [N]
    h += network.to(tl.int64) * tokens * K
    stats += network.to(tl.int64) * tl.cdiv(K, NOTED) * 2 * tokens
    mean = tl.zeros([M], tl.float32)  # [M]
    squares = tl.zeros([M], tl.float32)  # [M]
    for first in tl.range(0, K, NOTED):
        count = tl.minimum(K - first, NOTED)
        place = stats + tl.cast(first // NOTED * 2, tl.int64) * tokens
        step = tl.load(place + index) - mean  # [M]
        mean += step * (count / (first + count))
        squares += tl.load(place + tokens + index) + step * step * (first * count / (first + count))
    share = tl.rsqrt(squares / K + eps)  # [M]
    acc = tl.zeros([M, N], tl.float32)  # [M, N]
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        rows = _slice(h, index, tokens, k, K, BLOCK_K)  # [M, BLOCK_K]
        w_rows = _slice(weight, channel, WIDTH, k, K, BLOCK_K)  # [N, BLOCK_K]
        d = k + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        gain = tl.load(norm_weight + d, mask=d < K, other=0.0).to(tl.float32)  # [BLOCK_K]
        shift = tl.load(norm_bias + d, mask=d < K, other=0.0).to(tl.float32)  # [BLOCK_K]
        a = (rows.to(tl.float32) - mean[:, None]) * share[:, None] * gain[None, :] + shift[None, :]
        a = a.to(rows.dtype).to(tl.float32)  # [M, BLOCK_K]
        a = tl.where(a > 0, a, a * slope).to(rows.dtype)  # [M, BLOCK_K]
        acc = tl.dot(a, tl.trans(w_rows), acc)
    f = (acc + tl.load(bias + channel).to(tl.float32)[None, :]).to(y.dtype.element_ty)  # [M, N]
    x_rows = load_rows_below(x, row, tokens, WIDTH, tile * N, WIDTH, N)  # [M, N]
    store_rows_below(y, row, tokens, WIDTH, tile * N, x_rows.to(tl.float32) + f.to(tl.float32), WIDTH, N)


def forward(
    x: Tensor, first: Sequence[Any], second: Sequence[Any] | None, eps: float, slope: float
) -> tuple[Tensor, Tensor]:
    """Return x + f(x) `[B, N, C]` of both networks, the second empty if there is none."""
    tokens, (mid, C), count = x.shape[0] * x.shape[1], first[0].shape, 1 if second is None else 2
    y = x.new_empty(x.shape)
    y_2 = x.new_empty((0,) if second is None else x.shape)
    h = x.new_empty((count, tokens, mid))
    if not x.numel():
        return y, y_2
    weight, bias, norm_weight, norm_bias, last_weight, last_bias = zip(first, second or first, strict=True)

    def hidden(launch: Launch) -> dict[str, Any]:
        return _named(launch, C, mid, count)

    tensors = x, *weight, *bias, h
    launch = launch_of(
        "residual.hidden", x, (C, mid, count),
        lambda launch: _hidden.needs(*tensors, torch.float32, tokens, **hidden(launch)),
        channels=min(block_of(mid), WIDEST),
    )  # fmt: skip
    noted = launch.own[1]
    stats = x.new_empty((count, math.ceil(mid / noted), 2, tokens), dtype=torch.float32)
    _hidden[(_programs(launch, tokens, mid, count),)](*tensors, stats, tokens, **hidden(launch))

    def added(launch: Launch) -> dict[str, Any]:
        return _named(launch, mid, C, count) | dict(NOTED=noted)

    parameters = *norm_weight, *norm_bias, *last_weight, *last_bias
    args = h, stats, *parameters, x, y, y if second is None else y_2, tokens, eps, slope
    launch = launch_of(
        "residual.added", x, (mid, C, count, noted), lambda launch: _added.needs(*args, **added(launch)),
        channels=min(block_of(C), WIDEST),
    )  # fmt: skip
    _added[(_programs(launch, tokens, C, count),)](*args, **added(launch))
    return y, y_2


def _named(launch: Launch, K: int, width: int, count: int) -> dict[str, Any]:
    tall, wide = launch.own
    return dict(
        K=K, WIDTH=width, NETWORKS=count, M=tall, N=wide, BLOCK_K=min(launch.length, block_of(K)), STAGES=launch.stages,
        GROUP=_GROUP, num_warps=launch.warps,
    )  # fmt: skip


def _programs(launch: Launch, tokens: int, width: int, count: int) -> int:
    tall, wide = launch.own
    return math.ceil(tokens / tall) * math.ceil(width / wide) * count
