"""Draws results of whole models: time and memory against resolution, a picture per architecture. Needs matplotlib."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vision_attn.bench.document import read_document
from vision_attn.bench.overview import per_item
from vision_attn.bench.quality.plot import COLOURS, MARKERS, plot_fidelity
from vision_attn.bench.run import find_entries

Row = dict[str, Any]


def plot_document(path: Path, out: Path) -> list[Path]:
    """Draw a stored result of whole models, or of fidelity.

    Args:
        path: What an entry such as `pipelines` or `quality_dinov2` stored.
        out: Folder of the pictures, `<entry>_<architecture>.svg` or `<entry>_<size>.svg`; is made.

    Returns:
        The files written, one for each group of the result, or for each case.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not a result of either kind, holds no times, or matplotlib is not installed.
    """
    document = read_document(path)
    if any("quality" in candidate for row in document["rows"] for candidate in row["candidates"]):
        _refuse_without_matplotlib()
        measure, label = find_entries(document["entry"])[0].PLOTTED
        return plot_fidelity(document, measure, label, out)
    rows = [row for row in document["rows"] if _size(row) is not None]
    if not any(candidate.get("forward") for row in rows for candidate in row["candidates"]):
        raise ValueError(f"{path} holds no times of whole models by resolution: {document['entry']} has no plot")
    _refuse_without_matplotlib()
    from matplotlib.figure import Figure  # noqa: PLC0415, an extra

    out.mkdir(parents=True, exist_ok=True)
    written, every = [], _names(rows)
    for group in dict.fromkeys(row["group"] for row in rows):
        own = [row for row in rows if row["group"] == group]
        figure = Figure(figsize=(12, 4.6), layout="constrained")
        # a candidate has the same colour in all pictures, if there are enough colours
        looks = _looks(every if len(_others(every)) <= len(COLOURS) else _names(own))
        _draw(figure, own, looks, f"{group}, {document['device']}, torch {document['versions']['torch']}")
        word = "".join(
            c if c.isalnum() or c in ".-" else "_" for c in own[0]["case"].rpartition(f"-{_size(own[0])}")[0]
        )
        written.append(out / f"{document['entry']}_{word}.svg")
        figure.savefig(written[-1], metadata={"Date": None})
    return written


def _refuse_without_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401, PLC0415, an extra
    except ImportError as error:
        raise ValueError(f"plots need matplotlib ({error}): pip install 'vision_attn[bench]'") from error


def series(rows: Sequence[Row], value: Callable[[Row], float | None]) -> dict[tuple[str, bool], list[tuple]]:
    """Collect lines of a plot.

    Returns:
        By candidate and whether it is compiled: (pixels, value, extrapolated) of the rows in which it was measured.
        Replays of CUDA graphs are left out, because their lines would lie on those of what they replay. So are
        candidates that were compiled at only one of several sizes: one point is not a line.
    """
    found: dict[tuple[str, bool], list[tuple]] = {}
    for row in sorted(rows, key=lambda row: _size(row) or 0):
        for candidate in row["candidates"]:
            y = value(candidate) if candidate.get("forward") else None
            if y is not None and not candidate["name"].endswith(" graph"):
                name, compiled = candidate["name"], row["shape"].get("mode") == "compiled"
                if name.endswith((" eager", " compiled")):
                    name, _, mode = name.rpartition(" ")
                    compiled = mode == "compiled"
                point = _size(row), y, bool(candidate["forward"].get("extrapolated"))
                found.setdefault((name, compiled), []).append(point)
    several = len({_size(row) for row in rows}) > 1
    return {key: points for key, points in found.items() if len(points) > 1 or not (several and key[1])}


def _size(row: Row) -> int | None:
    return row["shape"].get("pixels", row["shape"].get("size"))


def _seconds(candidate: Row) -> float | None:
    ms = per_item(candidate)
    return None if ms is None else ms / 1e3


def _memory(candidate: Row) -> float | None:
    timed = candidate["forward"]
    memory = timed.get("memory")
    if memory is None:
        return None
    # several classifiers lie on the GPU at once, so that the total says nothing; a denoiser is alone there
    return (memory["above"] / timed["batch"] if "batch" in timed else memory["bytes"]) / 2**30


def _names(rows: Sequence[Row]) -> list[str]:
    """Return the candidates that are drawn."""
    groups = dict.fromkeys(row["group"] for row in rows)
    drawn = [series([row for row in rows if row["group"] == group], _seconds) for group in groups]
    return list(dict.fromkeys(name for lines in drawn for name, _ in lines))


def _draw(figure: Any, rows: Sequence[Row], looks: dict[str, tuple[str, str]], title: str) -> None:
    classifiers = any("batch" in (c.get("forward") or {}) for row in rows for c in row["candidates"])
    what = "an image" if classifiers else "a step"
    panels = [(_seconds, f"seconds {what}"), (_memory, "GiB above weights an image" if classifiers else "peak GiB")]
    panels = [panel for panel in panels if series(rows, panel[0])]
    sizes = sorted({size for row in rows if (size := _size(row)) is not None})
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (value, label) in zip(axes, panels, strict=True):
        for (name, compiled), points in series(rows, value).items():
            colour, marker = looks[name]
            x, y, extrapolated = zip(*points, strict=True)
            style: dict[str, Any] = dict(color=colour, linestyle="--" if compiled else "-", linewidth=1.5, zorder=2)
            axis.plot(x, y, label=f"{name}{', compiled' * compiled}", **style)
            for at, height, hollow in zip(x, y, extrapolated, strict=True):
                face = "white" if hollow else colour
                axis.plot(at, height, marker, color=colour, markerfacecolor=face, markersize=6, zorder=3)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        heights = [y for points in series(rows, value).values() for _, y, _ in points]
        ticks = _ticks(min(heights), max(heights))
        axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_ylim(ticks[0], ticks[-1])
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
        axis.set_xlabel("side of the image in pixels")
        axis.set_title(label, fontsize=10)
        axis.grid(True, which="major", color="#dddddd", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    hollow = any(hollow for points in series(rows, _seconds).values() for _, _, hollow in points)
    figure.suptitle(title + (" (hollow: extrapolated from blocks)" if hollow else ""), fontsize=11)


def _ticks(low: float, high: float) -> list[float]:
    """Return 1, 2, 5, 10, ... from below `low` to above `high`."""
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    steps = [step * 10.0**decade for decade in decades for step in (1, 2, 5)]
    first = max(i for i, step in enumerate(steps) if step <= low)
    last = min(i for i, step in enumerate(steps) if step >= high)
    return steps[first : max(last, first + 1) + 1]


def _looks(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Give every candidate a colour and a marker; stock ones are black and grey."""
    others = _others(names)
    stock = [name for name in names if name not in others]
    looks = {name: (("black", "#777777")[i % 2], "o") for i, name in enumerate(stock)}
    count = len(COLOURS)
    return looks | {name: (COLOURS[i % count], MARKERS[i % count]) for i, name in enumerate(others)}


def _others(names: Sequence[str]) -> list[str]:
    return [name for name in names if not name.startswith("stock")]
