"""What calls cost: their times side by side, and the memory they take.

On a GPU, replays of CUDA graphs are timed between events; on a CPU, wall-clock time. Candidates take turns, in
alternating order, so that what drifts hits all alike. On a GPU each turn begins with 80 ms of calls that are not
counted: a GPU that was idle, or ran something lighter, has a higher clock than the candidate can hold. It then waits
until short calls are queued, as else it would wait for each of them where the host is slow. The inputs are not evicted
from the cache between calls.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vision_attn.bench.candidate import Inputs

_LEAD_MS = 80.0
_TURN_MS = 40.0
_SLOW_MS = 100.0
_MOST_MS = 600.0
_SHORT_MS = 0.2
_QUEUED_CYCLES = 8_000_000  # of the GPU, about 4 ms: in these the host queues 40 calls


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call over `samples` calls: the median, the least, and the width of the middle half."""

    median_ms: float
    min_ms: float
    iqr_ms: float
    samples: int
    launch: str

    @classmethod
    def of(cls, samples: list[float], launch: str) -> "Timing":
        """Summarise at least two samples in milliseconds."""
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, min(samples), high - low, len(samples), launch)


class Launch:
    """A call that is ready to be timed: warmed up and, on a GPU, captured in a CUDA graph where it can be.

    Args:
        call: What to time; takes no arguments, and its result is dropped. On a GPU its work must go to the current
            stream.
        device: Where it runs.
        setup: Runs before every call and is not timed: the forward that a backward consumes.
        graph: Whether to try a CUDA graph. A whole model is timed without one, as its users run it.

    Attributes:
        kind: 'graph', 'eager' (on a GPU, where no graph was captured) or 'cpu'.
        estimate_ms: About how long a call takes.
    """

    def __init__(
        self,
        call: Callable[[], object],
        device: torch.device,
        setup: Callable[[], object] | None = None,
        *,
        graph: bool = True,
    ) -> None:
        # Graphs hold addresses alone: what the functions refer to must live as long as the graphs are replayed.
        self._functions = self._steps = [call] if setup is None else [setup, call]
        self.kind = "cpu"
        self._once()
        if device.type == "cuda":
            torch.cuda.synchronize()
            self.kind = "graph" if graph and self._capture() else "eager"
        self.estimate_ms = self.burst(1)[0]
        if self.estimate_ms < _SLOW_MS:
            self.estimate_ms = self.burst(1)[0]

    def _capture(self) -> bool:
        try:
            pool = torch.cuda.graph_pool_handle()
            self._steps = [_graph(function, pool).replay for function in self._functions]
            self._once()
            torch.cuda.synchronize()
        except RuntimeError:
            self._steps = self._functions
            return False
        return True

    def _once(self) -> None:
        for step in self._steps:
            step()

    def turn(self) -> list[float]:
        """Return the milliseconds of one slow call, or of up to 40 calls in a row after calls that are not counted."""
        if self.estimate_ms >= _SLOW_MS:
            return self.burst(1)
        per_ms = 1 / max(self.estimate_ms, 1e-3)
        lead = 1 if self.kind == "cpu" else math.ceil(_LEAD_MS * per_ms)
        return self.burst(min(max(int(_TURN_MS * per_ms), 2), 40), lead)

    def burst(self, count: int, lead: int = 0) -> list[float]:
        """Return the milliseconds of `count` calls that follow `lead` uncounted ones."""
        for _ in range(lead):
            self._once()
        *setup, call = self._steps
        if self.kind == "cpu":
            return [_wall(setup, call) for _ in range(count)]
        if lead and self.estimate_ms < _SHORT_MS:
            torch.cuda._sleep(_QUEUED_CYCLES)
        pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(count)]
        for begin, end in pairs:
            for step in setup:
                step()
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in pairs]


def _wall(setup: Sequence[Callable[[], object]], call: Callable[[], object]) -> float:
    for step in setup:
        step()
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def _graph(call: Callable[[], object], pool: Any) -> torch.cuda.CUDAGraph:
    # torch.cuda.graph would also collect garbage and empty the allocator's cache, a second or more each time
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(pool=pool)
    try:
        call()
    finally:
        graph.capture_end()
    return graph


def own_stream(device: torch.device) -> AbstractContextManager[object]:
    """Return a context with a stream of its own: CUDA graphs are not captured on the default stream."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()


def interleave(launches: Mapping[str, Launch], *, rounds: int = 4) -> dict[str, Timing]:
    """Time all launches in turns.

    Args:
        launches: By name.
        rounds: Turns of each launch. One that has spent 600 ms sits out the rest, from two samples on.

    Returns:
        The timing of every launch, by name.
    """
    samples: dict[str, list[float]] = {name: [] for name in launches}
    for turn in range(max(rounds, 2)):
        for name in list(launches) if turn % 2 == 0 else list(launches)[::-1]:
            if len(samples[name]) < 2 or sum(samples[name]) <= _MOST_MS:
                samples[name] += launches[name].turn()
    return {name: Timing.of(samples[name], launch.kind) for name, launch in launches.items()}


class Clock:
    """Measures milliseconds: by events on a GPU, by wall-clock time on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def now(self) -> Any:
        """Return this moment: on a GPU, a place in the stream of work."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms(self, begin: Any, end: Any) -> float:
        """Return the milliseconds between two moments."""
        if not self._cuda:
            return (end - begin) * 1e3
        end.synchronize()
        return begin.elapsed_time(end)

    def time(self, call: Callable[[], object]) -> float:
        """Return the milliseconds of one call."""
        begin = self.now()
        call()
        return self.ms(begin, self.now())


class PeakMemory:
    """Watches the memory of a GPU from the moment it is made; on a CPU nothing is counted."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)

    def read(self) -> dict[str, int] | None:
        """Return the peak in `bytes` and the part of it `above` what lay there before; None on a CPU."""
        if self._device.type != "cuda":
            return None
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated(self._device)
        return dict(bytes=peak, above=peak - self._before)


def peak_memory(call: Callable[[], object], device: torch.device) -> dict[str, int] | None:
    """Return what one call needs, see `PeakMemory`.

    Args:
        call: Has run before, so that no compilation is in the figure.
        device: Where it runs.
    """
    watch = PeakMemory(device)
    call()
    return watch.read()


def extra_memory(
    run: Callable[..., Tensor], inputs: Inputs, device: torch.device, backward: bool
) -> dict[str, float] | None:
    """Return the peak above inputs and outputs of one forward, or of forward and backward together.

    Saved statistics such as a log-sum-exp count as extra; a cotangent is an input, gradients are outputs.

    Args:
        run: From the inputs to the output; has run before, so that no compilation is in the figure.
        inputs: What to call it with.
        device: Where it runs.
        backward: Whether the gradients of all inputs are computed too.

    Returns:
        `bytes`, and `share` of the bytes of inputs and outputs. None on a CPU.
    """
    if device.type != "cuda":
        return None
    watch = PeakMemory(device)
    if backward:
        leaves = inputs.leaves()
        output = run(*leaves)
        outputs = (output, *torch.autograd.grad(output, leaves, inputs.cotangent))
        given = sum(t.nbytes for t in (*inputs.tensors, inputs.cotangent))
    else:
        with torch.no_grad():
            outputs = (run(*inputs.tensors),)
        given = sum(t.nbytes for t in inputs.tensors)
    made, peak = sum(t.nbytes for t in outputs), watch.read()
    assert peak is not None
    extra = max(peak["above"] - made, 0)
    return dict(bytes=extra, share=extra / (given + made))
