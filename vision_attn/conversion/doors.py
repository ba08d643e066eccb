"""Doors: two functions of `torch.nn.functional` that the layer which runs answers, for one Python call each.

A host looks the function up in `torch.nn.functional` whenever it calls it. While the forward of a converted layer runs,
the attribute there is ours; the function asks which layer runs in its own thread, and goes on to what was there before
if none does. A `TorchFunctionMode` could do the same without touching the attribute, but it sees each of the 20 to 60
calls of a layer, and that took a quarter of a step's host time.

The attribute belongs to the whole process, so that this is the one state outside objects. It is ours only between the
first layer that begins, in any thread, and the last one that ends, by an error too: convert, revert, copies and
pickles have nothing to keep in order, code that is compiled, scripted or traced between forwards finds PyTorch as it
is, and a function that somebody else put there (SageAttention) answers what layers leave to the host.

Modes of others, inside or around the layer, come first. To them the call looks as without us: whether they compare the
function with the attribute, or with what they imported long ago. Dynamo inlines modes well and threads badly: in code
that it compiles the layer enters `Answering`, a mode, and no door is open.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
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
    """A function of `torch.nn.functional` that the layer which runs may answer.

    Args:
        name: Name of the function.

    Attributes:
        builtin: PyTorch's function.
        front: The function that stands there while a layer runs.
        here: The state of this thread.
    """

    def __init__(self, name: str) -> None:
        self.name, self.here = name, _Here()
        self.builtin = self._behind = getattr(torch._C._nn, name)
        self._inside, self._lock = 0, threading.Lock()

        def front(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():  # another thread's door, seen while this one compiles
                return self.builtin(*args, **kwargs)
            if torch._C._len_torch_function_stack() and self._behind is self.builtin:
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

        front.__name__, front.__qualname__, front.__doc__ = name, name, self.builtin.__doc__
        front.__module__ = F.__name__
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
        found = getattr(F, self.name)
        if found is not self.front:
            self._behind = found
            setattr(F, self.name, self.front)

    def _give_back(self) -> None:
        if getattr(F, self.name) is self.front:  # else somebody has replaced it meanwhile, and keeps it
            setattr(F, self.name, self._behind)
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
            return handle_torch_function(getattr(F, self.name), (*args, *kwargs.values()), *args, **kwargs)
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


ATTENTION, LINEAR = Door("scaled_dot_product_attention"), Door("linear")
