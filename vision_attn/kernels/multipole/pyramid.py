"""Where the means of all levels lie for the kernels: those of one parent cell together, so that TMA fetches them.

The cells of level l that make up one cell of level l + 1, their parent, have `2 * per_cell` x `2 * per_cell` means.
They are a block of neighbouring rows, and blocks follow each other row by row of parents. The parents near a cell's own
parent are then a few runs of rows, which hold all means of that level that the cell sees, and some that it does not:
masses hide those. A block has a power of two of rows; those that hold no mean are zero.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vision_attn.kernels.multipole.cells import count_levels
from vision_attn.kernels.tables import fixed, lasting
from vision_attn.kernels.triton.launching import layout, next_power


@dataclass(frozen=True)
class Pyramid:
    """The rows of the means of a grid `height` x `width`, cut into cells of side `cell` with means of side `pool`."""

    height: int
    width: int
    cell: int
    near: int
    pool: int

    @functools.cached_property
    def levels(self) -> int:
        """Levels of means."""
        return count_levels(self.height, self.width, self.cell, self.near)

    @property
    def per_cell(self) -> int:
        """Means along the side of a cell."""
        return self.cell // self.pool

    @property
    def cells(self) -> tuple[int, int]:
        """Rows and columns of cells."""
        return math.ceil(self.height / self.cell), math.ceil(self.width / self.cell)

    @property
    def block(self) -> int:
        """Rows of one block."""
        return next_power((2 * self.per_cell) ** 2)

    def means(self, level: int) -> tuple[int, int]:
        """Return rows and columns of the means of a level."""
        side = self.pool << level
        return math.ceil(self.height / side), math.ceil(self.width / side)

    def blocks(self, level: int) -> tuple[int, int]:
        """Return rows and columns of the blocks of a level."""
        side = self.cell << (level + 1)
        return math.ceil(self.height / side), math.ceil(self.width / side)

    @functools.cached_property
    def first(self) -> list[int]:
        """The first row of each level, and how many rows there are."""
        found = [0]
        for level in range(self.levels):
            down, across = self.blocks(level)
            found.append(found[-1] + down * across * self.block)
        return found

    @property
    def rows(self) -> int:
        """Rows of all levels."""
        return self.first[-1]

    @property
    def finest(self) -> int:
        """Rows of the first level."""
        return self.first[1] if self.levels else 0

    @functools.cached_property
    def full(self) -> bool:
        """Whether every row holds a mean."""
        return self.rows == sum(math.prod(self.means(level)) for level in range(self.levels))

    def table(self, device: torch.device) -> Tensor:
        """Return first row, columns of blocks, rows and columns of means of each level, int32 `[levels, 4]`."""
        return lasting(_table(self, device))

    def order(self, device: torch.device) -> Tensor:
        """Return the mean of each row, counted level by level and row by row; the number of means for none."""
        return lasting(_order(self, device))

    def tile_rows(self, tiles: "MeanTiles", device: torch.device) -> Tensor:
        """Return the first row of each tile that each cell meets, int32 `[C, tiles]`: see `tile_of_means`.

        It may lie before the first row or beyond the last.
        """
        return lasting(_tile_rows(self, tiles, device))


@functools.lru_cache(maxsize=256)
def pyramid_of(height: int, width: int, cell: int, near: int, pool: int) -> Pyramid:
    """Return the rows of a grid's means; what was worked out about them is kept."""
    return Pyramid(height, width, cell, near, pool)


def pyramid(size: Sequence[int]) -> Pyramid:
    """Return the rows of a call's means; `size` is height, width, prefix, suffix, cell, near, pool, ..."""
    height, width, _, _, cell, near, pool = size[:7]
    return pyramid_of(height, width, cell, near, pool)


@functools.lru_cache(maxsize=256)
def _table(rows: Pyramid, device: torch.device) -> Tensor:
    entries = [(rows.first[n], rows.blocks(n)[1], *rows.means(n)) for n in range(rows.levels)]
    return fixed(torch.tensor(entries, dtype=torch.int32, device=device).view(-1, 4))


@dataclass(frozen=True)
class MeanTiles:
    """The tiles of means that one cell meets, level by level, parent by parent.

    Attributes:
        length: Rows of a tile.
        across: Tiles of one row of parents.
        skip: Whether the tile of the cell's own parent, all of whose children are near, is left out of each level.
        count: Tiles of all levels.
    """

    length: int
    across: int
    skip: bool
    count: int

    @classmethod
    def of(cls, rows: Pyramid, most: int) -> "MeanTiles":
        """Return tiles of at most `most` rows, a power of two."""
        span = 2 * rows.near + 1
        length = min(max(16, next_power(span * rows.block)), most)
        across = math.ceil(span * rows.block / length)
        skip = rows.near > 0 and rows.block == length
        return cls(length, across, skip, rows.levels * (span * across - skip))


@functools.lru_cache(maxsize=256)
def _order(rows: Pyramid, device: torch.device) -> Tensor:
    found, before = [], 0
    count, wide = sum(math.prod(rows.means(level)) for level in range(rows.levels)), 2 * rows.per_cell
    inner = torch.arange(rows.block, device="cpu")
    for level in range(rows.levels):
        (down, across), (tall, broad) = rows.means(level), rows.blocks(level)
        y = torch.arange(tall, device="cpu")[:, None, None] * wide + inner // wide
        x = torch.arange(broad, device="cpu")[None, :, None] * wide + inner % wide
        there = (y < down) & (x < across) & (inner < wide * wide)
        found.append(torch.where(there, before + y * across + x, count).flatten())
        before += down * across
    # from the CPU, as in `_tile_rows`
    return (torch.cat(found) if found else inner[:0]).to(device)


@functools.lru_cache(maxsize=256)
def _tile_rows(rows: Pyramid, tiles: MeanTiles, device: torch.device) -> Tensor:
    span = 2 * rows.near + 1
    j = torch.arange(span * tiles.across, device="cpu")
    if tiles.skip:
        j = j[j != rows.near * span + rows.near]
    down, right, inside = j // tiles.across - rows.near, -rows.near, j % tiles.across * tiles.length
    y, x = (torch.arange(n, device="cpu") for n in rows.cells)
    found = [j.new_zeros((len(y), len(x), 0))]
    for level in range(rows.levels):
        block_y, block_x = (y[:, None, None] >> (level + 1)) + down, (x[None, :, None] >> (level + 1)) + right
        found.append(rows.first[level] + (block_y * rows.blocks(level)[1] + block_x) * rows.block + inside)
    # from the CPU, so that nothing kept here is of the memory of a CUDA graph that is being captured
    return fixed(torch.cat(found, 2).flatten(0, 1).int().to(device))


@dataclass(frozen=True)
class Sized:
    """Tensors and numbers that a launch is planned for; see `planned`."""

    tensors: tuple[Any, ...]
    numbers: tuple[Any, ...]

    @property
    def key(self) -> tuple[Any, ...]:
        """All that a launch depends on but the values of tensors."""
        return *self.numbers, *[None if t is None else (t.device, layout(t)) for t in self.tensors]
