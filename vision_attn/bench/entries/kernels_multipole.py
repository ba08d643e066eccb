"""Multipole attention at FLUX's shapes, beside a disc of radius 16 and dense attention; choice and means included."""

from typing import Any

import torch

from vision_attn.bench.measure import Measurement
from vision_attn.bench.multipole import CANDIDATES, MultipoleProblem
from vision_attn.grid import Grid
from vision_attn.processors.multipole import Multipole

__all__ = ["CANDIDATES", "TITLE", "cases", "row"]

TITLE = (
    "Multipole attention, the whole operator on `[B, N, H, D]` tensors with its means, its choice of cells and the "
    "rows of 512 text tokens. `int8` and `fp8` are the same in 8 bits, with what quantises. `clear r16` is local "
    "attention in a disc of radius 16, cuDNN computes dense attention"
)
_SETTINGS = tuple(
    Multipole(cell=cell, near=near, pool=pool, exact=exact)
    for cell, near, pool, exact in ((8, 1, 4, 0), (8, 1, 4, 4), (8, 1, 2, 0), (8, 1, 2, 4), (8, 0, 4, 8), (4, 1, 4, 8))
)
_ROUNDED = ("int8", "fp8")
_QUICK = ("multipole-128-c8-n1-p4-e4",)


def cases(device: torch.device, quick: bool = False) -> list[MultipoleProblem]:
    """Return the cases for a device; a CPU gets small ones in float32."""
    if device.type == "cpu":
        small: dict[str, Any] = dict(heads=2, head_dim=32, dtype="float32")
        side, both = 32 if quick else 64, ("ours", "SDPA")
        peers = *_ROUNDED, "SDPA"
        return [MultipoleProblem("Multipole", Grid(side, side, prefix=32), Multipole(), peers, both, **small)]
    every = [_case(side, spec) for side in (64, 128, 256) for spec in _SETTINGS]
    every += [_case(512, Multipole(exact=0)), _case(512, Multipole())]
    every += [_case(side, Multipole(spread=0)) for side in (128, 256)]  # what the bounds of the keys cost
    return [case for case in every if not quick or case.name in _QUICK]


def row(case: MultipoleProblem, measurement: Measurement) -> dict[str, Any]:
    """Measure one case; see `Measurement.row`."""
    return measurement.row(case, CANDIDATES)


def _case(side: int, spec: Multipole) -> MultipoleProblem:
    usual = spec in (Multipole(), Multipole(exact=0))
    peers = *(_ROUNDED if usual else ()), "clear r16", "cuDNN"
    backward = ("ours", "clear r16") if usual else ()
    return MultipoleProblem("Multipole", Grid(side, side, prefix=512), spec, peers, backward)
