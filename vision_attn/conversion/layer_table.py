"""The table that shows what became of each converted layer."""

from collections.abc import Sequence
from typing import NamedTuple


class Row(NamedTuple):
    """One converted layer. `tokens` and `attended` (mean share of tokens seen) are of its last forward, else None."""

    name: str
    heads: int
    tokens: int | None
    attended: float | None
    status: str


class LayerTable(list[Row]):
    """The converted layers; prints as a table."""

    def __str__(self) -> str:
        cells = [("layer", "heads", "tokens", "attended", "status")]
        for row in self:
            attended = "-" if row.attended is None else f"{row.attended:.1%}"
            cells.append(
                (row.name, str(row.heads), "-" if row.tokens is None else str(row.tokens), attended, row.status)
            )
        return aligned(cells)


def aligned(cells: Sequence[Sequence[str]]) -> str:
    """Return rows of equal length as text with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)
