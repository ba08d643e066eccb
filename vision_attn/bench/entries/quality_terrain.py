"""Untrained fidelity of a pretrained diffusion UNet that draws height maps, by noise level."""

from collections.abc import Sequence
from typing import Any

import torch

from vision_attn.bench.measure import Measurement
from vision_attn.bench.quality.contenders import DEFAULT, DISCS, MULTIPOLES, OTHERS, POOLED, SPREAD, Contender
from vision_attn.bench.quality.fidelity import TIMING, Bound, fidelity_row, fidelity_table
from vision_attn.bench.quality.terrain import SIGMAS, TerrainCase
from vision_attn.bench.quality.weights import TERRAIN, fetch

__all__ = ["CANDIDATES", "MEASURES", "PLOTTED", "TIMING", "TITLE", "cases", "download", "row", "table"]

TITLE = (
    "A pretrained diffusion UNet of height maps (the one in adaptive-terrain-diffusion 0.4.2) whose nine attentions at "
    "32 x 32 were replaced, beside itself with dense attention, in float32. The error of the prediction for noise of "
    "each level is its root mean square over that of the dense prediction. `keys` are the keys that "
    "a token meets, in the mean"
)
CANDIDATES: Sequence[Contender] = tuple(dict.fromkeys((*DISCS, *POOLED, *OTHERS, *MULTIPOLES, *SPREAD, DEFAULT)))
MEASURES = {"keys": ("keys", ".0f")} | {f"sigma_{sigma:g}": (f"sigma {sigma:g}", ".2g") for sigma in SIGMAS}
PLOTTED = ("sigma_80", "error of the prediction at sigma 80, relative")


def cases(device: torch.device, quick: bool = False) -> list[TerrainCase]:
    """Return the one case."""
    if quick:
        return [TerrainCase((*DISCS, DEFAULT), samples=1)]
    return [TerrainCase(tuple(CANDIDATES), bounds=(Bound(DEFAULT.name, "sigma_80", most=0.01),))]


def row(case: TerrainCase, measurement: Measurement) -> dict[str, Any]:
    """Measure the case; see `fidelity_row`."""
    return fidelity_row(case, measurement)


def table(document: dict[str, Any], groups: Sequence[str] = ()) -> str:
    """Return the stored result as Markdown."""
    return fidelity_table(document, MEASURES, groups)


def download() -> None:
    """Fetch the weights (39 MB)."""
    fetch(TERRAIN)
