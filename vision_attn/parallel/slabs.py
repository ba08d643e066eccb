"""Multipole attention over processes that hold whole rows of cells, in Triton, and its gradients.

As `multipole.py`, in fewer launches. While the exact cells of others are under way the tokens outside the grid attend.
Backward, what a process found out about tokens of others returns to these, and each adds up what it gets.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vision_attn.grid import Grid
from vision_attn.kernels.multipole import Cells, slab_reasons
from vision_attn.kernels.multipole.op import slab_attention, slab_gradients, slab_means_gradients, weight_gradient
from vision_attn.kernels.multipole.pyramid import pyramid
from vision_attn.parallel.local import Halo, Slab
from vision_attn.parallel.outside import Outside, rows_gradients, send_gradients
from vision_attn.parallel.ranks import Ranks
from vision_attn.parallel.transfers import Added, Pending, apart, as_rows, exchange_back, gather, given, transfer

_LONGEST = 256  # tokens of a tile of the sequence


def fits_slabs(q: Tensor, ranks: Ranks, cells: Cells, backend: str) -> bool:
    """Whether every process holds an even number of rows of cells, and the kernels run; all answer the same."""
    if torch.compiler.is_compiling() or cells.group > 1 or backend not in ("auto", "triton"):
        return False
    block = 2 * cells.cell * ranks.grid.width
    if any(cut % block for cut in ranks.image[:-1]) or len(set(ranks.image)) != len(ranks.image):
        return False
    sizes = (_size_of(ranks, cells, rank) for rank in range(ranks.size))
    if not all(pyramid(size).levels for size in sizes):
        return False
    return not slab_reasons(q, Grid(ranks.grid.height, ranks.grid.width), cells, backend == "auto")


@dataclass(frozen=True)
class _Task:
    """What is computed, but for the tensors.

    Args:
        ranks: Who holds what.
        cells: Sides of cells and means.
        slabs: The rows near those of each process.
        mask: Bool `[B, own tokens outside the grid]`, or None.
        scale: Factor of the logits.
    """

    ranks: Ranks
    cells: Cells
    slabs: list[Slab]
    mask: Tensor | None
    scale: float

    @property
    def count(self) -> int:
        """Tokens outside the grid."""
        return sum(self.ranks.outside)

    @property
    def grid(self) -> Grid:
        """The whole sequence as the kernels get it."""
        return Grid(self.ranks.grid.height, self.ranks.grid.width, prefix=self.count)

    @property
    def own(self) -> slice:
        """The own tokens of the grid in that sequence."""
        first, stop = self.ranks.span()
        return slice(self.count + first, self.count + stop)

    @property
    def wanted(self) -> list[tuple[int, int]]:
        """First and last + 1 of the grid's tokens that a halo brings to each process."""
        whole = 0, self.ranks.grid.image_tokens
        return [whole if self.ranks.gathers else slab.span for slab in self.slabs]


class _Made(NamedTuple):
    """What the backward needs of the forward.

    Attributes:
        keys: Those that the own queries meet, in the whole sequence `[B, N, H, D]`.
        values: Like `keys`.
        means_k: Means of keys of all levels, in the rows of `pyramid.py`.
        means_v: Means of values.
        chosen: Exact cells.
        o: The output, in the whole sequence.
        lse: Its log-sum-exp in base 2.
        mask: Of all keys outside the grid, or None.
        outside_q: All queries outside the grid.
        outside_o: The output of the own ones; outside_lse: its log-sum-exp, None if there are none.
        hidden: Which keys of the own slice are seen by tokens outside the grid, None for all.
        listed: The exact cells that travelled: see `_Demand`. None if none did.
    """

    keys: Tensor
    values: Tensor
    means_k: Tensor
    means_v: Tensor
    chosen: Tensor
    o: Tensor
    lse: Tensor
    mask: Tensor | None
    outside_q: Tensor
    outside_o: Tensor
    outside_lse: Tensor | None
    hidden: Tensor | None
    listed: Tensor | None


