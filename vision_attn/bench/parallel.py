"""Denoising steps of one picture over several processes: each way to attend beside one GPU, Ulysses and ring.

Start it in every process: `torchrun --nproc-per-node 2 -m vision_attn.cli bench parallel`. Rank 0 stores the result.
"""

import atexit
import gc
import math
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from vision_attn.bench.candidate import reason_of
from vision_attn.bench.overview import Must, judge
from vision_attn.bench.pipelines.architectures import ARCHITECTURES, Architecture
from vision_attn.bench.pipelines.steps import Steps
from vision_attn.bench.timing import Clock
from vision_attn.bench.training import training
from vision_attn.conversion.conversion import Conversion, convert
from vision_attn.conversion.state import model_state
from vision_attn.grid import Grid
from vision_attn.kernels.local import Window
from vision_attn.parallel import enable
from vision_attn.parallel.local import slab_of
from vision_attn.parallel.multipole import near_slab
from vision_attn.parallel.ranks import Cut, Ranks
from vision_attn.processors import AttnSpec, Clear, LinFusion, Multipole

ALONE, OVER, GATHERED = "alone", "over", "gathered"


@dataclass(frozen=True)
class Way:
    """A candidate.

    Args:
        name: Short and stable.
        spec: What the model is converted to; None for stock.
        kind: `ALONE` in one process; `OVER` all, with our transfers; `GATHERED` over all, but every process fetches all
            keys; 'ulysses' or 'ring' over all as diffusers does it.
    """

    name: str
    spec: AttnSpec | None
    kind: str

    @property
    def computes(self) -> str:
        """What it computes, for the JSON."""
        return f"{self.spec or 'as diffusers attends'}, {self.kind}"


SPECS: dict[str, AttnSpec] = {"clear r16": Clear(radius=16), "multipole": Multipole(), "linfusion": LinFusion()}
WAYS = (
    *(Way(f"{name} {kind}", spec, kind) for name, spec in SPECS.items() for kind in (ALONE, OVER, GATHERED)),
    *(Way(f"stock {kind}", None, kind) for kind in (ALONE, "ulysses", "ring")),
)


@dataclass(frozen=True)
class ParallelCase:
    """Steps of one denoiser, batch 1.

    Args:
        architecture: Name of the denoiser's architecture.
        pixels: Side of the square image.
        ways: Names of the candidates.
        musts: What must hold on as many GPUs.
        small: Whether to run the twin for a CPU, in float32.
        trains: Whether a step is one of a distillation, not of denoising: see `training.py`.
        processes: Over how many processes.
    """

    architecture: str
    pixels: int
    ways: tuple[str, ...]
    musts: tuple[Must, ...] = ()
    small: bool = False
    trains: bool = False
    processes: int = 2

    @property
    def name(self) -> str:
        """As in 'flux-8192', 'flux-train-2048', and for more than two processes 'flux-8192-x4'."""
        more = f"-x{self.processes}" if self.processes != 2 else ""
        return f"{self.architecture}{'-train' * self.trains}-{self.pixels}{more}"

    @property
    def model(self) -> Architecture:
        """The architecture, or its twin."""
        whole = ARCHITECTURES[self.architecture]
        return whole.twin() if self.small else whole

    @property
    def grid(self) -> Grid:
        """The tokens of the finest attention."""
        side = self.pixels // self.model.patch
        return Grid(side, side, prefix=self.model.prefix)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and latents."""
        return torch.float32 if self.small else torch.bfloat16


def join(device: torch.device) -> dist.ProcessGroup:
    """Return the group of all processes, which is made the first time; this process gets the GPU of its rank.

    Raises:
        ValueError: If no launcher started several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise ValueError(
            "bench parallel runs in several processes: torchrun --nproc-per-node 2 -m vision_attn.cli bench parallel"
        )
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    group = dist.group.WORLD
    assert group is not None
    return group


