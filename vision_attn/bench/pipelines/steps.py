"""Denoising steps: a denoiser at one size is built once; each way to attend is put into it, timed and taken out.

A step that would take too long is extrapolated from one block of each kind.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vision_attn.bench.candidate import AbsentError, reason_of
from vision_attn.bench.overview import Must, add_speedups, judge
from vision_attn.bench.pipelines.architectures import ARCHITECTURES, Architecture, in_float8
from vision_attn.bench.pipelines.attention import DENSE, WAYS, Way
from vision_attn.bench.timing import Clock, PeakMemory
from vision_attn.conversion.conversion import Conversion
from vision_attn.estimation.cost import seconds
from vision_attn.estimation.rates import machine_of
from vision_attn.graphs import replaying
from vision_attn.grid import Grid
from vision_attn.hosts import find_host
from vision_attn.hosts.host import heads_of
from vision_attn.processors.base import Layer

LONGEST_S = 15.0
_SKIP_S = 60.0  # a step of blocks that differ cannot be extrapolated
_TURNS, _WARM = 3, 3  # where steps are taken in turns: turns of each candidate, and steps of each that do not count
_COUNTS = ((0.5, 5), (2.0, 3), (6.0, 2))  # (seconds, how many steps are timed if one takes less)


@dataclass(frozen=True)
class PipelineCase:
    """Steps of one denoiser, batch 1.

    Args:
        architecture: Name of the denoiser's architecture.
        pixels: Side of the square image.
        ways: Names of the candidates, see `attention.py`.
        compiled: Whether the repeated blocks are compiled.
        musts: What must hold.
        small: Whether to run the twin for a CPU, in float32.
        float8: Whether the weights of linear layers are quantised.
    """

    architecture: str
    pixels: int
    ways: tuple[str, ...]
    compiled: bool = False
    musts: tuple[Must, ...] = ()
    small: bool = False
    float8: bool = False

    @property
    def name(self) -> str:
        """As in 'flux-8192', 'flux-8192-compiled', 'flux-float8-1024'."""
        return f"{self.subject}-{self.pixels}{'-compiled' * self.compiled}"

    @property
    def subject(self) -> str:
        """The architecture and its weights."""
        return f"{self.architecture}{'-float8' * self.float8}"

    @property
    def model(self) -> Architecture:
        """The architecture, or its twin."""
        whole = ARCHITECTURES[self.architecture]
        return whole.twin() if self.small else whole

    @property
    def group(self) -> str:
        """The table it belongs to."""
        return f"{self.model.title}{', weights in float8' * self.float8}"

    def build(self, device: torch.device) -> nn.Module:
        """Build the model."""
        model = self.model.build(device, self.dtype)
        return in_float8(model) if self.float8 else model

    @property
    def grid(self) -> Grid:
        """The tokens of the finest attention."""
        side = self.pixels // self.model.patch
        return Grid(side, side, prefix=self.model.prefix)

    @property
    def label(self) -> str:
        """As in '4096 px, 65536 tokens, eager'."""
        native = " (native)" if self.pixels == self.model.native else ""
        return f"{self.pixels} px{native}, {self.grid.image_tokens} tokens, {self.mode}"

    @property
    def graphed(self) -> bool:
        """Whether steps are timed in CUDA graphs too: up to twice the native side, where Python may be the limit."""
        return not self.compiled and self.pixels <= 2 * self.model.native

    @property
    def in_turns(self) -> bool:
        """Whether eager steps are taken in turns: at native sizes Python is the limit, and others use the host too."""
        return not self.compiled and self.pixels <= self.model.native

    @property
    def mode(self) -> str:
        """How the blocks run."""
        return "compiled" if self.compiled else "eager"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and latents."""
        return torch.float32 if self.small else torch.bfloat16

    def shape(self) -> dict[str, Any]:
        """Return what defines the case, for the JSON."""
        model = self.model
        about = dict(architecture=self.subject, source=model.source, native=model.native)
        dtype = str(self.dtype).removeprefix("torch.")
        return about | dict(pixels=self.pixels, tokens=self.grid.image_tokens, batch=1, dtype=dtype, mode=self.mode)


