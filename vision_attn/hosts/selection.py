"""Finds what a user means: the models of a pipeline, their hosts, the layers, and the spec of each layer."""

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from vision_attn.hosts.dit import DITS
from vision_attn.hosts.host import Host
from vision_attn.hosts.image_ids import ID_HOSTS
from vision_attn.hosts.language_encoders import LANGUAGE_ENCODERS
from vision_attn.hosts.unet import UNETS
from vision_attn.hosts.vision_encoders import ENCODERS
from vision_attn.hosts.vit import VITS
from vision_attn.processors.base import AttnSpec

HOSTS: tuple[Host, ...] = (*UNETS, *DITS, *ID_HOSTS, *VITS, *LANGUAGE_ENCODERS, *ENCODERS)
REFUSED = {
    **dict.fromkeys(("SanaTransformer2DModel", "SanaControlNetModel"), "its self-attention is linear already"),
    "Ideogram4Transformer2DModel": "it packs text and images in one sequence, and tells where they lie by values only",
    "OmniGenTransformer2DModel": "its attention is causal but for images, and its mask says so for each pair of tokens",
    "Xcit": "it attends between channels, not between tokens",
    **dict.fromkeys(
        ("SwinTransformer", "SwinTransformerV2", "SwinTransformerV2Cr", "Hiera"), "its attention is in windows already"
    ),
    **dict.fromkeys(
        ("SwinPreTrainedModel", "Swinv2PreTrainedModel", "HieraPreTrainedModel"), "its attention is in windows already"
    ),
    "Sam2PreTrainedModel": "its image encoder is a Hiera, whose attention is in windows already",
}
"""Why models that people ask for are no hosts, by the name of their class or of a base class."""

COMPONENTS = ("unet", "transformer", "transformer_2", "prior")
_IF_KNOWN = ("decoder", "prior_prior")  # names that Stable Cascade's denoisers share with what is none

Where = str | re.Pattern[str] | Callable[[str], bool] | None
Specs = AttnSpec | Sequence[AttnSpec] | Mapping[str, AttnSpec]
"""One spec for all layers; several that take turns, layer by layer; or one for each pattern of names."""


def _classes(model: nn.Module) -> list[str]:
    return [cls.__name__ for cls in type(model).__mro__]


def is_known(model: object) -> bool:
    """Whether `model` is of a class that `convert` knows."""
    return isinstance(model, nn.Module) and any(set(host.models) & set(_classes(model)) for host in HOSTS)


def is_refused(model: object) -> bool:
    """Whether `model` is of a class of which it is known why it cannot be converted."""
    return isinstance(model, nn.Module) and any(name in REFUSED for name in _classes(model))


def find_host(model: nn.Module) -> Host:
    """Return the host of `model` by the name of its class or of a base class.

    Raises:
        ValueError: If no host is for this class, or the host cannot convert this model.
    """
    classes = _classes(model)
    for host in HOSTS:
        if set(host.models) & set(classes):
            problem = host.problem(model)
            if problem:
                raise ValueError(f"{classes[0]} cannot be converted: {problem}")
            return host
    reason = next((REFUSED[name] for name in classes if name in REFUSED), None)
    if reason is not None:
        raise ValueError(f"{classes[0]} cannot be converted: {reason}")
    hint = ""
    if any(word in classes[0] for word in ("3D", "Video")):
        hint = " It looks like a video model, and a grid is one image."
    else:  # what trains, averages or reads features often wraps a model
        inner = next((name for name, module in model.named_modules() if name and is_known(module)), None)
        hint = f" It holds one as its attribute `{inner}`: convert that." if inner else ""
    known = ", ".join(name for host in HOSTS for name in host.models)
    raise ValueError(
        f"{classes[0]} is not a known host.{hint} Known are {known}. For another image model say which modules attend "
        "over the grid and where the grid is: convert(model, spec, host=Host(layers=('blocks.*.attn',), "
        "probe=lambda module, inputs: Grid(height, width)))"
    )


def candidates_of(target: Any) -> dict[str, nn.Module]:
    """Return the models of `target` by component name, '' for a model by itself.

    Of a model that something wraps (`torch.compile`, `DataParallel`, `DistributedDataParallel`) it is the one inside.
    Of a list of models, or of a component that holds several hosts (the ControlNets of a pipeline), it is each:
    'controlnet.nets.0', 'controlnet.nets.1'.

    Raises:
        TypeError: If `target` is neither a model nor a pipeline.
    """
    parts = {"": target} if isinstance(target, (nn.Module, list, tuple)) else getattr(target, "components", None)
    if isinstance(parts, dict):
        found = {name: part for component, given in parts.items() for name, part in _held(component, given).items()}
        if found or not isinstance(target, (list, tuple)):
            return found
    raise TypeError(f"cannot convert a {type(target).__name__}: give a diffusers pipeline or model, or a timm model")


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside of what `torch.compile`, `DataParallel` and `DistributedDataParallel` make of it."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def _held(name: str, part: Any) -> dict[str, nn.Module]:
    """Return a component itself, or the models that it holds."""
    inside: dict[Any, Any]
    if isinstance(part, (list, tuple)):
        inside = dict(enumerate(part))
    elif isinstance(part, nn.Module):
        model = unwrapped(part)
        nets = getattr(model, "nets", None)
        if type(model) in (nn.ModuleList, nn.ModuleDict):
            inside = dict(model.named_children())
        elif isinstance(nets, nn.ModuleList) and not is_known(model):
            inside = {f"nets.{number}": net for number, net in enumerate(nets)}
        else:
            return {name: model}
    else:
        return {}
    prefix = f"{name}." if name else ""
    return {path: model for key, held in inside.items() for path, model in _held(f"{prefix}{key}", held).items()}


