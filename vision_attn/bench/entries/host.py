"""What a conversion costs the host: milliseconds of Python from the start of a step to its last launch, beside stock.

At usual sizes a GPU waits for Python, so this is the time of a step there; a CUDA graph leaves it out.
"""

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from vision_attn.bench.measure import Measurement
from vision_attn.bench.overview import Columns, Must, add_speedups, judge, overview, speedup
from vision_attn.bench.pipelines.steps import PipelineCase
from vision_attn.conversion.conversion import convert
from vision_attn.processors import RALA, Agent, AttnSpec, Clear, HiLo, LinFusion, Multipole, Softmax

TITLE = (
    "Host time of one denoising step with random weights in bf16 (on a CPU small twins in float32, whose computing is "
    "counted too): one forward of the denoiser, batch 1. `left alone` is converted, but all layers have fewer tokens "
    "than `min_tokens`, as where `only_if_faster` leaves them to the host"
)
TIMING = (
    "Wall-clock time until the last launch returned, on an idle GPU, candidates in turns in one run on one model: the "
    "median of turns, of which each counts by the least of its steps, as others use the processor too. A GPU that is "
    "slower than Python holds it up once its queue is full: then this is the GPU's time."
)
STOCK = "stock"
_TURNS = 3  # for each round of other entries


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

    @contextmanager
    def use(self, model: nn.Module) -> Iterator[None]:
        """Convert a model inside the `with` block."""
        if self.spec is None:
            yield
            return
        conversion = convert(model, self.spec, **self.options)
        try:
            yield
        finally:
            conversion.revert()


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
    """Measure one case.

    Returns:
        A row of `document.py`'s schema.
    """
    device, chosen = measurement.device, measurement.chosen
    ways = [way for way in CANDIDATES if not chosen or way.name in chosen]
    model = case.model.build(device, case.dtype)
    arguments = case.model.arguments(case.pixels, device, case.dtype)
    samples: dict[str, list[float]] = {way.name: [] for way in ways}
    reasons: dict[str, str] = {}
    with torch.no_grad():
        for _ in range(_TURNS * measurement.rounds):
            for way in ways:
                try:
                    with way.use(model):
                        samples[way.name].append(min(_host_ms(model, arguments, device)))
                except (RuntimeError, ValueError) as error:
                    reasons[way.name] = str(error)
    results = [
        dict(
            name=way.name, computes=str(way.spec or "as diffusers attends"), reason=reasons.get(way.name),
            forward=None if way.name in reasons else _figures(samples[way.name]),
        )
        for way in ways
    ]  # fmt: skip
    add_speedups(results, (STOCK,))
    head = dict(case=case.name, label=case.label, group=case.group, shape=case.shape(), subject=None)
    return dict(**head, candidates=results, musts=judge(case.musts, results))


def _host_ms(model: nn.Module, arguments: Mapping[str, Any], device: torch.device) -> list[float]:
    """Return the host times of some steps, after two that are not counted."""
    found = []
    for number in range(7):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        model(**arguments)
        if number > 1:
            found.append((time.perf_counter() - begin) * 1e3)
    return found


def _figures(samples: Sequence[float]) -> dict[str, Any]:
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return dict(
        median_ms=statistics.median(samples), min_ms=min(samples), iqr_ms=high - low, samples=len(samples),
        launch="host", memory=None,
    )  # fmt: skip


def table(document: dict[str, Any], groups: Sequence[str] = ()) -> str:
    """Return a stored result as Markdown."""
    columns: Columns = {
        "host ms": lambda timed: f"{timed['median_ms']:.1f}",
        "best": lambda timed: f"{timed['min_ms']:.1f}",
        "of stock": lambda timed: "-" if timed.get("speedup") is None else f"{1 / timed['speedup']:.2f}x",
        "speed-up": speedup,
    }
    return overview(document, columns, groups)
