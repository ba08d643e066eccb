"""The one place that reroutes `scaled_dot_product_attention` inside an attention module of a host.

The host's own code keeps running: its processors, projections, norms, rotary embeddings, adapters and hooks. A rerouted
module gets a subclass of its own class whose `__call__` runs the original one inside a `TorchFunctionMode`. The mode
lets the layer's processor answer a call to `scaled_dot_product_attention` if queries and keys both are the layer's
whole token sequence. Every other call goes through.
"""

import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from vision_attn.conversion.grids import Seen
from vision_attn.conversion.projections import Projections
from vision_attn.conversion.state import LAYER, LayerState, state_of
from vision_attn.grid import Grid
from vision_attn.processors.base import CHILD, Moment, Processor
from vision_attn.processors.softmax import Softmax, SoftmaxAttention

_log = logging.getLogger(__name__)
_MASKED = "dense: the attention mask says that the grid lies elsewhere in each sample"


def reroute(module: nn.Module, processor: nn.Module, state: LayerState) -> None:
    """Make `module` answer its attention over the grid with `processor`. `restore` undoes it."""
    setattr(module, LAYER, state)
    module.add_module(CHILD, processor)
    module.__class__ = _beneath_parametrizations(type(module))


def restore(module: nn.Module) -> None:
    """Give a rerouted module its own class back and take the processor out, whatever class others put on top since."""
    cls: Any = type(module)
    ours: Any = next(base for base in cls.__mro__ if _BASE in vars(base))
    module.__class__ = _replaced(cls, ours, vars(ours)[_BASE])
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
                state.block_input = None
                return super().__call__(*args, **kwargs)
            if getattr(getattr(self, "processor", None), "_parallel_config", None) is not None:
                raise ValueError(f"{state.name} runs with context parallelism, which cuts the grid: revert() first")
            mode = _Reroute(self, kwargs.get("attention_mask") is not None)
            with mode:
                output = super().__call__(*args, **kwargs)
            if not torch.compiler.is_compiling() and not mode.reached and not _may_skip(self):
                if not isinstance(state.spec, Softmax):
                    raise RuntimeError(_never_reached(state, self))
                state.note(None, "dense: the host's own code computed it", expected=True)
            return output

        def __reduce_ex__(self, protocol: Any) -> Any:
            make, args, *rest = super().__reduce_ex__(protocol)
            return (_rebuild, (make, base, *args[1:]), *rest) if args[0] is Rerouted else (make, args, *rest)

    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(Rerouted, name, getattr(base, name))
    setattr(Rerouted, _BASE, base)
    return Rerouted


def _may_skip(module: nn.Module) -> bool:
    """Whether a hook has replaced the `forward` of a module, and may answer without it (a cache).

    A hook that was taken off again leaves the module's own method there.
    """
    forward = vars(module).get("forward")
    return forward is not None and getattr(forward, "__self__", None) is not module


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


