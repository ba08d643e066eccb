"""What a conversion changes in one model, checked before anything is touched; and how it is undone.

The host's own code keeps running: its processors, projections, norms, rotary embeddings, adapters and hooks. A rerouted
module gets a subclass of its own class whose `__call__` runs the original one, and `answers.py` answers the calls of
`scaled_dot_product_attention` in it.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from vision_attn.conversion.answers import answered
from vision_attn.conversion.grids import GridContext, by_name, remove_hooks, unwatch, watch
from vision_attn.conversion.projections import PROJECTIONS, bind, is_bound, unbind
from vision_attn.conversion.state import (
    LAYER,
    Fingerprint,
    LayerState,
    ModelState,
    Shared,
    computing_dtype,
    forget,
    is_quantised,
    is_rerouted,
    model_state,
    plain,
    refuse_offloaded,
    remember,
    state_of,
)
from vision_attn.estimation.model import break_even
from vision_attn.grid import Grid
from vision_attn.hosts.host import Host, argument_names, heads_of, input_dim, passed
from vision_attn.hosts.selection import unwrapped
from vision_attn.parallel.models import is_cut
from vision_attn.processors.base import CHILD, AttnSpec, Layer, Processor, model_name, stored_name

_LAYERS = "_vision_attn_layers"  # attribute of a block: states of the layers that want its input


def fix_grid(contexts: Sequence[GridContext], size: tuple[int, int]) -> None:
    """Fix the grid of the layers to (height, width) tokens, so that it need not be read.

    Raises:
        TypeError: If a side is not an int.
        ValueError: If the layers have grids of different sizes (a UNet), or the size is not a pair or not positive.
    """
    if len(contexts) > 1:
        raise ValueError("the levels of a UNet have different grids and read them from shapes: leave out grid")
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise ValueError(f"grid must be (height, width) in tokens, got {size!r}")
    for context in contexts:
        context.fix(Grid(*size))


class Plan:
    """The changes to one model.

    Args:
        model: The model. It is not changed before `apply`.
        specs: The spec of each layer to convert, by name.
        host: How the model's layers and their grids are found.
        backend: How the processors' operators run.

    Raises:
        ValueError: If a layer cannot be rerouted.
    """

    def __init__(self, model: nn.Module, specs: Mapping[str, AttnSpec], host: Host, backend: str) -> None:
        self.model, self.host, self.shared = model, host, Shared()
        self.watched: list[tuple[nn.Module, GridContext]] = []
        self.layers: list[tuple[nn.Module, Processor, LayerState]] = []
        for watched, found in host.find(model):
            chosen = [(name, module) for name, module in found if name in specs]
            if not chosen:
                continue
            names = argument_names(watched)
            context = GridContext(
                host.probe, names, host.others, host.reads, host.counted, host.after, of_model=watched is model
            )
            self.watched.append((watched, context))
            for name, module in chosen:
                _refuse_other_attention(name, module)
                heads = heads_of(name, module)
                layer_spec = specs[name]
                if layer_spec.thresholds and host.timestep is None:
                    raise ValueError(
                        f"{layer_spec} follows the denoising, but a {type(model).__name__} has no timestep"
                    )
                layer = Layer(name, *heads, backend, input_dim(module))
                processor = layer_spec.build(layer).train(module.training)
                state = LayerState(name, heads[0], layer_spec, context, self.shared, host)
                self.layers.append((module, _like(processor, module, model), state))

    @property
    def contexts(self) -> list[GridContext]:
        """Where the layers find their grids."""
        return [context for _, context in self.watched]

    def break_even(self, *, graphs: bool) -> None:
        """Leave each layer to the host's own attention where a step is as fast with it; see `break_even`."""
        specs = {state.name: state.spec for _, _, state in self.layers}
        found = break_even(self.model, self.host, specs, graphs=graphs)
        for _, _, state in self.layers:
            state.break_even = found[state.name]

    def apply(self, min_tokens: int) -> None:
        """Change the model."""
        self.shared.min_tokens = min_tokens
        self.shared.thresholds = tuple(sorted({t for _, _, state in self.layers for t in state.spec.thresholds}))
        mark(self.model, self.shared, self.host, self.contexts)
        for module, processor, state in self.layers:
            if getattr(module, "fused_attn", None) is False:
                state.replaced["fused_attn"] = False
                module.fused_attn = True  # type: ignore[assignment]
            reroute(module, processor, state)
            if processor.wants:
                keep_input(self.model.get_submodule(state.name.rpartition(".")[0]), state)
        for watched, context in self.watched:
            watch(watched, context)

    def expect(self, tensors: Mapping[str, Tensor], source: str) -> None:
        """Refuse tensors that will not fit the converted model.

        Args:
            tensors: By name in the converted model.
            source: Where they come from, for the error.

        Raises:
            ValueError: If a tensor has no place or another shape, or a new parameter has no tensor (the first eight
                are named); or if there are tensors for projections that are fused or quantised.
        """
        new = {
            f"{state.name}.{CHILD}.{name}": parameter
            for _, processor, state in self.layers
            for name, parameter in processor.state_dict().items()
        }
        for module, _, state in self.layers:
            projections = [name for name in tensors if name.startswith(f"{state.name}.to_") and ".to_out" not in name]
            if getattr(module, "fused_projections", False) and projections:
                raise ValueError(
                    f"{source} has {projections[0]}, but the projections of {state.name} are fused: call "
                    "unfuse_qkv_projections() first, and fuse them again afterwards"
                )
        for name, parameter in self.model.named_parameters():
            if plain(name) in tensors and is_quantised(parameter):
                raise ValueError(
                    f"{source} has {plain(name)}, which is quantised in this {type(self.model).__name__}: load the "
                    "adapter into the model as it was, and quantise that"
                )
        places = {**{plain(name): tensor for name, tensor in self.model.state_dict().items()}, **new}
        wrong = [f"missing: {stored_name(name)}" for name in new if name not in tensors]
        wrong += [f"unexpected: {stored_name(name)}" for name in tensors if name not in places]
        wrong += [
            f"{stored_name(name)} is {tuple(tensor.shape)} there and {tuple(places[name].shape)} here"
            for name, tensor in tensors.items()
            if name in places and places[name].shape != tensor.shape
        ]
        if wrong:
            more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
            raise ValueError(f"{source} does not fit this {type(self.model).__name__}: {'; '.join(wrong[:8])}{more}")

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Put tensors in their places, and keep the host's own for `undo`."""
        own: dict[str, Tensor] = {plain(name): parameter for name, parameter in self.model.named_parameters()}
        own |= dict(self.model.named_buffers())
        originals = model_state(self.model).originals
        for name, tensor in tensors.items():
            place = own[name]
            if f".{CHILD}." not in name:
                originals[name] = place.data
            place.data = tensor.to(place.device, place.dtype)


