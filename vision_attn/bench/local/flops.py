"""Counts the pairs of queries and keys that local attention needs, and those that its Triton tiles visit, exactly.

A pair costs 4 D operations in a forward (two products of D multiply-adds) and 10 D in its gradients (five products).
"""

import math
from collections.abc import Iterator

import torch

from vision_attn.grid import Grid
from vision_attn.kernels.local.window import Window, window_start

Pair = tuple[int, int]


def needed_pairs(grid: Grid, window: Window) -> int:
    """Count the attended pairs of one head, dense rows and columns of the tokens outside the grid included."""
    outside = grid.prefix + grid.suffix
    return window.pairs(grid) + outside * (grid.image_tokens + grid.tokens)


def tile_pairs(grid: Grid, window: Window, queries: Pair, keys: Pair) -> int:
    """Count the pairs inside the grid that tiles compute, of one head.

    Query tiles lie side by side. Each walks bands of key rows from the first row it needs; in a band, tiles follow each
    other from the first column that any of the band's rows needs. With dilation every sub-grid is walked alone, and
    query tiles beyond a smaller sub-grid do nothing.

    Args:
        grid: The grid.
        window: Disc or square.
        queries: Rows and columns of a query tile.
        keys: Rows and columns of a key tile.
    """
    height, width = _axes(grid, window)
    tiles = 0
    for length_y in height:
        for length_x in width:
            if window.radius is None:
                rows = _square_tiles(length_y, window.kernel[0], queries[0], keys[0])
                tiles += rows * _square_tiles(length_x, window.kernel[1], queries[1], keys[1])
            else:
                tiles += sum(_disc_tiles(length_y, length_x, window.radius, queries, keys))
    return tiles * math.prod(queries) * math.prod(keys)


def _axes(grid: Grid, window: Window) -> list[list[int]]:
    """Lengths of the sub-grids' axes."""
    steps = (1, 1) if window.radius is not None else window.steps
    sides = zip((grid.height, grid.width), steps, strict=True)
    return [[math.ceil((side - group) / step) for group in range(step)] for side, step in sides]


def _square_tiles(length: int, kernel_size: int, queries: int, keys: int) -> int:
    """Key tiles of an axis, summed over its query tiles."""
    total = 0
    for first in range(0, length, queries):
        last = min(first + queries, length) - 1
        stop = window_start(last, length, kernel_size) + kernel_size
        total += math.ceil((stop - window_start(first, length, kernel_size)) / keys)
    return total


def _disc_tiles(height: int, width: int, radius: float, queries: Pair, keys: Pair) -> Iterator[int]:
    """Key tiles of every query tile."""
    limit = math.ceil(min(radius, height + width) ** 2) - 1
    reach = math.isqrt(limit)
    for y0 in range(0, height, queries[0]):
        y1 = min(y0 + queries[0], height) - 1
        bands = range(max(y0 - reach, 0), min(y1 + reach + 1, height), keys[0])
        gaps = [max(row - y1, y0 - (row + keys[0] - 1), 0) for row in bands]
        halves = [math.isqrt(limit - gap**2) for gap in gaps]
        for x0 in range(0, width, queries[1]):
            x1 = min(x0 + queries[1], width) - 1
            yield sum(math.ceil((min(x1 + h + 1, width) - max(x0 - h, 0)) / keys[1]) for h in halves)


def outside_pairs(grid: Grid, tiles: int, queries: int, keys: int, part: int) -> int:
    """Count the pairs with tokens outside the grid that tiles compute, of one head.

    Args:
        grid: The grid.
        tiles: Query tiles of the grid.
        queries: Queries of a tile.
        keys: Keys of a tile.
        part: Keys of a part: the rows of the tokens outside the grid are split over their keys.
    """
    columns = sum(math.ceil(length / keys) * keys for length in (grid.prefix, grid.suffix))
    rows = math.ceil((grid.prefix + grid.suffix) / queries) * queries
    lengths = [min(part, grid.tokens - first) for first in range(0, grid.tokens, part)]
    return tiles * queries * columns + rows * sum(math.ceil(length / keys) * keys for length in lengths)


def triton_pairs(
    grid: Grid, window: Window, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
) -> int:
    """Count the pairs that the Triton forward computes for q of `shape` [B, N, H, D], with the tiles it chooses."""
    from vision_attn.kernels.local.call import Call  # noqa: PLC0415
    from vision_attn.kernels.local.forward import _CONFIGS, _forward, config  # noqa: PLC0415
    from vision_attn.kernels.local.plan import plan_queries  # noqa: PLC0415

    q = torch.empty(1, dtype=dtype, device=device).expand(shape)
    disc = window.radius is not None
    kernel, steps = ((0, 0), (1, 1)) if disc else (window.kernel, window.steps)
    size = grid.height, grid.width, grid.prefix, grid.suffix
    radius = min(float(window.radius or 0), float(grid.height + grid.width))
    call = Call(q, q, q, None, None, None, None, size, radius, kernel, steps, 1.0)
    tiles = config(call, _CONFIGS)
    M, LEN = math.prod(tiles.queries), math.prod(tiles.keys)
    part = plan_queries(call, _forward, tiles).launch.named["part_length"]
    inside = tile_pairs(grid, window, tiles.queries, tiles.keys)
    return shape[0] * shape[2] * (inside + outside_pairs(grid, call.tiles(tiles.queries), M, LEN, part))
