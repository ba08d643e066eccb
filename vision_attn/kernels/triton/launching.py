"""From a call in PyTorch to launches of Triton kernels: inputs, launch sizes, launches, TMA boxes.

Nothing here imports Triton, which is optional: the modules that define kernels do, and they are imported when they
first run. Launches take place on the GPU of their tensors, and calls alike share what Python works out for them.
"""

import importlib.util
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, lru_cache, partial, wraps
from typing import Any

import torch
from torch import Tensor

from vision_attn.kernels.backend import exporting, transformed
from vision_attn.kernels.tapes import HERE

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LANES = 16  # rows of sums over tokens that no two threads share; they are added up once, at the end
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_MOST = 4096  # plans kept of one kind: shapes may come from a user's data


def triton_reasons(q: Tensor, *others: Tensor, constants: tuple[Tensor, ...] = (), auto: bool = False) -> list[str]:
    """List why the Triton backend cannot run; empty if it can.

    Args:
        q: Queries; dtype and device are theirs.
        others: All tensors whose last axis is channels of a head.
        constants: Tensors that must need no gradient.
        auto: Whether the backend would be chosen rather than asked for.
    """
    reasons = []
    if not _HAS_TRITON:
        reasons.append("triton is not installed")
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        reasons.append(f"q is on {q.device}, not on cuda")
    if q.dtype not in DTYPES:
        reasons.append(f"dtype {q.dtype} is none of float32, float16, bfloat16")
    reasons += [f"head_dim {D} is above 256" for D in sorted({t.shape[-1] for t in (q, *others)}) if D > 256]
    if any(t.requires_grad for t in constants) and torch.is_grad_enabled():
        reasons.append("rotary needs a gradient")
    if transformed():
        reasons.append("it runs under no transform of torch.func and has no forward-mode derivative, as 'torch' does")
    if auto and exporting():
        reasons.append("an exported program has no kernels of ours")
    if auto and not q.is_cuda:
        reasons.append("on a CPU it is interpreted")
    return reasons


def inference_reasons(q: Tensor, *others: Tensor, weights: tuple[Tensor, ...], auto: bool) -> list[str]:
    """List why an operator without a backward cannot run in Triton; empty if it can.

    Args:
        q: As for `triton_reasons`.
        others: As for `triton_reasons`.
        weights: Tensors of other shapes.
        auto: As for `triton_reasons`.
    """
    reasons = triton_reasons(q, *others, auto=auto)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, *others, *weights)):
        reasons.append("it has no gradient")
    return reasons


def packed(t: Tensor) -> Tensor:
    """Return `t` with neighbouring channels in memory; a copy only where they are not."""
    return t if t.stride(-1) == 1 else t.contiguous()


def aligned(t: Tensor) -> Tensor:
    """Return `t` with neighbouring channels from a multiple of 16 bytes on; a copy only where they are not."""
    unit = 16 // t.element_size()
    if t.data_ptr() % 16 == 0 and _in_units(t.shape, t.stride(), unit):
        return t
    padded = t.new_empty((*t.shape[:-1], math.ceil(t.shape[-1] / unit) * unit))
    return padded[..., : t.shape[-1]].copy_(t)


@lru_cache(_MOST)
def _in_units(shape: tuple[int, ...], strides: tuple[int, ...], unit: int) -> bool:
    """Whether channels are neighbours, and all else lies a multiple of `unit` elements apart."""
    return strides[-1] == 1 and all(s % unit == 0 for n, s in zip(shape[:-1], strides[:-1], strict=True) if n > 1)


def bytes_of_mask(mask: Tensor | None) -> Tensor | None:
    """Return a bool mask as kernels read it."""
    return None if mask is None else mask.contiguous().view(torch.uint8)


def strides_of(*tensors: Tensor) -> tuple[int, ...]:
    """Return the strides of batch, token and head of each tensor `[B, N, H, D]`."""
    return tuple([stride for t in tensors for stride in t.stride()[:3]])


