"""A few rows of a large table in which everything that matters still occurs: `make test` runs these, `test-all` all."""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import pytest

Need = tuple[Callable[..., Hashable], int]


def open_needs(rows: Sequence[tuple], chosen: Sequence[tuple], needs: Sequence[Need]) -> Counter:
    """Return how often each value of each fact is still missing among the rows chosen."""
    missing: Counter = Counter()
    for fact, times in needs:
        there, found = (Counter(fact(*row) for row in some) for some in (rows, chosen))
        missing.update({(fact, value): min(times, count) - found[value] for value, count in there.items()})
    return +missing


def covering(rows: Sequence[tuple], *needs: Need) -> list[tuple]:
    """Choose rows so that each value of each fact occurs often enough.

    The next row is the one that meets most of the open needs; of several the one whose values are rarest so far; of
    several still the first. So the choice is the same in every process.

    Args:
        rows: The whole table, without repetitions.
        needs: Pairs of a fact, which is a function of a row, and how many of the rows chosen must have each of its
            values; all that have it, if the table has fewer.

    Returns:
        The rows chosen, in their order in the table.
    """
    chosen: list[tuple] = []
    while missing := open_needs(rows, chosen, needs):
        seen = Counter((fact, fact(*row)) for row in chosen for fact, _ in needs)

        def worth(row: tuple, missing: Counter = missing, seen: Counter = seen) -> tuple[int, int]:
            values = [(fact, fact(*row)) for fact, _ in needs]
            return sum(value in missing for value in values), -sum(seen[value] for value in values)

        chosen.append(max((row for row in rows if row not in chosen), key=worth))
    return [row for row in rows if row in chosen]


def quick(rows: Sequence[tuple], *needs: Need) -> list[Any]:
    """Return all rows as parameters of a test; those that `covering` leaves out are slow."""
    chosen = covering(rows, *needs)
    return [pytest.param(*row, marks=() if row in chosen else pytest.mark.slow) for row in rows]