def denoisers_of(pipe: Any) -> dict[str, nn.Module]:
    """Return the denoisers of a pipeline by component name, a compiled one as it is."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    return {name: part for name, part in parts.items() if _denoises(name, unwrapped(part))}


def _denoises(component: str, model: nn.Module) -> bool:
    """Whether a component is a denoiser by its name; the name of a part of it tells the component."""
    name = component.partition(".")[0]
    return name in COMPONENTS or (name in _IF_KNOWN and is_known(model))


def targets_of(target: Any, components: tuple[str, ...] | None, host: Host | None) -> dict[str, nn.Module]:
    """Choose the models to convert.

    Args:
        target: A pipeline or a model.
        components: Names of the pipeline's components; None for its denoisers.
        host: The host that the user gives, None if the model must be known.

    Returns:
        The models by component name, '' for a model by itself.

    Raises:
        TypeError: If `target` is neither a model nor a pipeline.
        ValueError: If a component is missing, or nothing is there to convert.
    """
    candidates = candidates_of(target)
    if isinstance(target, (nn.Module, list, tuple)):
        if components:
            raise ValueError(f"components={components} is for a pipeline, but a {type(target).__name__} was given")
        chosen = candidates
    elif components is not None:
        if isinstance(components, str) or not components:
            raise ValueError(f"components must be a tuple of names such as ('unet', 'controlnet'), got {components!r}")
        found = {given: [n for n in candidates if n == given or n.startswith(f"{given}.")] for given in components}
        missing = [given for given, names in found.items() if not names]
        if missing:
            raise ValueError(f"no component {', '.join(missing)} in the pipeline, only {', '.join(candidates)}")
        chosen = {name: candidates[name] for names in found.values() for name in names}
    else:
        denoisers = {name: model for name, model in candidates.items() if _denoises(name, model)}
        chosen = {name: m for name, m in denoisers.items() if host is not None or is_known(m)} or denoisers
    if not chosen:
        parts = ", ".join(f"{name} ({type(model).__name__})" for name, model in candidates.items()) or "no models"
        raise ValueError(f"nothing to convert in this {type(target).__name__}: it has {parts}")
    return distinct(chosen)


def distinct(models: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return each model once, under its first name: a pipeline may hold one ControlNet twice."""
    names = {id(model): name for name, model in reversed(list(models.items()))}
    return {name: model for name, model in models.items() if names[id(model)] == name}


def select(model: nn.Module, names: Sequence[str], where: Where) -> list[str]:
    """Return the layers among `names`, the attention layers of a model, that `where` selects.

    Raises:
        TypeError: If `where` is none of the accepted kinds.
        ValueError: If it selects none.
    """
    matches = _predicate(where)
    selected = [name for name in names if matches(name)]
    if not selected:
        some = ", ".join(names[:4])
        raise ValueError(f"where selects no layer of {type(model).__name__}; it has {some}, ... ({len(names)} layers)")
    return selected


def _predicate(where: Where) -> Callable[[str], bool]:
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


def check_host(host: Any) -> None:
    """Refuse anything but a host, or None for that of a known model.

    Raises:
        TypeError: If it is neither.
    """
    if host is not None and not isinstance(host, Host):
        raise TypeError(f"host must be a Host, got {host!r}")


def check_specs(specs: Any) -> None:
    """Refuse anything but a spec, a sequence of specs or a dictionary of specs.

    Raises:
        TypeError: If `specs` is or holds anything else.
        ValueError: If it is empty.
    """
    several = isinstance(specs, Mapping) or (isinstance(specs, Sequence) and not isinstance(specs, str))
    each = (list(specs.values()) if isinstance(specs, Mapping) else list(specs)) if several else [specs]
    for spec in each:
        if not isinstance(spec, AttnSpec):
            raise TypeError(f"spec must be a processor's spec such as Clear(radius=16), got {spec!r}")
    for pattern in specs if isinstance(specs, Mapping) else ():
        if not isinstance(pattern, str):
            raise TypeError(f"specs are given by patterns of layer names, such as 'down_blocks.*', got {pattern!r}")
    if not each:
        raise ValueError("no spec is given: give one, a sequence of them, or a dictionary of patterns and specs")


def assign(specs: Specs, names: Sequence[str]) -> dict[str, AttnSpec]:
    """Return the spec of each layer.

    Args:
        specs: One for all; a sequence, whose members take turns from layer to layer; or a dictionary by patterns as in
            a shell: the first pattern that matches counts. Layers that no pattern matches are left out.
        names: The selected layers, in order of depth.

    Raises:
        ValueError: If a pattern matches no layer, or only layers that patterns before it match.
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
        if found and assigned.keys() >= set(found):
            raise ValueError(
                f"the pattern {pattern!r} gets no layer, because patterns before it match all of its {len(found)}: "
                "the first that matches counts, so give it earlier"
            )
        for name in found:
            assigned.setdefault(name, spec)
    return {name: assigned[name] for name in names if name in assigned}
