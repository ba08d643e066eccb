"""Draws from cached embeddings with the teacher and the student from the same noise: the sheets of validation."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vision_attn.distill.data import Batch
from vision_attn.distill.hosts import Interface
from vision_attn.highres.levels import shift_at
from vision_attn.highres.redraw import decode, unpacked


def sample(
    model: Any, pipe: Any, interface: Interface, batch: Batch, noise: Tensor, *, steps: int, guidance: float = 1.0
) -> Tensor:
    """Denoise with the pipeline's scheduler; returns latents like `noise`.

    Args:
        model: The denoiser as it is called.
        pipe: Its pipeline, for the scheduler and the native size.
        interface: How the denoiser is called.
        batch: The embeddings; its latents are not looked at.
        noise: To begin with.
        steps: Denoising steps.
        guidance: Of classifier-free guidance against the empty prompt; 1 is none.
    """
    scheduler, flow = _fresh(pipe, batch.size)
    if flow:
        scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
    else:
        scheduler.set_timesteps(steps)
    latents = noise * scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else noise
    everything = torch.ones(len(noise), dtype=torch.bool)
    dtype = next(model.parameters()).dtype if hasattr(model, "parameters") else noise.dtype
    with torch.no_grad():
        for time in scheduler.timesteps:
            scaled = latents if flow else scheduler.scale_model_input(latents, time)

            def predict(tensors: dict[str, Tensor], scaled: Tensor = scaled, time: Tensor = time) -> Tensor:
                call = interface.arguments(scaled.to(dtype), time.expand(len(noise)), tensors)
                output = model(**call)[0].float()
                half = output.dim() == 4 and output.shape[1] == 2 * noise.shape[1]
                return output.chunk(2, 1)[0] if half else output

            prediction = predict(batch.tensors)
            if guidance != 1:
                null = predict(batch.without_prompts(everything))
                prediction = null + guidance * (prediction - null)
            latents = scheduler.step(prediction, time, latents, return_dict=False)[0]
    return latents


def _fresh(pipe: Any, size: tuple[int, int]) -> tuple[Any, bool]:
    """Return a scheduler of the pipeline's kind; that of flow matching with the static shift for a size in pixels."""
    config = pipe.scheduler.config
    if not hasattr(pipe.scheduler, "scale_noise"):
        return type(pipe.scheduler).from_config(config), False
    shift = shift_at(pipe, size, "sqrt")
    return type(pipe.scheduler).from_config(config, use_dynamic_shifting=False, shift=shift), True


def to_images(pipe: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:
    """Decode latents as the denoiser gives them into pictures `[B, 3, height, width]` in [0, 1], on the CPU."""
    with torch.no_grad():
        pixels = decode(pipe, unpacked(pipe, latents.to(pipe.vae.device), *size))
    return (pixels.cpu() / 2 + 0.5).clamp(0, 1)


def save_sheet(path: Path, rows: list[Tensor]) -> None:
    """Write rows of pictures `[B, 3, height, width]` in [0, 1] as one PNG."""
    from PIL import Image  # noqa: PLC0415, optional

    sheet = torch.cat([torch.cat(list(row), 2) for row in rows], 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    Image.fromarray((sheet * 255).round().byte().permute(1, 2, 0).numpy()).save(part, "PNG")
    part.replace(path)
