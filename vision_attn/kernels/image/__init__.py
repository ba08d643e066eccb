"""The tokens of a grid as an image of channels: means over windows, and a depth-wise convolution with a gate.

    m_w = mean of t_i over the tokens i of a window w
    y_i = o_i + (K * v)_i + bias on the grid, o_i outside of it;    with a gate y_i + y_i (W_g v_i)

The kernels are for inference. Where a gradient is wanted, `for_inference` names PyTorch, which has them all.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_attn.grid import Grid
from vision_attn.kernels.backend import Implementation, pick
from vision_attn.kernels.image.op import add_depthwise_triton, depthwise_reasons, means_triton
from vision_attn.kernels.triton.launching import inference_reasons

__all__ = ["Windows", "add_depthwise", "averages", "means", "on_image"]


@dataclass(frozen=True)
class Windows:
    """How an image is cut for `means`: into windows of a size, or into a number of them.

    Args:
        size: Side of a window in tokens. Windows at the right and bottom border are smaller if it does not divide the
            image.
        count: Rows and columns of windows, as adaptive pooling has them: they overlap where they do not divide it.

    Raises:
        ValueError: If not exactly one is given, or it is below 1.
    """

    size: int | None = None
    count: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if (self.size is None) == (self.count is None) or min(self.count or (self.size or 0,)) < 1:
            raise ValueError(f"windows have either a size or a count, of at least 1, got {self!r}")

    def along(self, sides: tuple[int, int]) -> tuple[list[int], list[int]]:
        """Return the windows of a height and a width: their numbers, and the steps from one to the next as fractions.

        Window i begins at `i * step`, rounded down, and ends at `(i + 1) * step`, rounded up, or at the border.

        Returns:
            [rows, columns], and numerator and denominator of the step down and of the step to the right.
        """
        if self.count is None:
            assert self.size is not None
            return [-(-side // self.size) for side in sides], [self.size, 1] * 2
        return list(self.count), [sides[0], self.count[0], sides[1], self.count[1]]


def means(
    t: Tensor, grid: Grid, windows: Windows, *, and_of: Tensor | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Return the means of the grid's tokens over windows.

    Args:
        t: Tokens `[B, N, H, D]`; those outside the grid have no part.
        grid: Where the image lies.
        windows: The windows.
        and_of: A second tensor like `t`, whose means come by the same launch.
        backend: 'triton' (CUDA, without gradients), 'torch' (any device), or 'auto' for the fastest that can run.

    Returns:
        `[B, windows, H, D]`, row by row, of `t` and of `and_of`; the first twice if there is no second.

    Raises:
        ValueError: If a tensor has another number of tokens than the grid, or a named backend cannot run.
    """
    others = () if and_of is None else (and_of,)
    for tokens in (t, *others):
        if tokens.dim() != 4 or tokens.shape[1] != grid.tokens or tokens.shape != t.shape:
            raise ValueError(f"tokens must be [B, {grid.tokens}, H, D] for {grid}, got {tuple(tokens.shape)}")
    implementations = {
        "triton": Implementation(means_triton, inference_reasons(t, *others, weights=(), auto=backend == "auto")),
        "torch": Implementation(_means),
    }
    return pick("means", backend, implementations)(t, and_of, grid, windows)


def _means(t: Tensor, other: Tensor | None, grid: Grid, windows: Windows) -> tuple[Tensor, Tensor]:
    def pool(image: Tensor) -> Tensor:
        if windows.size is not None:
            return F.avg_pool2d(image, windows.size, ceil_mode=True, count_include_pad=False)
        assert windows.count is not None
        return _adaptive(image, windows.count)

    first = on_image(t[:, grid.image], grid, pool)
    return first, first if other is None else on_image(other[:, grid.image], grid, pool)


