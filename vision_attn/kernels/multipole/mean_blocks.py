"""Where means lie for attention in 8 bits: those that the cells of one parent meet at a level, in blocks of 64 slots.

A cell meets the blocks of `pyramid.py` around its parent's own, and not that one if all of the parent's cells are near.
They are copied for each parent: then each tile of means is one piece of memory, as the tiles of tokens are. With the
usual sizes (near 1, four means a cell) eight blocks of 16 means fill two of 64 slots, where runs of them take three.
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_attn.kernels.eight_bits import SLOTS
from vision_attn.kernels.multipole.pyramid import MeanTiles, Pyramid
from vision_attn.kernels.tables import fixed, lasting


@dataclass(frozen=True)
class MeanBlocks:
    """The blocks of means of a pyramid."""

    rows: Pyramid

    @property
    def tiles(self) -> MeanTiles:
        """The blocks of a pyramid that a cell meets, in the order of their masses."""
        return MeanTiles.of(self.rows, self.rows.block)

    @property
    def tiles_of_level(self) -> int:
        """How many of them there are at each level."""
        return max(self.tiles.count // max(self.rows.levels, 1), 1)

    @property
    def width(self) -> int:
        """Means that a cell meets at a level, with those that it does not see."""
        return self.tiles_of_level * self.tiles.length

    @property
    def each(self) -> int:
        """Blocks of a parent at a level."""
        return math.ceil(self.width / SLOTS)

    @property
    def count(self) -> int:
        """Blocks of all levels."""
        return sum(math.prod(self.rows.blocks(level)) for level in range(self.rows.levels)) * self.each

    def slots(self, device: torch.device) -> Tensor:
        """Return the row of the pyramid in each slot of each block, int32 `[blocks, 64]`; -1 for none."""
        return lasting(_tables(self.rows, device)[0])

    def met(self, device: torch.device) -> Tensor:
        """Return the blocks that each cell meets, int32 `[C, levels * each]`."""
        return lasting(_tables(self.rows, device)[1])


@functools.lru_cache(maxsize=256)
def _tables(rows: Pyramid, device: torch.device) -> tuple[Tensor, Tensor]:
    blocks = MeanBlocks(rows)
    # first rows of the tiles that each cell meets, level by level
    tiles = rows.tile_rows(blocks.tiles, torch.device("cpu")).unflatten(0, rows.cells)
    tiles = tiles.unflatten(2, (-1, blocks.tiles_of_level))  # [rows, columns, levels, tiles]
    y, x = (torch.arange(n, device="cpu")[:, None] for n in rows.cells)
    slots, met, before = (
        [torch.empty(0, SLOTS, dtype=torch.int32, device="cpu")],
        [torch.empty(*rows.cells, 0, dtype=torch.int32, device="cpu")],
        0,
    )
    for level in range(rows.levels):
        (down, across), step = rows.blocks(level), 2 << level
        first = tiles[::step, ::step, level].flatten(0, 1)  # [parents, tiles], by the first cell of each parent
        found = (first[:, :, None] + torch.arange(rows.block, device="cpu")).flatten(1)
        found = torch.where((found < 0) | (found >= rows.rows), -1, found)
        slots.append(F.pad(found, (0, -found.shape[1] % SLOTS), value=-1).view(-1, SLOTS).int())
        parent = (y >> (level + 1)) * across + (x >> (level + 1)).T  # [rows, columns]
        met.append((before + parent[:, :, None] * blocks.each + torch.arange(blocks.each, device="cpu")).int())
        before += down * across * blocks.each
    # from the CPU, so that nothing kept here is of the memory of a CUDA graph that is being captured
    return fixed(torch.cat(slots).to(device)), fixed(torch.cat(met, 2).flatten(0, 1).to(device))
