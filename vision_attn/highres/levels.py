"""`generate_highres`: pictures far above the training size, from coarse to fine.

A model that knows one size repeats the object where it draws a larger one from noise alone. So the first picture is
drawn at the native size; each next level enlarges the picture, adds noise up to a level s, and removes it again
(SDEdit), which adds detail and keeps the layout.

Papers: 'SDEdit' - https://arxiv.org/abs/2108.01073, 'DemoFusion' (the skip residual) - https://arxiv.org/abs/2311.16973
"""

import inspect
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from vision_attn.conversion.conversion import convert
from vision_attn.conversion.model_state import is_converted
from vision_attn.highres.feed_forward import chunked_feed_forward
from vision_attn.highres.options import Options, refuse_taken, shift_at, tokens_of, unit_of
from vision_attn.highres.positions import stretched_positions
from vision_attn.highres.redraw import Redraw, decode, encode, image_to_image, is_flow, schedule_for, tiled, unpacked
from vision_attn.highres.specs import Proportional, cell_of, specs_of
from vision_attn.hosts.targets import COMPONENTS
from vision_attn.processors.base import AttnSpec
from vision_attn.processors.clear import Clear

__all__ = ["HighRes", "Level", "Options", "generate_highres"]

_TILED_FROM = 2048  # pixels of the longer side from which on the autoencoder works tile by tile
_CHUNK = 16384  # tokens of FLUX's feed-forward layers at a time


@dataclass(frozen=True)
class Level:
    """One level: the pictures, and how they were made.

    Attributes:
        height: In pixels.
        width: In pixels.
        images: PIL images, one per prompt.
        strength: Noise level that drawing began at, 1 for the first.
        seconds: Of the denoising and the autoencoder.
    """

    height: int
    width: int
    images: list[Any]
    strength: float
    seconds: float


@dataclass(frozen=True)
class HighRes:
    """What `generate_highres` returns: all levels; `images` are those of the last."""

    levels: list[Level]

    @property
    def images(self) -> list[Any]:
        """The pictures at the asked size."""
        return self.levels[-1].images


def generate_highres(
    pipe: Any,
    prompt: str | list[str] | None,
    height: int,
    width: int,
    *,
    options: Options | None = None,
    attn: AttnSpec | Sequence[AttnSpec | None] | None = None,
    generator: torch.Generator | None = None,
    callback: Callable[[int, Level], None] | None = None,
    **call: Any,
) -> HighRes:
    """Draw a picture above the size that a pipeline was trained for, in levels that each enlarge the one before.

    Args:
        pipe: A text-to-image pipeline of the FLUX, SD3, SDXL or Stable Diffusion kind. It is as before afterwards.
        prompt: One or several; None if `call` has embeddings.
        height: Of the picture in pixels.
        width: Of the picture in pixels.
        options: How levels are made, see `Options`.
        attn: Processor of the levels above the first; or a list with one for each level, None for the pipeline as it
            is. A `Clear` without `native_tokens` gets those of the first level (the proportional scale).
        generator: Of all noise.
        callback: Is called with the number and the result of each level that is done.
        call: Further arguments of the pipeline's calls, such as `guidance_scale` or `negative_prompt`.

    Raises:
        ValueError: If the size is no multiple of what the pipeline can draw, options contradict each other, or `call`
            has what the levels decide themselves.
    """
    refuse_taken(call)
    options = options or Options()
    sizes = options.sizes(pipe, height, width, cell_of(attn))
    strengths = options.strengths(len(sizes))
    specs = specs_of(attn, len(sizes))
    redraw = image_to_image(pipe)
    converted = any(is_converted(m) for m in _denoisers(pipe))
    if converted and any(spec is not None for spec in specs):
        raise ValueError("the pipeline is converted already: revert() it, or leave attn away")
    levels: list[Level] = []
    total = options.steps + (len(sizes) - 1) * options.level_steps
    with tqdm(total=total, unit="step", disable=options.quiet) as bar, ExitStack() as restored, torch.no_grad():
        restored.enter_context(_without_bars(pipe, redraw))
        picture: Tensor | None = None
        for number, (size, level) in enumerate(zip(sizes, strengths, strict=True)):
            bar.set_description(f"{size[1]} x {size[0]}")
            start = time.perf_counter()
            with _level(pipe, size, sizes[0], specs[number], options):
                arguments = {**call, "prompt": prompt, "generator": generator}
                if picture is None:
                    latents = _first(pipe, size, options, bar.update, arguments)
                else:
                    enlarged = F.interpolate(picture, size, mode="bicubic", antialias=True).clamp(-1, 1)
                    shift = shift_at(pipe, size, options.shift) if is_flow(pipe) else None
                    latents = _next(redraw, enlarged, level, shift, options, bar.update, arguments)
                picture = decode(pipe, latents)
            images = pipe.image_processor.postprocess(picture.clamp(-1, 1), output_type="pil")
            levels.append(Level(*size, images, level, time.perf_counter() - start))
            if callback is not None:
                callback(number, levels[-1])
    return HighRes(levels)


