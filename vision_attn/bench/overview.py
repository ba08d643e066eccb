"""Rows of whole models: speed-ups, what must hold, and their Markdown with one table per case."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vision_attn.bench.table import heading

Row = dict[str, Any]
Columns = dict[str, Callable[[Row], str]]


@dataclass(frozen=True)
class Must:
    """One candidate is faster than others, or runs at all.

    Args:
        subject: Name of the candidate.
        against: Candidates to compare with; the fastest counts. None if it is enough that the subject runs.
        factor: How many times faster the subject must be, at least.
        graphs: Whether the subject replays from a CUDA graph, and the others do not.
    """

    subject: str
    against: tuple[str, ...] = ()
    factor: float = 1.0
    graphs: bool = False

    def judge(self, candidates: Sequence[Row]) -> Row | None:
        """Return the verdict `{text, value, needed, holds}`, or None if the subject or all others took no part.

        A subject that was left out with a reason fails. `value` is None where there is nothing to compare.
        """
        by_name = {candidate["name"]: candidate for candidate in candidates}
        others = [by_name[name] for name in self.against if name in by_name]
        if self.subject not in by_name or bool(self.against) != bool(others):
            return None
        own = per_item(by_name[self.subject])
        if self.graphs:
            own = ((by_name[self.subject].get("forward") or {}).get("graphs") or {}).get("median_ms")
        if not self.against:
            return dict(text=f"{self.subject} runs", value=None, needed=None, holds=own is not None)
        times = {other["name"]: t for other in others if (t := per_item(other)) is not None}
        fastest = min(times, key=lambda name: times[name], default=" or ".join(self.against))
        value = times[fastest] / own if times and own is not None else None
        text = f"{self.subject}{' in graphs' * self.graphs} at least {self.factor:g}x as fast as {fastest}"
        return dict(text=text, value=value, needed=self.factor, holds=value is not None and value >= self.factor)


def per_item(candidate: Row) -> float | None:
    """Return the milliseconds per image of a measured candidate, None for one that was left out."""
    timed = candidate.get("forward")
    return timed["median_ms"] / timed.get("batch", 1) if timed else None


def judge(musts: Sequence[Must], candidates: Sequence[Row]) -> list[Row]:
    """Return the verdicts on the musts whose candidates took part in the run."""
    verdicts = [must.judge(candidates) for must in musts]
    return [verdict for verdict in verdicts if verdict is not None]


def add_speedups(candidates: Sequence[Row], reference: Sequence[str]) -> None:
    """Give each measured candidate `speedup`: how many times faster it is than the fastest of `reference`."""
    times = [per_item(candidate) for candidate in candidates if candidate["name"] in reference]
    fastest = min((t for t in times if t is not None), default=None)
    for candidate in candidates:
        own = per_item(candidate)
        if own is not None:
            candidate["forward"]["speedup"] = None if fastest is None else fastest / own


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
        "in graphs": _in_graphs,
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


def _in_graphs(timed: Row) -> str:
    """Return the cell of a step that replays from a CUDA graph, with its speed-up over the same reference."""
    graphs = timed.get("graphs")
    if not graphs:
        return "-"
    faster = timed.get("speedup") and timed["speedup"] * timed["median_ms"] / graphs["median_ms"]
    return f"{graphs['median_ms'] / 1e3:.4f}" + (f" ({faster:.2f}x)" if faster else "")


def speedup(timed: Row) -> str:
    """Return the cell that says how many times faster than the row's reference a candidate is."""
    return "-" if timed.get("speedup") is None else f"{timed['speedup']:.2f}x"


def _gib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**30:.2f} GiB"


def _lists(row: Row) -> list[str]:
    """Return a list of what must hold and whether it does, and a list of why candidates were left out."""
    musts = [f"- {'holds' if m['holds'] else '**missed**'}: {m['text']}{_value(m)}" for m in row.get("musts", ())]
    reasons = [f"- {c['name']} is left out: {c['reason']}" for c in row["candidates"] if c["reason"]]
    return ["\n".join(lines) for lines in (musts, reasons) if lines]


def _value(must: Row) -> str:
    return "" if must["value"] is None else f": {must['value']:.2f}x"
