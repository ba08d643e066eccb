"""Times the forwards of a denoiser where it runs: what the device does in attention, linear layers and convolutions."""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.profiler import record_function
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity

from vision_attn.estimation.step import PARTS, part_of

_MARK = "vision_attn: "
_STEP, _ATTENTION = f"{_MARK}step", f"{_MARK}attention"
_MARKED = PARTS[:-1]  # the rest is what no other part has


@dataclass(frozen=True)
class Profile:
    """Seconds of one forward of a model, or of all models of a step one after another.

    Attributes:
        seconds: From its begin until the device is done.
        host: Until the last launch.
        attention: Of the device, in attention over as many keys as queries.
        parts: Of the device, in each of `PARTS`.
    """

    seconds: float
    host: float
    attention: float
    parts: Mapping[str, float]


def profile(models: Iterable[nn.Module], run: Callable[[], object], device: torch.device) -> Profile:
    """Time the forwards that `run` makes.

    Args:
        models: The models; each of them may run several times.
        run: Runs them, and perhaps other things, which are not counted. It is called three times.
        device: Where they run.

    Raises:
        RuntimeError: If no model ran, or the profiler saw nothing of the device.
    """
    watches = [_Watch(model, device) for model in models]
    with torch.no_grad():
        run()  # code is compiled, and libraries choose their kernels
        with _all(watch.timing() for watch in watches):
            run()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        marks = _all(watch.marking() for watch in watches)
        with marks, _Attention(watches), torch.profiler.profile(activities=activities) as found:
            run()
            wait(device)
    ran = [watch for watch in watches if watch.walls]
    if not ran:
        raise RuntimeError("no denoiser ran")
    spent = dict.fromkeys((_STEP, _ATTENTION, *(_MARK + part for part in _MARKED)), 0.0)
    for event in found.events() or ():
        if event.name in spent and event.device_type.name == "CPU":
            spent[event.name] += (event.device_time_total if device.type == "cuda" else event.cpu_time_total) / 1e6
    if not spent[_STEP]:
        raise RuntimeError("the profiler saw nothing of the device")
    steps = max(watch.marked for watch in ran)
    attention, parts = spent[_ATTENTION] / steps, {part: spent[_MARK + part] / steps for part in _MARKED}
    parts["other"] = max(0.0, spent[_STEP] / steps - attention - sum(parts.values()))
    seconds, host = (
        sum(map(statistics.median, times)) for times in zip(*((w.walls, w.hosts) for w in ran), strict=True)
    )
    return Profile(seconds, host, attention, parts)


class _Watch:
    """Watches the forwards of one model.

    Attributes:
        walls: Seconds of each forward that was timed.
        hosts: Those of the host.
        marked: How many forwards were marked for the profiler.
        inside: Whether a forward that is marked runs.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model, self._device = model, device
        self.walls: list[float] = []
        self.hosts: list[float] = []
        self.marked, self.inside = 0, False
        self._begin = 0.0
        self._open: list[Any] = []

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Take the times of forwards inside the `with` block."""

        def begin(model: nn.Module, args: Any) -> None:
            wait(self._device)
            self._begin = time.perf_counter()

        def end(model: nn.Module, args: Any, output: Any) -> None:
            self.hosts.append(time.perf_counter() - self._begin)
            wait(self._device)
            self.walls.append(time.perf_counter() - self._begin)

        with _hooks((self._model, begin, end)):
            yield

    @contextmanager
    def marking(self) -> Iterator[None]:
        """Mark forwards, and linear layers and convolutions in them, inside the `with` block."""

        def step(model: nn.Module, args: Any) -> None:
            self.marked += 1
            self.inside = True
            self._enter(_STEP)

        def end(model: nn.Module, args: Any, output: Any) -> None:
            self._leave()
            self.inside = False

        every: list[tuple[nn.Module, Callable[..., None], Callable[..., None]]] = [(self._model, step, end)]
        modules = dict(self._model.named_modules())
        for name, module in modules.items():
            part = part_of(name, modules)
            if part in _MARKED:
                every.append((module, partial(self._enter, _MARK + part), self._leave))
        try:
            with _hooks(*every):
                yield
        finally:
            while self._open:  # a forward raised an exception
                self._leave()

    def _enter(self, part: str, *_: Any) -> None:
        mark = record_function(part)
        mark.__enter__()
        self._open.append(mark)

    def _leave(self, *_: Any) -> None:
        self._open.pop().__exit__(None, None, None)


class _Attention(TorchFunctionMode):
    """Marks attention of as many keys as queries."""

    def __init__(self, watches: list[_Watch]) -> None:
        super().__init__()
        self._watches = watches

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or not any(watch.inside for watch in self._watches):
            return func(*args, **kwargs)
        query, key = (args[n] if len(args) > n else kwargs[name] for n, name in enumerate(("query", "key")))
        if not isinstance(query, Tensor) or query.shape[-2] != key.shape[-2]:
            return func(*args, **kwargs)
        with record_function(_ATTENTION):
            return func(*args, **kwargs)


@contextmanager
def _hooks(*found: tuple[nn.Module, Callable[..., None], Callable[..., None]]) -> Iterator[None]:
    """Call functions before and after the forwards of modules inside the `with` block."""
    handles: list[Any] = []
    try:
        for module, before, after in found:
            handles.append(module.register_forward_pre_hook(before))
            handles.append(module.register_forward_hook(after))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _all(contexts: Iterable[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def wait(device: torch.device) -> None:
    """Wait until a GPU is done; a CPU is."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
