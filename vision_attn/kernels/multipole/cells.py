"""The cells of multipole attention: what a cell sees exactly, which means it sees, and what each mean stands for.

A grid is cut into cells of `cell` x `cell` tokens; at level l a cell has 2^l times that side, and its means are over
`pool * 2^l` x `pool * 2^l` tokens. A query meets the means of level l in the cells of that level that are children of
the neighbourhood of its own cell's parent and not in its own cell's neighbourhood: the interaction list of the fast
multipole method. So each token beyond the neighbourhood is in one mean, of the level that its distance asks for.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_attn._checks import check_int, check_number
from vision_attn.grid import Grid
from vision_attn.kernels.backend import exporting, full_precision, passing
from vision_attn.kernels.eight_bits import check_precision
from vision_attn.kernels.tables import lasting

_MOST_SCORES = 1 << 24  # of mean queries and mean keys at a time


@dataclass(frozen=True)
class Cells:
    """What one grid query sees exactly and what it sees as means.

    Args:
        cell: Side of a cell in tokens.
        near: A query sees exactly the cells within this Chebyshev distance of its own: 1 for 3 x 3 cells.
        pool: Side of the finest means in tokens; it must divide `cell`.
        exact: How many further cells each cell sees exactly: those that its mean query weighs most.
        group: How many neighbouring heads choose together; the last group may have fewer.
        spread: How much the spread of a cell's keys counts in the choice, from 0, where a cell counts as its mean key,
            to 1, where it counts as the best key that its keys' bounds allow.
        mass: Added to the logits of the means, `[H, levels]`; levels beyond the last column take the last. Rows of
            several samples `[n * H, levels]` repeat over the batch: of groups of heads that stand there.
        weights: Logarithms of the weights of the tokens in a mean of the first level, `[pool, pool]`; equal if None.
        chosen: Indices of the exact cells `[B, H, cells, exact]` in row-major order, the number of cells for none: what
            `choose_cells` returned, to be used again. Chosen anew if None.
        precision: 'int8' or 'fp8' for products in 8 bits, which have no gradients: see `eight_bit.py`. None for those
            of q. The choice is that of unrounded q and k.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size is out of range, `pool` does not divide `cell`, or there is no such precision.
    """

    cell: int = 8
    near: int = 1
    pool: int = 4
    exact: int = 4
    group: int = 1
    spread: float = 0.0
    mass: Tensor | None = field(default=None, compare=False, repr=False)
    weights: Tensor | None = field(default=None, compare=False, repr=False)
    chosen: Tensor | None = field(default=None, compare=False, repr=False)
    precision: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("cell", 1), ("near", 0), ("pool", 1), ("exact", 0), ("group", 1)):
            check_int(name, getattr(self, name), least)
        check_number("spread", self.spread, "between 0 and 1")
        if not 0 <= self.spread <= 1:
            raise ValueError(f"spread must be between 0 and 1, got {self.spread}")
        if self.cell % self.pool:
            raise ValueError(f"pool must divide cell, got cell={self.cell} and pool={self.pool}")
        if self.precision is not None:
            check_precision(self.precision)

    def covers(self, grid: Grid) -> bool:
        """Whether the neighbourhood of every query is the whole grid: dense attention."""
        return math.ceil(max(grid.height, grid.width) / self.cell) - 1 <= self.near

    def count(self, grid: Grid) -> int:
        """Return the number of cells of a grid."""
        return math.ceil(grid.height / self.cell) * math.ceil(grid.width / self.cell)

    def layout(self, grid: Grid, device: torch.device) -> "Layout":
        """Return who sees what on a grid."""
        about = grid.height, grid.width, self.cell, self.near, self.pool, device
        if passing():
            return _layout(*about)
        found = _kept_layout(*about)
        for table in vars(found).values():
            if isinstance(table, Tensor):
                lasting(table)
        return found


@dataclass(frozen=True)
class Layout:
    """Who sees what on a grid of C cells of L tokens, with M means of all levels, row by row and level by level.

    Attributes:
        size: Rows and columns of cells.
        near: The cells of each neighbourhood `[C, (2 * near + 1)^2]`, C for none.
        slots: The means that a cell sees `[C, P]`, M for none.
        boxes: First row, row after the last, first column, column after the last of each mean `[M + 1, 4]`; the last
            is empty.
        levels: The level of each mean `[M + 1]`.
        sides: Rows and columns of the means of each level.
        tokens: The tokens of each cell `[C + 1, 4]`, as `boxes`; the last is empty.
    """

    size: tuple[int, int]
    near: Tensor
    slots: Tensor
    boxes: Tensor
    levels: Tensor
    sides: tuple[tuple[int, int], ...]
    tokens: Tensor


def count_levels(height: int, width: int, cell: int, near: int) -> int:
    """Return how many levels of means it takes until the neighbourhood of every query is the whole grid."""
    levels = 0
    while math.ceil(max(height, width) / (cell << levels)) - 1 > near:
        levels += 1
    return levels


def _layout(height: int, width: int, cell: int, near: int, pool: int, device: torch.device) -> Layout:
    size = math.ceil(height / cell), math.ceil(width / cell)
    count = size[0] * size[1]
    levels = count_levels(height, width, cell, near)
    sides = tuple((math.ceil(height / (pool << level)), math.ceil(width / (pool << level))) for level in range(levels))
    means = sum(rows * columns for rows, columns in sides)
    slots, first = [], 0
    for level, side in enumerate(sides):
        coarse = math.ceil(height / (cell << level)), math.ceil(width / (cell << level))
        found = _interactions(coarse, side, near, cell // pool)
        found = torch.where(found < 0, means, found + first)
        row, column = (torch.arange(n, device="cpu").div(1 << level, rounding_mode="floor") for n in size)
        slots.append(found[(row[:, None] * coarse[1] + column).flatten()])
        first += side[0] * side[1]
    boxes = [_boxes(height, width, pool << level) for level in range(levels)]
    level_of = [torch.full((len(box),), level, device="cpu") for level, box in enumerate(boxes)]
    empty = torch.zeros(1, 4, dtype=torch.long, device="cpu")
    return Layout(
        size,
        _neighbours(size, near).to(device),
        (torch.cat(slots, 1) if slots else torch.zeros(count, 0, dtype=torch.long, device="cpu")).to(device),
        torch.cat([*boxes, empty]).to(device),
        torch.cat([*level_of, torch.zeros(1, dtype=torch.long, device="cpu")]).to(device),
        sides,
        torch.cat([_boxes(height, width, cell), empty]).to(device),
    )


_kept_layout = functools.lru_cache(maxsize=256)(_layout)


def _boxes(height: int, width: int, side: int) -> Tensor:
    """The squares of `side` tokens that a grid is cut into, at the borders what is left `[squares, 4]`."""
    y, x = torch.meshgrid(
        torch.arange(0, height, side, device="cpu"), torch.arange(0, width, side, device="cpu"), indexing="ij"
    )
    return torch.stack([y, (y + side).clamp(max=height), x, (x + side).clamp(max=width)], -1).flatten(0, 1)


def _neighbours(size: tuple[int, int], near: int) -> Tensor:
    """Cells within `near` of each cell `[cells, (2 * near + 1)^2]`; the number of cells where there is none."""
    rows, columns = (torch.arange(n, device="cpu")[:, None] + torch.arange(-near, near + 1, device="cpu") for n in size)
    y, x = rows[:, None, :, None], columns[None, :, None, :]
    inside = (y >= 0) & (y < size[0]) & (x >= 0) & (x < size[1])
    return torch.where(inside, y * size[1] + x, size[0] * size[1]).flatten(2).flatten(0, 1)


def _interactions(size: tuple[int, int], means: tuple[int, int], near: int, per_cell: int) -> Tensor:
    """The means of one level that its cells see `[cells, at most 4 (2 * near + 1)^2 * per_cell^2]`, -1 for none.

    Args:
        size: Rows and columns of the level's cells.
        means: Rows and columns of its means.
        near: Distance of a neighbourhood in cells.
        per_cell: Means along the side of a cell.
    """
    children = torch.arange(2 * (2 * near + 1), device="cpu")
    own_y, own_x = (torch.arange(n, device="cpu") for n in size)
    y, x = ((2 * (own // 2 - near))[:, None] + children for own in (own_y, own_x))  # [rows, children]
    close_y, close_x = (y - own_y[:, None]).abs() <= near, (x - own_x[:, None]).abs() <= near
    y_in, x_in = (y >= 0) & (y < size[0]), (x >= 0) & (x < size[1])
    seen = y_in[:, None, :, None] & x_in[None, :, None, :] & ~(close_y[:, None, :, None] & close_x[None, :, None, :])
    inner = torch.arange(per_cell, device="cpu")
    mean_y, mean_x = y[:, None, :, None, None, None] * per_cell + inner[:, None], x[None, :, None, :, None, None]
    mean_x = mean_x * per_cell + inner
    there = seen[..., None, None] & (mean_y < means[0]) & (mean_x < means[1])
    found = torch.where(there, mean_y * means[1] + mean_x, -1).flatten(2).flatten(0, 1)  # [cells, all]
    axes = [_met(n, m, near, per_cell) for n, m in zip(size, means, strict=True)]
    most = max([wide_y * wide_x - own_y * own_x for wide_y, own_y in axes[0] for wide_x, own_x in axes[1]])
    place = torch.arange(found.shape[1], device="cpu")
    order = torch.where(found < 0, place + len(place), place).argsort(dim=1)[:, :most]  # ONNX has no stable sort
    return found.gather(1, order)


def _met(cells: int, means: int, near: int, per_cell: int) -> set[tuple[int, int]]:
    """How many means along an axis lie in the neighbourhoods of a cell's parent and of the cell, for all cells."""

    def inside(first: int, stop: int) -> int:
        return max(0, min(stop * per_cell, means) - max(first, 0) * per_cell)

    parents = ((i, 2 * (i // 2 - near)) for i in range(cells))
    return {(inside(low, low + 2 * (2 * near + 1)), inside(i - near, i + near + 1)) for i, low in parents}


def counts_of(layout: Layout, slots: Tensor, chosen: Tensor) -> Tensor:
    """Return the tokens that means stand for once the exact cells are taken out of them.

    Args:
        layout: Who sees what.
        slots: Means `[n, P]`.
        chosen: Exact cells of each of the n cells `[..., n, exact]`, the number of cells for none.

    Returns:
        Int `[..., n, P]`, 0 for no mean and for one whose tokens are all exact.
    """
    box, exact = layout.boxes[slots], layout.tokens[chosen]  # [n, P, 4], [..., n, exact, 4]
    left = ((box[..., 1] - box[..., 0]) * (box[..., 3] - box[..., 2])).expand(*chosen.shape[:-1], slots.shape[1])
    for i in range(chosen.shape[-1]):
        y0, y1, x0, x1 = (t[..., None] for t in exact[..., i, :].unbind(-1))
        rows = torch.minimum(box[..., 1], y1) - torch.maximum(box[..., 0], y0)
        columns = torch.minimum(box[..., 3], x1) - torch.maximum(box[..., 2], x0)
        left = left - rows.clamp(min=0) * columns.clamp(min=0)
    return left


def means_of(t: Tensor, grid: Grid, cells: Cells, sides: Sequence[tuple[int, int]]) -> Tensor:
    """Return the means of all levels `[B, M, H, D]` of the grid's tokens `[B, height * width, H, D]`, in its dtype.

    A mean of a higher level is that of the means below it, each counted as its tokens.
    """
    if not sides:
        return t[:, :0]
    return levels_of(*_finest_sums(t, grid, cells.pool, cells.weights), len(sides)).to(t.dtype)


def levels_of(sums: Tensor, count: Tensor, levels: int) -> Tensor:
    """Return the means of all levels `[B, M, H, D]`.

    Args:
        sums: Finest means times their numbers of tokens `[B, rows, columns, H, D]`.
        count: Those numbers `[1, rows, columns, 1, 1]`.
        levels: How many levels there are.
    """
    found = []
    for level in range(levels):
        if level:
            sums, count = (_sums(_padded(each, 2), 2) for each in (sums, count))
        found.append((sums / count).flatten(1, 2))
    return torch.cat(found, 1) if found else sums.flatten(1, 2)[:, :0]


def _finest_sums(t: Tensor, grid: Grid, pool: int, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Finest means of `[B, height * width, H, D]` times their numbers of tokens, `[B, rows, columns, H, D]`.

    And those numbers, `[1, rows, columns, 1, 1]`; in float32 at least.
    """
    wide = torch.promote_types(t.dtype, torch.float32)
    image = _padded(t.unflatten(1, (grid.height, grid.width)), pool).to(wide)
    there = _padded(t.new_ones(1, grid.height, grid.width, 1, 1, dtype=wide), pool)
    count = _sums(there, pool)
    if weights is None:
        return _sums(image, pool), count
    weight = there * _tiled(weights.to(t.device, wide).exp(), there)
    return _sums(image * weight, pool) * (count / _sums(weight, pool)), count


def _padded(image: Tensor, side: int) -> Tensor:
    """Fill `[B, height, width, H, D]` with zeros up to multiples of `side`."""
    height, width = image.shape[1:3]
    if height % side == width % side == 0:
        return image
    return F.pad(image, (0, 0, 0, 0, 0, -width % side, 0, -height % side))


def _tiled(weights: Tensor, image: Tensor) -> Tensor:
    """Repeat `[pool, pool]` over an image whose sides it divides: `[1, height, width, 1, 1]`."""
    rows, columns = (n // weights.shape[0] for n in image.shape[1:3])
    return weights.repeat(rows, columns)[None, :, :, None, None]


def _sums(image: Tensor, side: int) -> Tensor:
    """Add up squares of `side`: `[B, height, width, H, D]` to `[B, height / side, width / side, H, D]`."""
    B, height, width, H, D = image.shape
    rows = image.reshape(B, height // side, side, width, H, D).sum(2)  # one axis at a time: a CPU adds rows of memory
    return rows.view(B, height // side, width // side, side, H, D).sum(3)


def choose_cells(q: Tensor, k: Tensor, grid: Grid, cells: Cells, *, scale: float | None = None) -> Tensor:
    """Choose the cells that each cell sees exactly beside its neighbourhood: those that its mean query weighs most.

        weight(c) = scale * mean(q of the cell) . mean(k of c) + log |c|

    The mean of keys is made of the finest means, so it has the weights `cells.weights`. With `cells.spread` s > 0, each
    of its channels is moved by the share s of the way to the largest of the cell's keys, or to the smallest where the
    query is negative: s = 1 is the bound of 'Quest' - https://arxiv.org/abs/2406.10774. With `cells.group` > 1, heads
    of a group choose those of the largest mean softmax of these weights. The choice has no gradient.

    Args:
        q: Queries `[B, N, H, D]`.
        k: Keys, like `q`.
        grid: Where the image tokens lie.
        cells: How many are chosen.
        scale: Factor of the logits, `D ** -0.5` if None.

    Returns:
        Indices `[B, H, cells, exact]` of cells in row-major order; the number of cells where there is no further one.
    """
    layout = cells.layout(grid, q.device)
    C, E = layout.near.shape[0], cells.exact
    B, _, H, D = q.shape
    if not E or cells.covers(grid) or not B:
        return torch.full((B, H, C, E), C, device=q.device)
    return _chosen(q, k, grid, cells, layout, D**-0.5 if scale is None else scale)


@full_precision
@torch.no_grad()
def _chosen(q: Tensor, k: Tensor, grid: Grid, cells: Cells, layout: Layout, scale: float) -> Tensor:
    mean_q = cell_means(*_finest_sums(q[:, grid.image], grid, cells.pool, None), cells)
    keys = cell_means(*_finest_sums(k[:, grid.image], grid, cells.pool, cells.weights), cells)
    bounds = _cell_bounds(k[:, grid.image], grid, cells.cell) if cells.spread else None
    return choose_for(scale * mean_q, keys, bounds, layout, cells, slice(0, layout.near.shape[0]))


def choose_for(
    mean_q: Tensor, keys: Tensor, bounds: tuple[Tensor, Tensor] | None, layout: Layout, cells: Cells, part: slice
) -> Tensor:
    """Choose the exact cells of some cells: see `choose_cells`.

    Args:
        mean_q: Mean queries of these cells, scaled `[B, H, n, D]`.
        keys: Mean keys of all cells `[B, H, C, D]`.
        bounds: The least and the largest of each cell's keys, each like `keys`; with `cells.spread` only.
        layout: Who sees what.
        cells: How many are chosen.
        part: Which cells these are.

    Returns:
        `[B, H, n, exact]`.
    """
    C, (B, H, n, _) = layout.near.shape[0], mean_q.shape
    size = (layout.tokens[:C, 1] - layout.tokens[:C, 0]) * (layout.tokens[:C, 3] - layout.tokens[:C, 2])
    if bounds is not None:  # one product with the query's positive and negative channels
        low, high = bounds
        mean_q = torch.cat([mean_q.clamp(min=0), mean_q.clamp(max=0)], -1)
        keys = torch.cat([torch.lerp(keys, bound, cells.spread) for bound in (high, low)], -1)
    near, step = layout.near[part], n if exporting() else max(1, _MOST_SCORES // (B * H * C))  # any batch is exported
    parts = [
        _best(mean_q[:, :, i : i + step], keys, size, near[i : i + step], cells.exact, cells.group)
        for i in range(0, n, step)
    ]
    return torch.cat(parts, 2) if parts else layout.near.new_empty((B, H, 0, cells.exact))


def cell_means(sums: Tensor, count: Tensor, cells: Cells) -> Tensor:
    """Return means of cells `[B, H, C, D]`, of what `levels_of` takes."""
    per_cell = cells.cell // cells.pool
    sums, count = (_sums(_padded(each, per_cell), per_cell) for each in (sums, count))
    return (sums / count).flatten(1, 2).transpose(1, 2)


def _cell_bounds(t: Tensor, grid: Grid, cell: int) -> tuple[Tensor, Tensor]:
    """The least and the largest of each cell and channel, each like `cell_means`."""
    image = t.unflatten(1, (grid.height, grid.width)).to(torch.promote_types(t.dtype, torch.float32))
    B, height, width, H, D = image.shape
    found = []
    for sign in (-1, 1):
        padded = F.pad(image, (0, 0, 0, 0, 0, -width % cell, 0, -height % cell), value=-sign * math.inf)
        most = torch.amax if sign > 0 else torch.amin
        rows = most(padded.reshape(B, -(-height // cell), cell, -1, H, D), 2)  # as in `_sums`
        squares = most(rows.view(B, rows.shape[1], -(-width // cell), cell, H, D), 3)
        found.append(squares.flatten(1, 2).transpose(1, 2))
    return found[0], found[1]


def _best(q: Tensor, k: Tensor, size: Tensor, near: Tensor, exact: int, group: int) -> Tensor:
    """The `exact` cells of largest weight for queries `[B, H, n, D]` among keys `[B, H, C, D]`, C for none."""
    C = k.shape[2]
    weight = q @ k.mT + size.to(q.dtype).log()
    hidden = torch.zeros(len(near), C + 1, dtype=torch.bool, device=q.device).scatter_(1, near, 1)[:, :C]
    weight = weight.masked_fill(hidden, -math.inf)
    if group > 1:
        groups = weight.softmax(-1).nan_to_num().split(group, 1)
        weight = torch.cat([heads.mean(1, keepdim=True).expand_as(heads) for heads in groups], 1)
        weight = weight.masked_fill(hidden, -math.inf)
    best, index = weight.topk(min(exact, C), -1)
    index = torch.where(best == -math.inf, C, index)
    return F.pad(index, (0, exact - index.shape[-1]), value=C)


def by_head(mass: Tensor, B: int, H: int) -> Tensor:
    """Return the masses of every head of every sample `[B, H, levels]`: see `Cells.mass`."""
    return mass[torch.arange(B * H, device=mass.device).view(B, H) % len(mass)]


def of_one_head(t: Tensor) -> Tensor:
    """Return the one head of keys `[B, N, 1, D]` that all heads share in memory, or all of them `[B, N, H, D]`."""
    return t[:, :, :1] if t.stride(2) == 0 else t
