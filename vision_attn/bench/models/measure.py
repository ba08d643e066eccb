"""Turns a case of whole models into a row: each is built, warmed up, and timed beside the others."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from vision_attn.bench.candidate import AbsentError
from vision_attn.bench.memory import peak_memory
from vision_attn.bench.models.case import COMPILED, GRAPH, MODES, Entrant, ModelCase
from vision_attn.bench.musts import add_speedups, judge
from vision_attn.bench.reasons import reason_of
from vision_attn.bench.timing import Launch, interleave


def model_row(case: ModelCase, device: torch.device, *, rounds: int = 4, chosen: tuple[str, ...] = ()) -> dict:
    """Measure one case.

    Args:
        case: What to measure.
        device: Where.
        rounds: Turns of each candidate, see `interleave`.
        chosen: Names of the candidates that take part, all if empty.

    Returns:
        A row of `document.py`'s schema.
    """
    torch.compiler.reset()  # compiled code of another size is of no use any more
    entrants = [e for e in case.entrants if not chosen or e.name in chosen]
    results, launches, built = [], {}, {}
    with _stream(device), torch.backends.cudnn.flags(enabled=True, benchmark=True), torch.no_grad():
        images = case.images(device)
        for entrant in entrants:
            result: dict[str, Any] = dict(name=entrant.name, computes=entrant.model, reason=None, forward=None)
            start = time.perf_counter()
            try:
                if entrant.model not in built:
                    built[entrant.model] = case.build(entrant.model, device)
                launches[entrant.name], result["forward"] = _ready(entrant, built[entrant.model], images, device)
            except Exception as error:  # a model may fail in any way: that is a result, and the others go on
                result["reason"] = reason_of(error)
            results.append(result | dict(ready_s=time.perf_counter() - start))
        timings = interleave(launches, rounds=rounds)
    for result in results:
        if timing := timings.get(result["name"]):
            result["forward"] |= asdict(timing)
            result["forward"]["images_per_s"] = 1e3 * result["forward"]["batch"] / timing.median_ms
    for mode in MODES:
        add_speedups([r for r in results if r["name"].endswith(mode)], [f"{case.reference} {mode}"])
    head = dict(case=case.name, label=case.label, group=case.group, shape=case.shape(), subject=None)
    return dict(**head, candidates=results, musts=judge(case.musts, results))


def _stream(device: torch.device) -> AbstractContextManager[object]:
    """CUDA graphs are not captured on the default stream."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()


def _ready(entrant: Entrant, model: nn.Module, images: Tensor, device: torch.device) -> tuple[Launch, dict[str, Any]]:
    """Return what is timed, and its batch and memory; the batch is halved until it fits."""
    run: Callable[[Tensor], Tensor] = model
    graph = entrant.mode.endswith(GRAPH)
    if device.type != "cuda" and (graph or entrant.mode == COMPILED):
        raise AbsentError("compiled and captured for CUDA only")
    if entrant.mode.startswith(COMPILED):
        run = torch.compile(model, dynamic=False)
    while True:
        try:
            call = _Forward(run, images)
            launch = Launch(call, device, graph=graph)
            if graph and launch.kind != "graph":
                raise AbsentError("it cannot be captured in a CUDA graph")
            memory = peak_memory(call, device)
        except torch.OutOfMemoryError:
            if len(images) < 2:
                raise
        else:
            return launch, dict(batch=len(images), memory=memory)
        images = images[: len(images) // 2]
        if device.type == "cuda":
            torch.cuda.empty_cache()


class _Forward:
    """A forward without arguments."""

    def __init__(self, run: Callable[[Tensor], Tensor], images: Tensor) -> None:
        self._run, self._images = run, images

    def __call__(self) -> None:
        # many models share one forward: each of them is compiled
        with torch._dynamo.config.patch(recompile_limit=256):
            self._run(self._images)
