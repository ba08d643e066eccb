"""`generate_highres`: pictures far above the training size, from coarse to fine.

A model that knows one size repeats the object where it draws a larger one from noise alone. So the first picture is
drawn at the native size; each next level enlarges the picture, adds noise up to a level s, and removes it again
(SDEdit), which adds detail and keeps the layout.

Papers: 'SDEdit' - https://arxiv.org/abs/2108.01073, 'DemoFusion' (the skip residual) - https://arxiv.org/abs/2311.16973
"""

import inspect
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from vision_attn._checks import check_one_of, is_int, is_number
from vision_attn.conversion.conversion import convert
from vision_attn.conversion.state import is_converted
from vision_attn.grid import Grid
from vision_attn.highres.feed_forward import chunked_feed_forward
from vision_attn.highres.positions import stretched_positions
from vision_attn.highres.redraw import (
    Redraw,
    decode,
    encode,
    image_to_image,
    is_flow,
    native_side,
    schedule_for,
    shift_at,
    tiled,
    tokens_of,
    unit_of,
    unpacked,
)
from vision_attn.hosts.selection import denoisers_of
from vision_attn.processors.base import AttnSpec
from vision_attn.processors.clear import Clear
from vision_attn.processors.moh import MoH
from vision_attn.processors.schedule import Schedule

# Options hold steps and strengths, a level goes on from the tensors of the one before, and pictures are PIL images.
_TAKEN = {"num_inference_steps", "strength", "image", "latents", "output_type", "callback_on_step_end", "return_dict"}
_TILED_FROM = 2048  # pixels of the longer side from which on the autoencoder works tile by tile
_CHUNK = 16384  # tokens of FLUX's feed-forward layers at a time


@dataclass(frozen=True)
class Options:
    """How `generate_highres` makes its levels.

    Args:
        num_inference_steps: Denoising steps of the first level.
        level_inference_steps: Denoising steps of each level above the first.
        base: (height, width) of the first level in pixels; None for the largest size of the asked shape that has no
            more pixels than the native size.
        factor: Enlargement from level to level, above 1.
        strength: Noise levels s of the levels above the first, in (0, 1), or one for all; the last one also counts for
            all levels that follow.
        skip_residual: Power of the skip residual, above 0; None for no skip residual.
        match_stats: Whether each channel of a level's latents gets the mean and deviation of the enlarged picture.
        rope: 'ntk' to stretch the base of FLUX's rotary embedding with the side, 'interpolate' to scale positions to
            those of the first level, 'none' to leave both.
        shift: Shift of flow matching's schedule above the first level: 'sqrt' to let it grow with the square root of
            the tokens, or a number above 0.
        quiet: Whether to hide the progress bar.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a value is out of its range.
    """

    num_inference_steps: int = 28
    level_inference_steps: int = 14
    base: tuple[int, int] | None = None
    factor: float = 2.0
    strength: float | tuple[float, ...] = (0.6, 0.45, 0.35, 0.3)
    skip_residual: float | None = 3.0
    match_stats: bool = True
    rope: str = "ntk"
    shift: float | str = "sqrt"
    quiet: bool = False

    def __post_init__(self) -> None:
        for name in ("num_inference_steps", "level_inference_steps"):
            _check_count(name, getattr(self, name))
        if self.base is not None:
            object.__setattr__(self, "base", _checked_base(self.base))
        object.__setattr__(self, "strength", _checked_strength(self.strength))
        if not is_number(self.factor) or not self.factor > 1:
            raise _refusal("factor must be a number above 1", self.factor, is_number(self.factor))
        if self.skip_residual is not None and not (is_number(self.skip_residual) and self.skip_residual > 0):
            text = "skip_residual must be a number above 0, or None for none"
            raise _refusal(text, self.skip_residual, is_number(self.skip_residual))
        check_one_of("rope", self.rope, ("ntk", "interpolate", "none"))
        if self.shift != "sqrt" and not (is_number(self.shift) and self.shift > 0):  # type: ignore[operator]
            typed = isinstance(self.shift, str) or is_number(self.shift)
            raise _refusal("shift must be 'sqrt' or a number above 0", self.shift, typed)

    def sizes(self, pipe: Any, height: int, width: int, cell: int = 1) -> list[tuple[int, int]]:
        """Return (height, width) of all levels.

        Args:
            pipe: The pipeline.
            height: Height of the last level in pixels.
            width: Width of the last level in pixels.
            cell: The sides of all levels are multiples of this many tokens: the processors' pooled cells.

        Raises:
            TypeError: If a side is not an int.
            ValueError: If a side is not a multiple of the cell, or `base` does not fit.
        """
        if not (is_int(height) and is_int(width)):
            raise TypeError(f"height and width must be ints, got {height!r} and {width!r}")
        unit = unit_of(pipe) * cell
        why = f" ({cell} tokens, a pooled cell)" if cell > 1 else ""
        if height % unit or width % unit or min(height, width) < unit:
            raise ValueError(f"height and width must be multiples of {unit} pixels{why}, got {height} x {width}")
        base = self.base
        if base is None:
            side = native_side(pipe)
            shrink = min(1.0, side / math.sqrt(height * width))
            base = tuple(max(unit, int(s * shrink / unit + 1e-6) * unit) for s in (height, width))  # type: ignore
        assert base is not None
        if base[0] % unit or base[1] % unit or base[0] > height or base[1] > width:
            raise ValueError(f"base must be multiples of {unit} pixels{why} within {height} x {width}, got {base}")
        sizes = [base]
        while sizes[-1] != (height, width):
            last = sizes[-1]
            bigger = tuple(
                min(round(s * self.factor / unit) * unit, most) for s, most in zip(last, (height, width), strict=True)
            )
            near = bigger[0] * bigger[1] * 1.25 > height * width or bigger == last
            sizes.append((height, width) if near else bigger)  # type: ignore[arg-type]
        return sizes

    def strengths(self, levels: int) -> list[float]:
        """Return the noise level that each of `levels` levels begins at."""
        assert isinstance(self.strength, tuple)
        return [1.0, *(self.strength[min(i, len(self.strength) - 1)] for i in range(levels - 1))]


