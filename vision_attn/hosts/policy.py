"""Which layers a conversion is for, and which processor each of them gets."""

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vision_attn.processors.base import AttnSpec

Where = str | re.Pattern[str] | Callable[[str], bool] | None
Specs = AttnSpec | Sequence[AttnSpec] | Mapping[str, AttnSpec]
"""One spec for all layers; several that take turns, layer by layer; or one for each pattern of names."""


def selector(where: Where) -> Callable[[str], bool]:
    """Turn `where` into a predicate on layer names.

    Raises:
        TypeError: If it is none of the accepted kinds.
    """
    if where is None:
        return lambda name: True
    if isinstance(where, str):
        return lambda name: fnmatch.fnmatchcase(name, where)
    if isinstance(where, re.Pattern):
        return lambda name: where.search(name) is not None
    if callable(where):
        return where
    raise TypeError(
        f"where must be a pattern such as '*.attn1', a compiled regular expression or a predicate, got {where!r}"
    )


def check_specs(specs: Any) -> None:
    """Refuse what is no spec, nor several.

    Raises:
        TypeError: If it is none of the accepted kinds.
        ValueError: If there is none in it.
    """
    several = isinstance(specs, Mapping) or (isinstance(specs, Sequence) and not isinstance(specs, str))
    each = (list(specs.values()) if isinstance(specs, Mapping) else list(specs)) if several else [specs]
    for spec in each:
        if not isinstance(spec, AttnSpec):
            raise TypeError(f"spec must be a processor's spec such as Clear(radius=16), got {spec!r}")
    if not each:
        raise ValueError("no spec is given: give one, a sequence of them, or a dictionary of patterns and specs")


def assign(specs: Specs, names: Sequence[str]) -> dict[str, AttnSpec]:
    """Return the spec of each layer.

    Args:
        specs: One for all; a sequence, whose members take turns with the depth; or a dictionary of patterns as in a
            shell, of which the first that matches counts. Layers that none matches are left out.
        names: The selected layers, in order of depth.

    Raises:
        ValueError: If a pattern matches no layer.
    """
    if isinstance(specs, AttnSpec):
        return dict.fromkeys(names, specs)
    if not isinstance(specs, Mapping):
        return {name: specs[depth % len(specs)] for depth, name in enumerate(names)}
    assigned: dict[str, AttnSpec] = {}
    for pattern, spec in specs.items():
        found = fnmatch.filter(names, pattern)
        if not found and names:
            raise ValueError(f"the pattern {pattern!r} matches none of the {len(names)} layers {names[0]}, ...")
        for name in found:
            assigned.setdefault(name, spec)
    return {name: assigned[name] for name in names if name in assigned}
