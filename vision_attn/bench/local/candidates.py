"""Who computes local attention, or dense attention in its place: ours, PyTorch's, xformers', NATTEN's.

The second half counts the pairs of queries and keys that our Triton tiles visit, exactly. A pair costs 4 D operations
in a forward: two products of D multiply-adds.
"""

import importlib
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vision_attn.bench.candidate import AbsentError, Candidate, Prepared
from vision_attn.bench.local.problem import DENSE, EIGHT_BITS, LOCAL, UNDILATED, LocalProblem
from vision_attn.grid import Grid
from vision_attn.kernels.local import Window, local_attention
from vision_attn.kernels.local.plain import window_start

Pair = tuple[int, int]


def _flop(problem: LocalProblem, pairs_of_all_heads: int) -> int:
    return 4 * problem.head_dim * pairs_of_all_heads


def _dense_flop(problem: LocalProblem) -> int:
    return _flop(problem, problem.heads * problem.grid.tokens**2)


def _with_window(problem: LocalProblem, device: torch.device, window: Window) -> Prepared:
    backend = "triton" if device.type == "cuda" else "torch"

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return local_attention(q, k, v, problem.grid, window, backend=backend)

    if backend == "torch":
        return Prepared(run)
    shape = 1, problem.grid.tokens, problem.heads, problem.head_dim
    return Prepared(run, _flop(problem, triton_pairs(problem.grid, window, shape, problem.torch_dtype, device)))


def _ours(problem: LocalProblem, device: torch.device) -> Prepared:
    return _with_window(problem, device, problem.window)


def _undilated(problem: LocalProblem, device: torch.device) -> Prepared:
    return _with_window(problem, device, problem.undilated())


def _eight_bits(precision: str, problem: LocalProblem, device: torch.device) -> Prepared:
    """The whole operator: what quantises is inside the timing."""
    window, backend = replace(problem.window, precision=precision), "triton" if device.type == "cuda" else "torch"

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return local_attention(q, k, v, problem.grid, window, backend=backend)

    return Prepared(run)


def _sdpa(backend: SDPBackend | None, problem: LocalProblem, device: torch.device) -> Prepared:
    if backend is not None and device.type != "cuda":
        raise AbsentError(f"{backend.name} runs on CUDA only")

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    return Prepared(run, _dense_flop(problem))


def imported(module: str, name: str) -> Any:
    """Return what a package has by a name.

    Raises:
        AbsentError: If it cannot be imported.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, OSError, AttributeError) as error:
        raise AbsentError(f"{module} cannot be imported: {error}") from error


def _xformers(problem: LocalProblem, device: torch.device) -> Prepared:
    del device
    return Prepared(imported("xformers.ops", "memory_efficient_attention"), _dense_flop(problem))


def _natten(problem: LocalProblem, device: torch.device) -> Prepared:
    del device
    grid, window = problem.grid, problem.window
    if window.radius is not None or grid.prefix + grid.suffix:
        raise AbsentError("NATTEN has neither discs nor tokens outside the grid")
    na2d = imported("natten", "na2d")

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.unflatten(1, (grid.height, grid.width)) for t in (q, k, v))
        return na2d(q, k, v, kernel_size=window.kernel, dilation=window.steps).flatten(1, 2)

    return Prepared(run)


OPERATORS = (
    Candidate("ours", LOCAL, _ours),
    Candidate("ours undilated", UNDILATED, _undilated),
    Candidate("int8", EIGHT_BITS, partial(_eight_bits, "int8")),
    Candidate("fp8", EIGHT_BITS, partial(_eight_bits, "fp8")),
    Candidate("cuDNN", DENSE, partial(_sdpa, SDPBackend.CUDNN_ATTENTION)),
    Candidate("flash", DENSE, partial(_sdpa, SDPBackend.FLASH_ATTENTION)),
    Candidate("SDPA", DENSE, partial(_sdpa, None)),
    Candidate("xformers", DENSE, _xformers),
    Candidate("NATTEN", LOCAL, _natten),
)


def tile_pairs(grid: Grid, window: Window, queries: Pair, keys: Pair) -> int:
    """Count the pairs inside the grid that the tiles of one head compute.

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
    """Return the lengths of the sub-grids, for each axis."""
    steps = (1, 1) if window.radius is not None else window.steps
    sides = zip((grid.height, grid.width), steps, strict=True)
    return [[math.ceil((side - group) / step) for group in range(step)] for side, step in sides]


def _square_tiles(length: int, kernel_size: int, queries: int, keys: int) -> int:
    """Count the key tiles of an axis, summed over its query tiles."""
    total = 0
    for first in range(0, length, queries):
        last = min(first + queries, length) - 1
        stop = window_start(last, length, kernel_size) + kernel_size
        total += math.ceil((stop - window_start(first, length, kernel_size)) / keys)
    return total


def _disc_tiles(height: int, width: int, radius: float, queries: Pair, keys: Pair) -> Iterator[int]:
    """Yield the number of key tiles of each query tile."""
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
    """Count the pairs with tokens outside the grid that the tiles of one head compute.

    Args:
        grid: The grid.
        tiles: Query tiles of the grid.
        queries: Queries of a tile.
        keys: Keys of a tile.
        part: Keys of a part: rows of tokens outside the grid are computed in parts of their keys.
    """
    columns = sum(math.ceil(length / keys) * keys for length in (grid.prefix, grid.suffix))
    rows = math.ceil((grid.prefix + grid.suffix) / queries) * queries
    lengths = [min(part, grid.tokens - first) for first in range(0, grid.tokens, part)]
    return tiles * queries * columns + rows * sum(math.ceil(length / keys) * keys for length in lengths)


def triton_pairs(
    grid: Grid, window: Window, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
) -> int:
    """Count the pairs that the Triton forward computes for q of `shape` [B, N, H, D], with the tiles it chooses."""
    from vision_attn.kernels.local.op import Call  # noqa: PLC0415
    from vision_attn.kernels.local.queries import _forward  # noqa: PLC0415
    from vision_attn.kernels.local.tiles import grid_tiles, plan_queries  # noqa: PLC0415

    q = torch.empty(1, dtype=dtype, device=device).expand(shape)
    size = grid.height, grid.width, grid.prefix, grid.suffix
    call = Call(q, q, q, None, None, None, None, size, *window.geometry(grid), 1.0)
    plan = plan_queries(call, _forward, "local.forward")
    queries, keys = grid_tiles(plan.tiles)
    outside = outside_pairs(
        grid, call.tiles(queries), plan.tiles.rows, plan.tiles.length, plan.launch.named["part_length"]
    )
    return shape[0] * shape[2] * (tile_pairs(grid, window, queries, keys) + outside)
