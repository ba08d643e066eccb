"""Untrained fidelity on both embedded teachers: errors of predictions, and pictures beside the dense ones."""

from collections.abc import Sequence
from typing import Any

import torch

from vision_attn.bench.measure import Measurement
from vision_attn.bench.quality.contenders import DEFAULT, DISCS, MULTIPOLES, POOLED, SPREAD, Contender
from vision_attn.bench.quality.drawing import DrawingCase
from vision_attn.bench.quality.fidelity import TIMING, Bound, fidelity_row, fidelity_table

__all__ = ["CANDIDATES", "MEASURES", "PLOTTED", "TIMING", "TITLE", "cases", "row", "table"]

TITLE = (
    "Converted teachers that had no training, beside themselves with dense attention: the same prompts, noise and 10 "
    "steps with guidance, in float32. `KD` is the squared error of the prediction over the square of the teacher's, in "
    "the mean over the teacher's own steps; `PSNR` that of the pictures to the dense ones; `keys` the keys that a "
    "token of the finest grid meets, in the mean"
)
CANDIDATES: Sequence[Contender] = tuple(dict.fromkeys((*DISCS, *POOLED, *MULTIPOLES, *SPREAD, DEFAULT)))
MEASURES = {"keys": ("keys", ".0f"), "kd_error": ("KD", ".2g"), "psnr_db": ("PSNR", ".1f")}
PLOTTED = ("kd_error", "KD error of the prediction")
_SIZES = {128: 8, 256: 8, 512: 2}  # pixels: prompts
_BOUNDS = {
    ("base", 128): (
        Bound(DEFAULT.name, "kd_error", most=3e-4),
        Bound(DEFAULT.name, "psnr_db", least=33),
    ),
    ("base", 256): (
        Bound(DEFAULT.name, "kd_error", most=6e-3),
        Bound(DEFAULT.name, "psnr_db", least=18.5),
    ),
    ("unet", 256): (Bound(DEFAULT.name, "psnr_db", least=23.5),),
}


def cases(device: torch.device, quick: bool = False) -> list[DrawingCase]:
    """Return the cases for a device; a quick run on a CPU draws two pictures of two steps with few contenders."""
    if device.type == "cpu" and quick:
        return [DrawingCase("nano", 128, (*DISCS, DEFAULT), prompts=1, steps=2)]
    sizes = {128: 8} if quick else _SIZES
    return [
        DrawingCase(teacher, pixels, tuple(CANDIDATES), prompts, bounds=_BOUNDS.get((teacher, pixels), ()))
        for pixels, prompts in sizes.items() for teacher in ("base", "unet")
    ]  # fmt: skip


def row(case: DrawingCase, measurement: Measurement) -> dict[str, Any]:
    """Measure one case; see `fidelity_row`."""
    return fidelity_row(case, measurement)


def table(document: dict[str, Any], groups: Sequence[str] = ()) -> str:
    """Return the stored result as Markdown."""
    return fidelity_table(document, MEASURES, groups)
