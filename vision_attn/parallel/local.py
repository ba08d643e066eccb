"""Local attention over processes: each gets the rows around its own, and attends on that slab of the grid.

For the own queries a slab that holds all rows of their windows is as good as the grid: a window is cut or moved by the
grid's border only, and there the slab ends with the grid.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_attn.grid import Grid
from vision_attn.kernels.local import Window, local_attention
from vision_attn.kernels.local.plain import window_start
from vision_attn.kernels.local.portable import HIDDEN, grid_attention
from vision_attn.parallel.outside import Outside
from vision_attn.parallel.ranks import Ranks, refuse_precision
from vision_attn.parallel.transfers import Pending, apart, exchange


@dataclass(frozen=True)
class Slab:
    """Some rows of the grid, which hold the own tokens and all that these meet.

    Args:
        ranks: Who holds what.
        first: First row.
        stop: Row after the last.
    """

    ranks: Ranks
    first: int
    stop: int

    @property
    def grid(self) -> Grid:
        """The rows as a grid of their own."""
        return Grid(self.stop - self.first, self.ranks.grid.width)

    @property
    def span(self) -> tuple[int, int]:
        """First and last + 1 of its tokens."""
        return self.first * self.ranks.grid.width, self.stop * self.ranks.grid.width

    def around(self, t: Tensor) -> Tensor:
        """Put own tokens `[B, n, H, D]` in their places, with zeros around them."""
        if self.first == self.stop:
            return t  # this process holds no token of the grid
        (first, stop), (own_first, own_stop) = self.span, self.ranks.span()
        return F.pad(t, (0, 0, 0, 0, own_first - first, stop - own_stop))

    def filled(self, t: Tensor, others: Tensor) -> Tensor:
        """Put own tokens and those of others in their places."""
        before = self.ranks.span()[0] - self.span[0] if self.first < self.stop else 0
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return torch.cat([others[:, :before], t, others[:, before:]], 1)
        n, more = t.shape[1], others.shape[1]  # `cat` copies a few bytes at a time where one tensor has gaps
        whole = t.new_empty((t.shape[0], n + more, *t.shape[2:]))
        whole[:, :before], whole[:, before : before + n], whole[:, before + n :] = (
            others[:, :before],
            t,
            others[:, before:],
        )
        return whole

    def own(self, t: Tensor) -> Tensor:
        """Return the own tokens of the slab's `[B, tokens, H, D]`."""
        first = self.ranks.span()[0] - self.span[0]
        return t[:, first : first + self.ranks.count(self.ranks.image)]


class Halo:
    """The own tokens and those around them, which are under way when this is made.

    Args:
        tensors: Keys, values and what else is wanted of the own tokens of the grid, each `[B, n, H, D]`; the channels
            may differ.
        slabs: The slab that each process attends on.
        what: What they are, for the count of bytes.
    """

    def __init__(self, tensors: Sequence[Tensor], slabs: Sequence[Slab], what: str = "halo") -> None:
        ranks = slabs[0].ranks
        self._own = list(tensors)
        self._slab, self._whole = slabs[ranks.rank], Slab(ranks, 0, ranks.grid.height)
        wanted = [self._whole.span if ranks.gathers else slab.span for slab in slabs]
        self._pending: Pending = exchange(self._own, wanted, ranks, what)

    def place(self, whole: Sequence[Tensor], before: int) -> None:
        """Write the tokens of others to tensors of the whole grid `[B, before + height * width, H, D]`."""
        held = self._whole if self._slab.ranks.gathers else self._slab
        (begin, end), (first, stop) = held.span, held.ranks.span()
        for t, other in zip(whole, apart(self._pending.wait(), self._own), strict=True):
            t[:, before + begin : before + first] = other[:, : first - begin]
            t[:, before + stop : before + end] = other[:, first - begin :]

    def wait(self) -> list[Tensor]:
        """Return the slab's tokens `[B, tokens, H, D]` of each tensor."""
        others = apart(self._pending.wait(), self._own)
        held = self._whole if self._slab.ranks.gathers else self._slab
        found = [held.filled(own, other) for own, other in zip(self._own, others, strict=True)]
        begin, end = (place - held.span[0] for place in self._slab.span)
        return found if held.span == self._slab.span else [t[:, begin:end] for t in found]


