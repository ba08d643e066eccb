"""One picture over several GPUs: seconds, bytes moved, memory and efficiency, beside one GPU, Ulysses and ring."""

import os
from dataclasses import replace
from typing import Any

import torch

from vision_attn.bench.measure import Measurement
from vision_attn.bench.overview import Columns, Must, overview, speedup
from vision_attn.bench.parallel import ALONE, GATHERED, OVER, SPECS, WAYS, ParallelCase, parallel_row, predict

TITLE = (
    "One step of one picture over several processes, of denoising or of a distillation, random weights in bf16 (on a "
    "CPU small twins in float32), batch 1. `alone` is one process, `over` moves what a processor needs, "
    "`gathered` moves all keys and computes the same; `ulysses` and `ring` are diffusers' own"
)
TIMING = (
    "Candidates one after another in one run of all processes: a warm-up, two of a distillation, then medians of 5 "
    "steps below 0.5 s, 3 below 2 s, 2 below 6 s, else one. A step above 15 s is extrapolated: one block of each kind "
    "is timed in its place. One GPU is measured in every process at once, and rank 0 reports. Bytes are those that "
    "rank 0 receives in a step; memory is the peak of rank 0 with all weights."
)
CANDIDATES = WAYS
_FLUX = ("clear r16", "multipole")
_EVERY = tuple(way.name for way in WAYS)


def _musts(pixels: int) -> tuple[Must, ...]:
    factor = {4096: 1.80, 8192: 1.88}.get(pixels)
    if factor is None:
        return ()
    musts = [Must(f"{name} {OVER}", (f"{name} {ALONE}",), factor) for name in _FLUX]
    musts += [Must(f"{name} {OVER}", (f"{name} {GATHERED}",), 1.15) for name in _FLUX]
    if pixels == 8192:
        musts += [Must(f"{name} {OVER}", ("stock ulysses",), 8.0) for name in _FLUX]
    return tuple(musts)


def _flux(pixels: int, small: bool = False) -> ParallelCase:
    ways = tuple(way.name for way in WAYS if way.spec is None or way.spec in [SPECS[name] for name in _FLUX])
    if pixels >= 8192:  # it would take minutes
        ways = tuple(name for name in ways if name != f"stock {ALONE}")
    return ParallelCase("flux", pixels, ways, () if small else _musts(pixels), small)


def _sdxl(pixels: int, small: bool = False) -> ParallelCase:
    """Convolutions, group norms and linear attention; diffusers has no plan for a UNet."""
    over, alone = f"linfusion {OVER}", f"linfusion {ALONE}"
    musts = (Must(over, (alone,), 1.75),) if pixels == 8192 else ()
    return ParallelCase("sdxl", pixels, (alone, over), musts, small)


def _training(pixels: int, small: bool = False) -> ParallelCase:
    """A teacher in Ulysses' way, and a student with halos."""
    ways = tuple(f"{name} {kind}" for name in _FLUX for kind in (ALONE, OVER))
    musts = () if small else tuple(Must(f"{name} {OVER}", (f"{name} {ALONE}",), 1.8) for name in _FLUX)
    return ParallelCase("flux", pixels, ways, musts, small, trains=True)


def _more(case: ParallelCase, count: int) -> tuple[Must, ...]:
    """Return what must hold on more GPUs: 85 % efficiency on 4, 75 % on 8."""
    factor = {4: 3.4, 8: 6.0}.get(count)
    if factor is None or case.name != "flux-8192":
        return ()
    return tuple(Must(f"{name} {OVER}", (f"{name} {ALONE}",), factor) for name in _FLUX)


_CASES = (_flux(4096), _flux(8192), _flux(16384), _sdxl(8192), _sdxl(16384), _training(2048))
_SMALL = (_flux(128, small=True), _sdxl(256, small=True), _training(128, small=True))
NAMES = tuple(replace(case, processes=count).name for count in (2, 4, 8) for case in (*_CASES, *_SMALL))


def cases(device: torch.device, quick: bool = False) -> list[ParallelCase]:
    """Return the cases for a device and as many processes as run; a CPU gets small twins in float32."""
    count = int(os.environ.get("WORLD_SIZE", "2"))
    chosen = _SMALL if device.type == "cpu" else _CASES
    found = [case if count == 2 else replace(case, processes=count, musts=_more(case, count)) for case in chosen]
    return found[:1] if quick else found


def row(case: ParallelCase, measurement: Measurement) -> dict[str, Any]:
    """Measure one case; see `parallel_row`."""
    return parallel_row(case, measurement.device, measurement.chosen, measurement.keep)


def table(document: dict[str, Any], groups: Any = ()) -> str:
    """Return a stored result as Markdown."""
    columns: Columns = {
        "s/step": lambda timed: f"{timed['median_ms'] / 1e3:.3f}{' (extrapolated)' * timed['extrapolated']}",
        "of 1 GPU": speedup,
        "efficiency": lambda timed: "-" if "efficiency" not in timed else f"{timed['efficiency']:.0%}",
        "received": lambda timed: "-" if "moved" not in timed else f"{timed['moved']['bytes'] / 1e9:.2f} GB",
        "memory": lambda timed: "-" if not timed["memory"] else f"{timed['memory']['bytes'] / 2**30:.1f} GiB",
    }
    return overview(document, columns, groups) + "\n" + predictions(document)


def predictions(document: dict[str, Any]) -> str:
    """Return what is predicted for more GPUs from the rows of two, as Markdown; beside it what was measured."""
    head = ["case", "processes", "s/step, predicted", "of 1 GPU, predicted", "efficiency, predicted", "measured"]
    lines = [head, ["---"] * len(head)]
    rows = {row["case"]: row for row in document["rows"]}
    for row in (row for row in document["rows"] if row["shape"]["processes"] == 2):
        for size in (4, 8):
            there = {
                c["name"]: c["forward"] for c in rows.get(f"{row['case']}-x{size}", {"candidates": ()})["candidates"]
            }
            for name, p in predict(row, size).items():
                timed = there.get(f"{name} {OVER}") or {}
                seen = f"{timed['median_ms'] / 1e3:.3f} s, {timed['efficiency']:.0%}" if "efficiency" in timed else "-"
                cells = f"{p['ms'] / 1e3:.3f}", f"{p['speedup']:.2f}x", f"{p['efficiency']:.0%}"
                lines.append([f"{row['case']}, {name}", str(size), *cells, seen])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
