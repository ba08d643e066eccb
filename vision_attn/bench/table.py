"""Shows a stored result as Markdown: a table for each group and pass, and why candidates are absent."""

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]

_LEGEND = (
    "In TFLOP/s, `needed` counts the pairs that the function attends to, `visited` those that tiles or blocks compute. "
    "Cells of peers: ms (how many times ours, TFLOP/s visited). `memory` is the peak above inputs and outputs, as a "
    "share of them."
)


def markdown(document: dict[str, Any], groups: Sequence[str] = ()) -> str:
    """Return the tables of a document that `check_document` accepts.

    Args:
        document: A stored result.
        groups: Which groups to show, all if empty.

    Raises:
        ValueError: If a group is not in the document.
    """
    head, chosen = heading(document, groups)
    parts = [f"{head} {_LEGEND}"]
    for group in chosen:
        rows = [row for row in document["rows"] if row["group"] == group]
        for which in ("forward", "backward"):
            if timed := [row for row in rows if any(c.get(which) for c in row["candidates"])]:
                parts.append(f"### {group}, {which}\n\n{_table(timed, which)}")
        if reasons := _reasons(rows):
            parts.append("\n".join(reasons))
    return "\n\n".join(parts) + "\n"


def heading(document: dict[str, Any], groups: Sequence[str] = ()) -> tuple[str, list[str]]:
    """Return two paragraphs, on what was measured and on where and how, and the groups to show.

    Raises:
        ValueError: If a group is not in the document.
    """
    names = list(dict.fromkeys(row["group"] for row in document["rows"]))
    if unknown := [group for group in groups if group not in names]:
        raise ValueError(f"unknown group {', '.join(map(repr, unknown))}: known are {', '.join(map(repr, names))}")
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items() if version)
    dates = sorted({row["date"] for row in document["rows"]})
    when = " to ".join(dict.fromkeys((dates[0], dates[-1]))) if dates else "no rows"
    about = f"{document['title']}.\n\n{document['device']}, {versions}, {when}. {document['timing']}"
    return about, list(groups or names)


def _table(rows: Sequence[Row], which: str) -> str:
    columns = {"case": [row["label"] for row in rows]}
    columns |= _subject_columns(rows, which)
    for name in dict.fromkeys(c["name"] for row in rows for c in row["candidates"] if c["name"] != row["subject"]):
        found = [_pass(row, name, which) for row in rows]
        if any(found):
            columns[name] = [_peer(timed) for timed in found]
    lines = [list(columns), ["---"] * len(columns), *zip(*columns.values(), strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _subject_columns(rows: Sequence[Row], which: str) -> dict[str, list[str]]:
    subject = rows[0]["subject"]
    mine = [_pass(row, subject, which) or {} for row in rows]
    forward = [(_pass(row, subject, "forward") or {}).get("median_ms") for row in rows]
    times = [timed.get("median_ms") for timed in mine]
    columns = {f"{subject}, ms": [_cell(t, ".3f") for t in times]}
    if which == "backward":
        columns["/ forward"] = [_cell(t and f and t / f, ".1f", "x") for t, f in zip(times, forward, strict=True)]
    for key in ("needed", "visited"):
        columns[key] = [_rate(timed.get(f"{key}_tflops")) for timed in mine]
    columns["memory"] = [_cell((timed.get("extra_memory") or {}).get("share"), ".1%") for timed in mine]
    return {name: cells for name, cells in columns.items() if set(cells) != {"-"}}


def _pass(row: Row, name: str, which: str) -> Row | None:
    return next((c.get(which) for c in row["candidates"] if c["name"] == name), None)


def _cell(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def _rate(tflops: float | None) -> str:
    return _cell(tflops, ".0f" if tflops and tflops >= 100 else ".3g")


def _peer(timed: Row | None) -> str:
    if timed is None:
        return "-"
    notes = [_cell(timed.get("ratio"), ".1f", "x"), _rate(timed.get("visited_tflops"))]
    known = ", ".join(note for note in notes if note != "-")
    return f"{timed['median_ms']:.3f}" + (f" ({known})" if known else "")


def _reasons(rows: Sequence[Row]) -> list[str]:
    """Return a line for each reason, with the cases that it holds for."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for candidate in row["candidates"]:
            if candidate["reason"]:
                found.setdefault((candidate["name"], candidate["reason"]), []).append(row["label"])
    return [
        f"- {name} is left out{'' if len(labels) == len(rows) else ' at ' + '; '.join(labels)}: {reason}"
        for (name, reason), labels in found.items()
    ]
