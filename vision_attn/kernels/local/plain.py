"""Local attention in differentiable PyTorch, for derivatives of any kind, `torch.func` and export.

`local_attention` runs it where PyTorch must look into the operator of `portable.py`. It is slower, and holds the logits
of all windows at once.

Both axes are cut into tiles of tokens, apart for each phase of the dilation. A tile of the grid is a tile of rows by a
tile of columns; its queries meet the keys that any of them sees. No value of a tensor decides what runs.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def window_start(i: int, length: int, kernel_size: int) -> int:
    """Return the first key of query `i` on an undilated axis: the window is moved inside, never shrunk."""
    return min(max(i - kernel_size // 2, 0), length - kernel_size)


@dataclass(frozen=True)
class Axis:
    """The tiles of an axis: `n` of `T` queries, which meet `S` keys.

    Attributes:
        shape: n, T, S.
        queries: Tokens `[n * T]`; a short tile repeats its last one.
        keys: Tokens `[n * S]`, likewise.
        offsets: Key minus query in steps of the dilation `[n * T * S]`.
        seen: Whether a square sees the pair; for a disc, whether the key is there `[n * T * S]`.
        places: Where each token of the axis is among the queries `[length]`.
    """

    shape: tuple[int, int, int]
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    offsets: tuple[int, ...]
    seen: tuple[bool, ...]
    places: tuple[int, ...]


@functools.lru_cache(maxsize=256)
def _axis(length: int, kernel: int, step: int, reach: int) -> Axis:
    """Cut an axis.

    Args:
        length: Tokens of the axis.
        kernel: Keys of a square, 0 for a disc.
        step: The dilation.
        reach: The furthest key of a disc.
    """
    span = kernel or 2 * reach + 1
    tile = max(4, -(-span // 2))
    tile = length if (tile + span) * step > length else tile
    cuts: list[tuple[int, int, range, range]] = []  # phase, its length, queries and keys of a tile, counted in steps
    for phase in range(step):
        count = -(-(length - phase) // step)
        for first in range(0, count, tile):
            stop = min(first + tile, count)
            low = window_start(first, count, kernel) if kernel else max(0, first - reach)
            high = window_start(stop - 1, count, kernel) + kernel if kernel else min(count, stop + reach)
            cuts.append((phase, count, range(first, stop), range(low, high)))
    T, S = max(len(own) for _, _, own, _ in cuts), max(len(near) for _, _, _, near in cuts)
    queries: list[int] = []
    keys: list[int] = []
    offsets: list[int] = []
    seen: list[bool] = []
    places: dict[int, int] = {}
    for phase, count, own, near in cuts:
        for i, a in enumerate(own):
            places[phase + a * step] = len(queries) + i
        rows, columns = ([cut[min(i, len(cut) - 1)] for i in range(n)] for cut, n in ((own, T), (near, S)))
        for a in rows:
            start = window_start(a, count, kernel) if kernel else near[0]
            stop = start + kernel if kernel else near[-1] + 1
            offsets += [b - a for b in columns]
            seen += [i < len(near) and start <= b < stop for i, b in enumerate(columns)]
        queries += [phase + a * step for a in rows]
        keys += [phase + b * step for b in columns]
    return Axis(
        (len(cuts), T, S),
        tuple(queries),
        tuple(keys),
        tuple(offsets),
        tuple(seen),
        tuple(places[i] for i in range(length)),
    )


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, k_shared: Tensor, v_shared: Tensor, bias: Tensor | None, hidden: Tensor | None,
    size: Sequence[int], radius: float, kernel: Sequence[int], steps: Sequence[int], cell: int, scale: float,
) -> Tensor:  # fmt: skip
    """Grid queries `[B, height * width, H, D]` over their windows and the shared keys `[B, M, H, D]`.

    With `cell` > 0 the last shared keys are those of cells, counted as their tokens outside the disc.
    """
    wide, device = torch.promote_types(q.dtype, torch.float32), q.device
    reach = math.ceil(radius) - 1
    axes = [_axis(length, K, d, reach) for length, K, d in zip(size, kernel, steps, strict=True)]
    queries = _tiles(q.to(wide) * scale, size, axes[0].queries, axes[1].queries, axes)
    keys, values = (_tiles(t.to(wide), size, axes[0].keys, axes[1].keys, axes) for t in (k, v))
    scores = queries @ keys.mT  # [B, H, tiles, L, S]
    if bias is not None:
        scores = scores + _bias(bias.to(wide), axes)
    scores = scores.masked_fill(~_seen(axes, radius, device), -torch.inf)
    M = k_shared.shape[1]
    if M:
        shared_k, shared_v = (t.to(wide).transpose(1, 2)[:, :, None] for t in (k_shared, v_shared))  # [B, H, 1, M, D]
        beside = queries @ shared_k.mT
        beside = beside if hidden is None else beside + hidden.to(wide)[:, None, None, None]
        if cell:
            count = _counts(axes, size, radius, cell, device)  # [tiles, L, cells]
            mass = count.clamp(min=1).to(wide).log().masked_fill(count == 0, -torch.inf)
            beside = beside + F.pad(mass, (M - mass.shape[-1], 0))
        scores = torch.cat([beside, scores], -1)
    weights = scores.softmax(-1)
    o = weights[..., M:] @ values  # [B, H, tiles, L, D]
    if M:
        o = o + weights[..., :M] @ shared_v
    (rows, T, _), (columns, U, _) = (axis.shape for axis in axes)
    o = o.unflatten(3, (T, U)).unflatten(2, (rows, columns)).permute(0, 2, 4, 3, 5, 1, 6)
    o = o.flatten(1, 2).index_select(1, _index(axes[0].places, device))  # [B, height, columns, U, H, D]
    o = o.flatten(2, 3).index_select(2, _index(axes[1].places, device))
    return o.flatten(1, 2).to(q.dtype)


def _index(places: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(places, device=device)


def _tiles(t: Tensor, size: Sequence[int], rows: Sequence[int], columns: Sequence[int], axes: Sequence[Axis]) -> Tensor:
    """Gather tiles of `[B, height * width, H, D]`: `[B, H, tiles, tokens of a tile, D]`."""
    image = t.unflatten(1, (size[0], size[1]))
    image = image.index_select(1, _index(rows, t.device)).index_select(2, _index(columns, t.device))
    image = image.unflatten(2, (axes[1].shape[0], -1)).unflatten(1, (axes[0].shape[0], -1))
    return image.permute(0, 5, 1, 3, 2, 4, 6).flatten(4, 5).flatten(2, 3)


def _pairs(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Let `[n, T, S]` of rows and of columns broadcast to all pairs: `[n_y, n_x, T_y, T_x, S_y, S_x]`."""
    return rows[:, None, :, None, :, None], columns[None, :, None, :, None, :]


