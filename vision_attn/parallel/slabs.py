"""Multipole attention over processes that hold whole rows of cells, in Triton and without gradients.

As `multipole.py`, in fewer launches. While the exact cells of others are under way the tokens outside the grid attend.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vision_attn.grid import Grid
from vision_attn.kernels.multipole import Cells, slab_reasons
from vision_attn.kernels.multipole.op import slab_attention
from vision_attn.kernels.multipole.pyramid import pyramid
from vision_attn.parallel.local import Halo, Slab
from vision_attn.parallel.outside import Outside
from vision_attn.parallel.ranks import Ranks
from vision_attn.parallel.transfers import apart, as_rows, gather, transfer

_LONGEST = 256  # tokens of a tile of the sequence


def fits_slabs(q: Tensor, ranks: Ranks, cells: Cells, backend: str) -> bool:
    """Whether every process holds an even number of rows of cells, and the kernels run; all answer the same."""
    tensors = (q, cells.mass, cells.weights)
    if any(t is not None and t.requires_grad for t in tensors) and torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling() or cells.group > 1 or backend not in ("auto", "triton"):
        return False
    block = 2 * cells.cell * ranks.grid.width
    if any(cut % block for cut in ranks.image[:-1]) or len(set(ranks.image)) != len(ranks.image):
        return False
    sizes = (_size_of(ranks, cells, rank) for rank in range(ranks.size))
    if not all(pyramid(size).levels for size in sizes):
        return False
    return not slab_reasons(q, Grid(ranks.grid.height, ranks.grid.width), cells, backend == "auto")


def slab_attention_over(
    q: Tensor, k: Tensor, v: Tensor, ranks: Ranks, cells: Cells, slabs: list[Slab], *, mask: Tensor | None,
    scale: float,
) -> Tensor:  # fmt: skip
    """Do what `multipole_attention_over` does; `slabs` are the rows near those of each process."""
    from vision_attn.kernels.multipole.slabs import all_means, slab_choice, slab_means  # noqa: PLC0415

    with torch.no_grad():
        outside = Outside(q, k, v, ranks, mask, scale)
        halo = Halo((k, v), slabs)
        own = [ranks.own_image(t) for t in (q, k, v)]
        weights = None if cells.weights is None else cells.weights.detach()
        means = slab_means(
            own[0], own[1], own[2], weights, _size_of(ranks, cells, ranks.rank), cells.exact, cells.spread
        )
        counts = [pyramid(_size_of(ranks, cells, rank)).finest for rank in range(ranks.size)]
        finest = gather(as_rows(*means.finest), counts, ranks, "means")
        held, own_cells = _cells_of(ranks, cells)
        count, size = (
            sum(ranks.outside),
            (ranks.grid.height, ranks.grid.width, 0, 0, cells.cell, cells.near, cells.pool),
        )
        B, _, H, D = q.shape
        tokens = count + ranks.grid.image_tokens
        queries, keys, values = (room(t, (B, tokens, H, D), count, cells) for t in own)
        first, stop = ranks.span()
        demand = None
        if means.keys is None or means.queries is None:
            chosen = torch.empty((B, H, sum(held), 0), dtype=torch.int32, device=q.device)
        else:
            parts = list(means.keys)
            every = apart(gather(as_rows(*parts), held, ranks, "bounds").wait(), parts)
            chosen = slab_choice(means.queries, torch.stack(every), size, own_cells[0], cells.exact, scale)
            if not ranks.gathers:
                demand = _Demand(chosen, ranks, cells, slabs)
        for whole, part in zip((queries, keys, values), own, strict=True):
            whole[:, count + first : count + stop] = part
        if demand is not None:
            demand.begin(own[1], own[2])
        outside.wait()
        halo.place((keys, values), count)
        keys[:, :count], values[:, :count] = outside.k, outside.v
        every_mean = all_means(apart(finest.wait(), means.finest), size)
        if demand is not None:
            demand.place(keys, values, count)
        cells = replace(cells, chosen=chosen, mass=None if cells.mass is None else cells.mass.detach())
        grid = Grid(ranks.grid.height, ranks.grid.width, prefix=count)
        o = slab_attention(
            queries, keys, values, grid, cells, every_mean, ranks.rows(unit=cells.cell), outside.mask, scale
        )
        return ranks.together(outside.rows(), o[:, count + first : count + stop])


def room(like: Tensor, shape: Sequence[int], outside: int, cells: Cells) -> Tensor:
    """Return memory for tokens `[B, N, H, D]`, of which only those that some query meets will be filled.

    A kernel's tile can reach beyond the tokens outside the grid or a cell. It gives no weight to what is there, but
    zero times NaN is NaN: such tokens are zero from the start.

    Args:
        like: A tensor of their device and dtype.
        shape: B, N, H, D.
        outside: How many come before the grid.
        cells: Sides of cells.
    """
    if cells.cell & (cells.cell - 1):  # tiles are powers of two
        return like.new_zeros(shape)
    whole = like.new_empty(shape)
    if outside % _LONGEST:
        whole[:, outside : outside + _LONGEST] = 0
    return whole


def _size_of(ranks: Ranks, cells: Cells, rank: int) -> tuple[int, ...]:
    """Return height and width of what a process holds, 0, 0, cell, near, pool."""
    first, stop = ranks.rows(rank)
    return stop - first, ranks.grid.width, 0, 0, cells.cell, cells.near, cells.pool


def _cells_of(ranks: Ranks, cells: Cells) -> tuple[list[int], tuple[int, int]]:
    """Return how many cells each process holds, and first and last + 1 of the own ones."""
    columns = -(-ranks.grid.width // cells.cell)
    rows = [ranks.rows(rank, cells.cell) for rank in range(ranks.size)]
    first, stop = rows[ranks.rank]
    return [(b - a) * columns for a, b in rows], (first * columns, stop * columns)


@functools.lru_cache(maxsize=64)
def _tables(
    held: tuple[int, ...],
    rank: int,
    spans: tuple[tuple[int, int], ...],
    columns: int,
    entries: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What does not depend on the choice: see `_Demand`.

    Args:
        held: Cells of each process.
        rank: This process.
        spans: First and last + 1 row of cells that each process gets with its halo.
        columns: Cells in a row.
        entries: Batch entries times heads.
        device: Where the tables go.

    Returns:
        Which of the own cells lie beyond each process's halo, bool `[processes, own]`; which of all cells lie beyond
        the own one, bool `[cells]`; the codes of `listed`, those of the own cells for each process first; where each
        process's flags end.
    """
    begins = [sum(held[:n]) for n in range(len(held) + 1)]
    row = torch.arange(begins[-1], device="cpu") // columns
    beyond = torch.stack([(row < a) | (row >= b) for a, b in spans])  # [processes, cells]
    for each, (a, b) in enumerate(itertools.pairwise(begins)):
        beyond[each, a:b] = False
    own = held[rank]
    give = torch.arange(entries * own, device="cpu").repeat(len(held))
    cell = torch.arange(entries, device="cpu")[:, None] * begins[-1] + torch.arange(
        begins[-1], device="cpu"
    )  # [entries, cells]
    take = torch.cat([cell[:, a:b].flatten() for a, b in itertools.pairwise(begins)])
    ends = [entries * own * (n + 1) for n in range(len(held))]
    ends += [ends[-1] + entries * b for b in begins[1:]]
    found = (
        beyond[:, begins[rank] : begins[rank + 1]],
        beyond[rank],
        torch.cat([give, take]),
        torch.tensor(ends, device="cpu") - 1,
    )
    return found[0].to(device), found[1].to(device), found[2].to(device), found[3].to(device)