def _first(pipe: Any, size: tuple[int, int], options: Options, tick: Any, arguments: dict[str, Any]) -> Tensor:
    """Draw the first level from noise: latents `[B, C, height, width]`."""

    def after_step(pipe: Any, index: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tick()
        return tensors

    height, width = size
    steps = {"num_inference_steps": options.steps, "callback_on_step_end": after_step, "output_type": "latent"}
    return unpacked(pipe, pipe(height=height, width=width, **steps, **arguments).images, height, width)


def _next(
    redraw: Any,
    enlarged: Tensor,
    level: float,
    shift: float | None,
    options: Options,
    tick: Any,
    arguments: dict[str, Any],
) -> Tensor:
    """Redraw an enlarged picture from noise level `level` on: latents `[B, C, height, width]`."""
    from diffusers.utils.torch_utils import randn_tensor  # noqa: PLC0415, diffusers is optional

    clean = encode(redraw, enlarged)
    noise = randn_tensor(clean.shape, generator=arguments["generator"], device=clean.device, dtype=clean.dtype)
    schedule = schedule_for(redraw, level, options.level_steps, shift)
    known = inspect.signature(type(redraw).__call__).parameters
    size = dict(zip(("height", "width"), enlarged.shape[-2:], strict=True))
    size = {name: side for name, side in size.items() if name in known}
    run = Redraw(redraw, clean, noise, options.skip_residual)
    latents = run(tick, image=(enlarged + 1) / 2, **size, **schedule, **arguments)
    if options.match_stats:
        mean, wanted = (t.float().mean((2, 3), keepdim=True) for t in (latents, clean))
        deviation = clean.float().std((2, 3), keepdim=True) / latents.float().std((2, 3), keepdim=True).clamp(min=1e-6)
        latents = ((latents.float() - mean) * deviation + wanted).to(latents.dtype)
    return latents


@contextmanager
def _level(
    pipe: Any, size: tuple[int, int], base: tuple[int, int], spec: AttnSpec | None, options: Options
) -> Iterator[None]:
    """Change the pipeline for one level, and back."""
    stretch = math.sqrt(size[0] * size[1] / (base[0] * base[1]))
    with ExitStack() as restored:
        restored.enter_context(tiled(pipe.vae, max(size) > _TILED_FROM))
        for model in _denoisers(pipe):
            grid = (size[0] // unit_of(pipe), size[1] // unit_of(pipe))
            restored.enter_context(stretched_positions(model, grid, stretch, options.rope))
            if grid[0] * grid[1] > _CHUNK:
                restored.enter_context(chunked_feed_forward(model, _CHUNK))
        if spec is not None:
            if isinstance(spec, Clear) and spec.native_tokens is None:
                spec = Proportional(spec.radius, spec.pool, first=tokens_of(pipe, base))
            restored.callback(convert(pipe, spec).revert)
        yield


def _denoisers(pipe: Any) -> list[Any]:
    return [part for name, part in pipe.components.items() if name in COMPONENTS and part is not None]


@contextmanager
def _without_bars(*pipes: Any) -> Iterator[None]:
    """Hide the pipelines' own progress bars: there is one for all levels."""
    before = [dict(getattr(pipe, "_progress_bar_config", {})) for pipe in pipes]
    for pipe, config in zip(pipes, before, strict=True):
        pipe.set_progress_bar_config(**{**config, "disable": True})
    try:
        yield
    finally:
        for pipe, config in zip(pipes, before, strict=True):
            pipe.set_progress_bar_config(**config)
