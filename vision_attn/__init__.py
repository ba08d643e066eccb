"""Efficient attention for pretrained vision models: one call converts a diffusers pipeline or a timm ViT."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vision_attn.conversion import convert, load, use_grid
    from vision_attn.converted import Conversion
    from vision_attn.families import Host
    from vision_attn.grid import Grid
    from vision_attn.processors import Clear, Neighborhood, Softmax

__version__ = "0.1.0"

_PUBLIC = {
    "Clear": "processors.clear",
    "Conversion": "converted",
    "Grid": "grid",
    "Host": "families.host",
    "Neighborhood": "processors.neighborhood",
    "Softmax": "processors.softmax",
    "convert": "conversion",
    "load": "conversion",
    "use_grid": "conversion",
}

__all__ = ["Clear", "Conversion", "Grid", "Host", "Neighborhood", "Softmax", "convert", "load", "use_grid"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'vision_attn' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"vision_attn.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