class _Demand:
    """The exact cells that lie on other processes, head by head.

    Every process learns who wants which cell. How many travel between two processes is what the host reads, once.

    Args:
        chosen: Exact cells of the own cells, int32 `[B, H, C, exact]`.
        ranks: Who holds what.
        cells: Sides of cells.
        slabs: The rows near those of each process, which travel anyway.
    """

    def __init__(self, chosen: Tensor, ranks: Ranks, cells: Cells, slabs: list[Slab]) -> None:
        B, H, C, _ = chosen.shape
        held, own = _cells_of(ranks, cells)
        self.ranks, self.cells = ranks, cells
        side = cells.cell
        spans = tuple((slab.first // side, -(-slab.stop // side)) for slab in slabs)
        columns = -(-ranks.grid.width // side)
        beyond, further, codes, ends = _tables(tuple(held), ranks.rank, spans, columns, B * H, chosen.device)
        wanted = torch.zeros((B, H, C + 1), dtype=torch.uint8, device=chosen.device)
        wanted.scatter_(2, chosen[:, :, own[0] : own[1]].flatten(2).long(), 1)
        wanted = wanted[..., :C].reshape(1, -1)
        maps = gather(wanted, [1] * ranks.size, ranks, "wanted cells").wait().view(ranks.size, B * H, C)
        give = maps[:, :, own[0] : own[1]].bool() & beyond[:, None]
        take = (wanted.view(B * H, C).bool() & further).split(held, 1)
        from vision_attn.kernels.multipole.slabs import listed  # noqa: PLC0415

        self._list, count = listed(torch.cat([give.flatten(), *(part.flatten() for part in take)]), codes)
        self._ends = count[ends].to("cpu", non_blocking=True)
        self._ready = torch.cuda.Event() if count.is_cuda else None
        if self._ready is not None:
            self._ready.record()

    def begin(self, k: Tensor, v: Tensor) -> None:
        """Send the own keys and values `[B, n, H, D]` that others want."""
        from vision_attn.kernels.multipole.slabs import pack_cells  # noqa: PLC0415

        if self._ready is not None:
            self._ready.synchronize()
        ends, size = [0, *self._ends.tolist()], self.ranks.size
        counts = [b - a for a, b in itertools.pairwise(ends)]
        self._split = ends[size], ends[2 * size]
        rows = pack_cells(k, v, self._list[: ends[size]], _size_of(self.ranks, self.cells, self.ranks.rank))
        self._pending = transfer(rows, counts[size:], counts[:size], self.ranks, "exact cells")

    def place(self, keys: Tensor, values: Tensor, before: int) -> None:
        """Write what comes to tokens `[B, before + height * width, H, D]`."""
        from vision_attn.kernels.multipole.slabs import unpack_cells  # noqa: PLC0415

        grid, cells = self.ranks.grid, self.cells
        size = (grid.height, grid.width, before, 0, cells.cell, cells.near, cells.pool)
        unpack_cells(self._pending.wait(), keys, values, self._list[slice(*self._split)], size)