def pipeline_row(
    case: PipelineCase, device: torch.device, *, chosen: Sequence[str] = (), longest_s: float = LONGEST_S
) -> dict[str, Any]:
    """Measure one case.

    Args:
        case: What to measure.
        device: Where.
        chosen: Names of the candidates that take part, all if empty.
        longest_s: A step that is expected to take longer is extrapolated where it can be.

    Returns:
        A row of `document.py`'s schema.
    """
    built: list[tuple[nn.Module, dict[str, Any]]] = []

    def prepare(about: dict[str, Any]) -> Callable[[Way], dict[str, Any]]:
        start = time.perf_counter()
        model = case.build(device)
        arguments = case.model.arguments(case.pixels, device, case.dtype)
        about |= dict(build_s=time.perf_counter() - start, parameters=sum(p.numel() for p in model.parameters()))
        built.append((model, arguments))
        return lambda way: _measured(way, case, model, arguments, longest_s)

    def finish(results: Mapping[Way, dict[str, Any]]) -> None:
        if case.in_turns:
            _take_turns(case, *built[0], results)

    return row_of(case, device, chosen, prepare, finish)


def row_of(
    case: Any,
    device: torch.device,
    chosen: Sequence[str],
    prepare: Callable[[dict[str, Any]], Callable[[Way], dict[str, Any]]],
    finish: Callable[[Mapping[Way, dict[str, Any]]], None] = lambda results: None,
) -> dict[str, Any]:
    """Measure the ways to attend of a case, one after another.

    Args:
        case: What to measure: it has `ways`, `musts`, `shape()` and what names a row.
        device: Where.
        chosen: Names of the candidates that take part, all if empty.
        prepare: Builds the model, adds to what the JSON says of the case, and returns what measures a way.
        finish: Gets the figures of each way that was measured, and may change them.

    Returns:
        A row of `document.py`'s schema.
    """
    ways = [WAYS[name] for name in case.ways if not chosen or name in chosen]
    results: list[dict[str, Any]] = [dict(name=w.name, computes=w.computes, reason=None, forward=None) for w in ways]
    about = case.shape()
    try:
        free(device)
        measure = prepare(about)
        for way, result in zip(ways, results, strict=True):
            start = time.perf_counter()
            try:
                result["forward"] = measure(way)
            except Exception as error:  # a candidate may fail in any way: that is a result, and the others go on
                result["reason"] = reason_of(error)
            result["ready_s"] = time.perf_counter() - start
            free(device)
        finish({way: r["forward"] for way, r in zip(ways, results, strict=True) if r["forward"] is not None})
    except Exception as error:  # the model was not built, or the device is lost: what was measured stays
        for result in results:
            result["reason"] = result["reason"] or (None if result["forward"] else reason_of(error))
    add_speedups(results, DENSE)
    head = dict(case=case.name, label=case.label, group=case.group, shape=about, subject=None)
    return dict(**head, candidates=results, musts=judge(case.musts, results))


def _measured(
    way: Way, case: PipelineCase, model: nn.Module, arguments: dict[str, Any], longest_s: float
) -> dict[str, Any]:
    """Time one way to attend."""
    device = next(model.parameters()).device
    refuse_endless(way, case, model, device)

    def step() -> None:
        with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64):
            model(**arguments)

    with way.use(model, case.grid, device) as conversion, compiled_blocks(model, case.model.blocks, case.compiled):
        steps = Steps(step, model, case.model.stacks, device, longest_s=longest_s)
        figures = steps.measure(warm=case.compiled)
        if conversion is not None:
            whole = not (figures["extrapolated"] or case.compiled)
            figures["layers"] = rerouted(conversion, way.min_tokens, whole)
        if case.graphed and device.type == "cuda" and not figures["extrapolated"]:
            figures["graphs"] = _in_graphs(step, model, device)
    return figures | dict(launch="cpu" if device.type == "cpu" else case.mode)


