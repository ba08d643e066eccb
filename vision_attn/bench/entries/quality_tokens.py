"""Untrained fidelity of super tokens, mixtures of heads, chosen blocks, halos and InLine on both embedded teachers."""

from collections.abc import Sequence

import torch

from vision_attn.bench.entries.quality_teachers import MEASURES, PLOTTED, row, table
from vision_attn.bench.quality.contenders import BLOCKS, CURVES, DEFAULT, DISCS, EIGHT_BITS, Contender, multipole
from vision_attn.bench.quality.drawing import CALIBRATION, DrawingCase
from vision_attn.bench.quality.fidelity import TIMING

__all__ = ["CANDIDATES", "MEASURES", "PLOTTED", "TIMING", "TITLE", "cases", "row", "table"]

TITLE = (
    "Converted teachers that had no training, beside themselves with dense attention, as in `quality_teachers`. Unless "
    f"its name says otherwise, PARO was calibrated on {len(CALIBRATION)} other pictures of as many steps. Multipole "
    "attention is there at about as many keys as PARO's quarter and two thirds of the blocks"
)
CANDIDATES: Sequence[Contender] = (
    *DISCS, *EIGHT_BITS, multipole(4, 4, 8, spread=0.5), DEFAULT, *BLOCKS, *CURVES["Halo"], *CURVES["SuperToken"],
    *CURVES["MoH"], *CURVES["InLine"],
)  # fmt: skip


def cases(device: torch.device, quick: bool = False) -> list[DrawingCase]:
    """Return the cases for a device; a CPU draws fewer pictures in fewer steps."""
    if device.type == "cpu" and quick:
        return [DrawingCase("nano", 128, (*BLOCKS[:2], DEFAULT), prompts=1, steps=2)]
    prompts, steps = (2, 4) if device.type == "cpu" else (8, 10)
    return [DrawingCase(teacher, 128, tuple(CANDIDATES), prompts, steps) for teacher in ("base", "unet")]