def _refusal(text: str, value: object, right_type: bool) -> Exception:
    """Return the error for a value that is out of its range, or of another type."""
    return (ValueError if right_type else TypeError)(f"{text}, got {value!r}")


def _check_count(name: str, value: object) -> None:
    """Refuse a value that is not an int of at least 1."""
    if not (is_int(value) and value >= 1):  # type: ignore[operator]
        raise _refusal(f"{name} must be an int, at least 1", value, is_int(value))


def _checked_base(base: object) -> tuple[int, int]:
    """Return (height, width), or refuse a value that is not a pair of positive ints."""
    if not (isinstance(base, tuple | list) and len(base) == 2 and all(map(is_int, base)) and min(base) >= 1):
        typed = isinstance(base, tuple | list) and all(map(is_int, base))
        raise _refusal("base must be (height, width) in pixels, two ints of at least 1", base, typed)
    return base[0], base[1]


def _checked_strength(strength: Any) -> tuple[float, ...]:
    """Return the noise levels, one for a single number, or refuse a value that holds anything else."""
    levels = (strength,) if is_number(strength) else strength
    typed = isinstance(levels, tuple | list) and all(map(is_number, levels))
    if not typed or not levels or not all(0 < s < 1 for s in levels):
        raise _refusal("strength must hold noise levels between 0 and 1, such as 0.3 or (0.6, 0.3)", strength, typed)
    return tuple(levels)


def refuse_taken(call: Mapping[str, Any]) -> None:
    """Refuse arguments of a pipeline's call that the levels decide themselves.

    Raises:
        ValueError: If there are any; they are named.
    """
    if taken := sorted(_TAKEN & set(call)):
        raise ValueError(f"{', '.join(taken)}: the levels decide that; see Options for steps and strengths")


@dataclass(frozen=True)
class Proportional(Clear):
    """`Clear` whose native tokens are those of the first level: its image and the text.

    Args:
        first: Image tokens of the first level.
    """

    first: int = 0

    def native(self, grid: Grid) -> int:
        """Return the tokens of a sequence at the first level."""
        return self.first + grid.prefix + grid.suffix


def cell_of(spec: Any) -> int:
    """Return the number of tokens that the sides of every level must be multiples of."""
    if isinstance(spec, Clear):
        return spec.pool
    if isinstance(spec, Schedule):
        return math.lcm(*(cell_of(stage) for _, stage in spec.stages))
    if isinstance(spec, MoH):
        return cell_of(spec.spec)
    return math.lcm(*map(cell_of, spec)) if isinstance(spec, (list, tuple)) else 1


def proportional(spec: AttnSpec, first: int) -> AttnSpec:
    """Return a spec in which each `Clear` without native tokens, also one inside of another spec, is `Proportional`.

    Args:
        spec: The spec of a level.
        first: Image tokens of the first level.
    """
    if isinstance(spec, Schedule):
        return Schedule(tuple((until, proportional(stage, first)) for until, stage in spec.stages))
    if isinstance(spec, MoH):
        return replace(spec, spec=proportional(spec.spec, first))
    if type(spec) is not Clear or spec.native_tokens is not None:
        return spec
    return Proportional(**{field.name: getattr(spec, field.name) for field in fields(spec)}, first=first)


