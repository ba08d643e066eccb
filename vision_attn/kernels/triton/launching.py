"""What the launches of all Triton kernels share: they take place on the tensors' GPU, and work nothing out twice."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial, wraps
from typing import Any

import torch
from torch import Tensor

_MOST = 4096  # plans that are kept of a kind: shapes may come from a user's data


class Kernel:
    """A Triton kernel that is launched on the GPU of its tensors; `triton.jit` takes the current one, whichever it is.

    Args:
        function: The kernel, from `triton.jit`; its first argument is a tensor.
    """

    def __init__(self, function: Any) -> None:
        self.function = function

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        """Return what launches the kernel on a grid of programs."""
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *args: Any, **named: Any) -> None:
        with on_device_of(args[0]):
            self.function[grid](*args, **named)


class Bound:
    """A kernel with all its arguments but the tensors.

    At every launch `triton.jit` works out anew what the arguments mean for compiled code: 50 us for 65 of them. Here
    that is done once; then only the alignment of the tensors matters, for their dtypes are the plan's.

    Args:
        kernel: The kernel. Its tensors come first, then boxes, then numbers.
        grid: Its programs.
        numbers: Its arguments after tensors and boxes.
        named: The rest of its arguments, in any order, and options of the launch.
    """

    def __init__(
        self, kernel: Kernel, grid: tuple[int, ...], numbers: tuple[float, ...], named: Mapping[str, Any]
    ) -> None:
        self.function, self.grid, self.numbers, self.named = kernel.function, (*grid, 1, 1)[:3], numbers, named
        self._compiled: dict[tuple[int, ...], tuple[Any, list[Any]]] = {}

    def __call__(self, *tensors: Tensor, boxes: tuple[Any, ...] = ()) -> None:
        """Launch."""
        key = tuple([t.data_ptr() % 16 for t in tensors])
        found = self._compiled.get(key)
        with on_device_of(tensors[0]):
            if found is None:
                self._compile(key, (*tensors, *boxes, *self.numbers))
            else:
                found[0][self.grid](*tensors, *boxes, *found[1])

    def _compile(self, key: tuple[int, ...], args: tuple[Any, ...]) -> None:
        compiled = self.function[self.grid](*args, **self.named)
        if compiled is not None:  # the interpreter compiles nothing
            names = self.function.arg_names[len(args) :]
            self._compiled[key] = compiled, [*self.numbers, *(self.named[name] for name in names)]


def on_device_of(t: Tensor) -> AbstractContextManager[Any]:
    """Make the GPU of `t` the current one inside the `with` block."""
    device = t.get_device()
    return _NOTHING if device < 0 or device == torch.cuda.current_device() else torch.cuda.device(device)


_NOTHING = nullcontext()


def next_power(n: int) -> int:
    """Return the next power of two; triton's own takes ten times as long, and every call of an operator asks."""
    return 1 << (n - 1).bit_length()


def multiprocessors(t: Tensor) -> int:
    """Multiprocessors of the GPU; in the interpreter, those of an H200."""
    return _properties(t.device).multi_processor_count if t.is_cuda else 132


def hopper(t: Tensor) -> bool:
    """Whether `t` is on a Hopper or later GPU: TMA fetches tiles, and a launch may start before the last one ends."""
    return t.is_cuda and torch.version.hip is None and _properties(t.device).major >= 9


@cache
def _properties(device: torch.device) -> Any:
    return torch.cuda.get_device_properties(device)


def layout(t: Tensor | None) -> tuple[Any, ...] | None:
    """All that a launch depends on of a tensor but what it holds."""
    return None if t is None else (t.dtype, t.shape, t.stride(), t.data_ptr() % 16)


def planned(plan: Callable[..., Any]) -> Callable[..., Any]:
    """Remember what `plan` returns for a call, which has a `key`, for tensors by their layout and other arguments."""
    plans: dict[tuple[Any, ...], Any] = {}

    @wraps(plan)
    def remembered(call: Any, *others: Any) -> Any:
        key = call.key, *[layout(o) if isinstance(o, Tensor) else o for o in others]
        found = plans.get(key)
        if found is None:
            if len(plans) >= _MOST:
                plans.clear()
            found = plans[key] = plan(call, *others)
        return found

    remembered.forget = plans.clear  # type: ignore[attr-defined]
    return remembered