def _take_turns(
    case: PipelineCase, model: nn.Module, arguments: dict[str, Any], results: Mapping[Way, dict[str, Any]]
) -> None:  # fmt: skip
    """Take eager steps in turns, in alternating order, and put their times in the place of those that were found."""
    device = next(model.parameters()).device
    clock, samples = Clock(device), {way: list[float]() for way in results}

    def step() -> None:
        with torch.no_grad():
            model(**arguments)

    for turn in range(_TURNS):
        for way in list(results)[:: -1 if turn % 2 else 1]:
            with way.use(model, case.grid, device):
                for _ in range(_WARM):  # the first calls of a conversion record what later ones repeat
                    step()
                samples[way] += [clock.time(step) for _ in range(_COUNTS[0][1])]
    for way, found in results.items():
        found.update(figures_of(samples[way], found["memory"]), turns=_TURNS)


def _in_graphs(step: Callable[[], None], model: nn.Module, device: torch.device) -> dict[str, Any]:
    """Time a step that replays from a CUDA graph: what the host's Python takes is left out.

    Raises:
        RuntimeError: If it was not recorded; the reason is in the message.
    """
    with replaying({"": model}) as graphs:
        for _ in range(4):  # eager, recorded, and replays
            step()
        if not graphs.memory:
            raise RuntimeError(f"not recorded: {graphs.status['']}")
        clock, watch = Clock(device), PeakMemory(device)
        return figures_of([clock.time(step) for _ in range(9)], watch.read()) | dict(bytes=graphs.memory)


@contextmanager
def compiled_blocks(model: nn.Module, classes: Sequence[str], wanted: bool = True) -> Iterator[None]:
    """Compile the repeated blocks of a model inside the `with` block, as diffusers' `compile_repeated_blocks` does.

    On a CPU the code is traced and not compiled further.
    """
    blocks = [module for module in model.modules() if wanted and type(module).__name__ in classes]
    if wanted and not blocks:
        raise ValueError(f"{type(model).__name__} has no {' or '.join(classes)}")
    cuda = next(model.parameters()).is_cuda
    torch.compiler.reset()  # compiled code does not notice that the attention, or its backend, is another one
    try:
        for block in blocks:
            block.compile(dynamic=False, backend="inductor" if cuda else "eager")
        yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None
        torch.compiler.reset()


def refuse_endless(way: Way, case: PipelineCase, model: nn.Module, device: torch.device) -> None:
    """Refuse a step that cannot be extrapolated and would take minutes by the rates of `cost.py`.

    Raises:
        AbsentError: If it would; the estimate is in the message.
    """
    if case.model.stacks or device.type != "cuda":
        return
    host, machine, latents = find_host(model), machine_of("cuda"), case.pixels // 8
    expected = 0.0
    for name in host.layer_names(model):
        layer = Layer("", *heads_of(name, model.get_submodule(name)))
        grid = host.grid_at(model, name, latents, latents)
        expected += seconds(way.spec, grid, layer, machine, case.dtype.itemsize)
    if expected > _SKIP_S:
        raise AbsentError(f"not run: the attention alone would take {expected / 60:.1f} minutes by its operations")


def rerouted(conversion: Conversion, min_tokens: int, whole: bool) -> dict[str, int] | None:
    """Count the layers that attended the new way in the last step.

    Args:
        conversion: Of the model.
        min_tokens: Layers with fewer tokens keep the host's attention.
        whole: Whether every layer ran and reports; a compiled or shortened model is only searched for failures.

    Raises:
        RuntimeError: If another layer ran the host's own attention: the time would not be that of the processor.
    """
    status = conversion.status
    few = f"below min_tokens={min_tokens}"
    wrong = {name: why for name, why in status.items() if why.startswith("dense") and not why.endswith(few)}
    done = sum(why == "rerouted" for why in status.values())
    if wrong or (whole and not done):
        name = next(iter(wrong or status))
        raise RuntimeError(f"{len(status) - done} of {len(status)} layers were not rerouted: {name} {status[name]}")
    return dict(rerouted=done, of=len(status)) if whole else None


