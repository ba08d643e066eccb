"""LinFusion's residual networks of SDXL's and FLUX's layers, both of a layer at once, beside PyTorch's operators."""

from typing import Any

import torch

from vision_attn.bench.measure import Measurement
from vision_attn.bench.residual import CANDIDATES, ResidualProblem

__all__ = ["CANDIDATES", "TITLE", "cases", "row"]

TITLE = (
    "x + f(x) of both residual networks of a LinFusion layer, as wide as its tokens, and a sixteenth of that (the "
    "authors' for SDXL). `eager` is PyTorch's ten operators, which `auto` takes for `flux-64`. The host's time "
    "is that of `vision-attn bench host`"
)


def cases(device: torch.device, quick: bool = False) -> list[ResidualProblem]:
    """Return the cases for a device; a CPU gets a small one in float32."""
    if device.type == "cpu":
        return [ResidualProblem("16", 256, 64, 64, ("eager",), "float32")]
    sizes = [("sdxl-32", 1024, 1280), ("sdxl-64", 4096, 640), ("sdxl-128", 16384, 640), ("flux-64", 4608, 3072)]
    wide = [ResidualProblem(layer, tokens, channels, channels) for layer, tokens, channels in sizes]
    narrow = [ResidualProblem(layer, tokens, channels, channels // 16) for layer, tokens, channels in sizes]
    return wide if quick else [*wide, *narrow]


def row(case: ResidualProblem, measurement: Measurement) -> dict[str, Any]:
    """Measure one case; see `Measurement.row`."""
    return measurement.row(case, CANDIDATES)