def slab_attention_over(
    q: Tensor, k: Tensor, v: Tensor, ranks: Ranks, cells: Cells, slabs: list[Slab], *, mask: Tensor | None,
    scale: float,
) -> Tensor:  # fmt: skip
    """Do what `multipole_attention_over` does; `slabs` are the rows near those of each process."""
    mass, weights = cells.mass, cells.weights
    task = _Task(ranks, replace(cells, mass=None, weights=None), slabs, mask, scale)
    learned = any(t is not None and t.requires_grad for t in (q, k, v, mass, weights))
    if torch.is_grad_enabled() and learned:
        found: Tensor = _Slabs.apply(q, k, v, mass, weights, task)
        return found
    with torch.no_grad():
        return _attend(q, k, v, mass, weights, task, blank=False)[0]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mass: Tensor | None, weights: Tensor | None, task: _Task, *, blank: bool
) -> tuple[Tensor, _Made, list[int]]:
    """Return the output of the own slice, what the backward needs, and how many exact cells travelled: see `_Demand`.

    Args:
        q: Queries of the own slice `[B, tokens, H, D]`.
        k: Keys, like `q`.
        v: Values, like `q`.
        mass: As in `Cells`.
        weights: As in `Cells`.
        task: All else.
        blank: Whether tokens that no query meets are zero, as gradients need it.
    """
    from vision_attn.kernels.multipole.slabs import all_means, slab_choice, slab_means  # noqa: PLC0415

    ranks, cells, slabs, count = task.ranks, task.cells, task.slabs, task.count
    outside = Outside(q, k, v, ranks, task.mask, task.scale)
    own = list(outside.image)
    halo = Halo(own[1:], slabs)
    means = slab_means(own[0], own[1], own[2], weights, _size_of(ranks, cells, ranks.rank), cells.exact, cells.spread)
    counts = [pyramid(_size_of(ranks, cells, rank)).finest for rank in range(ranks.size)]
    finest = gather(as_rows(*means.finest), counts, ranks, "means")
    held, own_cells = _cells_of(ranks, cells)
    size = _grid_of(ranks, cells)
    B, _, H, D = q.shape
    shape = B, task.grid.tokens, H, D
    queries, keys, values = (t.new_zeros(shape) if blank else room(t, shape, count, cells) for t in own)
    demand = None
    if means.keys is None or means.queries is None:
        chosen = torch.empty((B, H, sum(held), 0), dtype=torch.int32, device=q.device)
    else:
        parts = list(means.keys)
        every = apart(gather(as_rows(*parts), held, ranks, "bounds").wait(), parts)
        chosen = slab_choice(means.queries, torch.stack(every), size, own_cells[0], cells.exact, task.scale)
        if not ranks.gathers:
            demand = _Demand(chosen, ranks, cells, slabs)
    for whole, part in zip((queries, keys, values), own, strict=True):
        whole[:, task.own] = part
    if demand is not None:
        demand.begin(own[1], own[2])
    outside.wait()
    halo.place((keys, values), count)
    keys[:, :count], values[:, :count] = outside.k, outside.v
    every_mean = all_means(apart(finest.wait(), means.finest), size)
    if demand is not None:
        demand.place(keys, values, count)
    with_cells = replace(cells, chosen=chosen, mass=mass)
    o, lse = slab_attention(
        queries, keys, values, task.grid, with_cells, every_mean, ranks.rows(unit=cells.cell), outside.mask, task.scale
    )
    rows, rows_lse = outside.merged() if count else (outside.rows(), None)
    made = _Made(
        keys, values, *every_mean, chosen, o, lse, outside.mask, outside.q if count else rows, rows, rows_lse,
        outside.own_mask(), None if demand is None else demand.listed,
    )  # fmt: skip
    return ranks.together(rows, o[:, task.own]), made, [] if demand is None else demand.ends


class _Slabs(torch.autograd.Function):
    """The attention and its gradients, one transfer for each that the forward has."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mass: Tensor | None, weights: Tensor | None, task: _Task
    ) -> Tensor:
        o, made, ctx.ends = _attend(q, k, v, mass, weights, task, blank=True)
        ctx.save_for_backward(q, k, v, mass, weights, *made)
        ctx.task = replace(task, mask=None)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mass, weights, *saved = ctx.saved_tensors
        return *_gradients(do, (q, k, v), (mass, weights), _Made(*saved), ctx.task, ctx.ends), None


def _gradients(
    do: Tensor, own: tuple[Tensor, Tensor, Tensor], learned: tuple[Tensor | None, Tensor | None], made: _Made,
    task: _Task, ends: list[int],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Return the gradients of q, k and v of the own slice, of the masses and of the weights: this process's part."""
    (q, k, v), (mass, weights) = own, learned
    ranks, count, cells, grid = task.ranks, task.count, task.cells, _grid_of(task.ranks, task.cells)
    sent = None
    if made.outside_lse is not None:
        sent = send_gradients(ranks.own_outside(do), made.outside_o, made.outside_lse, ranks)
    queries, whole = (t.new_zeros(made.keys.shape) for t in (q, do))
    queries[:, task.own], whole[:, task.own] = ranks.own_image(q), ranks.own_image(do)
    dq, dk, dv, d_means_k, d_means_v, d_mass = slab_gradients(
        whole, (made.o, made.lse), (queries, made.keys, made.values), (made.means_k, made.means_v), task.grid,
        replace(cells, chosen=made.chosen, mass=mass), ranks.rows(unit=cells.cell), made.mask, task.scale,
    )  # fmt: skip
    d_means = Added(torch.stack([d_means_k, d_means_v]), ranks, "means")
    halo = exchange_back((dk[:, count:], dv[:, count:]), task.wanted, ranks, "halo")
    exact = None
    if made.listed is not None:
        exact = _send_back(dk[:, count:], dv[:, count:], made.listed, ends, ranks, cells)
    dk_own, dv_own = dk[:, task.own], dv[:, task.own]
    rows = [t[:, :0] for t in (dq, dk, dv)]
    slice_k = slice_v = None
    if sent is not None:
        dq_rows, slice_k, slice_v = rows_gradients(sent, made.outside_q, k, v, made.hidden, ranks, task.scale)
        held = ranks.outside[ranks.rank]
        pending = transfer(
            as_rows(dq_rows, dk[:, :count], dv[:, :count]), [held] * ranks.size, ranks.outside, ranks, "outside"
        )
        parts = pending.wait().unflatten(0, (ranks.size, held))
        rows = apart(parts.sum(0, dtype=torch.promote_types(dq.dtype, torch.float32)).to(dq.dtype), rows)
    image = slice(ranks.span()[0], ranks.span()[1])
    of_means = [t[:, image] for t in slab_means_gradients(d_means.wait(), weights, grid)]
    d_weights = None
    if weights is not None:
        pairs = list(zip((ranks.own_image(k), ranks.own_image(v)), of_means, strict=True))
        d_weights = weight_gradient(pairs, weights, _size_of(ranks, cells, ranks.rank))
    dk_own, dv_own = dk_own + of_means[0], dv_own + of_means[1]
    first = 0
    back = apart(halo.wait(), (dk, dv))
    for _, (a, b) in given(task.wanted, ranks):
        for t, part in zip((dk_own, dv_own), back, strict=True):
            t[:, a - image.start : b - image.start] += part[:, first : first + b - a]
        first += b - a
    if exact is not None and made.listed is not None:
        _add_cells(exact.wait(), (dk_own, dv_own), made.listed, ends, ranks, cells)
    found = [ranks.together(rest, t) for rest, t in zip(rows, (dq[:, task.own], dk_own, dv_own), strict=True)]
    if slice_k is not None and slice_v is not None:
        found = [found[0], found[1] + slice_k, found[2] + slice_v]
    return *found, None if mass is None else d_mass, d_weights


