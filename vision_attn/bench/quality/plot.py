"""Draws results of fidelity: the error of each attention against the keys that a token meets. Needs matplotlib."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]
COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B", "#7F7F00", "#6A3D9A", "#A50026",
)  # fmt: skip
MARKERS = "osD^vP*Xphd<>"


def plot_fidelity(document: Row, measure: str, label: str, out: Path) -> list[Path]:
    """Draw a picture for each case of a stored result.

    Args:
        document: What an entry `quality_*` stored.
        measure: Which measure is drawn, an error.
        label: What the axis says of it.
        out: Folder of the pictures, `<entry>_<case>.svg`; is made.

    Returns:
        The files written.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415, an extra

    out.mkdir(parents=True, exist_ok=True)
    written = []
    for row in document["rows"]:
        figure = Figure(figsize=(9, 5), layout="constrained")
        axis = figure.subplots()
        for i, (name, points) in enumerate(series(row, measure).items()):
            x, y = zip(*points, strict=True)
            style: Mapping[str, Any] = dict(color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)])
            axis.plot(x, y, label=name, linewidth=1.2, markersize=6, **style)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("keys that a token meets, in the mean")
        axis.set_ylabel(label)
        axis.grid(True, which="major", color="#dddddd", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside right center", frameon=False, fontsize=8)
        figure.suptitle(f"{row['group']}, {row['label']}, untrained", fontsize=11)
        written.append(out / f"{document['entry']}_{row['case'].rpartition('-')[2]}.svg")
        figure.savefig(written[-1], metadata={"Date": None})
    return written


def series(row: Row, measure: str) -> dict[str, list[tuple[float, float]]]:
    """Collect the lines of a plot: (keys, error) by kind of attention, in the order of the keys.

    Settings of one kind that differ in what they cost, a radius or a number of exact cells, are one line.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for candidate in row["candidates"]:
        if candidate["quality"] and candidate["quality"][measure] > 0:
            kind = re.sub(r" (r|k)\d+| exact \d+", "", candidate["name"])
            found.setdefault(kind, []).append((candidate["quality"]["keys"], candidate["quality"][measure]))
    return {kind: sorted(points) for kind, points in found.items()}
