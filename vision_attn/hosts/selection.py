"""What a user means: which models of a pipeline, which of their layers, and which spec each of them gets."""

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from vision_attn.hosts import Host, is_known
from vision_attn.processors.base import AttnSpec

COMPONENTS = ("unet", "transformer", "transformer_2", "prior")

Where = str | re.Pattern[str] | Callable[[str], bool] | None
Specs = AttnSpec | Sequence[AttnSpec] | Mapping[str, AttnSpec]
"""One spec for all layers; several that take turns, layer by layer; or one for each pattern of names."""


def candidates_of(target: Any) -> dict[str, nn.Module]:
    """The models of `target` by component name; a compiled model stands for the one inside."""
    if isinstance(target, nn.Module):
        return {"": getattr(target, "_orig_mod", target)}
    parts = getattr(target, "components", None)
    if isinstance(parts, dict):
        return {name: getattr(part, "_orig_mod", part) for name, part in parts.items() if isinstance(part, nn.Module)}
    raise TypeError(f"cannot convert a {type(target).__name__}: give a diffusers pipeline or model, or a timm model")


def targets_of(target: Any, components: tuple[str, ...] | None, host: Host | None) -> dict[str, nn.Module]:
    """Choose the models to convert."""
    candidates = candidates_of(target)
    if "" in candidates:
        if components:
            raise ValueError(f"components={components} is for a pipeline, but a {type(target).__name__} was given")
        chosen = candidates
    elif components is not None:
        if isinstance(components, str) or not components:
            raise ValueError(f"components must be a tuple of names such as ('unet', 'controlnet'), got {components!r}")
        missing = [name for name in components if name not in candidates]
        if missing:
            raise ValueError(f"no component {', '.join(missing)} in the pipeline, only {', '.join(candidates)}")
        chosen = {name: candidates[name] for name in components}
    else:
        denoisers = {name: model for name, model in candidates.items() if name in COMPONENTS}
        chosen = {name: m for name, m in denoisers.items() if host is not None or is_known(m)} or denoisers
    if not chosen:
        parts = ", ".join(f"{name} ({type(model).__name__})" for name, model in candidates.items()) or "no models"
        raise ValueError(f"nothing to convert in this {type(target).__name__}: it has {parts}")
    return chosen


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
