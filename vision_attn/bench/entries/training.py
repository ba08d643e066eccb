"""Training steps of FLUX.1-dev with LoRA at 1024 to 8192 px: seconds, peak memory, and the GPU that holds it."""

from collections.abc import Sequence
from typing import Any

import torch

from vision_attn.bench.measure import Measurement
from vision_attn.bench.overview import Columns, Must, overview, speedup
from vision_attn.bench.pipelines.attention import DENSE, WAYS
from vision_attn.bench.pipelines.training import Fits, TrainingCase, smallest_card, training_row

TITLE = (
    "One training step at full size with random weights in bf16 (on a CPU a small twin in float32), batch 1: forward, "
    "backward and AdamW's update of LoRA layers of rank 16 on all projections of attention, whose weights are in the "
    "dtype of the model; with gradient checkpointing. `stock` is dense attention with PyTorch's choice of a backend, "
    "cuDNN's or its FlashAttention"
)
TIMING = (
    "Candidates one after another in one run, on one model. Models of one block of each kind, and of two of either "
    "kind, compile and give what a step is expected to take. Above 12 s it is extrapolated from them, else it is the "
    "median of 3 whole steps below 2 s, or one. Memory is the peak with all weights. A GPU holds a step if 1 GiB is "
    "left for CUDA."
)
_OURS = ("clear r16", "multipole", "linear local")
_FEW = _OURS[:2]
_DENSE = "stock cudnn"
CANDIDATES = tuple(WAYS[name] for name in (*DENSE, *_OURS))
_MUSTS: dict[str, tuple[Any, ...]] = {
    "flux-4096": tuple(Must(name, DENSE, 3.0) for name in _OURS) + tuple(Fits(name, 80) for name in _OURS),
    "flux-float8-offloaded-8192": tuple(Fits(name, 141) for name in _FEW),
}


def cases(device: torch.device, quick: bool = False) -> list[TrainingCase]:
    """Return the cases for a device; a CPU gets a small twin in float32."""
    if device.type == "cpu":
        ways = ("stock sdpa", _DENSE, *_OURS)
        return [
            TrainingCase(64, ways, small=True), TrainingCase(64, ways, float8=True, small=True),
            TrainingCase(64, ways, offloaded=True, small=True),
        ][: 1 if quick else None]  # fmt: skip
    # dense attention comes last, because an error of the device ends a run; and so does the case that takes a minute
    found = [TrainingCase(pixels, (*_OURS, _DENSE)) for pixels in (1024, 2048)]
    found.append(TrainingCase(4096, (*_OURS, *DENSE)))  # where cuDNN's backward, PyTorch's choice too, loses the device
    if quick:
        return found[:1]
    found += [TrainingCase(pixels, _FEW, float8=True) for pixels in (4096, 8192)]
    found += [TrainingCase(pixels, (*_FEW, _DENSE), float8=True) for pixels in (1024, 2048)]
    found += [TrainingCase(pixels, _FEW, float8=True, offloaded=True) for pixels in (8192, 4096)]
    found += [TrainingCase(8192, (*_OURS, _DENSE))]
    return [_judged(case) for case in found]


def _judged(case: TrainingCase) -> TrainingCase:
    return TrainingCase(case.pixels, case.ways, case.float8, case.offloaded, _MUSTS.get(case.name, ()))


def row(case: TrainingCase, measurement: Measurement) -> dict[str, Any]:
    """Measure one case; see `training_row`."""
    return training_row(case, measurement.device, chosen=measurement.chosen)


def table(document: dict[str, Any], groups: Sequence[str] = ()) -> str:
    """Return the stored result as Markdown."""
    columns: Columns = {
        "s/step": lambda timed: f"{timed['median_ms'] / 1e3:.3f}{' (extrapolated)' * timed['extrapolated']}",
        "speed-up": speedup,
        "memory": lambda timed: f"{timed['memory']['bytes'] / 2**30:.1f} GiB" if timed["memory"] else "-",
        "fits in": fitting,
    }
    return overview(document, columns, groups)


def fitting(timed: dict[str, Any]) -> str:
    """Return the cell of the smallest GPU that holds a step."""
    if not timed["memory"]:
        return "-"
    card = smallest_card(timed["memory"]["bytes"])
    return f"{card} GB" if card else "none"