def slab_of(ranks: Ranks, window: Window, rank: int, unit: int = 1) -> Slab:
    """Return the rows that a process attends on.

    Args:
        ranks: Who holds what.
        window: What a query sees.
        rank: Which process.
        unit: The rows begin and end at multiples of this.
    """
    height = ranks.grid.height
    first, stop = ranks.rows(rank)
    own = range(first, stop)
    if window.radius is not None:
        reach = max(dy for dy in range(height) if window.reach(dy, 0) >= 0)
        low, high = first - reach, stop + reach
    elif own:
        K, d = window.kernel[0], window.steps[0]
        starts = [y % d + d * window_start(y // d, -(-(height - y % d) // d), K) for y in own]
        low, high = min(starts), max(start + (K - 1) * d + 1 for start in starts)
        low, high = min(low, first), max(high, stop)
        low = max(0, min(low, high - K * d))  # a slab holds a window of every phase of the dilation
        high = max(high, low + K * d)
    else:
        low, high = first, stop
    low, high = max(low, 0) // unit * unit, min(-(-min(high, height) // unit) * unit, height)
    return Slab(ranks, low, high if own else low)


class Pooled(Protocol):
    """Pooled keys and values that are under way.

    Attributes:
        counted: As `cell` of `Window`: the side of the cells if each counts as its tokens outside the disc, else 0.
    """

    counted: int

    def wait(self) -> list[Tensor]:
        """Return them, each `[B, M, H, D]`."""


def local_attention_over(
    q: Tensor, k: Tensor, v: Tensor, ranks: Ranks, window: Window, *, pooled: Pooled | None = None,
    mask: Tensor | None, scale: float | None, backend: str,
) -> Tensor:  # fmt: skip
    """Attend as `local_attention` does on the whole sequence, from the tokens of the own slice.

    Args:
        q: Queries of the own slice `[B, tokens, H, D]`.
        k: Keys, like `q`.
        v: Values, like `q`.
        ranks: Who holds what.
        window: What a query sees, without pooled keys.
        pooled: Pooled keys of the whole grid.
        mask: Bool `[B, own tokens outside the grid]`, False for padding keys; None on all processes or on none.
        scale: Factor of the logits, `D ** -0.5` if None.
        backend: How the operators run.

    Returns:
        `[B, tokens, H, D]`.

    Raises:
        ValueError: If the window does not fit the grid, or has a precision.
    """
    window.check(ranks.grid)
    refuse_precision(window.precision)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    cell = 0 if pooled is None else pooled.counted
    slabs = [slab_of(ranks, window, rank, max(cell, 1)) for rank in range(ranks.size)]
    slab = slabs[ranks.rank]
    outside = Outside(q, k, v, ranks, mask, scale)
    halo = Halo(outside.image[1:], slabs)
    outside.wait()
    keys, values = halo.wait()
    further = [t.detach()[:, :0] for t in (k, v)] if pooled is None else pooled.wait()
    queries = slab.around(outside.image[0])
    if not queries.shape[1]:
        return ranks.together(outside.rows(), queries + keys + values + sum(t.sum() for t in further) * 0)
    grid, shared = slab.grid, (outside.k, outside.v)
    if cell:
        o = _counted(queries, (keys, values), shared, outside.mask, further, slab, window, cell, scale)
    elif outside.mask is None:
        more_k, more_v = (
            shared if pooled is None else (torch.cat(pair, 1) for pair in zip(shared, further, strict=True))
        )
        window = replace(window, pooled=(more_k, more_v) if more_k.shape[1] else None)
        o = local_attention(queries, keys, values, grid, window, scale=scale, backend=backend)
    else:  # no kernel hides pooled keys
        window = replace(window, pooled=(further[0], further[1]) if further[0].shape[1] else None)
        grid = replace(grid, prefix=outside.count)
        queries, keys, values = (
            torch.cat(pair, 1) for pair in ((outside.k, queries), (outside.k, keys), (outside.v, values))
        )
        o = local_attention(queries, keys, values, grid, window, mask=outside.mask, scale=scale, backend=backend)
        o = o[:, outside.count :]
    return ranks.together(outside.rows(), slab.own(o))


def _counted(
    q: Tensor, near: tuple[Tensor, Tensor], shared: tuple[Tensor, Tensor], mask: Tensor | None,
    pooled: Sequence[Tensor], slab: Slab, window: Window, cell: int, scale: float,
) -> Tensor:  # fmt: skip
    """Attend with pooled keys that count as their tokens outside the disc: beyond the slab that is all of them."""
    cells = slab.grid.width // cell
    first, stop = slab.first // cell * cells, slab.stop // cell * cells
    keys, values = (
        torch.cat([rest, t[:, :first], t[:, stop:], t[:, first:stop]], 1)
        for rest, t in zip(shared, pooled, strict=True)
    )
    beyond = pooled[0].shape[1] - (stop - first)
    weight = q.new_zeros((q.shape[0], keys.shape[1]), dtype=torch.promote_types(q.dtype, torch.float32))
    weight[:, shared[0].shape[1] : shared[0].shape[1] + beyond] = 2 * math.log(cell)
    if mask is not None:
        weight[:, : mask.shape[1]].masked_fill_(~mask, HIDDEN)
    return grid_attention(
        q, *near, keys, values, None, weight, [slab.grid.height, slab.grid.width], *window.geometry(slab.ranks.grid),
        cell, scale,
    )  # fmt: skip