def parallel_row(
    case: ParallelCase, device: torch.device, chosen: Sequence[str] = (),
    keep: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:  # fmt: skip
    """Measure one case in all processes.

    Args:
        case: What to measure.
        device: Where.
        chosen: Names of the candidates that take part, all if empty.
        keep: Receives the row after each candidate; the others then have a reason why they are not in it.

    Returns:
        A row of `document.py`'s schema, the same times in all processes.
    """
    group = join(device)
    ways = [way for way in WAYS if way.name in case.ways and (not chosen or way.name in chosen)]
    results: list[dict[str, Any]] = [dict(name=w.name, computes=w.computes, reason=None, forward=None) for w in ways]
    torch.manual_seed(0)
    model = case.model.build(device, case.dtype)
    arguments = case.model.arguments(case.pixels, device, case.dtype)
    for number, (way, result) in enumerate(zip(ways, results, strict=True)):
        try:
            result["forward"] = _measured(way, case, model, arguments, group)
        except Exception as error:  # a candidate may fail in any way, in all processes alike
            result["reason"] = reason_of(error)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if number + 1 < len(ways):
            later = [dict(r, reason="not measured: the run was cut off") for r in results[number + 1 :]]
            keep(_row(case, [*results[: number + 1], *later], group, None))
    return _row(case, results, group, bandwidth(device, group))


def _row(
    case: ParallelCase, results: list[dict[str, Any]], group: dist.ProcessGroup, gbs: float | None
) -> dict[str, Any]:
    """Return the row of these candidates."""
    _add_efficiency(results, group.size())
    about = dict(
        architecture=case.architecture, source=case.model.source, pixels=case.pixels, tokens=case.grid.image_tokens,
        batch=1, dtype=str(case.dtype).removeprefix("torch."), mode="eager", processes=group.size(),
        bandwidth_gbs=gbs,
    )  # fmt: skip
    label = f"{case.pixels} px, {case.grid.image_tokens} tokens, {group.size()} processes"
    title = f"{case.model.title}{', a step of a distillation' * case.trains}"
    head = dict(case=case.name, label=label, group=title, shape=about, subject=None)
    return dict(**head, candidates=results, musts=judge(case.musts, results))


def _measured(
    way: Way, case: ParallelCase, model: nn.Module, arguments: dict[str, Any], group: dist.ProcessGroup
) -> dict[str, Any]:
    """Time one way to attend."""
    device = next(model.parameters()).device

    def step() -> None:
        with torch.no_grad():
            model(**arguments)

    def agree(seconds: float) -> float:
        return agreed(seconds, device, group)

    if case.trains:
        with training(model, way.spec, arguments, None if way.kind == ALONE else group) as update:
            update()  # which asks for the optimizer's memory: the next step finds other gaps for its own
            before = _retries(device)
            figures = Steps(update, model, (), device, agree=agree).measure(warm=True)
            figures["retries"] = _retries(device) - before
        return figures | dict(launch="cpu" if device.type == "cpu" else "eager")
    with converted(model, way.spec), over(model, way.kind, group):
        if way.kind == GATHERED:
            step()  # which finds its processes
            for context in model_state(model).contexts:
                assert context.cut is not None
                context.cut = replace(context.cut, gathers=True)
        steps = Steps(step, model, case.model.stacks, device, agree=agree)
        figures = steps.measure(warm=True)
        if way.spec is not None and way.kind != ALONE:
            figures["moved"] = moved(model, step)
    return figures | dict(launch="cpu" if device.type == "cpu" else "eager")


def _retries(device: torch.device) -> int:
    """Return how often memory was so short that PyTorch gave back all that it kept: such a step says little."""
    return int(torch.cuda.memory_stats(device)["num_alloc_retries"]) if device.type == "cuda" else 0


def moved(model: nn.Module, step: Any) -> dict[str, Any]:
    """Return the bytes that this process receives in one step, by what they are, and in the mean layer."""
    state = model_state(model)
    cut = state.contexts[0].cut
    assert cut is not None
    before = cut.traffic.received.copy()
    step()
    received = cut.traffic.received - before
    layers = sum(status == "rerouted" for status in Conversion.of(model).status.values())
    return dict(bytes=received.total(), per_layer=received.total() / max(layers, 1), kinds=dict(received))


@contextmanager
def converted(model: nn.Module, spec: AttnSpec | None) -> Iterator[None]:
    """Convert a model inside the `with` block."""
    if spec is None:
        yield
        return
    conversion = convert(model, spec)
    try:
        yield
    finally:
        conversion.revert()


@contextmanager
def over(model: Any, kind: str, group: dist.ProcessGroup) -> Iterator[None]:
    """Run a model over all processes inside the `with` block, unless `kind` is `ALONE`.

    diffusers has no way back from `enable_parallelism`, so what it set is taken off here.
    """
    if kind == ALONE:
        yield
        return
    if model._cp_plan is None:
        enabled = enable(model)
        try:
            yield
        finally:
            enabled.disable()
        return
    from diffusers import ContextParallelConfig  # noqa: PLC0415
    from diffusers.hooks.context_parallel import remove_context_parallel  # noqa: PLC0415

    degree = {"ring_degree" if kind == "ring" else "ulysses_degree": group.size()}
    if kind == "ring":
        model.set_attention_backend("_native_flash" if next(model.parameters()).is_cuda else "native")
    model.enable_parallelism(config=ContextParallelConfig(**degree))
    try:
        yield
    finally:
        remove_context_parallel(model, model._cp_plan)
        model._parallel_config = None
        for module in model.modules():
            processor = vars(module).get("processor") or module._modules.get("processor")
            if getattr(processor, "_parallel_config", None) is not None:
                processor._parallel_config = None
        if kind == "ring":
            model.set_attention_backend("native")


def agreed(seconds: float, device: torch.device, group: dist.ProcessGroup) -> float:
    """Return the time that rank 0 has measured: all processes must take as many steps."""
    shared = torch.tensor([seconds], dtype=torch.float64, device=device)
    dist.broadcast(shared, 0, group=group)
    return float(shared)


def bandwidth(device: torch.device, group: dist.ProcessGroup) -> float:
    """Return the gigabytes a second that a process receives while all send to all, in pieces of 64 MiB."""
    size, clock = group.size(), Clock(device)
    count = (1 << (24 if device.type == "cuda" else 16)) // size * size
    sent, found = torch.zeros(count, device=device), torch.empty(count, device=device)
    times = [clock.time(lambda: dist.all_to_all_single(found, sent, group=group)) for _ in range(6)]
    received = count * sent.element_size() * (size - 1) / size
    return agreed(received / statistics.median(times[1:]) / 1e6, device, group)


def _add_efficiency(results: Sequence[dict[str, Any]], size: int) -> None:
    """Give each candidate over processes `speedup` over one process with the same spec, and `efficiency`."""
    alone = {r["name"].rpartition(" ")[0]: r["forward"] for r in results if r["name"].endswith(ALONE)}
    for result in results:
        one = alone.get(result["name"].rpartition(" ")[0])
        if result["forward"] and one and not result["name"].endswith(ALONE):
            faster = one["median_ms"] / result["forward"]["median_ms"]
            result["forward"] |= dict(speedup=faster, efficiency=faster / size)


def vectors(spec: AttnSpec, grid: Grid, size: int) -> int:
    """Return how many K and V token vectors a process receives in a layer, the most of all processes.

    Counted as in 'Many GPUs' of the project's notes: a halo for CLEAR, a halo and the finest means of the others for
    multipole attention (without the cells that it asks for); and the text of the others. For linear attention it is
    the rows that convolutions get from neighbours, one from each.
    """
    ranks = Cut("", 0, size).of(grid)
    return max(_vectors_of(spec, ranks, rank) for rank in range(size))


def _vectors_of(spec: AttnSpec, ranks: Ranks, rank: int) -> int:
    text = ranks.grid.prefix - ranks.count(ranks.prefix, rank)
    own = ranks.count(ranks.image, rank)
    if isinstance(spec, Clear):
        first, stop = slab_of(ranks, Window(radius=spec.radius), rank).span
        return 2 * (stop - first - own + text)
    if isinstance(spec, Multipole):
        first, stop = near_slab(ranks, spec.cells(), rank).span
        means = math.ceil(ranks.grid.height / spec.pool) * math.ceil(ranks.grid.width / spec.pool)
        return 2 * (stop - first - own + text + means * (ranks.size - 1) // ranks.size)
    return ranks.grid.width * ((rank > 0) + (rank + 1 < ranks.size))


def predict(row: dict[str, Any], size: int) -> dict[str, dict[str, float]]:
    """Predict a step over `size` processes from a stored row, which was measured over fewer.

    What a step takes beyond its share of one process's time grows with what a process receives, and is at least the
    time that this takes at the measured bandwidth, as if nothing overlapped.

    Returns:
        `ms`, `speedup` and `efficiency` by the name of what attends.
    """
    about = row["shape"]
    measured, side = about["processes"], math.isqrt(about["tokens"])
    grid = Grid(side, side, prefix=ARCHITECTURES[about["architecture"]].prefix)
    by_name = {r["name"]: r["forward"] for r in row["candidates"]}
    found = {}
    for name, spec in SPECS.items():
        one, many = by_name.get(f"{name} {ALONE}"), by_name.get(f"{name} {OVER}")
        if not (one and many and "moved" in many and about["bandwidth_gbs"]):
            continue
        grows = vectors(spec, grid, size) / vectors(spec, grid, measured)
        beyond = max(many["median_ms"] - one["median_ms"] / measured, 0.0) * grows
        transfer = many["moved"]["bytes"] * grows / about["bandwidth_gbs"] / 1e6
        ms = one["median_ms"] / size + max(beyond, transfer)
        found[name] = dict(ms=ms, speedup=one["median_ms"] / ms, efficiency=one["median_ms"] / ms / size)
    return found
