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
        strength: Noise levels s of the further levels, in (0, 1), or one for all; the last one counts for all that
            follow.
        skip_residual: Power of the skip residual, above 0; None for none.
        match_stats: Whether the latents of a level get mean and deviation, by channel, of the enlarged picture.
        rope: 'ntk' to stretch the base of FLUX's rotary embedding with the side, 'interpolate' to scale positions to
            those of the first level, 'none' to leave both.
        shift: Of flow matching's schedule above the first level: 'sqrt' to let it grow with the square root of the
            tokens, or a number above 0.
        quiet: No progress bar.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a value is out of its range.
    """

    steps: int = 28
    level_steps: int = 14
    base: tuple[int, int] | None = None
    factor: float = 2.0
    strength: float | tuple[float, ...] = (0.6, 0.45, 0.35, 0.3)
    skip_residual: float | None = 3.0
    match_stats: bool = True
    rope: str = "ntk"
    shift: float | str = "sqrt"
    quiet: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "level_steps"):
            _check_count(name, getattr(self, name))
        if self.base is not None:
            object.__setattr__(self, "base", _checked_base(self.base))
        object.__setattr__(self, "strength", _checked_strength(self.strength))
        if not _is_number(self.factor) or not self.factor > 1:
            raise _refusal("factor must be a number above 1", self.factor, _is_number(self.factor))
        if self.skip_residual is not None and not (_is_number(self.skip_residual) and self.skip_residual > 0):
            text = "skip_residual must be a number above 0, or None for none"
            raise _refusal(text, self.skip_residual, _is_number(self.skip_residual))
        if self.rope not in ("ntk", "interpolate", "none"):
            raise ValueError(f"rope must be 'ntk', 'interpolate' or 'none', got {self.rope!r}")
        if self.shift != "sqrt" and not (_is_number(self.shift) and self.shift > 0):  # type: ignore[operator]
            typed = isinstance(self.shift, str) or _is_number(self.shift)
            raise _refusal("shift must be 'sqrt' or a number above 0", self.shift, typed)

    def sizes(self, pipe: Any, height: int, width: int, cell: int = 1) -> list[tuple[int, int]]:
        """Return (height, width) of all levels.

        Args:
            pipe: The pipeline.
            height: Of the last level in pixels.
            width: Of the last level in pixels.
            cell: Tokens that the sides of all levels are multiples of: the processors' pooled cells.

        Raises:
            TypeError: If a side is not an int.
            ValueError: If the sides are no such multiples, or `base` does not fit.
        """
        if not (_is_int(height) and _is_int(width)):
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
        """Return the noise level that each level begins at."""
        assert isinstance(self.strength, tuple)
        return [1.0, *(self.strength[min(i, len(self.strength) - 1)] for i in range(levels - 1))]


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _refusal(text: str, value: object, right_type: bool) -> Exception:
    """Return the error for a value that is out of its range, or of another type."""
    return (ValueError if right_type else TypeError)(f"{text}, got {value!r}")


def _check_count(name: str, value: object) -> None:
    """Refuse what is no int of at least 1."""
    if not (_is_int(value) and value >= 1):  # type: ignore[operator]
        raise _refusal(f"{name} must be an int, at least 1", value, _is_int(value))


def _checked_base(base: object) -> tuple[int, int]:
    """Return (height, width), or refuse what is no pair of positive ints."""
    if not (isinstance(base, tuple | list) and len(base) == 2 and all(map(_is_int, base)) and min(base) >= 1):
        typed = isinstance(base, tuple | list) and all(map(_is_int, base))
        raise _refusal("base must be (height, width) in pixels, two ints of at least 1", base, typed)
    return base[0], base[1]


def _checked_strength(strength: Any) -> tuple[float, ...]:
    """Return noise levels, of one number a single one, or refuse what is none."""
    levels = (strength,) if _is_number(strength) else strength
    typed = isinstance(levels, tuple | list) and all(map(_is_number, levels))
    if not typed or not levels or not all(0 < s < 1 for s in levels):
        raise _refusal("strength must hold noise levels between 0 and 1, such as 0.3 or (0.6, 0.3)", strength, typed)
    return tuple(levels)


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
