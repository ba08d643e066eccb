"""Redraws a picture from a chosen noise level with diffusers' own image-to-image pipelines, in latents.

A noise level s in (0, 1) means: s parts noise to 1 - s parts picture. Flow matching calls it sigma; a diffusion with
cumulative alpha a has s = sqrt(1 - a) / (sqrt(a) + sqrt(1 - a)). A level is the same signal-to-noise ratio in every
pipeline, whatever the steps and the shift of its schedule are.
"""

import copy
import inspect
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


def is_flow(pipe: Any) -> bool:
    """Whether a pipeline's scheduler is one of flow matching."""
    return hasattr(pipe.scheduler, "scale_noise")


def unit_of(pipe: Any) -> int:
    """Return the number of pixels that height and width must be multiples of: two latents."""
    return 2 * pipe.vae_scale_factor


def native_side(pipe: Any) -> int:
    """Return the side in pixels of the square that a pipeline was trained for."""
    latents = getattr(pipe, "default_sample_size", None) or pipe.unet.config.sample_size
    return int(latents) * pipe.vae_scale_factor


def shift_at(pipe: Any, size: tuple[int, int], shift: float | str) -> float:
    """Return the shift of flow matching's schedule at a size; for 'sqrt' the native one times the ratio of the sides.

    FLUX's own dynamic shift is not bounded: at 64K tokens every level would begin at pure noise.
    """
    if not isinstance(shift, str):
        return float(shift)
    config, native = pipe.scheduler.config, native_side(pipe)
    base = config.shift
    if config.get("use_dynamic_shifting"):  # exp(mu) at the native size
        tokens = (native // unit_of(pipe)) ** 2
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        base = math.exp(config.base_shift + slope * (tokens - config.base_image_seq_len))
    return base * max(1.0, math.sqrt(size[0] * size[1]) / native)


def tokens_of(pipe: Any, size: tuple[int, int]) -> int:
    """Return the number of image tokens at a size in pixels."""
    return size[0] // unit_of(pipe) * (size[1] // unit_of(pipe))


def image_to_image(pipe: Any) -> Any:
    """Return an image-to-image pipeline with the components of `pipe`.

    Raises:
        ValueError: If diffusers has none for a pipeline of this class.
    """
    from diffusers import AutoPipelineForImage2Image  # noqa: PLC0415, diffusers is optional

    own = getattr(type(pipe), "image_to_image", None)  # a pipeline that diffusers does not know names its own
    if own is not None:
        return own(**pipe.components)  # from_pipe would cast to float32
    try:
        return AutoPipelineForImage2Image.from_pipe(pipe)
    except (ValueError, TypeError) as error:
        raise ValueError(f"a {type(pipe).__name__} has no image-to-image pipeline: {error}") from None


def encode(pipe: Any, image: Tensor) -> Tensor:
    """Encode pixels `[B, 3, height, width]` in [-1, 1] into latents as the denoiser knows them."""
    vae: Any = pipe.vae
    with _full_precision(vae):
        latents = vae.encode(image.to(vae.device, vae.dtype)).latent_dist.mode()
    return (latents - _shift(vae)) * vae.config.scaling_factor


def decode(pipe: Any, latents: Tensor) -> Tensor:
    """Decode latents into pixels `[B, 3, height, width]` in [-1, 1], float32."""
    vae: Any = pipe.vae
    with _full_precision(vae):
        latents = latents / vae.config.scaling_factor + _shift(vae)
        return vae.decode(latents.to(vae.device, vae.dtype), return_dict=False)[0].float()


def _shift(vae: Any) -> float:
    return getattr(vae.config, "shift_factor", None) or 0.0


@contextmanager
def _full_precision(vae: Any) -> Iterator[None]:
    """Run the autoencoder in float32 inside the `with` block, if it says that it overflows in float16 (SDXL)."""
    dtype = vae.dtype
    upcast = getattr(vae.config, "force_upcast", False) and dtype == torch.float16
    if upcast:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if upcast:
            vae.to(dtype)


@contextmanager
def tiled(vae: Any, enabled: bool) -> Iterator[None]:
    """Encode and decode tile by tile inside the `with` block, if it is `enabled` and the autoencoder can do it."""
    before = getattr(vae, "use_tiling", False)
    if enabled and not before and hasattr(vae, "enable_tiling"):
        vae.enable_tiling()
    try:
        yield
    finally:
        if enabled and not before and hasattr(vae, "disable_tiling"):
            vae.disable_tiling()


def unpacked(pipe: Any, latents: Tensor, height: int, width: int) -> Tensor:
    """Return a pipeline's output as an image of latents `[B, C, rows, columns]`; FLUX packs 2 x 2 of them into a token.

    Args:
        pipe: The pipeline.
        latents: Its output, packed or not.
        height: Height of the picture in pixels.
        width: Width of the picture in pixels.
    """
    return pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor) if latents.dim() == 3 else latents


