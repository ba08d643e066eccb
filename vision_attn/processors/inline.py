"""InLine: linear attention that subtracts the mean of its weights, so that different queries get different weights.

    w_ij = scale / N phi(q_i) . phi(k_j),    o_i = sum_j (w_ij - mean_j w_ij + 1 / N) v_j + r_i
    r = depth-wise 3 x 3 convolution of v over the grid, with kernels f(mean_j v_j) of each sample

The weights of a query sum to one. All tokens enter the sums and the mean; tokens outside the grid have no r.
f = Linear - GELU - Linear, for each head apart. In the paper f takes the mean of the tokens that the layer projects. A
processor sees only what the host projects of them, so here f takes the mean of the values, which is a linear map of it.

Paper: 'Bridging the Divide: Reconsidering Softmax and Linear Attention' - https://arxiv.org/abs/2412.06590
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_attn._checks import check_one_of
from vision_attn.grid import Grid
from vision_attn.kernels.backend import exporting, transformed
from vision_attn.kernels.image import on_image
from vision_attn.kernels.linear import Features, feature_mean, injective_attention
from vision_attn.processors.base import AttnSpec, Layer, Processor, register
from vision_attn.processors.linfusion import key_weight
from vision_attn.processors.positional import check_kernel_size

FEATURE_MAPS = ("identity", "relu", "leaky_relu", "exp")


def injective_features(x: Tensor, feature_map: str) -> Tensor:
    """Return phi(x): x, relu(x), leaky_relu(x) with slope 0.01, or exp(x / 5)."""
    if feature_map == "identity":
        return x
    if feature_map == "exp":
        return (x * 0.2).exp()
    return F.relu(x) if feature_map == "relu" else F.leaky_relu(x)


@register(tests={"inline": {}, "inline-exp": dict(kernel_size=0, feature_map="exp")}, demo=[{}], bench={"inline": {}})
@dataclass(frozen=True)
class InLine(AttnSpec):
    """Injective linear attention with a local residual. Needs training.

    The last layer of f starts at zero, so training starts without the local residual: with softmax attention to the
    first order of small logits.

    Args:
        kernel_size: Side of the local residual's kernels in tokens, odd; 0 for no local residual.
        feature_map: phi: 'identity', which the authors chose, or 'relu', 'leaky_relu' or 'exp', which they compared.
    """

    kernel_size: int = 3
    feature_map: str = "identity"

    def __post_init__(self) -> None:
        check_kernel_size(self.kernel_size)
        check_one_of("feature_map", self.feature_map, FEATURE_MAPS)

    def build(self, layer: Layer) -> "InLineAttention":
        """Return the processor of one layer."""
        return InLineAttention(self, layer)

    def attended(self, grid: Grid) -> float:
        """Return 1.0: every token enters the sums."""
        return 1.0

    def flops(self, grid: Grid, layer: Layer) -> float:
        """Return the operations of the sums, of the means and of the convolution."""
        per_channel = 4 * layer.head_dim + 2 + 2 * self.kernel_size**2
        return grid.tokens * layer.num_heads * layer.head_dim * per_channel

    @property
    def passes(self) -> float:
        """Those of an H200: the sums and the mean of the values take two and a half, the convolution most."""
        return (14.5 if self.kernel_size else 2.5) + (0.0 if self.feature_map == "identity" else 1.0)

    @property
    def calls(self) -> float:
        """Kernels of the sums and of the output, and the layers of f and the convolution."""
        return (38.0 if self.kernel_size else 12.0) + (0.0 if self.feature_map == "identity" else 4.0)


class InLineAttention(Processor):
    """`injective_attention` with a local residual.

    Attributes:
        residual: f.
    """

    def __init__(self, spec: InLine, layer: Layer) -> None:
        super().__init__()
        self.spec, self.backend = spec, layer.backend
        self.heads_alike = not spec.kernel_size
        if spec.kernel_size:
            self.residual = LocalKernels(layer.num_heads, layer.head_dim, spec.kernel_size)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, mask: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        """Attend linearly: see `Processor.forward`."""
        weight = key_weight(mask, grid, q)
        phi_q, phi_k = (injective_features(t, self.spec.feature_map) for t in (q, k))
        o = injective_attention(phi_q, phi_k, v, key_weight=weight, scale=scale, backend=self.backend)
        if not self.spec.kernel_size:
            return o
        mean = feature_mean(v, features=Features("none"), weight=weight, backend=self.backend)
        return add_local_residual(o, v, grid, self.residual(mean.flatten(1).to(v.dtype)))


class LocalKernels(nn.Module):
    """f: the kernels of a depth-wise convolution from a mean token `[B, C]`, zero at the start.

    Attributes:
        weight_1: `[C, C / H, 1]`, the first layer as a convolution in groups of heads.
        bias_1: `[C]`.
        weight_2: `[C * kernel_size^2, C / H, 1]`, the second one.
        bias_2: `[C * kernel_size^2]`.
    """

    def __init__(self, num_heads: int, head_dim: int, kernel_size: int) -> None:
        super().__init__()
        self.num_heads, self.kernel_size = num_heads, kernel_size
        channels = num_heads * head_dim
        first: Any = nn.Conv1d(channels, channels, 1, groups=num_heads)  # for its start
        self.weight_1, self.bias_1 = first.weight, first.bias
        self.weight_2 = nn.Parameter(torch.zeros(channels * kernel_size**2, head_dim, 1))
        self.bias_2 = nn.Parameter(torch.zeros(channels * kernel_size**2))

    def forward(self, mean: Tensor) -> Tensor:
        """Return kernels `[B, C, kernel_size, kernel_size]` in the dtype of `mean`."""
        first, shift, second, last = (
            t.to(mean) for t in (self.weight_1, self.bias_1, self.weight_2, self.bias_2)
        )  # offloading may have parked them elsewhere
        x = F.gelu(F.conv1d(mean[..., None], first, shift, groups=self.num_heads))
        x = F.conv1d(x, second, last, groups=self.num_heads)
        return x.view(mean.shape[0], -1, self.kernel_size, self.kernel_size)


def add_local_residual(o: Tensor, v: Tensor, grid: Grid, kernels: Tensor) -> Tensor:
    """Add the convolution of the grid's values to the grid's outputs, with kernels of each sample and channel.

    Args:
        o: Outputs `[B, N, H, D]`.
        v: Values `[B, N, H, D]`.
        grid: Where the image tokens lie.
        kernels: `[B, C, kernel_size, kernel_size]`, with an odd side.

    Returns:
        `[B, N, H, D]`.
    """
    local = on_image(v[:, grid.image], grid, lambda image: _convolve(image, kernels.to(v.dtype)))
    outside = grid.prefix + grid.suffix
    return o + (F.pad(local, (0, 0, 0, 0, grid.prefix, grid.suffix)) if outside else local)


def _convolve(image: Tensor, kernels: Tensor) -> Tensor:
    """Convolve each channel `[B, C, height, width]` with its kernel `[B, C, k, k]`; beyond the border are zeros."""
    B, C, height, width = image.shape
    side = kernels.shape[-1]
    if not (transformed() or exporting()):
        rows, weights = image.reshape(1, B * C, height, width), kernels.reshape(B * C, 1, side, side)
        return F.conv2d(rows, weights, padding=side // 2, groups=B * C).view(B, C, height, width)
    # an exported convolution has a fixed number of groups
    wide, total = F.pad(image, (side // 2,) * 4), torch.zeros_like(image)
    for dy in range(side):
        for dx in range(side):
            part = wide[:, :, dy : dy + height, dx : dx + width]
            total = total + part * kernels[:, :, dy, dx, None, None]
    return total
