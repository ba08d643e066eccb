"""Whole classifiers: NAT, DiNAT, Agent- and InLine-Swin beside Swin, LITv2 and RAVLT beside PVTv2, dense twins."""

from collections.abc import Sequence
from typing import Any

import torch

from vision_attn.bench.measure import Measurement
from vision_attn.bench.models import CONVERTED, Entrant, ModelCase, model_row, twin_of
from vision_attn.bench.overview import images_table

TITLE = (
    "Image classifiers with random weights, one forward in bf16 and channels-last memory. A dense twin is the same "
    "model with softmax attention over all cells in the place of its local or linear attention (the last stages of "
    "Agent-Swin and InLine-Swin have shifted windows in both); nat_tiny and dinat_tiny have the same dense twin"
)
TIMING = (
    "Medians, candidates in turns in one run, eager and by `torch.compile(dynamic=False)`; `graph` is the same "
    "replayed from a CUDA graph, so that the host takes no time to launch it. cuDNN's autotuner is on. Speed-ups are "
    "images per second over those of the row's reference in the same mode. Memory is the peak above the weights."
)
SWIN, PVT = "swin_tiny_patch4_window7_224", "pvt_v2_b2"
VIT, VIT_SIDES = "vit_small_patch14_dinov2", (518, 1036, 2072)
_NAT, _LINEAR = ("nat_tiny", "dinat_tiny"), ("litv2_small", "ravlt_small")


def _case(group: str, models: Sequence[str], reference: str, size: int, factor: float, **fields: Any) -> ModelCase:
    """Return a row in which NAT and DiNAT must be `factor` times as fast as the reference.

    At 1024 px every model must also be faster than its dense twin.
    """
    factors = [(model, reference, factor) for model in models if model in _NAT]
    entrants = [*models, reference]
    if size >= 1024:
        twins = {model: twin_of("nat_tiny" if model == "dinat_tiny" else model) for model in models}  # they share one
        factors += [(model, twin, 1.0) for model, twin in twins.items()]
        entrants += dict.fromkeys(twins.values())
    batch = fields.pop("batch", 16 if size >= 1024 else 128)
    return ModelCase(group, size, batch, tuple(entrants), reference, tuple(factors), **fields)


def cases(device: torch.device, quick: bool = False) -> list[ModelCase]:
    """Return the cases for a device; a CPU gets small ones in float32."""
    if device.type == "cpu":
        small: dict[str, Any] = dict(batch=2, dtype="float32")
        vit = "vit_tiny_patch16_224"
        every = [_case("Nat", ("nat_mini",), SWIN, 64, 1.0, **small)]
        more = ModelCase("ViT, converted", 512, 1, (vit, *(f"{vit}{name}" for name in CONVERTED)), vit, dtype="float32")
        return every if quick else [*every, _case("Linear", ("ravlt_tiny",), "pvt_v2_b0", 64, 1.0, **small), more]
    sizes = ((224, 1.0), (384, 1.3), (1024, 1.3))
    others = "agent_swin_tiny", "inline_swin_tiny"
    swins = [_case("NAT, DiNAT, Agent- and InLine-Swin", (*_NAT, *others), SWIN, size, f) for size, f in sizes]
    pvts = [_case("Linear: LITv2 and RAVLT", _LINEAR, PVT, size, f) for size, f in sizes]
    names = VIT, *(f"{VIT}{name}" for name in CONVERTED)
    vits = [ModelCase("ViT-S/14 (DINOv2), converted", side, 4 if side > 2000 else 16, names, VIT) for side in VIT_SIDES]
    return [*swins[:2], *pvts[:2], swins[2], pvts[2], *vits] if not quick else swins[:2]


CANDIDATES: Sequence[Entrant] = tuple(
    {e.name: e for kind in ("cuda", "cpu") for case in cases(torch.device(kind)) for e in case.entrants}.values()
)
table = images_table


def row(case: ModelCase, measurement: Measurement) -> dict[str, Any]:
    """Measure one case; see `model_row`."""
    return model_row(case, measurement.device, rounds=measurement.rounds, chosen=measurement.chosen)
