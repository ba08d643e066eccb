"""Efficient attention for pretrained vision models: one call converts a diffusers pipeline or a timm ViT."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vision_attn.conversion import Conversion, convert, load, use_grid
    from vision_attn.estimation import advise, estimate
    from vision_attn.grid import Grid
    from vision_attn.highres import Options, generate_highres
    from vision_attn.hosts import Host
    from vision_attn.processors import (
        RALA,
        Agent,
        AgentSD,
        Clear,
        Halo,
        HiLo,
        InLine,
        LinearLocal,
        LinFusion,
        MoH,
        Multipole,
        Neighborhood,
        Paro,
        Schedule,
        Softmax,
        SuperToken,
    )

__version__ = "0.1.0"

_PUBLIC = {
    "conversion": ("Conversion", "convert", "load", "use_grid"),
    "estimation": ("advise", "estimate"),
    "grid": ("Grid",),
    "highres": ("Options", "generate_highres"),
    "hosts": ("Host",),
    "processors": (
        "RALA",
        "Agent",
        "AgentSD",
        "Clear",
        "Halo",
        "HiLo",
        "InLine",
        "LinFusion",
        "LinearLocal",
        "MoH",
        "Multipole",
        "Neighborhood",
        "Paro",
        "Schedule",
        "Softmax",
        "SuperToken",
    ),
}
_PLACE = {name: folder for folder, names in _PUBLIC.items() for name in names}

__all__ = [
    "RALA",
    "Agent",
    "AgentSD",
    "Clear",
    "Conversion",
    "Grid",
    "Halo",
    "HiLo",
    "Host",
    "InLine",
    "LinFusion",
    "LinearLocal",
    "MoH",
    "Multipole",
    "Neighborhood",
    "Options",
    "Paro",
    "Schedule",
    "Softmax",
    "SuperToken",
    "advise",
    "convert",
    "estimate",
    "generate_highres",
    "load",
    "use_grid",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACE:
        raise AttributeError(f"module 'vision_attn' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"vision_attn.{_PLACE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
