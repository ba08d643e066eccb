"""Finds the models in what a user wants to convert: a pipeline's denoisers, or the model itself."""

from typing import Any

from torch import nn

from vision_attn.conversion.model_state import is_converted
from vision_attn.hosts import Host, is_known

COMPONENTS = ("unet", "transformer", "transformer_2", "prior")


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


def refuse_converted(models: dict[str, nn.Module]) -> None:
    """Refuse models that are converted already."""
    done = [name or type(model).__name__ for name, model in models.items() if is_converted(model)]
    if done:
        raise ValueError(f"{', '.join(done)} is converted already: revert() the conversion first")