def specs_of(spec: Any, levels: int) -> list[AttnSpec | None]:
    """Return the processor of each level, None for the pipeline as it is.

    Raises:
        TypeError: If `spec` is neither a spec nor a list of them.
        ValueError: If the list has not one for each level.
    """
    if spec is None or isinstance(spec, AttnSpec):
        return [None, *[spec] * (levels - 1)]
    typed = isinstance(spec, (list, tuple)) and all(each is None or isinstance(each, AttnSpec) for each in spec)
    if not typed or len(spec) != levels:
        text = f"spec must be a spec, or a list of {levels} specs or None, one for each level"
        raise _refusal(text, spec, typed)
    return list(spec)


@dataclass(frozen=True)
class Level:
    """One level: the pictures, and how they were made.

    Attributes:
        height: Height in pixels.
        width: Width in pixels.
        images: PIL images, one per prompt.
        strength: Noise level at which drawing began, 1 for the first level.
        seconds: Time that the denoising and the autoencoder took.
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
    spec: AttnSpec | Sequence[AttnSpec | None] | None = None,
    generator: torch.Generator | None = None,
    callback: Callable[[int, Level], None] | None = None,
    **call: Any,
) -> HighRes:
    """Draw a picture above the size that a pipeline was trained for, in levels that each enlarge the one before.

    Args:
        pipe: A text-to-image pipeline of the FLUX, SD3, SDXL or Stable Diffusion kind. It is unchanged afterwards.
        prompt: One prompt or several; None if `call` has embeddings.
        height: Height of the picture in pixels.
        width: Width of the picture in pixels.
        options: How levels are made, see `Options`.
        spec: Processor of the levels above the first; or a list with one for each level, None for the pipeline as it
            is. A `Clear` without `native_tokens` gets those of the first level (the proportional scale).
        generator: Draws all noise.
        callback: Called with the number and the result of each level when it is done.
        call: Further arguments of the pipeline's calls, such as `guidance_scale` or `negative_prompt`.

    Returns:
        All levels, with their pictures.

    Raises:
        TypeError: If a side is not an int, `pipe` is no pipeline, or `options` are none.
        ValueError: If the size is not a multiple of what the pipeline can draw, `options` or `spec` do not fit, the
            pipeline is converted already, or `call` has what the levels decide themselves.
    """
    refuse_taken(call)
    if not hasattr(pipe, "components") or not hasattr(pipe, "vae_scale_factor"):
        raise TypeError(f"generate_highres draws with a diffusers pipeline, got a {type(pipe).__name__}")
    options = Options() if options is None else options
    if not isinstance(options, Options):
        raise TypeError(f"options must be Options(...), got {options!r}")
    sizes = options.sizes(pipe, height, width, cell_of(spec))
    strengths = options.strengths(len(sizes))
    specs = specs_of(spec, len(sizes))
    redraw = image_to_image(pipe)
    converted = any(map(is_converted, denoisers_of(pipe).values()))
    if converted and any(spec is not None for spec in specs):
        raise ValueError("the pipeline is converted already: revert() it, or leave out spec")
    levels: list[Level] = []
    total = options.num_inference_steps + (len(sizes) - 1) * options.level_inference_steps
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
    steps = {
        "num_inference_steps": options.num_inference_steps,
        "callback_on_step_end": after_step,
        "output_type": "latent",
    }
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
    schedule = schedule_for(redraw, level, options.level_inference_steps, shift)
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
    """Prepare the pipeline for one level inside the `with` block."""
    stretch = math.sqrt(size[0] * size[1] / (base[0] * base[1]))
    with ExitStack() as restored:
        restored.enter_context(tiled(pipe.vae, max(size) > _TILED_FROM))
        for model in denoisers_of(pipe).values():
            grid = (size[0] // unit_of(pipe), size[1] // unit_of(pipe))
            restored.enter_context(stretched_positions(model, grid, stretch, options.rope))
            if grid[0] * grid[1] > _CHUNK:
                restored.enter_context(chunked_feed_forward(model, _CHUNK))
        if spec is not None:
            restored.callback(convert(pipe, proportional(spec, tokens_of(pipe, base))).revert)
        yield


@contextmanager
def _without_bars(*pipes: Any) -> Iterator[None]:
    """Hide the pipelines' own progress bars inside the `with` block: one bar shows all levels."""
    before = [dict(getattr(pipe, "_progress_bar_config", {})) for pipe in pipes]
    for pipe, config in zip(pipes, before, strict=True):
        pipe.set_progress_bar_config(**{**config, "disable": True})
    try:
        yield
    finally:
        for pipe, config in zip(pipes, before, strict=True):
            pipe.set_progress_bar_config(**config)