def _grid_of(ranks: Ranks, cells: Cells) -> tuple[int, ...]:
    """Return height and width of the grid, 0, 0, cell, near, pool."""
    return ranks.grid.height, ranks.grid.width, 0, 0, cells.cell, cells.near, cells.pool


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

        self.listed, count = listed(torch.cat([give.flatten(), *(part.flatten() for part in take)]), codes)
        self._ends = count[ends].to("cpu", non_blocking=True)
        self._ready = torch.cuda.Event() if count.is_cuda else None
        if self._ready is not None:
            self._ready.record()

    @property
    def ends(self) -> list[int]:
        """Where the cells for each process end in `listed`, and after them those from each process."""
        return self._ends.tolist()

    def begin(self, k: Tensor, v: Tensor) -> None:
        """Send the own keys and values `[B, n, H, D]` that others want."""
        from vision_attn.kernels.multipole.slabs import pack_cells  # noqa: PLC0415

        if self._ready is not None:
            self._ready.synchronize()
        give, take, self._split = _counts(self.ends, self.ranks.size)
        rows = pack_cells(k, v, self.listed[: self._split.start], _size_of(self.ranks, self.cells, self.ranks.rank))
        self._pending = transfer(rows, take, give, self.ranks, "exact cells")

    def place(self, keys: Tensor, values: Tensor, before: int) -> None:
        """Write what comes to tokens `[B, before + height * width, H, D]`."""
        from vision_attn.kernels.multipole.slabs import unpack_cells  # noqa: PLC0415

        grid, cells = self.ranks.grid, self.cells
        size = (grid.height, grid.width, before, 0, cells.cell, cells.near, cells.pool)
        unpack_cells(self._pending.wait(), keys, values, self.listed[self._split], size)


def _counts(ends: list[int], size: int) -> tuple[list[int], list[int], slice]:
    """Return how many exact cells go to each process and come from each, and where the latter are listed."""
    counts = [b - a for a, b in itertools.pairwise([0, *ends])]
    return counts[:size], counts[size:], slice(ends[size - 1], ends[-1])


def _send_back(dk: Tensor, dv: Tensor, listed: Tensor, ends: list[int], ranks: Ranks, cells: Cells) -> Pending:
    """Begin to send the gradients of exact cells `[B, height * width, H, D]` to those who hold these."""
    from vision_attn.kernels.multipole.slabs import pack_cells  # noqa: PLC0415

    gave, took, theirs = _counts(ends, ranks.size)
    rows = pack_cells(dk, dv, listed[theirs], _grid_of(ranks, cells))
    return transfer(rows, gave, took, ranks, "exact cells")


def _add_cells(
    rows: Tensor, to: tuple[Tensor, Tensor], listed: Tensor, ends: list[int], ranks: Ranks, cells: Cells
) -> None:
    """Add gradients of own cells, as of `_send_back`, to tensors of the own tokens, one process after another."""
    from vision_attn.kernels.multipole.slabs import pack_cells, unpack_cells  # noqa: PLC0415

    size = _size_of(ranks, cells, ranks.rank)
    for a, b in itertools.pairwise([0, *ends[: ranks.size]]):
        if b > a:
            held = pack_cells(*to, listed[a:b], size)
            unpack_cells(held + rows[a:b], *to, listed[a:b], size)
