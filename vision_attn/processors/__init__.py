"""One file, one paper: the specs that `convert` takes, by name."""

from vision_attn.processors.base import AttnSpec, Layer, Processor
from vision_attn.processors.clear import Clear
from vision_attn.processors.neighborhood import Neighborhood
from vision_attn.processors.softmax import Softmax

SPECS: dict[str, type[AttnSpec]] = {spec.__name__.lower(): spec for spec in (Clear, Neighborhood, Softmax)}

__all__ = ["SPECS", "AttnSpec", "Clear", "Layer", "Neighborhood", "Processor", "Softmax", "make_spec"]


def make_spec(name: str, **fields: object) -> AttnSpec:
    """Return the spec called `name`, in any case, with its fields set.

    Raises:
        ValueError: If no spec has that name; the known ones are listed.
        TypeError: If the spec has no such field.
    """
    if not isinstance(name, str) or name.lower() not in SPECS:
        raise ValueError(f"unknown processor {name!r}: known are {', '.join(sorted(SPECS))}")
    spec = SPECS[name.lower()]
    known = list(getattr(spec, "__dataclass_fields__", {}))
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise TypeError(f"{spec.__name__} has no field {', '.join(unknown)}: it has {', '.join(known) or 'none'}")
    return spec(**fields)