def refuse_unsynchronised(target: Any, plans: Sequence[Plan]) -> None:
    """Refuse to add parameters to a model that is distributed already.

    Raises:
        ValueError: If `DistributedDataParallel` would not know parameters that are added now.
    """
    parts = getattr(target, "components", {"": target})
    wrapped = [unwrapped(part) for part in parts.values() if isinstance(part, nn.parallel.DistributedDataParallel)]
    for plan in plans:
        added = sum(p.numel() for _, processor, _ in plan.layers for p in processor.parameters())
        if added and any(plan.model is model for model in wrapped):
            raise ValueError(
                f"DistributedDataParallel would not synchronise the {added} parameters that are added to this "
                f"{type(plan.model).__name__}: convert the model before it is wrapped"
            )


def _like(processor: Processor, module: nn.Module, model: nn.Module) -> Processor:
    """Put a processor where its module is, in the dtype that the module computes in, or else its model."""
    parameter = next(module.parameters(), None)
    if parameter is None:
        return processor
    dtype = computing_dtype(module) or computing_dtype(model)
    return processor.to(dtype=dtype) if parameter.is_meta else processor.to(parameter.device, dtype)


def _refuse_other_attention(name: str, module: nn.Module) -> None:
    """Refuse a module that is known not to call attention that we can answer.

    Raises:
        ValueError: If it is one; the error says what to switch off.
    """
    processor: Any = getattr(module, "processor", None)
    kind = type(processor).__name__
    for sign, cure in (
        ("Sliced", "disable_attention_slicing"),
        ("XFormers", "disable_xformers_memory_efficient_attention"),
    ):
        if kind.startswith(sign):
            raise ValueError(f"{name} runs {kind}, not scaled_dot_product_attention: call {cure}() first")