def free(device: torch.device) -> None:
    """Give memory that nobody uses back to the device."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


class _Timed(nn.Module):
    """Runs a block and remembers when."""

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
    first = {name: _Timed(getattr(model, name)[0], clock) for name in stacks}
    with replaced(model, {name: [block] for name, block in first.items()}):
        yield first


@contextmanager
def replaced(model: nn.Module, stacks: Mapping[str, Sequence[nn.Module]]) -> Iterator[None]:
    """Give a model other blocks in the lists of these names inside the `with` block."""
    whole = {name: getattr(model, name) for name in stacks}
    try:
        for name, blocks in stacks.items():
            setattr(model, name, nn.ModuleList(blocks))
        yield
    finally:
        for name, blocks in whole.items():
            setattr(model, name, blocks)


class Steps:
    """The steps of one model, timed.

    Args:
        step: One step.
        model: The model that it runs.
        stacks: Lists of equal blocks of the model. None if the blocks differ: then every step is run whole.
        device: Where.
        longest_s: A step that is expected to take longer is extrapolated.
        agree: Returns the seconds by which it is decided how many steps are taken, from those that were measured: all
            of several processes must take as many.
    """

    def __init__(
        self,
        step: Callable[[], object],
        model: nn.Module,
        stacks: Sequence[str],
        device: torch.device,
        *,
        longest_s: float = LONGEST_S,
        agree: Callable[[float], float] = float,
    ) -> None:
        self.step, self.model, self.stacks, self.device = step, model, tuple(stacks), device
        self.agree = agree
        self.longest_s, self.clock = longest_s, Clock(device)
        self.lengths = {name: len(getattr(model, name)) for name in self.stacks}

    def measure(self, *, warm: bool) -> dict[str, Any]:
        """Time a step.

        The peak memory is that of the timed steps. A shortened model has the same peak as the whole one: all weights,
        and the activations of one block at a time.

        Args:
            warm: Whether to run a whole step first, because code is compiled block by block.

        Returns:
            Figures of a step in milliseconds, `extrapolated`, `blocks_ms` by stack, and `memory`.
        """
        blocks: dict[str, float] = {}
        if self.stacks:
            with shortened(self.model, self.stacks, self.clock) as first:
                self.step()
                watch = PeakMemory(self.device)
                samples, parts = zip(*(self._short(first) for _ in range(2)), strict=True)
                blocks = {name: statistics.median(part[name] for part in parts) for name in self.stacks}
            expected = self.agree(min(samples) / 1e3)
            if expected > self.longest_s:
                return figures_of(samples, watch.read()) | dict(extrapolated=True, blocks_ms=blocks)
            if warm or expected < 2:
                self.step()
            watch, timed = PeakMemory(self.device), []
        else:
            self.step()
            watch = PeakMemory(self.device)
            timed = [self.clock.time(self.step)]
            expected = self.agree(timed[0] / 1e3)
        count = next((count for limit, count in _COUNTS if expected < limit), 1)
        timed += [self.clock.time(self.step) for _ in range(count - len(timed))]
        return figures_of(timed, watch.read()) | dict(extrapolated=False, blocks_ms=blocks or None)

    def _short(self, first: dict[str, _Timed]) -> tuple[float, dict[str, float]]:
        """Time a shortened step; return what a whole one would take, and each stack's block."""
        total = self.clock.time(self.step)
        blocks = {name: self.clock.ms(*timed.last) for name, timed in first.items()}
        return total + sum((self.lengths[name] - 1) * ms for name, ms in blocks.items()), blocks


def figures_of(samples: Sequence[float], memory: dict[str, int] | None) -> dict[str, Any]:
    """Return what is stored of samples in milliseconds and of the peak memory."""
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else (0.0, 0.0, 0.0)
    figures = dict(median_ms=statistics.median(samples), min_ms=min(samples), iqr_ms=high - low, samples=len(samples))
    return figures | dict(memory=memory)
