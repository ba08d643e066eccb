"""From a call in PyTorch to launches of Triton kernels: inputs, launch sizes, launches, TMA boxes.

Nothing here imports Triton, which is optional: the modules that define kernels do, and they are imported when they
first run. Launches take place on the GPU of their tensors, and calls alike share what Python works out for them.
"""

import importlib.util
import logging
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, lru_cache, partial, wraps
from typing import Any

import torch
from torch import Tensor

from vision_attn.kernels import launches
from vision_attn.kernels.backend import LaunchError, exporting, transformed
from vision_attn.kernels.launches import Launch
from vision_attn.kernels.tapes import HERE, record_anew

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LANES = 16  # rows of sums over tokens that no two threads share; they are added up once, at the end
_HAS_TRITON = importlib.util.find_spec("triton") is not None
# where the numbers of a kernel begin
_SIZES = ("N", "heads", "tokens", "outside", "parts", "queries", "first", "height")
# what a user sets and no size changes: a dilation of one saves its divisions
_COMPILED = ("step_y", "step_x", "KY", "KX", "reach", "near", "cell", "cell_h", "cell_w", "halo_h", "halo_w",
             "pool")  # fmt: skip
_SLOW = 0.5  # seconds of compiling that are worth a line
_logger = logging.getLogger(__name__)
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
        package = "triton-windows" if platform.system() == "Windows" else "triton"
        reasons.append(f"triton is not installed (pip install {package})")
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


def next_power(n: int) -> int:
    """Return the next power of two; triton's own takes ten times as long, and every call of an operator needs it."""
    return 1 << (n - 1).bit_length()


def block_of(channels: int) -> int:
    """Return the channels of a tile: the next power of two, at least 16."""
    return max(16, next_power(channels))


def thrice(t: Tensor) -> str:
    """Return the precision of products that keeps float32's accuracy on tensor cores: three in TF32, if there are any.

    Products of 16 bits ignore it.
    """
    return "ieee" if launches.target_of(t.device).amd else "tf32x3"


def precision_of(t: Tensor) -> str:
    """Return the precision of products: `thrice` up to 128 channels; 16 bits ignore it."""
    if t.dtype != torch.float32:
        return "ieee" if launches.target_of(t.device).amd else "tf32"
    return thrice(t) if t.shape[-1] <= 128 else "ieee"


def floats_of(t: Tensor) -> int:
    """Return in how many floats a log-sum-exp is kept for the backward: see `store_lse`."""
    return 2 if t.dtype == torch.float32 else 1


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

    Its arguments are tensors, boxes and strides, from one of `_SIZES` on numbers of tokens, heads and so on, and last
    constants. Triton would compile anew for a number that is one, or that is no multiple of 16 while others were. Here
    numbers have no part in what is compiled, so that a second size of a picture compiles nothing. Strides have one: a
    multiple of 16 lets 16 bytes be loaded at once.

    Args:
        function: The kernel, from `triton.jit`; its first argument is a tensor.
    """

    def __init__(self, function: Any) -> None:
        if hasattr(function, "device_caches"):  # not in the interpreter, which compiles nothing
            function = type(function)(function.fn, do_not_specialize=_numbers(function))
        self.function = function

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        """Return a function that launches the kernel on a grid of programs."""
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *args: Any, **named: Any) -> None:
        heard = HERE.recorder
        with on_device_of(args[0]) if heard is None else heard.paused():
            compiled = self.run(grid, *args, **named)
        if heard is not None:
            names, values = self.function.arg_names, dict(zip(self.function.arg_names, args, strict=False)) | named
            tensors = {name: values[name] for name in names if isinstance(values.get(name), Tensor)}

            def again(*others: Tensor) -> None:
                now = values | dict(zip(tensors, others, strict=True))
                self._launch(grid, *[now.pop(name) for name in names[: len(args)]], **now)

            if compiled is not None:
                where = [n for n, name in enumerate(names) if name in tensors]
                compiled = compiled, [values[name] for name in names], where
            heard.launched(compiled, grid, list(tensors.values()), again)

    def run(self, grid: tuple[int, ...], *args: Any, **named: Any) -> Any:
        """Launch on the current GPU; return the compiled kernel.

        Raises:
            LaunchError: If the kernel does not fit or compile, where it was never asked for what it `needs`.
        """
        if _Mode.compiles_only:
            self.needs(*args, **named)
            return None
        try:
            return self.function[grid](*args, **named)
        except Exception as error:
            if type(error).__name__ not in ("OutOfResources", "CompilationError"):  # Triton's, not imported here
                raise
            raise LaunchError(f"{self.name} does not fit or compile: {_short(error)}") from error

    def needs(self, *args: Any, **named: Any) -> int:
        """Compile for some arguments and return the bytes of shared memory that a block takes.

        A dtype stands for a tensor that is yet to be made.

        Raises:
            LaunchError: If the kernel does not compile.
        """
        if not hasattr(self.function, "device_caches") or launches.target_of(args[0].device) is launches.INTERPRETER:
            return 0  # the interpreter has no memory of a block
        start = time.perf_counter()
        with on_device_of(args[0]):
            _announce()
            try:
                compiled = self.function.warmup(*args, grid=(1,), **named)
            except Exception as error:  # the compiler of a GPU may fail in any way
                raise LaunchError(f"{self.name} does not compile: {_short(error)}") from error
        seconds = time.perf_counter() - start
        if seconds > _SLOW:
            _logger.info("%s was compiled in %.1f s", self.name, seconds)
        # beyond the columns of tensor memory that there are, no shared memory helps
        return compiled.metadata.shared if (getattr(compiled.metadata, "tmem_size", 0) or 0) <= 512 else sys.maxsize

    @property
    def name(self) -> str:
        """Where it stands: 'local.queries._forward'."""
        function = getattr(self.function, "fn", self.function)
        return f"{function.__module__.removeprefix('vision_attn.kernels.')}.{function.__name__}"


def _numbers(function: Any) -> list[str]:
    """Return the arguments of a kernel whose values have no part in what is compiled."""
    names = [p.name for p in function.params if not p.is_constexpr]
    first = next((n for n, name in enumerate(names) if name in _SIZES), len(names))
    return [name for name in names[first:] if name not in _COMPILED]


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()[-300:]}"


class _Mode:
    """What kernels do in all threads of this process: a backward has one of its own."""

    compiles_only = False


@contextmanager
def compile_only() -> Iterator[None]:
    """Compile kernels and launch none inside the block: for processes that fill Triton's cache."""
    _Mode.compiles_only = True
    try:
        yield
    finally:
        _Mode.compiles_only = False


