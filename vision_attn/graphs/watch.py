"""What a recorded forward depends on beside its inputs: the weights, the attributes of modules, and PyTorch's settings.

A CUDA graph plays launches again and runs no Python, so a weight that moved, an adapter that was switched, or a scale
that was set would be missed. A watch compares all of them before each replay. Weights that change in place are read
by the graph itself, and are no change.
"""

import functools
import operator
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_MOST_ITEMS = 4096  # of one container: larger ones are known by their length
_OWN = frozenset(vars(nn.Module()))  # attributes that every module has; those that matter are looked at by themselves


class Watch:
    """Remembers a model's state, and tells whether it has changed.

    Tensors count by their place in memory, numbers and texts by value, and lists, tuples and dictionaries by what they
    hold. Other objects count by identity, and a module's `processor` by its attributes too. Attributes of PyTorch's own
    layers are not looked at, only whether there are more of them.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._places: list[Any] = []
        self._values: list[Any] = []
        self._look()

    def changed(self) -> bool:
        """Whether anything is different from the last time that this was asked."""
        places, values = self._places, self._values
        if self._structure() != self._built:
            self._look()
            return True
        try:
            self._places, self._values = self._where(), self._now()
        except KeyError:  # one attribute went and another came
            self._look()
            return True
        if places != self._places or len(values) != len(self._values):
            return True
        if all(map(operator.is_, values, self._values)):  # a tenth of the time of what follows
            return False
        return not all(map(_same, values, self._values))

    def _look(self) -> None:
        """Find out anew what there is to watch."""
        self._modules = list(self.model.modules())
        every = [vars(module) for module in self._modules]
        self._children = [attributes["_modules"] for attributes in every if attributes["_modules"]]
        self._sized: list[Any] = [
            *every,
            *(d[kind] for d in every for kind in ("_forward_hooks", "_forward_pre_hooks")),
        ]
        self._tensors = [d[kind] for d in every for kind in ("_parameters", "_buffers") if d[kind]]
        watched = [vars(m) for m in self._modules if not type(m).__module__.startswith("torch.nn.modules.")]
        processors = [vars(d["processor"]) for d in watched if hasattr(d.get("processor"), "__dict__")]
        self._sized += processors
        self._attributes = [_split(attributes) for attributes in (*watched, *processors)]
        self._modes = [m for m in self._modules if m is self.model or "Dropout" in type(m).__name__]
        self._built = self._structure()
        self._places, self._values = self._where(), self._now()

    def _structure(self) -> list[int]:
        """Identities of all modules, and how many attributes and hooks each has."""
        found = [id(child) for children in self._children for child in children.values()]
        found += map(len, self._sized)
        return found

    def _where(self) -> list[Any]:
        """Where all parameters and buffers lie, and what the containers among attributes hold."""
        tensors = [tensor for tensors in self._tensors for tensor in tensors.values() if tensor is not None]
        try:
            found: list[Any] = [tensor.data_ptr() for tensor in tensors]
        except RuntimeError:  # quantised subclasses have no place
            found = [_place(tensor) for tensor in tensors]
        found += [_frozen(attributes[name]) for attributes, _, held in self._attributes for name in held]
        return found

    def _now(self) -> list[Any]:
        """All other attributes."""
        found: list[Any] = []
        for attributes, plain, _ in self._attributes:
            found += plain(attributes)
        found += [module.training for module in self._modes]
        return found


def _split(attributes: Any) -> tuple[Any, Callable[[Any], tuple[Any, ...]], list[str]]:
    """Return attributes, what gets those that count by value or identity, and the names of those that hold others."""
    names = [name for name in attributes if name not in _OWN and not name.startswith("_vision_attn")]
    held = [name for name in names if isinstance(attributes[name], (list, tuple, dict, set))]
    plain = [name for name in names if name not in held]
    return attributes, operator.itemgetter(plain[0], *plain) if plain else _none, held


def _none(attributes: Any) -> tuple[Any, ...]:
    return ()


def _place(tensor: Tensor) -> Any:
    """Where a tensor lies; an object itself where it has no place, as quantised subclasses have none."""
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return id(tensor)


def _frozen(value: Any, depth: int = 3) -> Any:
    """Return what a container holds, as something that can be compared later."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Tensor):
        return _place(value)
    if depth and isinstance(value, dict) and len(value) <= _MOST_ITEMS:
        return tuple([(key, _frozen(item, depth - 1)) for key, item in value.items()])
    if depth and isinstance(value, (list, tuple, set)) and len(value) <= _MOST_ITEMS:
        return tuple([_frozen(item, depth - 1) for item in value])
    return id(value)


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    return type(a) is type(b) and isinstance(a, (*_PLAIN, tuple)) and a == b


def settings() -> tuple[Any, ...]:
    """Return what PyTorch and diffusers are set to, as far as it decides what runs."""
    cuda = torch.backends.cuda
    diffusers = sys.modules.get("diffusers.models.attention_dispatch")
    registry = getattr(diffusers, "_AttentionBackendRegistry", None)
    return (
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        torch.backends.cudnn.enabled,
        getattr(registry, "_active_backend", None),
    )


def reason_of(model: nn.Module) -> str | None:
    """Say why the forward of `model` cannot be recorded, None if it can; hooks run Python, which a graph leaves out."""
    for name, module in model.named_modules():
        reason = _hooked(module, name)
        if reason is not None:
            return f"{name or type(model).__name__} {reason}"
    for value in vars(model).values():
        reason = value.graph_reason(model) if hasattr(type(value), "graph_reason") else None
        if reason:
            return str(reason)
    devices = {t.device for t in (*model.parameters(), *model.buffers())}
    if len(devices) > 1:
        return f"weights lie on {', '.join(sorted(map(str, devices)))}"
    if not devices or next(iter(devices)).type != "cuda":
        return f"the model is on {next(iter(devices), 'no device')}, not on a CUDA device"
    return None


def _hooked(module: nn.Module, name: str) -> str | None:
    """Say what Python runs around a module's forward; our own hooks only prepare what is recorded."""
    if hasattr(module, "_hf_hook"):
        return f"has a hook of accelerate ({type(module._hf_hook).__name__}), as offloading puts one on"
    registry = getattr(module, "_diffusers_hook", None)
    if registry is not None and getattr(registry, "hooks", None):
        return f"has a hook of diffusers ({', '.join(map(str, registry.hooks))})"
    if not name:
        return None
    if getattr(vars(module).get("forward", module.forward), "__func__", None) is not type(module).forward:
        return "has a forward that was replaced"
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    foreign = [hook for hook in hooks if not str(getattr(hook, "__module__", "")).startswith("vision_attn.")]
    return f"has a forward hook ({getattr(foreign[0], '__qualname__', foreign[0])})" if foreign else None


def keys_of(model: nn.Module) -> list[Any]:
    """Return functions that say on what else a forward depends: a conversion has one."""
    return [functools.partial(v.graph_key, model) for v in vars(model).values() if hasattr(type(v), "graph_key")]
