"""Rows of fidelity: each contender is put into a dense model, measured beside it, and taken out again."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from vision_attn.bench.candidate import reason_of
from vision_attn.bench.measure import Measurement
from vision_attn.bench.quality.contenders import Contender
from vision_attn.bench.table import heading
from vision_attn.conversion.conversion import Conversion

Row = dict[str, Any]
TIMING = "Nothing was timed."


class Reference(Protocol):
    """A dense model, with what it computed."""

    def measure(self, contender: Contender) -> dict[str, float]:
        """Convert the model, compare it with its dense self, and revert it; `keys` is among the measures."""


class FidelityCase(Protocol):
    """One model at one size. Cases are compared and hashed by their fields."""

    @property
    def name(self) -> str:
        """Short and stable."""

    @property
    def label(self) -> str:
        """For people."""

    @property
    def group(self) -> str:
        """The table it belongs to."""

    @property
    def contenders(self) -> Sequence[Contender]:
        """Who takes part."""

    @property
    def bounds(self) -> Sequence["Bound"]:
        """What must hold."""

    def __hash__(self) -> int:
        """Cases are frozen dataclasses."""

    def shape(self) -> dict[str, Any]:
        """Return what defines the case, for the JSON."""

    def reference(self, device: torch.device) -> Reference:
        """Run the dense model."""


@dataclass(frozen=True)
class Bound:
    """A measure of a contender is at most, or at least, a value.

    Args:
        subject: Name of the contender.
        measure: Name of the measure.
        most: The largest value allowed; None if there is none.
        least: The smallest value allowed; None if there is none.
    """

    subject: str
    measure: str
    most: float | None = None
    least: float | None = None

    def judge(self, candidates: Sequence[Row]) -> Row | None:
        """Return the verdict `{text, value, needed, holds}`, or None if the subject took no part."""
        found = [candidate for candidate in candidates if candidate["name"] == self.subject]
        if not found:
            return None
        value = (found[0].get("quality") or {}).get(self.measure)
        needed, word = (self.most, "at most") if self.most is not None else (self.least, "at least")
        holds = value is not None and (value <= needed if self.most is not None else value >= needed)
        return dict(text=f"{self.subject}: {self.measure} {word} {needed:g}", value=value, needed=needed, holds=holds)


def fidelity_row(case: FidelityCase, measurement: Measurement) -> Row:
    """Measure one case, contenders side by side in the worker processes of the run.

    Returns:
        A row of `document.py`'s schema. A contender that cannot run is in it with the reason.
    """
    chosen = [c for c in case.contenders if not measurement.chosen or c.name in measurement.chosen]
    device = str(measurement.device)
    found = measurement.workers.map(_measured, [(case, contender, device) for contender in chosen])
    results = [
        dict(name=contender.name, computes=str(contender.spec), reason=reason, quality=quality)
        for contender, (quality, reason) in zip(chosen, found, strict=True)
    ]
    verdicts = [bound.judge(results) for bound in case.bounds]
    head = dict(case=case.name, label=case.label, group=case.group, shape=case.shape(), subject=None)
    return dict(**head, candidates=results, musts=[verdict for verdict in verdicts if verdict is not None])


def _measured(work: tuple[FidelityCase, Contender, str]) -> tuple[dict[str, float] | None, str | None]:
    """Return the measures of one contender, or the reason why it has none."""
    case, contender, device = work
    try:
        return _reference(case, device).measure(contender), None
    except Exception as error:  # a contender may fail in any way: that is a result, and the others go on
        return None, reason_of(error)


@functools.lru_cache(maxsize=1)
def _reference(case: FidelityCase, device: str) -> Reference:
    return case.reference(torch.device(device))


def keys_met(conversion: Conversion) -> float:
    """Return how many keys a token of the finest grid meets, in the mean."""
    layer = max((row for row in conversion.layers if row.tokens), key=lambda row: row.tokens or 0)
    return (layer.tokens or 0) * (layer.attended or 1.0)


def fidelity_table(document: Row, measures: Mapping[str, tuple[str, str]], groups: Sequence[str] = ()) -> str:
    """Return the tables of a document: a table for each group, a line for each contender.

    Args:
        document: A stored result.
        measures: Title and format of each measure's column, by name.
        groups: Which groups to show, all if empty.

    Raises:
        ValueError: If a group is not in the document.
    """
    head, chosen = heading(document, groups)
    parts = [head]
    for group in chosen:
        rows = [row for row in document["rows"] if row["group"] == group]
        parts += [f"### {group}", fidelity_lines(rows, measures)]
        verdicts = [
            f"- {'holds' if m['holds'] else '**missed**'}: {row['label']}, {m['text']}"
            + ("" if m["value"] is None else f": {m['value']:g}")
            for row in rows for m in row["musts"]
        ]  # fmt: skip
        reasons = [
            f"- {row['label']}: {c['name']} is left out: {c['reason']}"
            for row in rows for c in row["candidates"] if c["reason"]
        ]  # fmt: skip
        parts += ["\n".join(lines) for lines in (verdicts, reasons) if lines]
    return "\n\n".join(parts) + "\n"


def fidelity_lines(rows: Sequence[Row], measures: Mapping[str, tuple[str, str]]) -> str:
    """Return one Markdown table of rows: a column for each row and measure that any contender has."""
    columns = [
        (row, name, f"{row['label']}, {title}", form)
        for row in rows for name, (title, form) in measures.items()
        if any(name in (c["quality"] or {}) for c in row["candidates"])
    ]  # fmt: skip
    lines = [["attention", *(title for _, _, title, _ in columns)], ["---"] * (len(columns) + 1)]
    for name in dict.fromkeys(c["name"] for row in rows for c in row["candidates"]):
        cells = []
        for row, measure, _, form in columns:
            found = next((c["quality"] for c in row["candidates"] if c["name"] == name), None) or {}
            cells.append(f"{found[measure]:{form}}" if measure in found else "-")
        lines.append([name, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