def unit_strides_of(*tensors: Tensor) -> tuple[int, ...]:
    """Return `strides_of` tensors that are `aligned`, in units of the 16 bytes that one load may take."""
    found = []
    for t in tensors:
        unit = 16 // t.element_size()
        found += [0 if n == 1 else s // unit for n, s in zip(t.shape[:3], t.stride()[:3], strict=True)]
    return tuple(found)


@dataclass(frozen=True)
class Launch:
    """Tokens of a tile, warps, pipeline stages, programs on one multiprocessor; `boxes` is taken where TMA can load."""

    length: int
    warps: int
    stages: int
    programs: int
    boxes: "Launch | None" = None


@dataclass(frozen=True)
class Blocks:
    """Tokens that a program owns, and the launch over the tokens that it walks."""

    rows: int
    launch: Launch


def choice(q: Tensor, table: Mapping[tuple[int, int], Any]) -> Any:
    """Return the first entry that fits; keys are bytes of an element, and channels at most."""
    return next(c for (b, d), c in table.items() if b == q.element_size() and block_of(q.shape[-1]) <= d)


def next_power(n: int) -> int:
    """Return the next power of two; triton's own takes ten times as long, and every call of an operator needs it."""
    return 1 << (n - 1).bit_length()


def block_of(channels: int) -> int:
    """Return the channels of a tile: the next power of two, at least 16."""
    return max(16, next_power(channels))


def precision_of(t: Tensor) -> str:
    """Return the precision of products: three in TF32 keep float32's accuracy up to 128 channels; 16 bits ignore it."""
    if t.dtype != torch.float32:
        return "tf32"
    return "tf32x3" if t.shape[-1] <= 128 else "ieee"


def cut(tokens: int, programs: int, launch: Launch, t: Tensor, *, least: int, fill: bool = True) -> tuple[int, int]:
    """Return into how many parts, and of what length, a loop over `tokens` is cut.

    Args:
        tokens: Length of the loop.
        programs: Programs of one part.
        launch: Tokens of a tile, and programs on one multiprocessor.
        t: A tensor on the GPU.
        least: The fewest tiles of a part that are worth what a part costs.
        fill: Whether the parts fill the GPU; if not, they leave room rather than exceed it.
    """
    want = multiprocessors(t) * launch.programs / max(programs, 1)
    parts = max(1, min(math.ceil(want) if fill else math.floor(want), tokens // (least * launch.length)))
    size = math.ceil(tokens / parts / launch.length) * launch.length
    return math.ceil(tokens / size), size


def added(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Add parts in a fixed order."""
    return parts[0] if len(parts) == 1 else parts.sum(0).to(dtype)


class Kernel:
    """A Triton kernel that is launched on the GPU of its tensors; `triton.jit` alone would take the current GPU.

    Args:
        function: The kernel, from `triton.jit`; its first argument is a tensor.
    """

    def __init__(self, function: Any) -> None:
        self.function = function

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        """Return a function that launches the kernel on a grid of programs."""
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *args: Any, **named: Any) -> None:
        heard = HERE.recorder
        with on_device_of(args[0]) if heard is None else heard.paused():
            compiled = self.function[grid](*args, **named)
        if heard is not None:
            tensors = [a for a in args if isinstance(a, Tensor)]
            numbers = args[len(tensors) :]
            if compiled is not None:
                compiled = compiled, [*numbers, *(named[name] for name in self.function.arg_names[len(args) :])]
            heard.launched(compiled, grid, tensors, lambda *others: self._launch(grid, *others, *numbers, **named))


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
        found, heard = self._compiled.get(key), HERE.recorder
        with on_device_of(tensors[0]) if heard is None else heard.paused():
            if found is None:
                found = self._compile(key, (*tensors, *boxes, *self.numbers))
            else:
                found[0][self.grid](*tensors, *boxes, *found[1])
        if heard is not None:
            heard.launched(found, self.grid, (*tensors, *boxes), self)

    def _compile(self, key: tuple[int, ...], args: tuple[Any, ...]) -> tuple[Any, list[Any]] | None:
        compiled = self.function[self.grid](*args, **self.named)
        if compiled is not None:  # the interpreter compiles nothing
            names = self.function.arg_names[len(args) :]
            self._compiled[key] = compiled, [*self.numbers, *(self.named[name] for name in names)]
        return self._compiled.get(key)


def on_device_of(t: Tensor) -> AbstractContextManager[Any]:
    """Make the GPU of `t` the current one inside the `with` block."""
    device = t.get_device()
    return _NOTHING if device < 0 or device == torch.cuda.current_device() else torch.cuda.device(device)


_NOTHING = nullcontext()


def multiprocessors(t: Tensor) -> int:
    """Return the number of the GPU's multiprocessors; in the interpreter, that of an H200."""
    return _properties(t.device).multi_processor_count if t.is_cuda else 132


def hopper(t: Tensor) -> bool:
    """Whether `t` is on a Hopper or later GPU: TMA fetches tiles, and a launch may start before the last one ends."""
    return t.is_cuda and torch.version.hip is None and _properties(t.device).major >= 9


@cache
def _properties(device: torch.device) -> Any:
    return torch.cuda.get_device_properties(device)


def dependent(t: Tensor) -> dict[str, bool]:
    """Return launch options of a kernel that calls `await_previous`."""
    return dict(OVERLAP=True, launch_pdl=True) if hopper(t) else dict(OVERLAP=False)


def layout(t: Tensor | None) -> tuple[Any, ...] | None:
    """Return everything of a tensor that a launch depends on, except its values."""
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


@dataclass(frozen=True)
class Shifted:
    """The address `elements` after the start of a tensor, before it if negative. TMA only counts from it."""

    tensor: Tensor
    elements: int

    @property
    def dtype(self) -> torch.dtype:
        """The tensor's."""
        return self.tensor.dtype

    def data_ptr(self) -> int:
        """Return the address."""
        return self.tensor.data_ptr() + self.elements * self.tensor.element_size()


@dataclass(frozen=True)
class Box:
    """Tiles of a tensor that TMA fetches: where the first starts, and the lengths, strides and tile of each axis.

    TMA takes no registers, and what lies beyond a tensor reads as zero.
    """

    first: int
    shape: list[int]
    strides: list[int]
    tile: list[int]

    def of(self, t: Tensor) -> Any:
        """Return the descriptor of tensor `t`."""
        base: Any = Shifted(t, self.first) if self.first else t
        return _descriptor()(base, self.shape, self.strides, self.tile)


@cache
def _descriptor() -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: PLC0415

    return TensorDescriptor


@dataclass(frozen=True)
class Plan:
    """A launch without its tensors.

    Args:
        launch: The kernel with its numbers.
        parts: Into how many parts its long loops are cut.
        boxes: Tiles of tensors; None where they are read by their strides.
    """

    launch: Bound
    parts: int
    boxes: tuple[Box | None, ...]

    def run(self, *tensors: Tensor, boxed: tuple[Tensor, ...]) -> None:
        """Launch; `boxed` has a tensor for each of the boxes."""
        boxes = tuple([t if box is None else box.of(t) for t, box in zip(boxed, self.boxes, strict=True)])
        self.launch(*tensors, boxes=boxes)


def uses_boxes(tensors: Sequence[Tensor]) -> bool:
    """Whether TMA can fetch tiles of these `[B, N, H, D]` tensors: Hopper or later, and 16-byte strides."""
    return hopper(tensors[0]) and all(boxable(t) for t in tensors)


def boxable(t: Tensor) -> bool:
    """Whether the strides of `t` suit TMA."""
    size = t.element_size()
    outer = zip(t.shape[:3], t.stride()[:3], strict=True)
    return t.data_ptr() % 16 == 0 and all(s > 0 and s * size % 16 == 0 for n, s in outer if n > 1)


def sequence_box(t: Tensor, length: int, block_d: int) -> Box:
    """Return boxes of `length` tokens of one head of `[B, N, H, D]`."""
    return Box(0, list(t.shape), box_strides(t), [1, length, 1, block_d])


def box_strides(t: Tensor) -> list[int]:
    """Return strides; that of an axis of one element is free, and TMA wants a multiple of 16 bytes."""
    return [s if n > 1 else 16 * t.shape[-1] for n, s in zip(t.shape[:3], t.stride()[:3], strict=True)] + [1]