def _seen(axes: Sequence[Axis], radius: float, device: torch.device) -> Tensor:
    """The window as a mask `[tiles, L, S]`."""
    rows, columns = _pairs(*(_index(axis.seen, device).view(axis.shape) for axis in axes))
    seen = rows & columns
    if radius:
        dy, dx = _pairs(*(_index(axis.offsets, device).view(axis.shape) for axis in axes))
        seen = seen & (dy**2 + dx**2 <= math.ceil(radius**2) - 1)
    return seen.flatten(4, 5).flatten(2, 3).flatten(0, 1)


def _counts(axes: Sequence[Axis], size: Sequence[int], radius: float, cell: int, device: torch.device) -> Tensor:
    """Count the tokens of each cell outside the disc of each query: `[tiles, L, cells]`."""
    y, x = (_index(axis.queries, device) for axis in axes)
    rest = math.ceil(radius**2) - 1 - (torch.arange(size[0], device=device) - y[:, None]) ** 2  # [n_y * T, height]
    reach = torch.where(rest < 0, -1, rest.clamp(min=0).double().sqrt().floor()).long()[:, :, None, None]
    first, x = torch.arange(0, size[1], cell, device=device), x[:, None]
    inside = (x + reach).clamp(max=first + cell - 1) - (x - reach).clamp(min=first) + 1  # [n_y * T, height, n_x * U, c]
    left = cell**2 - inside.clamp(min=0).unflatten(1, (-1, cell)).sum(2)
    (rows, T, _), (columns, U, _) = (axis.shape for axis in axes)
    tiles = left.unflatten(2, (columns, U)).unflatten(0, (rows, T)).permute(0, 3, 1, 4, 2, 5)
    return tiles.flatten(4, 5).flatten(2, 3).flatten(0, 1)


def _bias(bias: Tensor, axes: Sequence[Axis]) -> Tensor:
    """Lay out the relative position bias `[H, 2 K_y - 1, 2 K_x - 1]` as `[H, tiles, L, S]`."""
    for i, axis in enumerate(axes):
        last = bias.shape[1 + i] - 1
        index = [min(max(offset + last // 2, 0), last) for offset in axis.offsets]
        bias = bias.index_select(1 + i, _index(index, bias.device))
    (n_y, T, S), (n_x, U, R) = (axis.shape for axis in axes)
    tiles = bias.view(-1, n_y, T, S, n_x, U, R).permute(0, 1, 4, 2, 5, 3, 6)
    return tiles.flatten(5, 6).flatten(3, 4).flatten(1, 2)
