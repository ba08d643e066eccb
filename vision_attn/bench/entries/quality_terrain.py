"""Fidelity of a pretrained diffusion UNet that draws height maps: predictions by noise level, and the maps."""

from collections.abc import Sequence
from typing import Any

import torch

from vision_attn.bench.measure import Measurement
from vision_attn.bench.quality.contenders import DEFAULT, DISCS, EVERY, MULTIPOLES, POOLED, SPREAD, Contender, distilled
from vision_attn.bench.quality.fidelity import TIMING, Bound, fidelity_row, fidelity_table
from vision_attn.bench.quality.terrain import SIGMAS, TerrainCase
from vision_attn.bench.quality.terrain import fetch_weights as download
from vision_attn.bench.quality.weights import Sources

__all__ = ["CANDIDATES", "MEASURES", "PLOTTED", "TIMING", "TITLE", "cases", "download", "row", "table"]

TITLE = (
    "A pretrained diffusion UNet of height maps (the one in adaptive-terrain-diffusion 0.4.2) whose nine attentions at "
    "32 x 32 were replaced, beside itself with dense attention, in float32. The error of the prediction for noise of "
    "each level is its root mean square over that of the dense prediction. `PSNR` and `metres` compare the maps that "
    "are drawn in one step from noise, their values and their heights. `keys` are the keys that a token meets, in the "
    "mean"
)
CANDIDATES: Sequence[Contender] = tuple(dict.fromkeys((*EVERY, *POOLED, *MULTIPOLES, *SPREAD)))
MEASURES = {"keys": ("keys", ".0f")} | {f"sigma_{sigma:g}": (f"sigma {sigma:g}", ".2g") for sigma in SIGMAS}
MEASURES |= {"psnr_db": ("map, PSNR", ".1f"), "metres": ("map, metres", ".2g")}
PLOTTED = ("sigma_80", "error of the prediction at sigma 80, relative")


def cases(device: torch.device, quick: bool = False, sources: Sources | None = None) -> list[TerrainCase]:
    """Return the one case."""
    sources = sources or Sources()
    if quick:
        return [TerrainCase((*DISCS, DEFAULT), samples=1, drawn=1, sources=sources)]
    contenders = (*CANDIDATES, *distilled(sources.adapters, "terrain"))
    return [TerrainCase(contenders, bounds=(Bound(DEFAULT.name, "sigma_80", most=0.01),), sources=sources)]


def row(case: TerrainCase, measurement: Measurement) -> dict[str, Any]:
    """Measure the case; see `fidelity_row`."""
    return fidelity_row(case, measurement)


def table(document: dict[str, Any], groups: Sequence[str] = ()) -> str:
    """Return the stored result as Markdown."""
    return fidelity_table(document, MEASURES, groups)
