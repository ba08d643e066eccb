"""Draws results of fidelity: the error of each attention against the keys that a token meets. Needs matplotlib."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vision_attn.bench.quality.contenders import CURVES, DISTILLED

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
    from matplotlib import rc_context  # noqa: PLC0415, an extra
    from matplotlib.figure import Figure  # noqa: PLC0415

    out.mkdir(parents=True, exist_ok=True)
    written = []
    for row in document["rows"]:
        figure = Figure(figsize=(9, 5), layout="constrained")
        axis = figure.subplots()
        for name, points in series(row, measure).items():
            x, y = zip(*points, strict=True)
            i, trained = list(CURVES).index(name.removesuffix(DISTILLED)), name.endswith(DISTILLED)
            style: Mapping[str, Any] = dict(color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)])
            style = {**style, "linestyle": "--" if trained else "-"}
            axis.plot(x, y, label=name, linewidth=1.2, markersize=6, **style)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("keys that a token meets, in the mean")
        axis.set_ylabel(label)
        axis.grid(True, which="major", color="#dddddd", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside right center", frameon=False, fontsize=8)
        figure.suptitle(f"{row['group']}, {row['label']}, {document['device']}", fontsize=11)
        written.append(out / f"{document['entry']}_{row['case'].rpartition('-')[2]}.svg")
        with rc_context({"svg.fonttype": "none"}):  # letters as text, not as curves: a third of the size
            figure.savefig(written[-1], metadata={"Date": None})
    return written


def series(row: Row, measure: str) -> dict[str, list[tuple[float, float]]]:
    """Collect the lines of a plot: (keys, error) by processor, in the order of the keys; distilled ones by themselves.

    Settings that are in no curve of `contenders.py` are left out.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    curve_of = {contender.name: curve for curve, members in CURVES.items() for contender in members}
    for candidate in row["candidates"]:
        name = candidate["name"].removesuffix(DISTILLED)
        if name in curve_of and candidate["quality"] and candidate["quality"][measure] > 0:
            curve = curve_of[name] + DISTILLED * (name != candidate["name"])
            found.setdefault(curve, []).append((candidate["quality"]["keys"], candidate["quality"][measure]))
    return {curve: sorted(found[curve]) for name in CURVES for curve in (name, name + DISTILLED) if curve in found}
