"""Sums that all processes share: totals of small tensors, and sums over the cells that slices of the grid cut."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_attn.grid import Grid
from vision_attn.parallel.ranks import Ranks
from vision_attn.parallel.transfers import Pending, gather


class Total:
    """The sum of a tensor over all processes, which is under way when this is made.

    Each process gets the parts of all and adds them in one order: all have the same sum, bit by bit. The parts are
    states and agents, whose size does not depend on the number of tokens ('LASP-2' - https://arxiv.org/abs/2502.07563).
    """

    def __init__(self, part: Tensor, ranks: Ranks, what: str) -> None:
        self._shape = part.shape
        self._pending = gather(part.reshape(1, -1), [1] * ranks.size, ranks, what)

    def wait(self) -> Tensor:
        """Return the sum."""
        return self._pending.wait().sum(0).view(self._shape)

    def parts(self) -> Tensor:
        """Return the parts of all processes `[processes, ...]`."""
        return self._pending.wait().unflatten(1, self._shape)


class CellSums:
    """Sums over the cells of the grid, which are under way when this is made.

    Args:
        parts: The own tokens' share of the sums over the cells that the own slice touches, as of `own_cells`; they have
            one shape.
        cell: Side of a cell in tokens.
        ranks: Who holds what.
        what: What they are.
    """

    def __init__(self, parts: "list[Tensor]", cell: int, ranks: Ranks, what: str) -> None:
        columns = -(-ranks.grid.width // cell)
        spans = [ranks.rows(rank, cell) for rank in range(ranks.size)]
        counts = [(stop - first) * columns for first, stop in spans]
        self._size = -(-ranks.grid.height // cell), columns
        self._spans, self._counts = spans, counts
        rows = torch.stack([part.flatten(1, 2).transpose(0, 1) for part in parts], 1)  # [cells, parts, B, H, D]
        self._pending: Pending = gather(rows, counts, ranks, what)

    @property
    def _apart(self) -> bool:
        """Whether no cell is cut by the end of a slice."""
        return sum(self._counts) == self._size[0] * self._size[1]

    def _index(self, device: torch.device) -> Tensor:
        columns = self._size[1]
        return torch.cat([torch.arange(a * columns, b * columns, device=device) for a, b in self._spans])

    def wait(self) -> "list[Tensor]":
        """Return the sums `[B, rows, columns, H, D]`, in the order of `parts`."""
        rows = self._pending.wait()
        if not self._apart:
            whole = rows.new_zeros((self._size[0] * self._size[1], *rows.shape[1:]))
            rows = whole.index_add(0, self._index(rows.device), rows)
        return [t.transpose(0, 1).unflatten(1, self._size) for t in rows.unbind(1)]

    def largest(self) -> "list[Tensor]":
        """Return the largest of the shares instead of their sums. It has no gradient."""
        rows = self._pending.wait()
        if not self._apart:
            whole = rows.new_full((self._size[0] * self._size[1], *rows.shape[1:]), -torch.inf)
            for index, part in zip(self._index(rows.device).split(self._counts), rows.split(self._counts), strict=True):
                whole[index] = torch.maximum(whole[index], part)
            rows = whole
        return [t.transpose(0, 1).unflatten(1, self._size) for t in rows.unbind(1)]


def own_image(t: Tensor, cell: int, ranks: Ranks, fill: float = 0.0) -> Tensor:
    """Lay the own tokens of the grid out as an image of the cells that they touch.

    Args:
        t: Own tokens of the grid `[B, n, H, D]`.
        cell: Side of a cell in tokens.
        ranks: Who holds what.
        fill: The value of all other tokens.

    Returns:
        `[B, rows, columns, H, D]` with sides that `cell` divides.
    """
    width = ranks.grid.width
    first, stop = ranks.rows(unit=cell)
    begin, end = ranks.span()
    rows = (stop - first) * cell
    before = begin - first * cell * width if rows else 0
    after = rows * width - before - (end - begin)
    t = F.pad(t, (0, 0, 0, 0, before, after), value=fill) if before or after else t  # a pad of nothing copies
    image = t.unflatten(1, (rows, width))
    return F.pad(image, (0, 0, 0, 0, 0, -width % cell), value=fill) if width % cell else image


def own_cells(t: Tensor, cell: int, ranks: Ranks, dtype: torch.dtype) -> Tensor:
    """Return the own tokens' share of the sums over the cells that they touch, `[B, rows, columns, H, D]`."""
    return squares(own_image(t, cell, ranks), cell).sum((2, 4), dtype=dtype)


def squares(image: Tensor, side: int) -> Tensor:
    """Cut `[B, height, width, H, D]` into squares: `[B, rows, side, columns, side, H, D]`."""
    return image.unflatten(2, (image.shape[2] // side, side)).unflatten(1, (image.shape[1] // side, side))


def cell_counts(grid: Grid, cell: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return how many tokens each cell of a grid has, `[1, rows, columns, 1, 1]`."""
    sides = []
    for length in (grid.height, grid.width):
        first = torch.arange(0, length, cell, device=device)
        sides.append((first + cell).clamp(max=length) - first)
    return (sides[0][:, None] * sides[1]).to(dtype)[None, :, :, None, None]
