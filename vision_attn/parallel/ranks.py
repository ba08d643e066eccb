"""Which tokens of a sequence each process of a group holds, and what the processes sent each other."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vision_attn.grid import Grid


def cuts_of(tokens: int, size: int) -> tuple[int, ...]:
    """Return where each of `size` slices of `tokens` tokens begins, and the end of the last, as `tensor_split` cuts."""
    each, more = divmod(tokens, size)
    return tuple(each * rank + min(rank, more) for rank in range(size + 1))


def refuse_precision(precision: str | None) -> None:
    """Refuse attention in 8 bits: the mean of the keys and the scales would be those of a slice.

    Raises:
        ValueError: If there is a precision.
    """
    if precision is not None:
        raise ValueError(f"precision={precision!r} runs on one process: use precision=None over several")


@dataclass
class Traffic:
    """Counts what this process received from others.

    Attributes:
        received: Bytes, by what they were.
    """

    received: Counter[str] = field(default_factory=Counter)

    def add(self, what: str, count: int) -> None:
        """Count `count` bytes."""
        self.received[what] += count

    @property
    def total(self) -> int:
        """All bytes."""
        return self.received.total()


@dataclass(frozen=True)
class Cut:
    """A group of processes over which sequences are cut into slices, as diffusers cuts them.

    Args:
        group: Name of the process group.
        rank: Which of the group this process is.
        size: How many processes there are.
        gathers: As for `Ranks`.
        apart: Whether the suffix is cut by itself, not with the grid.
        rows: Where each process's rows of the grid begin, and the end of the last; empty if tokens are cut.
        traffic: As for `Ranks`.
    """

    group: str
    rank: int
    size: int
    gathers: bool = False
    apart: bool = False
    rows: tuple[int, ...] = ()
    traffic: Traffic = field(default_factory=Traffic, compare=False, repr=False)

    @classmethod
    def over(cls, group: Any, gathers: bool = False) -> "Cut":
        """Return the cut over a process group.

        Raises:
            ValueError: If PyTorch has no process group, which is then None.
        """
        if group is None:
            raise ValueError("there is no process group: call torch.distributed.init_process_group() first")
        return cls(group.group_name, torch.distributed.get_rank(group), group.size(), gathers)

    def of(self, grid: Grid) -> "Ranks":
        """Return the slices of a sequence: the prefix is cut by itself, the grid with the suffix if that is not."""
        n = grid.image_tokens
        if self.rows:
            image = tuple(row * grid.width for row in self.rows)
            prefix, suffix = (cuts_of(count, self.size) for count in (grid.prefix, grid.suffix))
            return Ranks(grid, self.group, self.rank, prefix, image, suffix, self.gathers, self.traffic)
        if self.apart:
            prefix, image, suffix = (cuts_of(count, self.size) for count in (grid.prefix, n, grid.suffix))
            return Ranks(grid, self.group, self.rank, prefix, image, suffix, self.gathers, self.traffic)
        cuts = cuts_of(n + grid.suffix, self.size)
        image, suffix = (
            tuple(min(max(cut - first, 0), most) for cut in cuts) for first, most in ((0, n), (n, grid.suffix))
        )
        prefix = cuts_of(grid.prefix, self.size)
        return Ranks(grid, self.group, self.rank, prefix, image, suffix, self.gathers, self.traffic)


@dataclass(frozen=True)
class Ranks:
    """The slices of one sequence that the processes of a group hold.

    A process holds its slice of the prefix, then its slice of the grid in row-major order, then its slice of the
    suffix. A slice may end anywhere, also inside a row of the grid.

    Args:
        grid: The whole sequence.
        group: Name of the process group.
        rank: Which of the group this process is.
        prefix: Where each slice of the prefix begins, and the end of the last.
        image: The same of the grid's tokens.
        suffix: The same of the suffix.
        gathers: Whether every process fetches all keys of the grid, for comparison: no halos, nothing by demand.
        traffic: Counts what this process receives.

    Raises:
        ValueError: If the slices do not cover the sequence.
    """

    grid: Grid
    group: str
    rank: int
    prefix: tuple[int, ...]
    image: tuple[int, ...]
    suffix: tuple[int, ...]
    gathers: bool = False
    traffic: Traffic = field(default_factory=Traffic, compare=False, repr=False)

    def __post_init__(self) -> None:
        lengths = self.grid.prefix, self.grid.image_tokens, self.grid.suffix
        for name, cuts, length in zip(("prefix", "image", "suffix"), self.cuts, lengths, strict=True):
            covers = cuts[:1] == (0,) and cuts[-1:] == (length,) and len(cuts) == len(self.image) > 1
            if not covers or list(cuts) != sorted(cuts):
                raise ValueError(f"{name} must be cut from 0 to {length} into {len(self.image) - 1} slices, got {cuts}")

    @property
    def cuts(self) -> tuple[tuple[int, ...], ...]:
        """Where prefix, grid and suffix are cut."""
        return self.prefix, self.image, self.suffix

    @property
    def size(self) -> int:
        """How many processes there are."""
        return len(self.image) - 1

    @property
    def held(self) -> Grid:
        """What this process holds, as a grid of one row."""
        before, own, after = (self.count(cuts) for cuts in self.cuts)
        return Grid(1, own, before, after)

    @property
    def tokens(self) -> int:
        """How many tokens this process holds."""
        return self.tokens_of(self.rank)

    def tokens_of(self, rank: int) -> int:
        """Return how many tokens a process holds."""
        return sum(self.count(cuts, rank) for cuts in self.cuts)

    def count(self, cuts: Sequence[int], rank: int | None = None) -> int:
        """Return how long a slice is: that of this process by default."""
        rank = self.rank if rank is None else rank
        return cuts[rank + 1] - cuts[rank]

    def span(self, rank: int | None = None) -> tuple[int, int]:
        """Return first and last + 1 of the grid's tokens that a process holds: this one by default."""
        rank = self.rank if rank is None else rank
        return self.image[rank], self.image[rank + 1]

    def rows(self, rank: int | None = None, unit: int = 1) -> tuple[int, int]:
        """Return first and last + 1 of the rows that a slice of the grid touches, in units of `unit` rows."""
        first, stop = self.span(rank)
        width = self.grid.width * unit
        return (first // width, -(-stop // width)) if stop > first else (first // width, first // width)

    @cached_property
    def outside(self) -> tuple[int, ...]:
        """How many tokens outside the grid each process holds."""
        return tuple(self.count(self.prefix, r) + self.count(self.suffix, r) for r in range(self.size))

    def pieces(self, t: Tensor) -> tuple[Tensor, ...]:
        """Cut a slice `[B, tokens, ...]` into its prefix, its tokens of the grid and its suffix.

        The gradient of all three is put together at once; where several gradients of slices are added, each is filled
        up with zeros.
        """
        return t.split([self.count(cuts) for cuts in self.cuts], 1)

    def own_image(self, t: Tensor) -> Tensor:
        """Return the grid's tokens of a slice `[B, tokens, ...]`."""
        first = self.count(self.prefix)
        return t[:, first : first + self.count(self.image)]

    def own_outside(self, t: Tensor) -> Tensor:
        """Return the tokens outside the grid of a slice `[B, tokens, ...]`."""
        first = self.count(self.prefix)
        return torch.cat([t[:, :first], t[:, first + self.count(self.image) :]], 1)

    def together(self, rest: Tensor, image: Tensor) -> Tensor:
        """Put the own tokens outside the grid before and after those of the grid: undoes the two above."""
        first = self.count(self.prefix)
        return torch.cat([rest[:, :first], image, rest[:, first:]], 1)

    def whole(self, t: Tensor, *, outside: bool = False) -> Tensor:
        """Bring the slices of all processes `[B, N, ...]`, those of rank 0 first, to the order of the sequence.

        Args:
            t: The slices of all tokens.
            outside: Whether they are of the tokens outside the grid only.
        """
        kinds = (self.prefix, self.suffix) if outside else self.cuts
        lengths = [self.count(cuts, rank) for rank in range(self.size) for cuts in kinds]
        parts = t.split(lengths, 1)
        return torch.cat([part for n in range(len(kinds)) for part in parts[n :: len(kinds)]], 1)

    def slice(self, t: Tensor) -> Tensor:
        """Return what this process holds of a whole sequence `[B, N, ...]`."""
        parts, first = [], 0
        for cuts in self.cuts:
            parts.append(t[:, first + cuts[self.rank] : first + cuts[self.rank + 1]])
            first += cuts[-1]
        return torch.cat(parts, 1)
