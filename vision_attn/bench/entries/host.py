"""What a conversion costs the host: milliseconds of Python from the start of a step to its last launch, beside stock.

At usual sizes a GPU waits for Python, so this is the time of a step there; a CUDA graph leaves it out. Each way to
attend has a copy of the model that shares the weights, and is converted and warmed once.
"""

import copy
import gc
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import nn

from vision_attn.bench.measure import CUT_OFF, Measurement
from vision_attn.bench.overview import Columns, Must, add_speedups, judge, overview, speedup
from vision_attn.bench.pipelines.steps import PipelineCase, figures_of, free
from vision_attn.conversion.conversion import convert
from vision_attn.processors import RALA, Agent, AttnSpec, Clear, HiLo, LinFusion, Multipole, Softmax

TITLE = (
    "Host time of one denoising step with random weights in bf16 (on a CPU small twins in float32, whose computing is "
    "counted too): one forward of the denoiser, batch 1. `left alone` is converted, but all layers have fewer tokens "
    "than `min_tokens`, as where `only_if_faster` leaves them to the host"
)
TIMING = (
    "`host ms` is the processor's time of the thread that launches, until the last launch returned, on an idle GPU: "
    "others who use the processor do not count. `wall ms` is the time that passed. Where the system counts a thread's "
    "time in pieces above 0.1 ms, `host ms` is the wall time too. Candidates in turns in one run, each on a copy of "
    "one model; a turn is a step that is not counted and two of which the lesser counts, and the median of the turns "
    "is shown. Python collects no garbage meanwhile. A GPU that is slower than Python holds it up once its queue is "
    "full: then this is the GPU's time."
)
STOCK = "stock"
_TURNS = 2  # for each round of other entries
_STEPS = 2  # of a turn
_FINEST_S = 1e-4


@dataclass(frozen=True)
class Way:
    """A candidate.

    Args:
        name: Short and stable.
        spec: What the model is converted to; None for stock.
        most: How many times the host time of stock it may take.
        options: Arguments of `convert`.
    """

    name: str
    spec: AttnSpec | None
    most: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def of(self, model: nn.Module) -> nn.Module:
        """Return a copy of a model that attends this way and shares the model's weights."""
        tensors = chain(model.parameters(), model.buffers())
        found = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
        if self.spec is not None:
            convert(found, self.spec, **self.options)
        return found


CANDIDATES = (
    Way(STOCK, None),
    Way("softmax", Softmax(), 1.03),
    Way("left alone", Clear(radius=8), 1.01, dict(min_tokens=2**40)),
    Way("clear r8", Clear(radius=8), 1.1),
    Way("multipole", Multipole(), 1.15),
    Way("linfusion", LinFusion(), 1.25),
    Way("agent", Agent(num_agents=64), 1.35),
    Way("hilo", HiLo(), 1.35),
    Way("rala", RALA(), 1.35),
)


def cases(device: torch.device, quick: bool = False) -> list[PipelineCase]:
    """Return the cases for a device, at the size that each denoiser was trained at; a CPU gets small twins."""
    names, ways = ("sdxl", "sd15", "pixart", "sd35"), tuple(way.name for way in CANDIDATES)
    musts = tuple(Must(way.name, (STOCK,), round(1 / way.most, 2)) for way in CANDIDATES if way.spec is not None)
    sizes = dict(sdxl=1024, sd15=512, pixart=1024, sd35=1024)
    small = device.type == "cpu"
    return [
        PipelineCase(name, 128 if small else sizes[name], ways, musts=musts if name == "sdxl" else (), small=small)
        for name in (names[:1] if quick else names)
    ]


