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
    values = [[(fact, fact(*row)) for fact, _ in needs] for row in rows]
    missing, seen = open_needs(rows, (), needs), Counter()
    left = dict.fromkeys(range(len(rows)))

    def worth(row: int) -> tuple[int, int]:
        return sum(missing[value] > 0 for value in values[row]), -sum(seen[value] for value in values[row])

    while +missing:
        best = max(left, key=worth)
        del left[best]
        missing.subtract(values[best])
        seen.update(values[best])
    return [row for i, row in enumerate(rows) if i not in left]


def quick(rows: Sequence[tuple], *needs: Need) -> list[Any]:
    """Return all rows as parameters of a test; those that `covering` leaves out are slow."""
    chosen = covering(rows, *needs)
    return [pytest.param(*row, marks=() if row in chosen else pytest.mark.slow) for row in rows]