def _adaptive(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Return `F.adaptive_avg_pool2d(image, size)`, whose gradient on CUDA is not deterministic, so that it may be."""
    if not (image.is_cuda and torch.are_deterministic_algorithms_enabled()):
        return F.adaptive_avg_pool2d(image, size)
    rows, columns = (averages(old, new).to(image) for old, new in zip(image.shape[-2:], size, strict=True))
    return rows @ image @ columns.mT


def averages(length: int, windows: int) -> Tensor:
    """Return the matrix `[windows, length]` by which adaptive pooling averages `length` entries of an axis."""
    i, n = torch.arange(windows, device="cpu")[:, None], torch.arange(length, device="cpu")
    inside = ((n >= i * length // windows) & (n < ((i + 1) * length + windows - 1) // windows)).double()
    return inside / inside.sum(1, keepdim=True)


def add_depthwise(
    o: Tensor, v: Tensor, grid: Grid, weight: Tensor | None, bias: Tensor | None, *, gate: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Add the convolution of the grid's values, channel by channel, to the grid's outputs; then apply a gate to all.

    Args:
        o: Outputs `[B, N, H, D]`.
        v: Values `[B, N, H, D]`.
        grid: Where the image tokens lie.
        weight: `[C, 1, kernel_size, kernel_size]`, with an odd side; None for no convolution.
        bias: `[C]`, if there is a convolution.
        gate: W_g of each head `[H, D, D]`, transposed: channel e of W_g v is the sum over d of `v[d] gate[d, e]`. None
            for no gate.
        backend: 'triton' (CUDA, one launch, without gradients), 'torch' (any device), or 'auto' for the fastest that
            can run.

    Returns:
        `[B, N, H, D]`.

    Raises:
        ValueError: If tensors do not fit each other, or a named backend cannot run (every reason is listed).
    """
    if o.shape != v.shape or o.dtype != v.dtype or v.dim() != 4 or v.shape[1] != grid.tokens:
        raise ValueError(
            f"o and v must be [B, {grid.tokens}, H, D] of one dtype for {grid}, got {tuple(o.shape)} {o.dtype} and "
            f"{tuple(v.shape)} {v.dtype}"
        )
    H, D = v.shape[2:]
    if gate is not None and tuple(gate.shape) != (H, D, D):
        raise ValueError(f"gate must be [H, D, D] = [{H}, {D}, {D}], got {tuple(gate.shape)}")
    if weight is not None and (weight.dim() != 4 or len(weight) != H * D or weight.shape[-1] % 2 == 0):
        raise ValueError(f"weight must be [{H * D}, 1, side, side] with an odd side, got {tuple(weight.shape)}")
    implementations = {
        "triton": Implementation(
            add_depthwise_triton, depthwise_reasons(o, v, weight, bias, gate, auto=backend == "auto")
        ),
        "torch": Implementation(_add_depthwise),
    }
    return pick("add_depthwise", backend, implementations)(o, v, grid, weight, bias, gate)


def _add_depthwise(
    o: Tensor, v: Tensor, grid: Grid, weight: Tensor | None, bias: Tensor | None, gate: Tensor | None
) -> Tensor:
    if weight is not None and bias is not None:
        kernel, offset = weight.to(v), bias.to(v)

        def convolve(image: Tensor) -> Tensor:
            return F.conv2d(image, kernel, offset, padding=kernel.shape[-1] // 2, groups=kernel.shape[0])

        local = on_image(v[:, grid.image], grid, convolve)
        outside = grid.prefix + grid.suffix
        o = o + (F.pad(local, (0, 0, 0, 0, grid.prefix, grid.suffix)) if outside else local)
    return o if gate is None else o + o * torch.einsum("bnhd,hde->bnhe", v, gate.to(v))


def on_image(t: Tensor, grid: Grid, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a function of images to the tokens of a grid.

    Args:
        t: Tokens `[B, height * width, H, D]`.
        grid: Its height and width; prefix and suffix are not in `t`.
        function: Maps `[B, C, height, width]` to `[B, C, rows, columns]`.

    Returns:
        `[B, rows * columns, H, D]`.
    """
    image = t.flatten(2).unflatten(1, (grid.height, grid.width)).permute(0, 3, 1, 2)  # [B, C, height, width]
    return function(image).permute(0, 2, 3, 1).flatten(1, 2).unflatten(2, t.shape[2:])
