"""A grid of image tokens, and the legend of every axis letter used in the package.

| letter | axis                                            |
|--------|-------------------------------------------------|
| B      | batch                                           |
| N      | tokens of one sequence: prefix, grid, suffix    |
| H      | heads (never the height of an image)            |
| D      | channels of one head                            |
| C      | channels of all heads, C = H * D                |

Heights and widths are spelled out, always in that order, and count tokens, not pixels. Tensors of queries, keys and
values are `[B, N, H, D]`.
"""

from dataclasses import dataclass

import torch

from vision_attn._checks import check_int


@dataclass(frozen=True)
class Grid:
    """`height` x `width` image tokens in row-major order, after `prefix` and before `suffix` other tokens.

    Prefix and suffix tokens (text, class, registers, reference images) have no place in the grid.

    Args:
        height: Rows of image tokens.
        width: Columns of image tokens.
        prefix: Tokens before the grid.
        suffix: Tokens after the grid.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If a side is below 1, or `prefix` or `suffix` is negative.
    """

    height: int
    width: int
    prefix: int = 0
    suffix: int = 0

    def __post_init__(self) -> None:
        if torch._C._get_tracing_state():  # torch.jit.trace makes tensors of sizes
            for name in ("height", "width", "prefix", "suffix"):
                object.__setattr__(self, name, int(getattr(self, name)))
        for name, least in (("height", 1), ("width", 1), ("prefix", 0), ("suffix", 0)):
            check_int(name, getattr(self, name), least, "an int (in tokens)")

    @property
    def image_tokens(self) -> int:
        """Tokens inside the grid."""
        return self.height * self.width

    @property
    def tokens(self) -> int:
        """All tokens of the sequence, N."""
        return self.prefix + self.image_tokens + self.suffix

    @property
    def image(self) -> slice:
        """Where the grid lies in the sequence."""
        return slice(self.prefix, self.prefix + self.image_tokens)


def largest(grid: Grid | tuple[Grid, ...]) -> Grid:
    """Return the grid, or the largest one of a batch that has a grid for each sample."""
    return grid if isinstance(grid, Grid) else max(grid, key=lambda own: own.image_tokens)


def holds(grid: Grid | tuple[Grid, ...], before: int, after: int) -> bool:
    """Whether so many keys before the first query, and after the last one, lie outside the grid."""
    return before <= largest(grid).prefix and after <= largest(grid).suffix
