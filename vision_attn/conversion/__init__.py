"""Joins a processor to a host: `convert`, its plan, the rerouting of attention, grids of a running forward, state."""

from vision_attn.conversion.conversion import Conversion, convert, load, use_grid

__all__ = ["Conversion", "convert", "load", "use_grid"]
