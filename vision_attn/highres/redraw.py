"""Redraws a picture from a chosen noise level with diffusers' own image-to-image pipelines, in latents.

A noise level s in (0, 1) means: s parts noise to 1 - s parts picture. Flow matching calls it sigma; a diffusion with
cumulative alpha a has s = sqrt(1 - a) / (sqrt(a) + sqrt(1 - a)). A level is the same signal-to-noise ratio in every
pipeline, whatever the steps and the shift of its schedule are.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def is_flow(pipe: Any) -> bool:
    """Whether a pipeline's scheduler is one of flow matching."""
    return hasattr(pipe.scheduler, "scale_noise")


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
    """Return s at a timestep of the scheduler."""
    time = float(timestep)
    if hasattr(scheduler, "scale_noise"):
        index = int((scheduler.timesteps.float() - time).abs().argmin())
        return float(scheduler.sigmas[index])
    alpha = float(scheduler.alphas_cumprod[min(int(time), len(scheduler.alphas_cumprod) - 1)])
    return math.sqrt(1 - alpha) / (math.sqrt(alpha) + math.sqrt(1 - alpha))


def _noisy(scheduler: Any, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    if hasattr(scheduler, "scale_noise"):
        return scheduler.scale_noise(clean, timestep, noise)
    return scheduler.add_noise(clean, noise, timestep)


def schedule_for(pipe: Any, level: float, steps: int, shift: float | None) -> dict[str, Any]:
    """Return the arguments of an image-to-image call that runs `steps` steps from a noise level on.

    Args:
        pipe: The pipeline. If its scheduler is one of flow matching, it gets the static shift.
        level: Noise level s to begin at.
        steps: Steps to run.
        shift: Shift of flow matching's schedule, None for other schedulers.
    """
    if is_flow(pipe):
        fixed = dict(use_dynamic_shifting=False, shift=shift)
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **fixed)
        assert shift is not None
        first = level / (shift - (shift - 1) * level)  # before the shift
        return dict(sigmas=list(np.linspace(first, first / steps, steps)), num_inference_steps=steps, strength=1.0)
    alphas = pipe.scheduler.alphas_cumprod.double()
    levels = (1 - alphas).sqrt() / (alphas.sqrt() + (1 - alphas).sqrt())
    time = int((levels - level).abs().argmin()) + 1
    estimate = max(steps, round(steps * len(levels) / time))
    trial = copy.deepcopy(pipe.scheduler)

    def miss(total: int) -> float:
        trial.set_timesteps(total)
        return abs(noise_level(trial, trial.timesteps[(total - steps) * trial.order]) - level)

    total = min(range(max(steps, estimate - 3), estimate + 4), key=miss)
    return dict(num_inference_steps=total, strength=min(1.0, (steps + 1e-3) / total))


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
