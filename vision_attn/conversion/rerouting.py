"""Makes the attention modules of a host let a processor answer their attention, and undoes it.

The host's own code keeps running: its processors, projections, norms, rotary embeddings, adapters and hooks. A rerouted
module gets a subclass of its own class whose `__call__` runs the original one, and `answers.py` answers the calls of
`scaled_dot_product_attention` in it.
"""

import functools
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from vision_attn.conversion.answers import answered
from vision_attn.conversion.projections import PROJECTIONS, bind, is_bound, unbind
from vision_attn.conversion.state import LAYER, LayerState
from vision_attn.processors.base import CHILD, Processor, model_name


def reroute(module: nn.Module, processor: nn.Module, state: LayerState) -> None:
    """Make `module` answer its attention over the grid with `processor`. `restore` undoes it."""
    setattr(module, LAYER, state)
    module.add_module(CHILD, processor)
    if any(isinstance(part, Processor) and part.residuals() for part in processor.modules()):
        bind(module)
    module.__class__ = _beneath_parametrizations(type(module))


def restore(module: nn.Module) -> None:
    """Give a rerouted module its own class back and take the processor out, whatever class others put on top since."""
    cls: Any = type(module)
    ours: Any = next(base for base in cls.__mro__ if _BASE in vars(base))
    module.__class__ = _replaced(cls, ours, vars(ours)[_BASE])
    unbind(module)
    del module._modules[CHILD]
    delattr(module, LAYER)


_BASE = "_vision_attn_base"  # attribute of a rerouted class: the class that it was made of


@functools.cache
def rerouted_class(base: Any) -> type[nn.Module]:
    """Return the subclass of `base` that reroutes. It has the name of `base`, as with `parametrize`.

    It replaces `__call__`, not `forward`: hooks (offloading, caches) replace the `forward` of an instance before or
    after us, and put the one back that they found.
    """

    class Rerouted(base):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            state: LayerState = self.__dict__[LAYER]
            if state.shared.bypassed:
                state.hand_over(None)
                return super().__call__(*args, **kwargs)
            return answered(self, state, super().__call__, args, kwargs)

        def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
            for name in [name for name in state_dict if name.startswith(prefix) and model_name(name) != name]:
                state_dict[model_name(name)] = state_dict.pop(name)  # of an earlier version
            super()._load_from_state_dict(state_dict, prefix, *args)

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if name in PROJECTIONS and is_bound(self):  # adapters wrap projections, and hosts fuse them
                bind(self)

        def __reduce_ex__(self, protocol: Any) -> Any:
            make, args, *rest = super().__reduce_ex__(protocol)
            return (_rebuild, (make, base, *args[1:]), *rest) if args[0] is Rerouted else (make, args, *rest)

    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(Rerouted, name, getattr(base, name))
    setattr(Rerouted, _BASE, base)
    return Rerouted


def _beneath_parametrizations(cls: Any) -> Any:
    """Return the rerouted class for a module of class `cls`.

    `parametrize` puts a class on top of a module's own, and takes off the uppermost one: that must not be ours.
    """
    if cls.__module__ != parametrize.__name__:
        return rerouted_class(cls)
    return _replaced(cls, cls.__bases__[0], _beneath_parametrizations(cls.__bases__[0]))


@functools.cache
def _replaced(cls: Any, old: Any, new: Any) -> Any:
    """Return the class `cls` with `new` in the place of its base class `old`."""
    if cls is old or old not in cls.__mro__:
        return new if cls is old else cls
    content = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, tuple(_replaced(base, old, new) for base in cls.__bases__), content)


def _rebuild(make: Callable[..., Any], base: Any, *args: Any) -> Any:
    """Copy or unpickle a rerouted module: its class cannot be found by name, but its base can."""
    return make(rerouted_class(base), *args)
