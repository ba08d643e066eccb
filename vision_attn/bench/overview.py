"""Renders results of whole models as Markdown: one table per case, its candidates as lines, and what must hold."""

from collections.abc import Callable, Sequence
from typing import Any

from vision_attn.bench.table import heading

Row = dict[str, Any]
Columns = dict[str, Callable[[Row], str]]


def images_table(document: Row, groups: Sequence[str] = ()) -> str:
    """Return the tables of classifiers: images per second; see `overview`."""
    columns: Columns = {
        "images/s": lambda timed: f"{timed['images_per_s']:.0f}",
        "batch": lambda timed: str(timed["batch"]),
        "ms": lambda timed: f"{timed['median_ms']:.1f}",
        "speed-up": speedup,
        "memory": lambda timed: _gib((timed["memory"] or {}).get("above")),
    }
    return overview(document, columns, groups)


def steps_table(document: Row, groups: Sequence[str] = ()) -> str:
    """Return the tables of denoisers: seconds per step; see `overview`."""
    columns: Columns = {
        "s/step": lambda timed: f"{timed['median_ms'] / 1e3:.3f}{' (extrapolated)' * timed['extrapolated']}",
        "speed-up": speedup,
        "memory": lambda timed: _gib((timed["memory"] or {}).get("bytes")),
        "above weights": lambda timed: _gib((timed["memory"] or {}).get("above")),
        "layers": lambda timed: "{rerouted} of {of}".format(**timed["layers"]) if timed.get("layers") else "-",
    }
    return overview(document, columns, groups)


def overview(document: Row, columns: Columns, groups: Sequence[str] = ()) -> str:
    """Return the tables of a document of whole models.

    Args:
        document: A stored result.
        columns: Title, and the cell of a measured candidate's forward.
        groups: Which groups to show, all if empty.

    Raises:
        ValueError: If a group is not in the document.
    """
    head, chosen = heading(document, groups)
    parts = [head]
    for group in chosen:
        parts += [f"### {group}"]
        for row in (row for row in document["rows"] if row["group"] == group):
            parts += [f"#### {row['label']}", _table(row, columns), *_lists(row)]
    return "\n\n".join(parts) + "\n"


def _table(row: Row, columns: Columns) -> str:
    lines = [["candidate", *columns], ["---"] * (len(columns) + 1)]
    for candidate in row["candidates"]:
        if timed := candidate.get("forward"):
            lines.append([candidate["name"], *(cell(timed) for cell in columns.values())])
        else:
            lines.append([candidate["name"], *["-"] * len(columns)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def speedup(timed: Row) -> str:
    """Return how many times faster than the row's reference a candidate is."""
    return "-" if timed.get("speedup") is None else f"{timed['speedup']:.2f}x"


def _gib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**30:.2f} GiB"


def _lists(row: Row) -> list[str]:
    """What must hold and whether it does; and why candidates were left out."""
    musts = [f"- {'holds' if m['holds'] else '**missed**'}: {m['text']}{_value(m)}" for m in row.get("musts", ())]
    reasons = [f"- {c['name']} is left out: {c['reason']}" for c in row["candidates"] if c["reason"]]
    return ["\n".join(lines) for lines in (musts, reasons) if lines]


def _value(must: Row) -> str:
    return "" if must["value"] is None else f": {must['value']:.2f}x"
