"""`advise`: measures or estimates a step, with every processor in turn."""

import dataclasses
import functools
import inspect
import logging
import time
from collections.abc import Callable, Mapping
from operator import add
from typing import Any

import torch
from torch import nn

from vision_attn._checks import check_int
from vision_attn.estimation import rates
from vision_attn.estimation.advice import Advice
from vision_attn.estimation.model import check_pixels, input_size, read
from vision_attn.estimation.profile import Profile, profile, wait
from vision_attn.estimation.rates import check_device, machine_of
from vision_attn.estimation.step import Denoiser, Step, device_of
from vision_attn.processors import Schedule, Softmax, registrations
from vision_attn.processors.base import CHILD, AttnSpec

_LOG = logging.getLogger(__name__)


def advise(
    target: Any,
    height: int,
    width: int,
    *,
    step: Callable[[], object] | None = None,
    batch: int = 1,
    device: str | None = None,
    vae_scale_factor: int | None = None,
) -> Advice:
    """Say what a step of a model is made of at a size, what each processor would gain, and what else helps.

    On a GPU a step is measured: `target` is called a few times. Elsewhere it is estimated as by `estimate`, for the
    GPU of this machine or for an H200. What processors and the rest would gain is always estimated.

    Args:
        target: A diffusers pipeline, a diffusers UNet or DiT, or a timm vision transformer, not converted.
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        step: Runs the model once, if it is on a GPU and not a pipeline that draws from a prompt, or a timm model. The
            size must be that of `height` and `width`.
        batch: Pictures that go through the model at once; guidance doubles them. It is not used if a step is measured.
        device: 'cuda' or 'cpu', to estimate for another device than the model's.
        vae_scale_factor: As for `estimate`.

    Returns:
        The advice, which prints as tables and ends in a line of code.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the model or the device is unknown, the model is converted or in graphs, or it refuses the size.
    """
    check_device(device)
    check_int("batch", batch, 1, "a number of pictures")
    check_pixels(height, width)
    if step is not None and not callable(step):
        raise TypeError(f"step must be a function that runs the model once, got {step!r}")
    denoisers, scale = read(target, None, vae_scale_factor)
    for denoiser in denoisers:
        _refuse_changed(denoiser.model)
    sizes = [input_size(denoiser, (height, width), scale) for denoiser in denoisers]
    parameter = next(denoisers[0].model.parameters())
    runs = device_of(denoisers[0].model)
    where = torch.device(device) if device is not None else runs
    known = runs.type == where.type and parameter.dtype.itemsize > 1  # weights of 8 bits compute in 16
    dtype = parameter.dtype if known else torch.bfloat16
    machine = machine_of(str(where), dtype)

    def step_with(specs: Mapping[str, AttnSpec] | AttnSpec) -> Step:
        parts = []
        for denoiser, at in zip(denoisers, sizes, strict=True):
            chosen = dict.fromkeys(denoiser.names, specs) if isinstance(specs, AttnSpec) else specs
            parts.append(denoiser.step(at, chosen, machine, dtype.itemsize).times(batch))
        return functools.reduce(add, parts)

    found, vae, about = None, None, "estimated"
    if where.type == runs.type == "cuda":
        found, vae, about = timed(target, denoisers, (height, width), sizes[0], step)
    stock = step_with({})
    rows: list[tuple[AttnSpec, Step | None, str]] = []
    for spec in _specs():
        try:
            rows.append((spec, _as_measured(step_with(spec), stock, found), ""))
        except ValueError as error:
            rows.append((spec, None, str(error)))
    return Advice(
        title=f"{', '.join(type(denoiser.model).__name__ for denoiser in denoisers)}, {height} x {width} pixels",
        stock=_as_measured(stock, stock, found),
        rows=rows,
        machine=machine,
        about=about,
        pipeline=not isinstance(target, (nn.Module, list, tuple)),
        component=_component(target, denoisers[0].model),
        cached=hasattr(denoisers[0].model, "enable_cache"),
        eight_bits=rates.INSTALLED.eight_bits(where),
        vae=vae,
    )


def _refuse_changed(model: nn.Module) -> None:
    """Refuse a model that does not run as its makers wrote it.

    Raises:
        ValueError: If it is converted or replays; the error says what to call first.
    """
    name = type(model).__name__
    if any(CHILD in module._modules for module in model.modules()):
        raise ValueError(f"this {name} is converted: revert() the conversion first")
    if type(vars(model).get("forward")).__module__.startswith("vision_attn."):
        raise ValueError(f"this {name} replays from CUDA graphs: vision_attn.graphs.disable() it first")


