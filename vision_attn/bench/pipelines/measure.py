"""Turns a case into a row: the denoiser is built once, and each way to attend is put into it, timed and taken out."""

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from vision_attn.bench.candidate import AbsentError
from vision_attn.bench.musts import add_speedups, judge
from vision_attn.bench.pipelines.attention import STOCK, WAYS, Way
from vision_attn.bench.pipelines.case import PipelineCase
from vision_attn.bench.pipelines.step import LONGEST_S, Steps
from vision_attn.bench.reasons import reason_of
from vision_attn.conversion.conversion import Conversion
from vision_attn.estimation.cost import machine_of, seconds
from vision_attn.hosts import find_host
from vision_attn.hosts.host import heads_of
from vision_attn.processors.base import Layer

_SKIP_S = 60.0  # a step of blocks that differ cannot be extrapolated


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
    ways = [WAYS[name] for name in case.ways if not chosen or name in chosen]
    results: list[dict[str, Any]] = [dict(name=w.name, computes=w.computes, reason=None, forward=None) for w in ways]
    about = case.shape()
    try:
        _free(device)
        start = time.perf_counter()
        model = case.model.build(device, case.dtype)
        arguments = case.model.arguments(case.pixels, device, case.dtype)
        about |= dict(build_s=time.perf_counter() - start, parameters=sum(p.numel() for p in model.parameters()))
        for way, result in zip(ways, results, strict=True):
            start = time.perf_counter()
            try:
                result["forward"] = _measured(way, case, model, arguments, longest_s)
            except Exception as error:  # a candidate may fail in any way: that is a result, and the others go on
                result["reason"] = reason_of(error)
            result["ready_s"] = time.perf_counter() - start
            _free(device)
    except Exception as error:  # the model was not built, or the device is lost: what was measured stays
        for result in results:
            result["reason"] = result["reason"] or (None if result["forward"] else reason_of(error))
    add_speedups(results, STOCK)
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
            figures["layers"] = _rerouted(conversion, way.min_tokens, whole)
    return figures | dict(launch="cpu" if device.type == "cpu" else case.mode)


@contextmanager
def compiled_blocks(model: nn.Module, classes: Sequence[str], wanted: bool = True) -> Iterator[None]:
    """Compile the repeated blocks of a model inside the `with` block, as diffusers' `compile_repeated_blocks` does.

    On a CPU the code is traced and not compiled further.
    """
    blocks = [module for module in model.modules() if wanted and type(module).__name__ in classes]
    if wanted and not blocks:
        raise ValueError(f"{type(model).__name__} has no {' or '.join(classes)}")
    cuda = next(model.parameters()).is_cuda
    torch.compiler.reset()  # nothing guards on the backend of attention, or on what answers it
    try:
        for block in blocks:
            block.compile(dynamic=False, backend="inductor" if cuda else "eager")
        yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None
        torch.compiler.reset()


def refuse_endless(way: Way, case: PipelineCase, model: nn.Module, device: torch.device) -> None:
    """Refuse a step that would take minutes and cannot be extrapolated, by the rates of `cost.py`.

    Raises:
        AbsentError: If so, with the estimate.
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
        raise AbsentError(f"not run: by its operations the attention alone would take {expected / 60:.1f} minutes")


def _rerouted(conversion: Conversion, min_tokens: int, whole: bool) -> dict[str, int] | None:
    """Count the layers that attended the new way in the last step; compiled ones and those that did not run do not say.

    Raises:
        RuntimeError: If a layer ran the host's own attention and has `min_tokens`: the time would not be that of the
            processor.
    """
    status = conversion.status
    few = f"below min_tokens={min_tokens}"
    wrong = {name: why for name, why in status.items() if why.startswith("dense") and not why.endswith(few)}
    done = sum(why == "rerouted" for why in status.values())
    if wrong or (whole and not done):
        name = next(iter(wrong or status))
        raise RuntimeError(f"{len(status) - done} of {len(status)} layers were not rerouted: {name} {status[name]}")
    return dict(rerouted=done, of=len(status)) if whole else None


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
