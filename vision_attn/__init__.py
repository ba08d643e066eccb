"""Efficient attention for pretrained vision models: one call converts a diffusers pipeline or a timm ViT."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vision_attn.conversion.conversion import Conversion, convert, load, use_grid
    from vision_attn.estimation.model import estimate
    from vision_attn.grid import Grid
    from vision_attn.highres.levels import generate_highres
    from vision_attn.hosts import Host
    from vision_attn.processors import RALA, Agent, Clear, HiLo, LinearLocal, LinFusion, Neighborhood, Softmax

__version__ = "0.1.0"

_PUBLIC = {
    "Agent": "processors.agent",
    "Clear": "processors.clear",
    "Conversion": "conversion",
    "Grid": "grid",
    "HiLo": "processors.hilo",
    "Host": "hosts.host",
    "LinFusion": "processors.linfusion",
    "LinearLocal": "processors.linear_local",
    "Neighborhood": "processors.neighborhood",
    "RALA": "processors.rala",
    "Softmax": "processors.softmax",
    "convert": "conversion",
    "estimate": "estimation",
    "generate_highres": "highres",
    "load": "conversion",
    "use_grid": "conversion",
}

__all__ = [
    "RALA",
    "Agent",
    "Clear",
    "Conversion",
    "Grid",
    "HiLo",
    "Host",
    "LinFusion",
    "LinearLocal",
    "Neighborhood",
    "Softmax",
    "convert",
    "estimate",
    "generate_highres",
    "load",
    "use_grid",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'vision_attn' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"vision_attn.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