def timed(
    target: Any,
    denoisers: list[Denoiser],
    pixels: tuple[int, int],
    size: tuple[int, int],
    step: Callable[[], object] | None,
) -> tuple[Profile | None, float | None, str]:
    """Time a step where the model is.

    Args:
        target: As for `advise`.
        denoisers: Its models.
        pixels: Height and width of the image.
        size: Those of the first model's input.
        step: As for `advise`.

    Returns:
        The profile; the seconds of the VAE, if there is one; and 'measured', or 'estimated' and why.
    """
    device = device_of(denoisers[0].model)
    try:
        run = step or _run_of(target, denoisers, pixels, next(denoisers[0].model.parameters()))
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # the program's own numbers stay
            found = profile([denoiser.model for denoiser in denoisers], run, device)
            return found, _vae_seconds(target, size), "measured"
    except Exception as error:  # whatever it is: an estimate is still of use
        why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        _LOG.warning("a step could not be timed, so it is estimated: %s", why)
        return None, None, f"estimated, as it could not be timed: {why}"


def _specs() -> list[AttnSpec]:
    """Return one spec of each processor that is one, the recommended one first."""
    return [known.spec() for known in registrations() if known.spec not in (Schedule, Softmax)]


def _as_measured(step: Step, stock: Step, found: Profile | None) -> Step:
    """Return an estimated step whose parts are as long as the measured ones of the stock model."""
    if found is None:
        return step
    factor = found.attention / stock.attention
    layers = tuple(
        dataclasses.replace(layer, dense=factor * layer.dense, converted=factor * layer.converted)
        for layer in step.layers
    )
    return Step(layers, **found.parts, host=found.host)


def _component(target: Any, model: nn.Module) -> str:
    """Return how a program names the denoiser of a target: 'pipe.unet', or 'model'."""
    parts = getattr(target, "components", {})
    return next((f"pipe.{name}" for name, part in parts.items() if part is model), "model")


def _vae_seconds(target: Any, size: tuple[int, int]) -> float | None:
    """Return what the VAE of a pipeline takes for one picture, None if it has none that we know."""
    vae: Any = getattr(target, "vae", None)
    channels = getattr(getattr(vae, "config", None), "latent_channels", None)
    if channels is None or not hasattr(vae, "decode"):
        return None
    latents = torch.zeros(1, channels, *size, device=vae.device, dtype=vae.dtype)
    found = []
    with torch.no_grad():
        for _ in range(3):
            wait(vae.device)
            begin = time.perf_counter()
            vae.decode(latents)
            wait(vae.device)
            found.append(time.perf_counter() - begin)
    return min(found)


def _run_of(
    target: Any, denoisers: list[Denoiser], size: tuple[int, int], parameter: torch.Tensor
) -> Callable[[], object]:
    """Return a function that runs a target for an image of a size.

    Raises:
        ValueError: If it is neither a timm model nor a pipeline that needs nothing but a prompt.
    """
    model: Any = denoisers[0].model
    if isinstance(target, nn.Module):
        if hasattr(model, "patch_embed") and not hasattr(model, "config"):
            first = next(module for module in model.patch_embed.modules() if isinstance(module, nn.Conv2d))
            image = torch.zeros(1, first.in_channels, *size, device=parameter.device, dtype=parameter.dtype)
            return lambda: target(image)
        raise ValueError(f"a {type(model).__name__} by itself takes inputs that we do not know: give step=")
    known = inspect.signature(type(target).__call__).parameters
    wanted = dict(prompt="red apple", height=size[0], width=size[1], num_inference_steps=2, output_type="latent")
    needed = [
        name
        for name, parameter in known.items()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        and name not in ("self", *wanted)
    ]
    if needed or "prompt" not in known:
        raise ValueError(f"a {type(target).__name__} needs {', '.join(needed) or 'more than a prompt'}: give step=")
    given = {name: value for name, value in wanted.items() if name in known}

    def run() -> None:
        before = getattr(target, "_progress_bar_config", None)
        target.set_progress_bar_config(disable=True)
        try:
            target(**given)
        finally:
            target._progress_bar_config = before or {}

    return run