@cache
def _announce() -> None:
    """Say once that kernels are compiled."""
    _logger.info(
        "Triton compiles kernels for this GPU: some seconds each, at their first call. They are kept in %s for later "
        "processes; `vision-attn warm` compiles them ahead",
        os.environ.get("TRITON_CACHE_DIR", "~/.triton/cache"),
    )


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
        self.kernel, self.function = kernel, kernel.function
        self.grid, self.numbers, self.named = (*grid, 1, 1)[:3], numbers, named
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
            moving = *tensors, *boxes
            compiled = found and (found[0], [*moving, *found[1]], range(len(moving)))
            heard.launched(compiled, self.grid, moving, self)

    def needs(self, *tensors: Any, boxes: tuple[Any, ...] = ()) -> int:
        """Compile, and return the bytes of shared memory that a block takes: see `Kernel.needs`."""
        return self.kernel.needs(*tensors, *boxes, *self.numbers, **self.named)

    def _compile(self, key: tuple[int, ...], args: tuple[Any, ...]) -> tuple[Any, list[Any]] | None:
        shared, most = self.kernel.needs(*args, **self.named), launches.target_of(args[0].device).shared
        if shared > most:
            raise LaunchError(f"{self.kernel.name} takes {shared} bytes of shared memory, a block has {most}")
        compiled = self.kernel.run(self.grid, *args, **self.named)
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
    return launches.target_of(t.device).multiprocessors


def hopper(t: Tensor) -> bool:
    """Whether `t` is on a Hopper or later GPU: TMA fetches tiles, and a launch may start before the last one ends."""
    return launches.target_of(t.device).tma


def roomless(t: Tensor) -> bool:
    """Whether a block of the GPU of `t` has less shared memory than an A100's."""
    return launches.target_of(t.device).shared < 2**17


def tensor_memory(t: Tensor) -> bool:
    """Whether `t` is on a GPU that sums products in tensor memory: Blackwell of data centres."""
    return launches.target_of(t.device).tensor_memory


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
            try:
                found = plan(call, *others)
            except LaunchError as error:
                found = LaunchError(*error.args)  # without the frames, which hold tensors
            plans[key] = found
        if type(found) is LaunchError:
            raise LaunchError(*found.args)
        return found

    _plans.append(plans)
    remembered.forget = plans.clear  # type: ignore[attr-defined]
    return remembered


_plans: list[dict[tuple[Any, ...], Any]] = []
_fits: dict[tuple[Any, ...], Launch | LaunchError] = {}
_plans.append(_fits)


def launch_of(
    name: str, t: Tensor, constants: tuple[Any, ...], needs: Callable[[Launch], int], *, columns: float = 0,
    channels: int | None = None,
) -> Launch:  # fmt: skip
    """Return the launch of a kernel that is not planned: see `launches.fitting`.

    Args:
        name: Operator and kernel.
        t: A tensor on the GPU, of the dtype and the channels of the call.
        constants: All else that the kernel is compiled for.
        needs: Takes a launch and returns the bytes of shared memory that it takes, see `Kernel.needs`.
        columns: Columns of a window.
        channels: Channels by which a row is found; those of `t` if None.

    Raises:
        LaunchError: If none fits.
    """
    key = name, t.device, t.dtype, t.shape[-1], constants, columns, channels
    found = _fits.get(key)
    if found is None:
        width = block_of(t.shape[-1]) if channels is None else channels
        try:
            found = launches.fitting(name, t, lambda one: (one, needs(one)), channels=width, columns=columns)
        except LaunchError as error:
            found = LaunchError(*error.args)
        _fits[key] = found
    if type(found) is LaunchError:
        raise LaunchError(*found.args)
    return found  # type: ignore[return-value]


def forget() -> None:
    """Plan every launch anew, from tables that are read anew; what repeats a call's launches is recorded anew."""
    for plans in _plans:
        plans.clear()
    record_anew()
    launches.forget()