def noise_level(scheduler: Any, timestep: Tensor | float) -> float:
    """Return s at a timestep of the scheduler: what its own way of adding noise does there."""
    times = scheduler.timesteps
    nearest = times[int((times.float() - float(timestep)).abs().argmin())][None]
    nothing, one = (torch.full((1, 1, 1, 1), value, device=times.device) for value in (0.0, 1.0))
    noise, signal = (float(_noisy(scheduler, *mixed, nearest)) for mixed in ((nothing, one), (one, nothing)))
    return noise / (noise + signal)


def _noisy(scheduler: Any, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    if hasattr(scheduler, "scale_noise"):
        return scheduler.scale_noise(clean, timestep, noise)
    return scheduler.add_noise(clean, noise, timestep)


def schedule_for(pipe: Any, level: float, steps: int, shift: float | None) -> dict[str, Any]:
    """Return the arguments of an image-to-image call that runs `steps` steps from a noise level on.

    Args:
        pipe: The pipeline. It gets a copy of its scheduler whose steps begin there: at a shift of flow matching, at
            a largest sigma (Karras, exponential, beta), at an offset of evenly spaced timesteps.
        level: Noise level s to begin at.
        steps: Steps to run.
        shift: Shift of flow matching's schedule, None for other schedulers.

    Raises:
        ValueError: If the scheduler cannot begin within 2 % of `level`.
    """
    name, nearest = type(pipe.scheduler).__name__, math.inf
    for starts in _starts(pipe.scheduler, level, steps, shift):
        best = None
        for start in starts:
            _, begins = _beginning(start, steps)
            if abs(begins - level) < abs(nearest - level):
                nearest, best = begins, start
            if abs(nearest - level) <= 1e-3 * level:
                break
        if best is not None and abs(nearest - level) <= 0.02 * level:
            pipe.scheduler = best.scheduler
            return best.call
    why = f"the nearest that it has is {nearest:.3f}" if nearest < math.inf else "it cannot add noise at a step"
    raise ValueError(
        f"a {name} cannot begin at the noise level {level} with {steps} steps to go: {why}. Take another scheduler, "
        "such as pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)"
    )


class _Start(NamedTuple):
    """A scheduler, and the arguments of a call that is to begin at some noise level."""

    scheduler: Any
    call: dict[str, Any]


def _starts(scheduler: Any, level: float, steps: int, shift: float | None) -> Iterator[Iterable[_Start]]:
    """Yield the ways in which a scheduler may begin at a noise level, the best first, each with some tries."""
    config = scheduler.config
    if hasattr(scheduler, "scale_noise") and shift is not None and _takes(scheduler, "sigmas"):
        fixed = dict(use_dynamic_shifting=False, shift=shift, shift_terminal=None)
        first = level / (shift - (shift - 1) * level)  # before the shift
        sigmas = list(np.linspace(first, first / steps, steps))
        call = dict(sigmas=sigmas, num_inference_steps=steps, strength=1.0)
        yield [_Start(type(scheduler).from_config(config, **fixed), call)]
        return
    if hasattr(scheduler, "scale_noise") or getattr(config, "use_flow_sigmas", False):
        yield _shifted(scheduler, level, steps)
        return
    spaced = any(getattr(config, f"use_{kind}_sigmas", False) for kind in ("karras", "exponential", "beta"))
    if spaced or ("sigma_max" in config and "timestep_spacing" not in config):
        yield [_changed(scheduler, steps, steps, sigma_max=level / (1 - level))]
    if getattr(scheduler, "alphas_cumprod", None) is None:
        return
    alphas = scheduler.alphas_cumprod.double()
    levels = (1 - alphas).sqrt() / (alphas.sqrt() + (1 - alphas).sqrt())
    time = int((levels - level).abs().argmin())
    middle = round(steps * len(levels) / (time + 1))
    nearby = sorted({max(steps, middle + more) for more in range(-3, 5)})
    totals = [total for total in nearby if total <= len(levels)]
    even = {
        key: False for key in config if key.startswith("use_") and key.endswith(("_sigmas", "_lambdas", "_shifting"))
    }
    even |= {"skip_prk_steps": True} if "skip_prk_steps" in config else {}
    if "steps_offset" in config and "original_inference_steps" not in config:
        yield (_offset(scheduler, time, steps, total, even) for total in totals)
    if "lambda_min_clipped" in config:
        clipped = math.log((1 - level) / level)
        yield (_changed(scheduler, steps, steps, lambda_min_clipped=clipped + d, **even) for d in (0, -1e-3, 1e-3))
    yield (_changed(scheduler, steps, total) for total in totals)
    if "original_inference_steps" in config:
        some = sorted({len(levels) // stride for stride in range(1, max(2, len(levels) // steps))})
        pairs = [(origin, total) for origin in some for total in totals if total <= origin]
        yield (_changed(scheduler, steps, total, original_inference_steps=origin) for origin, total in pairs)


def _takes(scheduler: Any, argument: str) -> bool:
    return argument in inspect.signature(scheduler.set_timesteps).parameters


def _changed(scheduler: Any, steps: int, total: int, **config: Any) -> _Start:
    """Return a copy of a scheduler with other settings, which runs the last `steps` of `total` steps."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.register_to_config(**config)
    return _Start(scheduler, dict(num_inference_steps=total, strength=min(1.0, (steps + 1e-3) / total)))


def _offset(scheduler: Any, time: int, steps: int, total: int, even: dict[str, bool]) -> _Start:
    """Return a scheduler whose timesteps are spaced evenly, and of whose last `steps` the first is `time`."""
    start = _changed(scheduler, steps, total, timestep_spacing="leading", steps_offset=0, **even)
    first, _ = _beginning(start, steps)
    start.scheduler.register_to_config(steps_offset=max(0, time - round(first)))
    return start


def _shifted(scheduler: Any, level: float, steps: int) -> list[_Start]:
    """Return flow-matching schedulers whose shifts put the first of the last steps at a level.

    The first has the shift that is most like its own.
    """
    key = "flow_shift" if "flow_shift" in scheduler.config else "shift"
    fixed = {"use_dynamic_shifting": False} if "use_dynamic_shifting" in scheduler.config else {}
    found = []
    for total in range(steps + 1, 6 * steps + 6):
        plain = _changed(type(scheduler).from_config(scheduler.config, **{key: 1.0}, **fixed), steps, total)
        _, sigma = _beginning(plain, steps)
        if 0 < sigma < 1:
            shift = level * (1 - sigma) / (sigma * (1 - level))
            shifted = type(scheduler).from_config(scheduler.config, **{key: shift}, **fixed)
            found.append((abs(math.log(shift / scheduler.config[key])), plain._replace(scheduler=shifted)))
    return [start for _, start in sorted(found, key=lambda one: one[0])]


def _beginning(start: _Start, steps: int) -> tuple[float, float]:
    """Return the timestep and the noise level at which a call begins; the level is infinite if it cannot be made."""
    scheduler = copy.deepcopy(start.scheduler)
    total = start.call["num_inference_steps"]
    try:
        names = ("sigmas",) if "sigmas" in start.call else ("num_inference_steps",)
        scheduler.set_timesteps(**{name: start.call[name] for name in names})
        skipped = (total - steps) * scheduler.order
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(skipped)
        time = scheduler.timesteps[skipped]
        return float(time), noise_level(scheduler, time)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError):
        return 0.0, math.inf


class Redraw:
    """One call of an image-to-image pipeline from given latents and noise, guided by the picture.

    Args:
        pipe: An image-to-image pipeline.
        clean: Latents of the picture `[B, C, height, width]`.
        noise: Like `clean`.
        residual: Power p of the skip residual, None for none: after a step that leads to level s, the noisy picture
            replaces a share c of the latents, c = (0.5 + 0.5 cos(pi (1 - s))) ** p (DemoFusion).
    """

    def __init__(self, pipe: Any, clean: Tensor, noise: Tensor, residual: float | None) -> None:
        self.pipe, self.clean, self.noise, self.residual = pipe, clean, noise, residual

    def __call__(self, tick: Any, **arguments: Any) -> Tensor:
        """Run the pipeline and return latents `[B, C, height, width]`; `tick()` is called after each step."""
        prepare = self.pipe.prepare_latents
        packs = hasattr(self.pipe, "_pack_latents") and hasattr(self.pipe, "_prepare_latent_image_ids")

        def prepare_latents(image: Any, timestep: Tensor, *args: Any, **kwargs: Any) -> Any:
            noisy = _noisy(self.pipe.scheduler, self.clean, self.noise, timestep)
            if not packs:
                return noisy
            names = ("batch_size", "num_channels_latents", "height", "width", "dtype", "device", "generator", "latents")
            given = {**dict(zip(names, args, strict=False)), **kwargs, "latents": self._packed(noisy)}
            return prepare(image, timestep, **given)

        def after_step(pipe: Any, index: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            tick()
            times = self.pipe.scheduler.timesteps
            place = int((times.float() - float(timestep)).abs().argmin()) + 1
            if self.residual is None or place >= len(times):
                return tensors
            level = noise_level(self.pipe.scheduler, times[place])
            share = (0.5 + 0.5 * math.cos(math.pi * (1 - level))) ** self.residual
            guide = _noisy(
                self.pipe.scheduler, self.clean, self.noise, times[place : place + 1].repeat(len(self.clean))
            )
            guide = self._packed(guide) if packs else guide
            return {"latents": torch.lerp(tensors["latents"], guide.to(tensors["latents"]), share)}

        self.pipe.prepare_latents = prepare_latents
        try:
            output = self.pipe(callback_on_step_end=after_step, output_type="latent", **arguments).images
        finally:
            del self.pipe.prepare_latents
        side = self.pipe.vae_scale_factor
        return unpacked(self.pipe, output, self.clean.shape[-2] * side, self.clean.shape[-1] * side)

    def _packed(self, latents: Tensor) -> Tensor:
        return self.pipe._pack_latents(latents, *latents.shape)
