"""Multipole attention over processes: near rows, the finest means of all, and the exact cells that somebody chose.

Every process builds the same pyramid of means. Its own queries meet near tokens, which a halo brings, and the tokens of
the cells that they choose: those that lie elsewhere are asked for, head by head. So a process has room for the keys of
the whole grid, of which it fills what its own queries meet.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from vision_attn.grid import Grid
from vision_attn.kernels.dense import dense_attention, full_mask
from vision_attn.kernels.multipole import Cells, part_attention
from vision_attn.kernels.multipole.cells import cell_means, choose_for, levels_of
from vision_attn.parallel.local import Halo, Slab
from vision_attn.parallel.outside import Outside
from vision_attn.parallel.ranks import Ranks, refuse_precision
from vision_attn.parallel.slabs import fits_slabs, room, slab_attention_over
from vision_attn.parallel.sums import CellSums, cell_counts, own_cells, own_image, squares
from vision_attn.parallel.transfers import gather, transfer


def multipole_attention_over(
    q: Tensor, k: Tensor, v: Tensor, ranks: Ranks, cells: Cells, *, mask: Tensor | None, scale: float | None,
    backend: str,
) -> Tensor:  # fmt: skip
    """Attend as `multipole_attention` does on the whole sequence, from the tokens of the own slice.

    Args:
        q: Queries of the own slice `[B, tokens, H, D]`.
        k: Keys, like `q`.
        v: Values, like `q`.
        ranks: Who holds what.
        cells: Sides of cells and means, and what was learned of them; `chosen` must be None.
        mask: Bool `[B, own tokens outside the grid]`, False for padding keys; None on all processes or on none.
        scale: Factor of the logits, `D ** -0.5` if None.
        backend: How the operators run.

    Returns:
        `[B, tokens, H, D]`.

    Raises:
        ValueError: If the cells have a precision.
    """
    refuse_precision(cells.precision)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    slabs = [near_slab(ranks, cells, rank) for rank in range(ranks.size)]
    if not cells.covers(ranks.grid) and fits_slabs(q, ranks, cells, backend):
        return slab_attention_over(q, k, v, ranks, cells, slabs, mask=mask, scale=scale)
    outside = Outside(q, k, v, ranks, mask, scale)
    if cells.covers(ranks.grid):
        return _dense(ranks, outside, scale)
    own = list(outside.image)
    means = _Means(own, ranks, cells)
    halo = Halo(own[1:], slabs)
    outside.wait()
    means_k, means_v, chosen = means.wait(scale)
    n, begin = ranks.grid.image_tokens, slabs[ranks.rank].span[0]
    blank = torch.is_grad_enabled() or not q.is_cuda  # PyTorch's implementation reads all, and gradients

    def placed(parts: dict[int, Tensor]) -> Tensor:
        shape = (q.shape[0], outside.count + n, *q.shape[2:])
        whole = q.new_zeros(shape) if blank else room(q, shape, outside.count, cells)
        for first, part in parts.items():
            whole[:, first : first + part.shape[1]] = part
        return whole

    keys, values = (
        placed({0: shared, outside.count + begin: near})
        for shared, near in zip((outside.k, outside.v), halo.wait(), strict=True)
    )
    if cells.exact and not ranks.gathers:
        demand = _Demand(chosen, ranks, cells)
        keys, values = demand.filled(own[1:], [keys, values], outside.count)
    first, stop = ranks.span()
    queries = placed({0: torch.zeros_like(outside.k), outside.count + first: own[0]})
    o = part_attention(
        queries, keys, values, Grid(ranks.grid.height, ranks.grid.width, prefix=outside.count),
        replace(cells, chosen=chosen), (means_k, means_v), ranks.rows(unit=cells.cell), mask=outside.mask, scale=scale,
        backend=backend,
    )  # fmt: skip
    return ranks.together(outside.rows(), o[:, first:stop])


def near_slab(ranks: Ranks, cells: Cells, rank: int) -> Slab:
    """Return the rows of the cells near those that a slice touches."""
    first, stop = ranks.rows(rank, cells.cell)
    if stop == first:
        return Slab(ranks, min(first * cells.cell, ranks.grid.height), min(first * cells.cell, ranks.grid.height))
    low, high = (first - cells.near) * cells.cell, (stop + cells.near) * cells.cell
    return Slab(ranks, max(low, 0), min(high, ranks.grid.height))


def _dense(ranks: Ranks, outside: Outside, scale: float) -> Tensor:
    """Attend densely, where the neighbourhood of every query is the whole grid."""
    whole = [Slab(ranks, 0, ranks.grid.height)] * ranks.size
    halo = Halo(outside.image[1:], whole)
    outside.wait()
    keys, values = (torch.cat(pair, 1) for pair in zip((outside.k, outside.v), halo.wait(), strict=True))
    mask = full_mask(outside.mask, Grid(ranks.grid.height, ranks.grid.width, prefix=outside.count))
    return ranks.together(outside.rows(), dense_attention(outside.image[0], keys, values, mask=mask, scale=scale))


class _Means:
    """Means of all levels and the choice of exact cells; finest means and bounds are under way when this is made.

    Args:
        own: Queries, keys and values of the own tokens of the grid.
        ranks: Who holds what.
        cells: As for `multipole_attention_over`.
    """

    def __init__(self, own: list[Tensor], ranks: Ranks, cells: Cells) -> None:
        q, k, v = own
        self.ranks, self.cells, self.dtype = ranks, cells, k.dtype
        self.grid = Grid(ranks.grid.height, ranks.grid.width)
        wide = torch.promote_types(k.dtype, torch.float32)
        self.count = cell_counts(self.grid, cells.pool, k.device, wide)
        weights = None if cells.weights is None else cells.weights.to(k.device, wide).exp()
        parts = [self._shares(t, weights).to(t.dtype) for t in (k, v)]
        self._finest = CellSums(parts, cells.pool, ranks, "means")
        self._bounds: CellSums | None = None
        self._queries: CellSums | Tensor | None = None
        if cells.exact:
            with torch.no_grad():
                if cells.spread:
                    parts = [-self._most(k, torch.amin), self._most(k, torch.amax)]
                    self._bounds = CellSums(parts, cells.cell, ranks, "bounds")
                first, stop = ranks.rows(unit=cells.cell)
                mean_q = own_cells(q, cells.cell, ranks, wide)
                mean_q = mean_q / cell_counts(self.grid, cells.cell, k.device, wide)[:, first:stop]
                row = ranks.grid.width * cells.cell
                cut = any(first % row for first in ranks.image[1:-1])
                self._queries = CellSums([mean_q], cells.cell, ranks, "mean queries") if cut else mean_q

    def _shares(self, t: Tensor, weights: Tensor | None) -> Tensor:
        """Return the own tokens' shares of the finest means that they touch."""
        pool = self.cells.pool
        first, stop = self.ranks.rows(unit=pool)
        if weights is None:
            return own_cells(t, pool, self.ranks, self.count.dtype) / self.count[:, first:stop]
        image = squares(
            own_image(t.to(self.count.dtype), pool, self.ranks), pool
        )  # [B, rows, pool, columns, pool, H, D]
        sums = torch.einsum("byixjhd,ij->byxhd", image, weights)
        return sums / _weight_sums(self.grid, weights)[:, first:stop]

    def _most(self, k: Tensor, most: Callable[..., Tensor]) -> Tensor:
        cell, fill = self.cells.cell, -torch.inf if most is torch.amax else torch.inf
        return most(squares(own_image(k, cell, self.ranks, fill), cell), (2, 4))

    def wait(self, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return the means of keys and of values `[B, M, H, D]`, and the exact cells of the own cells."""
        cells, ranks = self.cells, self.ranks
        finest_k, finest_v = self._finest.wait()
        layout = cells.layout(self.grid, finest_k.device)
        wide = self.count.dtype
        sums_k, sums_v = (t.to(wide) * self.count for t in (finest_k, finest_v))
        levels = len(layout.sides)
        means = [levels_of(t, self.count, levels).to(self.dtype) for t in (sums_k, sums_v)]
        C, (B, _, _, H, _) = layout.near.shape[0], sums_k.shape
        first, stop = ranks.rows(unit=cells.cell)
        part = slice(first * layout.size[1], stop * layout.size[1])
        chosen = torch.full((B, H, C, cells.exact), C, device=finest_k.device)
        if cells.exact:
            with torch.no_grad():
                queries = self._queries
                if isinstance(queries, CellSums):
                    queries = queries.wait()[0][:, first:stop]
                assert queries is not None
                bounds = None
                if self._bounds is not None:
                    low, high = (t.to(wide).flatten(1, 2).transpose(1, 2) for t in self._bounds.largest())
                    bounds = -low, high
                mean_q = queries.flatten(1, 2).transpose(1, 2) * scale
                keys = cell_means(sums_k, self.count, cells)
                chosen[:, :, part] = choose_for(mean_q, keys, bounds, layout, cells, part)
        return means[0], means[1], chosen


def _weight_sums(grid: Grid, weights: Tensor) -> Tensor:
    """Return the sum of the weights of each finest mean's tokens `[1, rows, columns, 1, 1]`."""
    sides = []
    for length in (grid.height, grid.width):
        there = torch.arange(-(-length // weights.shape[0]) * weights.shape[0], device=weights.device) < length
        sides.append(there.to(weights.dtype).unflatten(0, (-1, weights.shape[0])))
    return torch.einsum("yi,xj,ij->yx", *sides, weights)[None, :, :, None, None]


class _Demand:
    """The tokens of exact cells that lie on other processes, head by head.

    Who wants which cell is a map of bits that all processes get; how many tokens travel between two processes follows
    from it, and is the one number that the host reads.

    Args:
        chosen: Exact cells `[B, H, C, exact]`, C for none.
        ranks: Who holds what.
        cells: As for `multipole_attention_over`.
    """

    def __init__(self, chosen: Tensor, ranks: Ranks, cells: Cells) -> None:
        B, H, C, _ = chosen.shape
        self.ranks = ranks
        wanted = torch.zeros(B, H, C + 1, dtype=torch.uint8, device=chosen.device)
        wanted = wanted.scatter_(2, chosen.flatten(2), 1)[..., :C]
        maps = gather(wanted.reshape(1, -1), [1] * ranks.size, ranks, "wanted cells").wait()
        maps = maps.view(ranks.size, B, H, C).bool()
        token = torch.arange(ranks.grid.image_tokens, device=chosen.device)
        columns = -(-ranks.grid.width // cells.cell)
        cell = token // ranks.grid.width // cells.cell * columns + token % ranks.grid.width // cells.cell
        first, stop = ranks.span()
        give, take = [], []
        for rank in range(ranks.size):
            if rank == ranks.rank:
                none = wanted.new_zeros((B, H, 0), dtype=torch.bool)
                give.append(none)
                take.append(none)
                continue
            begin, end = near_slab(ranks, cells, rank).span
            beyond = (token[first:stop] < begin) | (token[first:stop] >= end)
            give.append(maps[rank][:, :, cell[first:stop]] & beyond)
            begin, end = near_slab(ranks, cells, ranks.rank).span
            theirs = token[slice(*ranks.span(rank))]
            take.append(wanted[:, :, cell[theirs]].bool() & ((theirs < begin) | (theirs >= end)))
        counts = torch.stack([t.sum() for t in (*give, *take)]).tolist()
        self.give, self.take = counts[: ranks.size], counts[ranks.size :]
        self._sources = torch.cat([_places(t, n, stop - first, 0) for t, n in zip(give, self.give, strict=True)])
        self._take = take

    def filled(self, own: list[Tensor], whole: list[Tensor], before: int) -> list[Tensor]:
        """Fetch the tokens that are wanted.

        Args:
            own: Own tokens of the grid `[B, n, H, D]`.
            whole: Tokens `[B, before + height * width, H, D]`, which are written to.
            before: Tokens before the grid.
        """
        tokens, ranks = whole[0].shape[1], self.ranks
        targets = torch.cat(
            [
                _places(t, count, tokens, before + ranks.span(rank)[0])
                for rank, (t, count) in enumerate(zip(self._take, self.take, strict=True))
            ]
        )
        rows = torch.stack([t.reshape(-1, t.shape[-1])[self._sources] for t in own], 1)
        rows = transfer(rows, self.take, self.give, ranks, "exact cells").wait()
        found = []
        for t, new in zip(whole, rows.unbind(1), strict=True):
            found.append(t.flatten(0, 2).index_copy_(0, targets, new).view_as(t))
        return found


def _places(wanted: Tensor, count: int, tokens: int, first: int) -> Tensor:
    """Return the rows of `[B * tokens * H, D]` that are True in `[B, H, n]`, whose first token is `first`."""
    _, H, n = wanted.shape
    flat = wanted.flatten()
    place = torch.where(flat, flat.cumsum(0) - 1, count)  # `nonzero` would wait for the GPU
    index = place.new_empty(count + 1).scatter_(0, place, torch.arange(len(flat), device=flat.device))[:count]
    b, h = index // (H * n), index // max(n, 1) % H
    return (b * tokens + first + index % max(n, 1)) * H + h