def row(case: PipelineCase, measurement: Measurement) -> dict[str, Any]:
    """Measure one case; `measurement.keep` gets the row of every turn.

    Returns:
        A row of `document.py`'s schema.
    """
    device, chosen = measurement.device, measurement.chosen
    ways = [way for way in CANDIDATES if not chosen or way.name in chosen]
    reasons: dict[str, str] = {}
    samples: dict[str, list[_Sample]] = {way.name: [] for way in ways}
    free(device)
    begin = time.perf_counter()
    model = case.model.build(device, case.dtype)
    arguments = case.model.arguments(case.pixels, device, case.dtype)
    measurement.say(f"{case.name}: built in {time.perf_counter() - begin:.1f} s")
    with torch.no_grad():
        models = _converted(ways, model, arguments, reasons, measurement)
        turns = _TURNS * measurement.rounds
        with _no_garbage():
            for turn in range(turns):
                gc.collect()
                for name, converted in models.items():
                    samples[name].append(_least(converted, arguments, device))
                if turn + 1 < turns:
                    measurement.keep(_row(case, ways, samples, reasons, f"{CUT_OFF} {turn + 1} of {turns} turns"))
    return _row(case, ways, samples, reasons)


@dataclass(frozen=True)
class _Sample:
    """Milliseconds of a step: of this thread on the processor, and on the wall."""

    thread: float
    wall: float


def _converted(
    ways: Sequence[Way], model: nn.Module, arguments: Mapping[str, Any], reasons: dict[str, str],
    measurement: Measurement,
) -> dict[str, nn.Module]:  # fmt: skip
    """Return a model for each way, after a step that compiles what it needs; write to `reasons` why one has none."""
    found = {}
    for way in ways:
        begin = time.perf_counter()
        try:
            converted = way.of(model)
            _step(converted, arguments, measurement.device)
        except (RuntimeError, ValueError) as error:
            reasons[way.name] = str(error)
        else:
            found[way.name] = converted
        done = f"left out: {reasons[way.name]}" if way.name in reasons else "ready"
        measurement.say(f"  {way.name} {done}, after {time.perf_counter() - begin:.1f} s")
    return found


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Collect no garbage inside the `with` block."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def _least(model: nn.Module, arguments: Mapping[str, Any], device: torch.device) -> _Sample:
    """Return the least times of some steps, after one that is not counted: another model ran before."""
    _step(model, arguments, device)
    found = [_step(model, arguments, device) for _ in range(_STEPS)]
    return _Sample(min(one.thread for one in found), min(one.wall for one in found))


def _step(model: nn.Module, arguments: Mapping[str, Any], device: torch.device) -> _Sample:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    wall, thread = time.perf_counter(), time.thread_time()
    model(**arguments)
    thread, wall = time.thread_time() - thread, time.perf_counter() - wall
    return _Sample(thread * 1e3, wall * 1e3)


def _finest_s() -> float:
    """Return the smallest step in which the time of this thread is counted, in seconds."""
    found = []
    for _ in range(3):
        begin = now = time.thread_time()
        while now == begin:
            now = time.thread_time()
        found.append(now - begin)
    return min(found)


def _row(
    case: PipelineCase, ways: Sequence[Way], samples: Mapping[str, Sequence[_Sample]], reasons: Mapping[str, str],
    until: str = "",
) -> dict[str, Any]:  # fmt: skip
    clock = "thread" if _finest_s() <= _FINEST_S else "wall"
    results = [
        dict(
            name=way.name, computes=str(way.spec or "as diffusers attends"), reason=reasons.get(way.name),
            forward=None if way.name in reasons else _figures(samples[way.name], clock),
        )
        for way in ways
    ]  # fmt: skip
    add_speedups(results, (STOCK,))
    head = dict(case=case.name, label=f"{case.label}{until}", group=case.group, shape=case.shape(), subject=None)
    return dict(**head, candidates=results, musts=judge(case.musts, results))


def _figures(samples: Sequence[_Sample], clock: str) -> dict[str, Any]:
    times, walls = [getattr(one, clock) for one in samples], [one.wall for one in samples]
    return figures_of(times, None) | dict(wall_ms=statistics.median(walls), clock=clock, launch="host")


def table(document: dict[str, Any], groups: Sequence[str] = ()) -> str:
    """Return a stored result as Markdown."""
    columns: Columns = {
        "host ms": lambda timed: f"{timed['median_ms']:.1f}",
        "wall ms": lambda timed: "-" if timed.get("wall_ms") is None else f"{timed['wall_ms']:.1f}",
        "best": lambda timed: f"{timed['min_ms']:.1f}",
        "of stock": lambda timed: "-" if timed.get("speedup") is None else f"{1 / timed['speedup']:.2f}x",
        "speed-up": speedup,
    }
    return overview(document, columns, groups)