def mark(model: nn.Module, shared: Shared, host: Host, contexts: list[GridContext]) -> None:
    """Mark a model as converted and watch its forward passes."""
    fingerprints = {name: Fingerprint.of(parameter) for name, parameter in model.named_parameters()}
    remember(model, ModelState(shared, host, argument_names(model), fingerprints, contexts=contexts))
    model.register_forward_pre_hook(_begin, with_kwargs=True)
    model.register_forward_hook(_end, always_call=True)


def undo(models: Iterable[nn.Module]) -> None:
    """Put converted models back as they were: all of them, or none.

    Raises:
        ValueError: If weights that `load` replaced are fused into others, offloaded or quantised, or a model is cut
            over processes.
    """
    for model, places in [(model, _places(model)) for model in models]:
        for module in list(model.modules()):
            if is_rerouted(module):
                for name, value in state_of(module).replaced.items():
                    setattr(module, name, value)
                restore(module)
            unwatch(module)
            forget_input(module)
        for hook in (_begin, _end):
            remove_hooks(model, hook)
        for name, original in model_state(model).originals.items():
            places[name].data = original.to(places[name].device, places[name].dtype)
        forget(model)


def _places(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors whose data `load` replaced, as they are now: hooks put new ones in their places.

    Raises:
        ValueError: As for `undo`; the error says what to do.
    """
    if is_cut(model):
        raise ValueError(f"this {type(model).__name__} is cut over processes: disable() that before the revert")
    originals = model_state(model).originals
    for name, module in model.named_modules():
        for sign, what, cure in _COPIES:
            if getattr(module, sign, False) is not True:
                continue
            if any(plain(key) in originals for key, _ in module.named_parameters(name)):
                raise ValueError(f"{what} {name}, whose old weights would come back: call {cure}() first")
    now: dict[str, Tensor] = {plain(name): tensor for name, tensor in model.named_parameters()}
    now |= dict(model.named_buffers())
    refuse_offloaded({name: now[name] for name in originals})
    for name in originals:
        if is_quantised(now[name]):
            raise ValueError(f"{name} came with the adapter and was quantised since, so it cannot be put back")
    return now


_COPIES = (  # attributes of modules that hold copies of weights, and what undoes the copies
    ("merged", "LoRA is fused into", "unfuse_lora"),
    ("fused_projections", "projections are fused in", "unfuse_qkv_projections"),
)


def _begin(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Reset the counts, and read progress and finest grid, when a forward of the whole model begins."""
    state = model_state(model)
    shared, host = state.shared, state.host
    if torch.compiler.is_compiling():
        if shared.thresholds:
            raise RuntimeError("torch.compile cannot read the timestep of a schedule: compile the blocks only")
        shared.traced, shared.moment = True, (None, _finest(state, args, kwargs))
        return
    shared.traced, here = False, shared.here
    here.running = True
    here.ran = here.rerouted = 0
    if not (shared.thresholds or host.finest):
        return
    progress = passed(shared.thresholds, host, by_name(state.names, args, kwargs)) if shared.thresholds else None
    shared.moment = here.moment = progress, _finest(state, args, kwargs)
    if torch.is_grad_enabled():
        shared.awaiting.remember("moment", here.moment)


def _finest(state: ModelState, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Return the tokens of the host's finest grid, None if all grids are equal."""
    name = state.host.finest
    return math.prod(by_name(state.names, args, kwargs)[name].shape[-2:]) if name else None


def _end(model: nn.Module, args: Any, output: Any) -> None:
    """Refuse a forward in which layers ran and none of them was rerouted."""
    shared = model_state(model).shared
    shared.traced = False
    if torch.compiler.is_compiling():
        return
    here = shared.here
    here.running = False
    if output is not None and here.ran and not here.rerouted and not shared.bypassed:
        states = [state_of(module) for module in model.modules() if is_rerouted(module)]
        reasons = sorted({state.status for state in states})
        raise RuntimeError(
            f"none of the {len(states)} converted layers of this {type(model).__name__} was rerouted: "
            f"{'; '.join(reasons)}. If the grid cannot be read, give it with use_grid(); or revert() the conversion"
        )


def keep_input(block: nn.Module, state: LayerState) -> None:
    """Hand a layer the tokens that enter its block, at each forward of the block."""
    vars(block).setdefault(_LAYERS, []).append(state)
    remove_hooks(block, _hand_over)
    block.register_forward_pre_hook(_hand_over, with_kwargs=True)


def _hand_over(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    tokens = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim() == 3), None)
    for state in vars(block)[_LAYERS]:
        state.hand_over(tokens)


def forget_input(block: nn.Module) -> None:
    """Undo `keep_input`, if it was done."""
    remove_hooks(block, _hand_over)
    vars(block).pop(_LAYERS, None)


def reroute(module: nn.Module, processor: nn.Module, state: LayerState) -> None:
    """Make `module` answer its attention over the grid with `processor`. `restore` undoes it."""
    setattr(module, LAYER, state)
    module.add_module(CHILD, processor)
    if any(isinstance(part, Processor) and part.residuals() for part in processor.modules()):
        bind(module)
    if isinstance(module, nn.MultiheadAttention):
        module.register_forward_pre_hook(_is_called)
    module.__class__ = _beneath_parametrizations(type(module))


def restore(module: nn.Module) -> None:
    """Give a rerouted module its own class back and take the processor out, whatever class others put on top since."""
    cls: Any = type(module)
    ours: Any = next(base for base in cls.__mro__ if _BASE in vars(base))
    module.__class__ = _replaced(cls, ours, vars(ours)[_BASE])
    unbind(module)
    remove_hooks(module, _is_called)
    del module._modules[CHILD]
    delattr(module, LAYER)


def _is_called(module: nn.Module, args: Any) -> None:
    """Do nothing: without a hook, `nn.TransformerEncoderLayer` computes its attention by a function of its own."""


_BASE = "_vision_attn_base"  # attribute of a rerouted class: the class that it was made of


@functools.cache
def rerouted_class(base: Any) -> type[nn.Module]:
    """Return the subclass of `base` that reroutes. It has the name of `base`, as with `parametrize`.

    It replaces `__call__`, not `forward`: hooks (offloading, caches) replace the `forward` of an instance before or
    after us, and put the one back that they found.
    """

    class Rerouted(base):
        @property
        def vision_attn(self) -> Processor:
            """The processor that answers; its name as a module is one that no pattern of others finds."""
            processor: Any = self._modules[CHILD]
            return processor

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            state: LayerState = self.__dict__[LAYER]
            if state.shared.bypassed:
                state.hand_over(None)
                return super().__call__(*args, **kwargs)
            return answered(self, state, super().__call__, args, kwargs)

        def __prepare_scriptable__(self) -> None:
            """Refuse `torch.jit.script`, which compiles `forward` alone: that is the host's own attention.

            Raises:
                RuntimeError: Always; it names what takes a converted model.
            """
            raise RuntimeError(
                f"{self.__dict__[LAYER].name} cannot be compiled by torch.jit.script, which would take the host's own "
                "attention: use torch.jit.trace or torch.export, or revert() the conversion for the host's own"
            )

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