class _Reroute(TorchFunctionMode):
    """Answers the attention of one module while its forward runs."""

    def __init__(self, module: nn.Module, masked: bool) -> None:
        super().__init__()
        self.module = module
        self.reached = False
        self.processor: Processor = getattr(module, CHILD)
        state = state_of(module)
        if self.processor.wants:
            self.processor = self.processor.at(moment_of(state))
        dense = dense_reason(state, state.context.known(), masked)
        residuals = self.processor.residuals() if dense is None else {}
        self.projections = Projections(module, residuals) if residuals else None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.unflatten:  # its Python body cannot be traced inside a mode
            return torch.unflatten(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self.reached = self.reached or not torch.compiler.is_compiling()
            return _answer(self, *args, **kwargs)
        if func is F.linear and self.projections is not None:
            return self.projections.linear(F.linear, *args, **{_LINEAR.get(k, k): v for k, v in kwargs.items()})
        return func(*args, **kwargs)


_LINEAR = {"input": "x"}  # torch's name of the argument, and that of `Projections.linear`


def _answer(
    mode: "_Reroute",
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Answer one call of `scaled_dot_product_attention` on `[B, H, N, D]` tensors."""
    state = state_of(mode.module)
    grid = locate(state, query, key, attn_mask)
    unchanged = grid is not None and isinstance(mode.processor, SoftmaxAttention)
    if grid is None or unchanged:
        if unchanged:
            state.note(grid, "rerouted")
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if dropout_p or is_causal:
        what = f"attention dropout {dropout_p}" if dropout_p else "a causal mask"
        raise ValueError(f"{state.name}: {what} cannot be rerouted: switch it off, or leave out the layer (where=)")
    if enable_gqa and query.shape[1] != key.shape[1]:
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    query, key, value = _autocast(query, key, value)
    mask = key_padding(attn_mask, grid, state)
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    if mode.projections is not None and not torch.compiler.is_compiling() and mode.projections.missing():
        raise RuntimeError(
            f"{state.name}: {state.spec} adds to the input of projections, but this {type(mode.module).__name__} does "
            f"not multiply by its weights of {mode.projections.missing()} (quantised layers do not)"
        )
    output = mode.processor(q, k, v, grid, mask, scale).transpose(1, 2)
    state.note(grid, "rerouted")
    return output


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast as autocast does for `scaled_dot_product_attention`."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def _never_reached(state: LayerState, module: nn.Module) -> str:
    processor = getattr(module, "processor", None)
    how = f" Its processor is {type(processor).__name__}." if processor is not None else ""
    return (
        f"{state.name} never called scaled_dot_product_attention, so it was not rerouted.{how} Switch off what "
        "replaces it: sliced attention (disable_attention_slicing), xformers "
        "(disable_xformers_memory_efficient_attention), another attention backend (set_attention_backend('native')), "
        "AttnProcessor (set_attn_processor(AttnProcessor2_0())), timm's fused_attn=False; or revert()"
    )


def dense_reason(state: LayerState, found: Grid | str, masked: bool) -> str | None:
    """Return why a layer runs the host's own attention over what its context found; None if it is rerouted."""
    if isinstance(found, str):
        return f"dense: {found}"
    if masked and state.mask_means_dense:
        return _MASKED
    if found.image_tokens < state.shared.min_tokens:
        return f"dense: {found.image_tokens} tokens are below min_tokens={state.shared.min_tokens}"
    if found.image_tokens < state.break_even:
        least = "never faster" if state.break_even == math.inf else f"faster from {state.break_even:.0f} tokens on"
        return f"dense: {state.spec} is {least}, and there are {found.image_tokens}"
    return None


def moment_of(state: LayerState) -> Moment:
    """Return what is known about the forward that begins; the block's input is handed over only once."""
    shared, found = state.shared, state.context.known()
    block_input, state.block_input = state.block_input, None
    downsample = 1
    if shared.finest is not None and not isinstance(found, str):
        downsample = math.ceil(math.sqrt(shared.finest // found.image_tokens))
    generator = None if block_input is None else shared.random(block_input.device)
    return Moment(shared.progress, downsample, block_input, generator)


def locate(state: LayerState, query: Tensor, key: Tensor, attn_mask: Tensor | None) -> Grid | None:
    """Return the grid of a call to reroute; None lets the call through.

    Args:
        state: The layer.
        query: Queries `[B, H, N, D]`.
        key: Keys `[B, H, M, D]`.
        attn_mask: The call's mask, None if it has none.
    """
    if query.dim() != 4 or query.shape[-2] != key.shape[-2]:
        return None  # cross-attention
    found = state.context.locate(query.shape[-2])
    reason = dense_reason(state, found, attn_mask is not None)
    if not isinstance(found, str) and reason is None:
        return found
    state.note(None if isinstance(found, str) else found, reason or "", expected=not isinstance(found, str))
    if reason is _MASKED and not torch.compiler.is_compiling() and not state.shared.warned:
        state.shared.warned = True
        _log.warning("%s runs %s", state.name, reason)
    return None


def key_padding(attn_mask: Tensor | None, grid: Grid, state: LayerState) -> Tensor | None:
    """Turn a mask of `scaled_dot_product_attention` into one over prefix and suffix keys.

    Args:
        attn_mask: Bool (True is seen) or additive (0 is seen, -1000 or less is hidden), broadcasts to `[B, H, N, N]`.
        grid: Where the image tokens lie.
        state: The layer, for its name and for the mask that it checked last.

    Returns:
        Bool `[B or 1, prefix + suffix]`, or None if every key is seen.

    Raises:
        ValueError: If the mask depends on query or head, hides grid tokens, or biases the logits.
    """
    if attn_mask is None:
        return None
    if attn_mask.dim() != 4 or attn_mask.shape[-2] != 1 or attn_mask.shape[-1] != grid.tokens:
        raise ValueError(
            f"{state.name}: cannot honour an attention mask of shape {tuple(attn_mask.shape)}: a mask must be key "
            f"padding [B, 1, 1, {grid.tokens}] over tokens outside the grid"
        )
    if torch.compiler.is_compiling():
        seen, problem = _read(attn_mask, grid)
        torch._assert_async(~problem.any(), f"{state.name}: the attention mask is not key padding outside the grid")
        return seen if grid.prefix + grid.suffix else None
    if state.padding is not None:
        last, known, result = state.padding
        if last.is_of(attn_mask) and known == grid:
            return result
    seen, problem = _read(attn_mask, grid)
    by_head, hides_grid, biases, hides = torch.cat([problem, ~seen.all()[None]]).tolist()
    for found, what in ((by_head, "differs by head"), (hides_grid, "hides grid tokens"), (biases, "biases the logits")):
        if found:
            raise ValueError(
                f"{state.name}: cannot honour an attention mask that {what}: a mask must be key padding over tokens "
                "outside the grid. Leave out the mask, or the layer (where=)"
            )
    result = seen if hides else None
    state.padding = (Seen(attn_mask), grid, result)
    return result


_HIDDEN = -1e3  # an additive mask hides a key with this or less


def _read(attn_mask: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return the mask `[B, prefix + suffix]` and three flags: differs by head, hides the grid, biases the logits."""
    keys = attn_mask[:, 0, 0]
    seen = keys if keys.dtype == torch.bool else keys > _HIDDEN
    biases = torch.zeros_like(seen) if keys.dtype == torch.bool else seen & (keys != 0)
    flags = [(attn_mask != attn_mask[:, :1]).any(), ~seen[:, grid.image].all(), biases.any()]
    return torch.cat([seen[:, : grid.prefix], seen[:, grid.image.stop :]], 1), torch.stack(flags)
