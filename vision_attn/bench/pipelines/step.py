"""Times denoising steps, and where a step would take too long extrapolates it from one block of each kind."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

LONGEST_S = 15.0
_COUNTS = ((0.5, 5), (2.0, 3), (6.0, 2))  # below so many seconds, so many steps are timed


class Clock:
    """Moments between which milliseconds are counted: events on a GPU, wall-clock time on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def now(self) -> Any:
        """Mark this place in the stream of work."""
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


class _Timed(nn.Module):
    """Runs a block and marks when."""

    def __init__(self, block: nn.Module, clock: Clock) -> None:
        super().__init__()
        self.block, self._clock = block, clock
        self.last: tuple[Any, Any] = (None, None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        begin = self._clock.now()
        output = self.block(*args, **kwargs)
        self.last = begin, self._clock.now()
        return output


@contextmanager
def shortened(model: nn.Module, stacks: Sequence[str], clock: Clock) -> Iterator[dict[str, _Timed]]:
    """Give a model one block of each stack inside the `with` block; all weights stay where they are."""
    whole = {name: getattr(model, name) for name in stacks}
    first = {name: _Timed(blocks[0], clock) for name, blocks in whole.items()}
    try:
        for name, block in first.items():
            setattr(model, name, nn.ModuleList([block]))
        yield first
    finally:
        for name, blocks in whole.items():
            setattr(model, name, blocks)


class Steps:
    """The steps of one model, timed.

    Args:
        step: One step.
        model: What it runs.
        stacks: Lists of equal blocks of the model; none if the blocks differ, and every step is run whole.
        device: Where.
        longest_s: A step that is expected to take longer is extrapolated.
    """

    def __init__(
        self,
        step: Callable[[], object],
        model: nn.Module,
        stacks: Sequence[str],
        device: torch.device,
        *,
        longest_s: float = LONGEST_S,
    ) -> None:
        self.step, self.model, self.stacks, self.device = step, model, tuple(stacks), device
        self.longest_s, self.clock = longest_s, Clock(device)
        self.lengths = {name: len(getattr(model, name)) for name in self.stacks}

    def measure(self, *, warm: bool) -> dict[str, Any]:
        """Time a step.

        The peak of memory is of the timed steps. A shortened model has all its weights in memory and one block's
        activations at a time, like the whole one, so that its peak is that of the whole one.

        Args:
            warm: Whether a whole step comes first: code is compiled block by block.

        Returns:
            Figures of a step in milliseconds, `extrapolated`, `blocks_ms` by stack, and `memory`.
        """
        blocks: dict[str, float] = {}
        if self.stacks:
            with shortened(self.model, self.stacks, self.clock) as first:
                self.step()
                begin = self._begin()
                samples, parts = zip(*(self._short(first) for _ in range(2)), strict=True)
                blocks = {name: statistics.median(part[name] for part in parts) for name in self.stacks}
            if min(samples) > self.longest_s * 1e3:
                return self._figures(samples, begin) | dict(extrapolated=True, blocks_ms=blocks)
            expected = min(samples) / 1e3
            if warm or expected < 2:
                self.step()
            begin, timed = self._begin(), []
        else:
            self.step()
            begin = self._begin()
            timed = [self.clock.time(self.step)]
            expected = timed[0] / 1e3
        count = next((count for limit, count in _COUNTS if expected < limit), 1)
        timed += [self.clock.time(self.step) for _ in range(count - len(timed))]
        return self._figures(timed, begin) | dict(extrapolated=False, blocks_ms=blocks or None)

    def _short(self, first: dict[str, _Timed]) -> tuple[float, dict[str, float]]:
        """Time a shortened step; return what a whole one would take, and each stack's block."""
        total = self.clock.time(self.step)
        blocks = {name: self.clock.ms(*timed.last) for name, timed in first.items()}
        return total + sum((self.lengths[name] - 1) * ms for name, ms in blocks.items()), blocks

    def _begin(self) -> int:
        """Start to watch the memory; return what is allocated."""
        if self.device.type != "cuda":
            return 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)

    def _figures(self, samples: Sequence[float], before: int) -> dict[str, Any]:
        median, memory = statistics.median(samples), None
        low, _, high = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else (0.0, 0.0, 0.0)
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
            memory = dict(bytes=peak, above=peak - before)
        return dict(median_ms=median, min_ms=min(samples), iqr_ms=high - low, samples=len(samples), memory=memory)
