"""How tokens travel between processes: one collective, asynchronous, whose gradient is the same one backwards.

A transfer is begun, other work runs while it is under way, and `Pending.wait` ends it. In the backward pass the
transfer of the gradients begins where the forward waited, and is waited for where the forward began.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vision_attn.parallel.ranks import Cut, Ranks

_ops = torch.ops._c10d_functional


class _Begin(torch.autograd.Function):
    """Begins a transfer; its gradient, which is under way, is waited for here."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, pending: "Pending") -> Tensor:
        """Send rows."""
        ctx.pending = pending
        sent: Tensor = _ops.all_to_all_single(rows, pending.take, pending.give, pending.group)
        return sent

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Wait."""
        back, ctx.pending.back = ctx.pending.back, None
        return _ops.wait_tensor(back), None


class _End(torch.autograd.Function):
    """Waits for a transfer; that of its gradient begins here."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, pending: "Pending") -> Tensor:
        """Wait."""
        ctx.pending = pending
        waited: Tensor = _ops.wait_tensor(rows)
        return waited

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Send the gradients back. What is returned has the shape that autograd asks for, and is not used."""
        pending = ctx.pending
        pending.back = _ops.all_to_all_single(grad.contiguous(), pending.give, pending.take, pending.group)
        return grad, None


class Pending:
    """Rows that are under way.

    Args:
        take: How many come from each process.
        give: How many go to each process.
        group: Name of the processes' group.

    Attributes:
        back: Gradients that are under way.
    """

    def __init__(self, take: Sequence[int], give: Sequence[int], group: str) -> None:
        self.take, self.give, self.group = list(take), list(give), group
        self.rows: Tensor | None = None
        self.back: Tensor | None = None

    def begin(self, rows: Tensor) -> "Pending":
        """Send rows."""
        self.rows = _Begin.apply(rows.contiguous(), self)
        return self

    def wait(self) -> Tensor:
        """Return the rows once they are there."""
        found: Tensor = _End.apply(self.rows, self)
        self.rows = None
        return found


def transfer(rows: Tensor, take: Sequence[int], give: Sequence[int], ranks: Ranks | Cut, what: str) -> Pending:
    """Begin to send rows to every process and to receive rows from every process.

    Args:
        rows: `[sum(give), ...]`, those for rank 0 first.
        take: How many rows come from each process.
        give: How many rows go to each process.
        ranks: The processes.
        what: What the rows are, for the count of bytes.

    Returns:
        The rows that come, those from rank 0 first, `[sum(take), ...]`.
    """
    if not torch.compiler.is_compiling():
        others = sum(take) - take[ranks.rank]
        ranks.traffic.add(what, others * math.prod(rows.shape[1:]) * rows.element_size())
    return Pending(take, give, ranks.group).begin(rows)


def gather(rows: Tensor, counts: Sequence[int], ranks: Ranks | Cut, what: str) -> Pending:
    """Begin to give every process the rows of all, those of rank 0 first.

    Args:
        rows: The own rows `[counts[ranks.rank], ...]`.
        counts: How many rows each process has.
        ranks: The processes.
        what: What the rows are.
    """
    copies = rows.expand(ranks.size, *rows.shape).flatten(0, 1)
    return transfer(copies, counts, [len(rows)] * ranks.size, ranks, what)


def as_rows(*tensors: Tensor) -> Tensor:
    """Lay `[B, n, H, D]` tensors, whose channels may differ, out as rows of tokens `[n, B, H, channels of all]`."""
    return torch.cat([t.transpose(0, 1) for t in tensors], -1)


def apart(rows: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Undo `as_rows`; `like` are tensors with as many channels."""
    return [t.transpose(0, 1) for t in rows.split([t.shape[-1] for t in like], -1)]


def exchange(tensors: Sequence[Tensor], wanted: Sequence[tuple[int, int]], ranks: Ranks, what: str) -> Pending:
    """Begin to give each process the grid's tokens that it wants around its own.

    Args:
        tensors: Tensors of the own image tokens `[B, n, H, D]`.
        wanted: First and last + 1 of the tokens that each process wants.
        ranks: The processes.
        what: What they are.

    Returns:
        Rows as of `as_rows`, in the order of the grid, without the own ones.
    """
    first, _ = ranks.span()
    give = dict(given(wanted, ranks))
    take = [0 if p == ranks.rank else _length(_common(ranks.span(p), wanted[ranks.rank])) for p in range(ranks.size)]
    rows = [as_rows(*(t[:, a - first : b - first] for t in tensors)) for a, b in give.values()]
    counts = [_length(give[p]) if p in give else 0 for p in range(ranks.size)]
    return transfer(torch.cat(rows), take, counts, ranks, what)


def exchange_back(tensors: Sequence[Tensor], wanted: Sequence[tuple[int, int]], ranks: Ranks, what: str) -> Pending:
    """Begin to send gradients of what `exchange` brought back to those who hold the tokens.

    Args:
        tensors: Gradients of the grid's tokens `[B, height * width, H, D]`, of which this process's wanted ones travel.
        wanted: As for `exchange`.
        ranks: Who holds what.
        what: What they are.

    Returns:
        Rows as of `as_rows`, those of `given` one after another.
    """
    here = [_common(ranks.span(p), wanted[ranks.rank]) for p in range(ranks.size) if p != ranks.rank]
    give, take = [0] * ranks.size, [0] * ranks.size
    for p, span in zip((p for p in range(ranks.size) if p != ranks.rank), here, strict=True):
        give[p] = _length(span)
    for p, span in given(wanted, ranks):
        take[p] = _length(span)
    return transfer(torch.cat([as_rows(*(t[:, a:b] for t in tensors)) for a, b in here]), take, give, ranks, what)


def given(wanted: Sequence[tuple[int, int]], ranks: Ranks) -> list[tuple[int, tuple[int, int]]]:
    """Return every other process, and first and last + 1 of the own tokens of the grid that it wants."""
    return [(p, _common(ranks.span(), wanted[p])) for p in range(ranks.size) if p != ranks.rank]


class Added:
    """The sum of a tensor over all processes, which is under way when this is made. It has no gradient.

    Args:
        part: What this process adds.
        ranks: The processes.
        what: What it is, for the count of bytes.
    """

    def __init__(self, part: Tensor, ranks: Ranks | Cut, what: str) -> None:
        ranks.traffic.add(what, 2 * part.numel() * part.element_size() * (ranks.size - 1) // ranks.size)
        self._sum = _ops.all_reduce(part.contiguous(), "sum", ranks.group)

    def wait(self) -> Tensor:
        """Return the sum."""
        found: Tensor = _ops.wait_tensor(self._sum)
        return found


def _common(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    """Return what two spans have in common, an empty span if that is nothing."""
    first, stop = max(one[0], other[0]), min(one[1], other[1])
    return (first, stop) if stop > first else (one[0], one[0])


def _length(span: tuple[int, int]) -> int:
    return span[1] - span[0]
