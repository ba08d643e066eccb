"""Doors: functions that a host looks up when it calls them, and that the layer which runs answers instead.

They are two functions of `torch.nn.functional`, and the attention backends in the dictionary of diffusers' dispatcher.
While the forward of a converted layer runs, the function in such a place is ours; it asks which layer runs in its own
thread, and goes on to what was there before if none does. A `TorchFunctionMode` could do the same for those of PyTorch
without touching the place, but it sees each of the 20 to 60 calls of a layer, and that took a quarter of a step's host
time.

The places belong to the whole process, so that this is the one state outside objects. One is ours only between the
first layer that begins, in any thread, and the last one that ends, by an error too: convert, revert, copies and
pickles have nothing to keep in order, code that is compiled, scripted or traced between forwards finds PyTorch as it
is, and a function that somebody else put there (SageAttention) answers what layers leave to the host.

Modes of others, inside or around the layer, come first. To them the call looks as without us: whether they compare the
function with the attribute, or with what they imported long ago. Dynamo inlines modes well and threads badly: in code
that it compiles the layer enters `Answering`, a mode, and no door is open.
"""

import functools
import inspect
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, handle_torch_function

Answer = Callable[..., Any]


class _Here(threading.local):
    """What one thread is doing at a door.

    Attributes:
        answer: The answer of the layer that runs, if one does.
        behind: Whether what stood there before is running.
        modes: How many calls of layers modes were asked to answer.
    """

    answer: Answer | None = None
    behind = False
    modes = 0


