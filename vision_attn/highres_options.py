"""How `generate_highres` makes its levels: their sizes, noise levels and what guides them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Steps and strengths are in `Options`; a level goes on from the tensors of the one before, and pictures are PIL's.
_TAKEN = {"num_inference_steps", "strength", "image", "latents", "output_type", "callback_on_step_end", "return_dict"}


@dataclass(frozen=True)
class Options:
    """How `generate_highres` makes its levels.

    Args:
        steps: Denoising steps of the first level.
        level_steps: Steps of each further one.
        base: (height, width) of the first level in pixels; the largest of the asked shape with no more pixels than the
            native size, if None.
        factor: Enlargement from level to level, above 1.
        strength: Noise levels s of the further levels, in (0, 1); the last one counts for all that follow.
        skip_residual: Power of the skip residual, None for none.
        match_stats: Whether the latents of a level get mean and deviation, by channel, of the enlarged picture.
        rope: 'ntk' to stretch the base of FLUX's rotary embedding with the side, 'interpolate' to scale positions to
            those of the first level, 'none' to leave both.
        shift: Of flow matching's schedule above the first level: 'sqrt' to let it grow with the square root of the
            tokens, or a number.
        quiet: No progress bar.

    Raises:
        ValueError: If a value is out of its range.
    """

    steps: int = 28
    level_steps: int = 14
    base: tuple[int, int] | None = None
    factor: float = 2.0
    strength: tuple[float, ...] = (0.6, 0.45, 0.35, 0.3)
    skip_residual: float | None = 3.0
    match_stats: bool = True
    rope: str = "ntk"
    shift: float | str = "sqrt"
    quiet: bool = False

    def __post_init__(self) -> None:
        if min(self.steps, self.level_steps) < 1:
            raise ValueError(f"steps and level_steps must be at least 1, got {self.steps} and {self.level_steps}")
        if self.factor <= 1:
            raise ValueError(f"factor must be above 1, got {self.factor}")
        if not self.strength or not all(0 < s < 1 for s in self.strength):
            raise ValueError(f"strength must hold noise levels between 0 and 1, got {self.strength}")
        if self.rope not in ("ntk", "interpolate", "none"):
            raise ValueError(f"rope must be 'ntk', 'interpolate' or 'none', got {self.rope!r}")
        if isinstance(self.shift, str) and self.shift != "sqrt":
            raise ValueError(f"shift must be 'sqrt' or a number, got {self.shift!r}")

    def sizes(self, pipe: Any, height: int, width: int, cell: int = 1) -> list[tuple[int, int]]:
        """Return (height, width) of all levels.

        Args:
            pipe: The pipeline.
            height: Of the last level in pixels.
            width: Of the last level in pixels.
            cell: Tokens that the sides of all levels are multiples of: the processors' pooled cells.

        Raises:
            ValueError: If the sides are no such multiples, or `base` does not fit.
        """
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
        """Return the noise level that each level begins at."""
        return [1.0, *(self.strength[min(i, len(self.strength) - 1)] for i in range(levels - 1))]


def unit_of(pipe: Any) -> int:
    """Return the pixels that height and width must be multiples of: two latents."""
    return 2 * pipe.vae_scale_factor


def native_side(pipe: Any) -> int:
    """Return the side in pixels of the square that a pipeline was trained for."""
    latents = getattr(pipe, "default_sample_size", None) or pipe.unet.config.sample_size
    return int(latents) * pipe.vae_scale_factor


def shift_at(pipe: Any, size: tuple[int, int], shift: float | str) -> float:
    """Return the shift of flow matching's schedule at a size: the native one times the ratio of the sides, if 'sqrt'.

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
    """Return the image tokens of a size in pixels."""
    return size[0] // unit_of(pipe) * (size[1] // unit_of(pipe))


def refuse_taken(call: Mapping[str, Any]) -> None:
    """Refuse arguments of a pipeline's call that the levels decide themselves.

    Raises:
        ValueError: If there are any; they are named.
    """
    if taken := sorted(_TAKEN & set(call)):
        raise ValueError(f"{', '.join(taken)}: the levels decide that; see Options for steps and strengths")
