"""The window of local attention: which grid tokens a grid token sees, its bias, and pooled keys beyond it.

Two shapes exist, and they treat the border differently because their papers do:

- disc, `dy^2 + dx^2 < radius^2`, cut by the border (CLEAR, https://arxiv.org/abs/2412.16112);
- square, `kernel_size` keys per axis, `dilation` tokens apart, moved inside the grid so that every query has exactly
  `kernel_size` keys per axis (NATTEN, https://arxiv.org/abs/2209.15001). On an axis of length L, for query i with
  g = i mod d, a = i div d and L_g = ceil((L - g) / d):

      start = clamp(a - K div 2, 0, L_g - K),   keys = { g + d * j : start <= j < start + K }
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vision_attn._checks import check_number, is_int
from vision_attn.grid import Grid

PerAxis = int | tuple[int, int]


def per_axis(value: PerAxis, name: str, least: int) -> tuple[int, int]:
    """Return `value` as a (vertical, horizontal) pair of integers of at least `least`."""
    if type(value) is int and value >= least:
        return value, value
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or not all(map(is_int, pair)):
        raise TypeError(f"{name} must be an int or a pair of ints (vertical, horizontal), got {value!r}")
    if min(pair) < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    return pair


def window_start(i: int, length: int, kernel_size: int) -> int:
    """Return the first key of query `i` on an undilated axis: the window is moved inside, never shrunk."""
    return min(max(i - kernel_size // 2, 0), length - kernel_size)


@dataclass(frozen=True)
class Window:
    """What one grid query sees besides prefix and suffix tokens: a disc or a square, and optionally pooled keys.

    Args:
        radius: Disc radius in tokens, above 0; may be `math.inf`. Exclusive with `kernel_size`.
        kernel_size: Side of the square in tokens, odd or even, or a (vertical, horizontal) pair.
        dilation: Distance between the square's keys in tokens, or a pair.
        bias: Relative position bias of the square, `[H, 2 * K_y - 1, 2 * K_x - 1]`, added to the scaled logits at
            index `(key - query) / dilation + K - 1` of each axis (NAT, https://arxiv.org/abs/2204.07143).
        pooled: Extra keys and values, each `[B, M, H, D]`, seen by every grid query and by nobody else.

    Raises:
        TypeError: If a size has the wrong type.
        ValueError: If not exactly one of `radius` and `kernel_size` is given, or a value is out of range.
    """

    radius: float | None = None
    kernel_size: PerAxis | None = None
    dilation: PerAxis = 1
    bias: Tensor | None = field(default=None, compare=False, repr=False)
    pooled: tuple[Tensor, Tensor] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if (self.radius is None) == (self.kernel_size is None):
            raise ValueError(
                f"a window is a disc or a square: give either radius or kernel_size, got radius={self.radius!r}, "
                f"kernel_size={self.kernel_size!r}"
            )
        if self.radius is not None:
            check_number("radius", self.radius, "a number of tokens")
            if not self.radius > 0:
                raise ValueError(f"radius must be above 0, got {self.radius}")
            if self.bias is not None or self.dilation not in (1, (1, 1)):
                raise ValueError("a disc has neither bias nor dilation: use kernel_size for a square window")
        else:
            _ = self.kernel, self.steps

    @property
    def kernel(self) -> tuple[int, int]:
        """Keys per axis of the square, (vertical, horizontal)."""
        assert self.kernel_size is not None
        return per_axis(self.kernel_size, "kernel_size", 1)

    @property
    def steps(self) -> tuple[int, int]:
        """Dilation per axis, (vertical, horizontal)."""
        return per_axis(self.dilation, "dilation", 1)

    def check(self, grid: Grid) -> None:
        """Refuse a square that does not fit the grid.

        Raises:
            ValueError: If `kernel_size * dilation` is above a side of the grid.
        """
        if self.kernel_size is None:
            return
        for side, K, d in zip((grid.height, grid.width), self.kernel, self.steps, strict=True):
            if K * d > side:
                raise ValueError(f"kernel_size {K} * dilation {d} does not fit in {grid}: at most {side // d}")

    def covers(self, grid: Grid) -> bool:
        """Whether every grid query sees every grid key."""
        if self.radius is not None:
            return (grid.height - 1) ** 2 + (grid.width - 1) ** 2 < self.radius**2
        return self.kernel == (grid.height, grid.width)

    def pairs(self, grid: Grid) -> int:
        """Count the (query, key) pairs inside the grid exactly, in O(height)."""
        if self.covers(grid):
            return grid.image_tokens**2
        if self.radius is None:
            return grid.image_tokens * self.kernel[0] * self.kernel[1]
        total = 0
        for dy in range(grid.height):
            reach = self.reach(dy, grid.width - 1)
            if reach < 0:
                break
            columns = grid.width * (2 * reach + 1) - reach * (reach + 1)
            total += (grid.height - dy) * columns * (1 if dy == 0 else 2)
        return total

    def share(self, grid: Grid) -> float:
        """Return the mean share of a sequence's tokens that one of its tokens sees, pooled keys not counted."""
        outside = grid.prefix + grid.suffix
        return (self.pairs(grid) + outside * (grid.image_tokens + grid.tokens)) / grid.tokens**2

    def reach(self, dy: int, most: int) -> int:
        """Return the largest `dx <= most` with `dy^2 + dx^2 < radius^2`, or -1 if there is none."""
        assert self.radius is not None
        rest = self.radius**2 - dy**2
        if rest <= 0:
            return -1
        return most if rest > most**2 else math.ceil(math.sqrt(rest)) - 1

    def allowed(self, grid: Grid, device: torch.device | None = None) -> Tensor:
        """Return the definition: a bool mask `[height * width, height * width]`, True where query (row) sees key."""
        y, x = torch.arange(grid.height, device=device), torch.arange(grid.width, device=device)
        if self.radius is not None:
            dy, dx = (y[:, None] - y).double(), (x[:, None] - x).double()
            seen = dy[:, None, :, None] ** 2 + dx[None, :, None, :] ** 2 < self.radius**2
        else:
            rows, columns = (self._axis(i, K, d) for i, K, d in zip((y, x), self.kernel, self.steps, strict=True))
            seen = rows[:, None, :, None] & columns[None, :, None, :]
        return seen.reshape(grid.image_tokens, grid.image_tokens)

    @staticmethod
    def _axis(i: Tensor, K: int, d: int) -> Tensor:
        length, group = len(i), i % d
        group_length = torch.div(length - group + d - 1, d, rounding_mode="floor")
        start = (i // d - K // 2).clamp(min=0).minimum(group_length - K)
        j = (i // d)[None]
        return (group[:, None] == group) & (j >= start[:, None]) & (j < start[:, None] + K)
