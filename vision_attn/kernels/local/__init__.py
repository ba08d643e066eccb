"""Local attention: grid tokens attend to a window of the grid, all other tokens attend to and are seen by everything.

    o_i = sum_j softmax_j(scale * q_i . k_j + bias_ij) v_j,    j in window(i) + prefix + suffix + pooled

A pooled key may count as the tokens that it stands for: its bias is then the logarithm of their number.

Two shapes of window exist, and they treat the border differently because their papers do:

- disc, `dy^2 + dx^2 < radius^2`, cut by the border (CLEAR, https://arxiv.org/abs/2412.16112);
- square, `kernel_size` keys per axis, `dilation` tokens apart, moved inside the grid so that every query has exactly
  `kernel_size` keys per axis (NATTEN, https://arxiv.org/abs/2209.15001). On an axis of length L, for query i with
  g = i mod d, a = i div d and L_g = ceil((L - g) / d):

      start = clamp(a - K div 2, 0, L_g - K),   keys = { g + d * j : start <= j < start + K }

This file holds the window, the signature, the checks and the definition; `portable.py` is the portable implementation,
`op.py` the fused one; `../eight_bits.py` says what either rounds where a window has a precision.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vision_attn._checks import check_int, check_number
from vision_attn.grid import Grid
from vision_attn.kernels import dense
from vision_attn.kernels.backend import Implementation, PerAxis, check_inputs, check_mask, per_axis, pick
from vision_attn.kernels.dense import full_mask
from vision_attn.kernels.eight_bits import check_precision, eight_bit_reasons, refuse_gradients
from vision_attn.kernels.local.eight_bit import eight_bit_attention_reference, eight_bit_attention_torch
from vision_attn.kernels.local.op import (
    eight_bit_attention_triton,
    local_attention_lse,
    local_attention_triton,
)
from vision_attn.kernels.local.portable import local_attention_torch
from vision_attn.kernels.triton.launching import triton_reasons

__all__ = ["Window", "biased_attention", "local_attention", "local_attention_lse"]


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
        cell: If above 0, the pooled keys are those of the grid's cells of this side, row by row, and each counts as the
            tokens of its cell outside the disc: the logarithm of their number is added to its logit.
        precision: 'int8' or 'fp8' for products in 8 bits, which have no gradients: see `eight_bits.py`. None for those
            of q.

    Raises:
        TypeError: If a size has the wrong type.
        ValueError: If not exactly one of `radius` and `kernel_size` is given, or a value is out of range.
    """

    radius: float | None = None
    kernel_size: PerAxis | None = None
    dilation: PerAxis = 1
    bias: Tensor | None = field(default=None, compare=False, repr=False)
    pooled: tuple[Tensor, Tensor] | None = field(default=None, compare=False, repr=False)
    cell: int = 0
    precision: str | None = None

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
        check_int("cell", self.cell, 0)
        if self.cell and (self.radius is None or self.pooled is None):
            raise ValueError(
                f"cell counts the tokens of pooled keys outside a disc: give radius and pooled, got {self!r}"
            )
        if self.precision is not None:
            check_precision(self.precision)
            if self.bias is not None or self.pooled is not None:
                raise ValueError(
                    f"a window with precision={self.precision!r} has neither a bias nor pooled keys: use precision=None"
                )

    @property
    def kernel(self) -> tuple[int, int]:
        """Keys per axis of the square, (vertical, horizontal)."""
        assert self.kernel_size is not None
        return per_axis(self.kernel_size, "kernel_size", 1)

    @property
    def steps(self) -> tuple[int, int]:
        """Dilation per axis, (vertical, horizontal)."""
        return per_axis(self.dilation, "dilation", 1)

    def geometry(self, grid: Grid) -> tuple[float, list[int], list[int]]:
        """Return the window as plain numbers: radius (0 for a square), kernel (0 for a disc), dilation."""
        if self.radius is not None:
            return min(float(self.radius), float(grid.height + grid.width)), [0, 0], [1, 1]
        return 0.0, list(self.kernel), list(self.steps)

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

    def counts(self, grid: Grid, device: torch.device | None = None) -> Tensor:
        """Return how many tokens of each cell are outside the disc of each query, `[height * width, cells]`."""
        rows, columns = grid.height // self.cell, grid.width // self.cell
        beyond = (~self.allowed(grid, device)).view(-1, rows, self.cell, columns, self.cell)
        return beyond.sum((2, 4)).flatten(1)

    @staticmethod
    def _axis(i: Tensor, K: int, d: int) -> Tensor:
        length, group = len(i), i % d
        group_length = torch.div(length - group + d - 1, d, rounding_mode="floor")
        start = (i // d - K // 2).clamp(min=0).minimum(group_length - K)
        j = (i // d)[None]
        return (group[:, None] == group) & (j >= start[:, None]) & (j < start[:, None] + K)


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Grid,
    window: Window,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend from each grid token to a window around it and to every token outside the grid.

    Prefix and suffix tokens see everything but the pooled keys. Logits and sums are computed in float32 at least.

    Args:
        q: Queries `[B, N, H, D]`, with `N == grid.tokens`; any strides.
        k: Keys, like `q`.
        v: Values, like `q`.
        grid: Where the image tokens lie in the sequence.
        window: Disc or square, its bias and pooled keys.
        mask: Bool `[B, prefix + suffix]` (or batch 1): False hides a key outside the grid from all queries. Keys of the
            grid cannot be hidden.
        scale: Factor of the logits, `D ** -0.5` if None.
        backend: 'triton' (CUDA, fused), 'torch' (any device), 'reference' (dense, small inputs), or 'auto' for the
            fastest that can run.

    Returns:
        `[B, N, H, D]` in the dtype of `q`.

    Raises:
        TypeError: If dtypes differ or are not floating point.
        ValueError: If shapes, devices, the window and the grid do not fit each other, a named backend cannot run (every
            reason is listed), or a window with a precision meets a tensor that wants a gradient.
    """
    check_inputs(q, k, v, grid)
    _check_window(q, grid, window)
    check_mask(q, grid, mask)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if window.precision is not None:
        refuse_gradients(window.precision, q, k, v)
        implementations = {
            "triton": Implementation(eight_bit_attention_triton, eight_bit_reasons(q, auto=backend == "auto")),
            "torch": Implementation(eight_bit_attention_torch),
            "reference": Implementation(eight_bit_attention_reference),
        }
        return pick("local_attention", backend, implementations)(q, k, v, grid, window, mask, scale)
    if backend == "auto" and (not q.is_cuda or (window.covers(grid) and window.bias is None)):
        reasons = ["on a CPU it is interpreted, and a window that covers the grid is dense attention"]
    else:
        reasons = triton_reasons(q, auto=backend == "auto")
    if window.cell:
        reasons = [*reasons, "its kernels do not count the tokens of pooled keys"]
    implementations = {
        "triton": Implementation(local_attention_triton, reasons),
        "torch": Implementation(local_attention_torch),
        "reference": Implementation(_reference),
    }
    run = pick("local_attention", backend, implementations)
    return run(q, k, v, grid, window, mask, scale)


def biased_attention(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, window: Window, bias: Tensor, *, scale: float | None = None
) -> Tensor:
    """Attend as `local_attention` does, with a bias for each pair of tokens. It takes as long as dense attention.

    Args:
        q: Queries `[B, N, H, D]`, with `N == grid.tokens`.
        k: Keys, like `q`.
        v: Values, like `q`.
        grid: Where the image tokens lie in the sequence.
        window: Disc or square, without a bias and pooled keys of its own.
        bias: Added to the scaled logits; broadcasts to `[B, H, N, N]`.
        scale: Factor of the logits, `D ** -0.5` if None.

    Returns:
        `[B, N, H, D]` in the dtype of `q`.

    Raises:
        ValueError: If the window does not fit the grid, or has a precision.
    """
    window.check(grid)
    if window.precision is not None:
        raise ValueError(
            "the host adds relative positions to the logits of each pair of tokens, which "
            f"precision={window.precision!r} has no place for: use precision=None"
        )
    return dense.biased_attention(q, k, v, grid, window.allowed(grid, q.device), bias, scale=scale)


def _check_window(q: Tensor, grid: Grid, window: Window) -> None:
    """Refuse a window that does not fit the grid, or whose bias or pooled keys do not fit q."""
    window.check(grid)
    B, _, H, D = q.shape
    if window.cell:
        if grid.height % window.cell or grid.width % window.cell:
            raise ValueError(f"cell {window.cell} must divide the height and width of {grid}")
        assert window.pooled is not None
        cells = grid.image_tokens // window.cell**2
        if any(t.shape[1] != cells for t in window.pooled):
            found = " and ".join(str(t.shape[1]) for t in window.pooled)
            raise ValueError(f"{grid} has {cells} cells of side {window.cell}, got {found} pooled keys and values")
    if window.bias is not None:
        want = (H, 2 * window.kernel[0] - 1, 2 * window.kernel[1] - 1)
        if tuple(window.bias.shape) != want:
            raise ValueError(f"bias must be [H, 2 * K_y - 1, 2 * K_x - 1] = {want}, got {tuple(window.bias.shape)}")
        if window.bias.device != q.device:
            raise ValueError(f"bias must be on the device of q, {q.device}, got {window.bias.device}")
    for name, t in zip(("pooled keys", "pooled values"), window.pooled or (), strict=False):
        if t.dim() != 4 or (t.shape[0], t.shape[2], t.shape[3]) != (B, H, D):
            raise ValueError(f"{name} must be [B, M, H, D] = [{B}, M, {H}, {D}], got {tuple(t.shape)}")
        if t.dtype != q.dtype or t.device != q.device:
            raise TypeError(f"{name} must be {q.dtype} on {q.device} like q, got {t.dtype} on {t.device}")


def _reference(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, window: Window, mask: Tensor | None, scale: float
) -> Tensor:
    """The definition: a dense mask and a softmax, in float64 if q is, else float32."""
    B, N = q.shape[:2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    pooled = window.pooled or (k[:, :0], v[:, :0])
    seen = torch.ones(B, N, N + pooled[0].shape[1], dtype=torch.bool, device=q.device)
    seen[:, grid.image, grid.image] = window.allowed(grid, q.device)
    seen[:, : grid.prefix, N:] = False
    seen[:, grid.image.stop :, N:] = False
    whole = full_mask(mask, grid, pooled[0].shape[1])
    if whole is not None:
        seen = seen & whole[:, 0]
    k, v = torch.cat([k, pooled[0]], 1), torch.cat([v, pooled[1]], 1)
    logits = torch.einsum("bnhd,bmhd->bhnm", q.to(dtype), k.to(dtype)) * scale
    if window.bias is not None:
        logits = logits + _dense_bias(window, grid, N, k.shape[1]).to(dtype)
    if window.cell:
        counts = window.counts(grid, q.device)
        seen[:, grid.image, N:] = counts > 0
        logits[:, :, grid.image, N:] += counts.clamp(min=1).to(dtype).log()
    weights = logits.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhnm,bmhd->bnhd", weights, v.to(dtype)).to(q.dtype)


def _dense_bias(window: Window, grid: Grid, queries: int, keys: int) -> Tensor:
    """The bias of every pair, `[H, N, N + M]`: zero outside the grid, arbitrary where the window does not see."""
    assert window.bias is not None
    device = window.bias.device
    index = []
    for length, K, d in zip((grid.height, grid.width), window.kernel, window.steps, strict=True):
        i = torch.arange(length, device=device)
        index.append(((i - i[:, None]).div(d, rounding_mode="floor") + K - 1).clamp(0, 2 * K - 2))
    dense = window.bias[:, index[0][:, None, :, None], index[1][None, :, None, :]]
    full = dense.new_zeros(dense.shape[0], queries, keys)
    full[:, grid.image, grid.image] = dense.reshape(-1, grid.image_tokens, grid.image_tokens)
    return full