class Door:
    """A function that the layer which runs may answer.

    Args:
        place: Where others look it up.
        name: Under which key.
        builtin: What stands there.
        overridable: Whether a `TorchFunctionMode` sees its calls.

    Attributes:
        front: The function that stands there while a layer runs.
        here: The state of this thread.
    """

    def __init__(self, place: dict[str, Any], name: str, builtin: Any, *, overridable: bool = True) -> None:
        self.place, self.name, self.here = place, name, _Here()
        self.builtin = self._behind = builtin
        self._inside, self._lock = 0, threading.Lock()

        def front(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():  # another thread's door, seen while this one compiles
                return self.builtin(*args, **kwargs)
            if torch._C._len_torch_function_stack() and overridable and self._behind is self.builtin:
                return self._after_modes(args, kwargs)
            here = self.here
            answer = here.answer
            if answer is None:
                return self.through(*args, **kwargs)
            here.answer = None  # what the answer calls is PyTorch's
            try:
                return answer(*args, **kwargs)
            finally:
                here.answer = answer

        front.__name__, front.__qualname__, front.__doc__ = name, name, builtin.__doc__
        front.__module__ = place.get("__name__", builtin.__module__)
        self.front = front

    def open(self, answer: Answer) -> Answer | None:
        """Let `answer` answer the calls of this thread until `close`; return who did before."""
        before, self.here.answer = self.here.answer, answer
        with self._lock:
            self._inside += 1
            self._take()
        return before

    def close(self, before: Answer | None) -> None:
        """Undo the last `open`, which returned `before`."""
        self.here.answer = before
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._give_back()

    def _take(self) -> None:
        found = self.place[self.name]
        if found is not self.front:
            self._behind = found
            self.place[self.name] = self.front

    def _give_back(self) -> None:
        if self.place[self.name] is self.front:  # else somebody has replaced it meanwhile, and keeps it
            self.place[self.name] = self._behind
        self._behind = self.builtin

    def through(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function that stood there before."""
        if self._behind is self.builtin or self.here.behind:  # a replacement may have got `front` for the original
            return self.builtin(*args, **kwargs)
        self.here.behind = True
        try:
            return self._behind(*args, **kwargs)
        finally:
            self.here.behind = False

    def _after_modes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Let the modes that are active answer first; what they let through reaches the layer, or PyTorch."""
        answer = self.here.answer
        self.here.modes += answer is not None
        with self._lock:
            alone = self._inside == 1 and answer is not None
            if alone:
                self._give_back()
        if not alone:  # other threads need the door open, so the function is what the attribute holds
            return handle_torch_function(self.place[self.name], (*args, *kwargs.values()), *args, **kwargs)
        self.here.answer = None
        try:
            with _Last(self.builtin, answer):
                return self.builtin(*args, **kwargs)
        finally:
            self.here.answer = answer
            with self._lock:
                self._take()


class Below(TorchFunctionMode):
    """A mode that comes below those which are active, so that they answer before it."""

    def __enter__(self) -> "Below":
        above = [torch.overrides._pop_mode() for _ in range(torch._C._len_torch_function_stack())]
        torch.overrides._push_mode(self)
        for mode in reversed(above):
            torch.overrides._push_mode(mode)
        return self

    def __exit__(self, *error: object) -> None:
        above = [torch.overrides._pop_mode() for _ in range(torch._C._len_torch_function_stack())]
        for mode in reversed(above[:-1]):
            torch.overrides._push_mode(mode)


class _Last(Below):
    """Answers one function."""

    def __init__(self, function: Any, answer: Any) -> None:
        super().__init__()
        self.function, self.answer = function, answer

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return (self.answer if func is self.function else func)(*args, **kwargs or {})


ATTENTION, LINEAR = (
    Door(vars(F), name, getattr(torch._C._nn, name)) for name in ("scaled_dot_product_attention", "linear")
)


def backend_of(processor: Any) -> Any:
    """Return the attention backend that a processor of diffusers calls, None if it calls none.

    PyTorch's own do not count: they end in `scaled_dot_product_attention`, which has a door.
    """
    backend = getattr(processor, "_attention_backend", "native")
    if backend is None:
        backend = sys.modules[_DISPATCH]._AttentionBackendRegistry._active_backend
    return None if backend in _PYTORCH else backend


_DISPATCH = "diffusers.models.attention_dispatch"
_PYTORCH = ("native", *(f"_native_{kind}" for kind in ("flash", "cudnn", "efficient", "math")))


@functools.cache
def backend_door(backend: Any) -> Door:
    """Return the door of an attention backend."""
    backends = sys.modules[_DISPATCH]._AttentionBackendRegistry._backends
    return Door(backends, backend, backends[backend], overridable=False)


def by_backend(backend: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Call an attention backend as `scaled_dot_product_attention` is called, on `[B, H, N, D]` tensors."""
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    dispatch = sys.modules[_DISPATCH].dispatch_attention_fn
    output: Tensor = dispatch(q, k, v, *args, **kwargs, backend=backend)
    return output.transpose(1, 2)


class _Described:
    """Stands for a processor's `__call__` where diffusers reads its signature, at each forward of an attention module.

    To work it out takes a tenth of a step's host time. Calls of the processor do not come here.
    """

    __slots__ = ("__signature__", "processor")

    def __init__(self, processor: Any, signature: inspect.Signature) -> None:
        self.processor, self.__signature__ = processor, signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.processor(*args, **kwargs)


def describe(processor: Any) -> dict[str, Any] | None:
    """Give a processor of diffusers its signature, until what is returned loses its `__call__`; None if it has none."""
    kind: Any = type(processor)
    signature = _signature_of(kind)
    if signature is None:
        return None
    attributes = vars(processor)
    if type(attributes.get("__call__", None)) not in (type(None), _Described):
        return None
    attributes["__call__"] = _Described(processor, signature)
    return attributes


@functools.cache
def _signature_of(cls: Any) -> inspect.Signature | None:
    """Return the signature of an object's `__call__`, if its class defines one in Python and takes attributes."""
    call = getattr(cls, "__call__", None)  # noqa: B004
    if not isinstance(call, types.FunctionType) or issubclass(cls, nn.Module) or not cls.__dictoffset__:
        return None
    return inspect.signature(types.MethodType(call, cls))


def never_reached(name: str, module: nn.Module) -> str:
    """Return what to say of a layer that attended without coming to a door."""
    processor = getattr(module, "processor", None)
    how = f" Its processor is {type(processor).__name__}." if processor is not None else ""
    kind = getattr(getattr(module, "config", None), "_attn_implementation", "sdpa")  # of transformers
    if kind != "sdpa":
        how = f" Its attention is {kind!r}: call set_attn_implementation('sdpa')."
    if isinstance(module, nn.MultiheadAttention):
        how = " nn.MultiheadAttention calls it if need_weights is False."
    if getattr(module, "_compiled_call_impl", None) is not None:
        how = " It is compiled by itself, where nothing can answer: compile its block or the model."
    return (
        f"{name} never called scaled_dot_product_attention, so it was not rerouted.{how} Switch off what "
        "replaces it: sliced attention (disable_attention_slicing), xformers "
        "(disable_xformers_memory_efficient_attention), "
        "AttnProcessor (set_attn_processor(AttnProcessor2_0())), timm's fused_attn=False; leave out the layer "
        "(where=); or revert()"
    )
