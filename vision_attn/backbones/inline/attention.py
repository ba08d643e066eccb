"""Injective linear attention with its own projections, under the parameter names of the authors' checkpoints.

    o = proj(injective(q, k, v) + r),    r = depth-wise 3 x 3 convolution of v, kernels f(mean of the layer's tokens)

See `vision_attn.processors.inline` for the formula. Nothing depends on the size of the map.

Paper: 'Bridging the Divide: Reconsidering Softmax and Linear Attention' - https://arxiv.org/abs/2412.06590
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from vision_attn._checks import check_one_of
from vision_attn.backbones.blocks import refuse_heads
from vision_attn.backbones.cswin_layers import CSwinBlock, StripeAttention
from vision_attn.backbones.pvt_layers import ReducedAttention
from vision_attn.backbones.registry import operator
from vision_attn.backbones.swin_layers import RolledAttention
from vision_attn.grid import Grid
from vision_attn.kernels.image import add_depthwise
from vision_attn.kernels.linear import injective_attention
from vision_attn.kernels.window import from_cells, inside_cells, to_cells
from vision_attn.processors.inline import FEATURE_MAPS, add_local_residual, injective_features


def attend(
    qkv: list[Tensor],
    kernels: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sizes: list[int],
    feature_map: str = "identity",
) -> Tensor:
    """Attend injectively inside every cell of the map, and add the local residual and a convolution of the values.

    Args:
        qkv: Queries, keys and values `[B, N, H, D]`; what precedes the tokens of the map are class tokens.
        kernels: Kernels of the local residual `[B * cells, C, 3, 3]`.
        weight: Weight of the convolution `[C, 1, 3, 3]`; None for no convolution.
        bias: Bias of the convolution `[C]`.
        sizes: Height and width of the map, and of a cell.
        feature_map: As for `InLine`.

    Returns:
        `[B, N, C]`.
    """
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return torch.ops.vision_attn.attend_injectively(qkv, kernels, weight, bias, sizes, feature_map)
    return attend_injectively(qkv, kernels, weight, bias, sizes, feature_map)


@operator(
    "attend_injectively(Tensor[] qkv, Tensor kernels, Tensor? weight, Tensor? bias, SymInt[] sizes, str feature_map) "
    "-> Tensor"
)
def attend_injectively(
    qkv: list[Tensor], kernels: Tensor, weight: Tensor | None, bias: Tensor | None, sizes: list[int], feature_map: str
) -> Tensor:
    """Compute `attend`."""
    q, k, v = qkv
    size, cell, batch = (sizes[0], sizes[1]), (sizes[2], sizes[3]), q.shape[0]
    grid, inside = Grid(*size, prefix=q.shape[1] - size[0] * size[1]), None
    if cell != size:
        whole, grid = grid, Grid(*cell)
        inside = inside_cells(whole, cell, q.device)
        q, k, v = (to_cells(t, whole, cell).flatten(0, 1) for t in (q, k, v))
    there = None if inside is None else inside.repeat(batch, 1)[..., None].to(q.dtype)
    phi_q, phi_k = (injective_features(t, feature_map) for t in (q, k))
    o = injective_attention(phi_q, phi_k, v, key_weight=there)
    o = add_local_residual(o, v, grid, kernels)
    if weight is not None and bias is not None:
        o = add_depthwise(o, v, grid, weight, bias, backend="torch")
    return (o if cell == size else from_cells(o.unflatten(0, (batch, -1)), whole, cell)).flatten(2)


def residual_of(dim: int, num_heads: int, **dd: Any) -> nn.Sequential:
    """Return f: from a mean token `[B, C, 1]` to the kernels `[B, 9 C, 1]`, for each head apart."""
    return nn.Sequential(
        nn.Conv1d(dim, dim, 1, groups=num_heads, **dd),
        nn.GELU(),
        nn.Conv1d(dim, 9 * dim, 1, groups=num_heads, **dd),
    )


@register_notrace_module
class InLineSelfAttention(RolledAttention):
    """Injective linear attention over all tokens of a map, with or without a class token.

    Args:
        dim: Channels C.
        num_heads: H.
        window: Height and width of windows inside which tokens attend; None for the whole map.
        feature_map: As for `InLine`.
        qkv_bias: Whether the projection to q, k and v has a bias.
        proj_drop: Dropout of the output.
        **dd: Device and dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window: tuple[int, int] | None = None,
        feature_map: str = "identity",
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        **dd: Any,
    ) -> None:
        super().__init__(window)
        refuse_heads(dim, num_heads)
        check_one_of("feature_map", feature_map, FEATURE_MAPS)
        self.num_heads, self.feature_map = num_heads, feature_map
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.residual = residual_of(dim, num_heads, **dd)

    def attend(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Attend inside windows at their place: see `RolledAttention.forward`."""
        shape = x.shape
        if size is None:
            size = (shape[1], shape[2])
            x = x.flatten(1, 2)
        cell = self.cell(size)
        mean = x.mean(1)
        if cell[0] != size[0] or cell[1] != size[1]:
            image = x.transpose(1, 2).unflatten(2, [size[0], size[1]])
            mean = F.avg_pool2d(image, [cell[0], cell[1]], ceil_mode=True, count_include_pad=False)
            mean = mean.flatten(2).transpose(1, 2).flatten(0, 1)
        kernels = self.residual(mean.unsqueeze(2)).reshape(mean.shape[0], -1, 3, 3)
        qkv = self.qkv(x).unflatten(2, [3, self.num_heads, -1]).unbind(2)
        o = attend(qkv, kernels, None, None, [size[0], size[1], cell[0], cell[1]], self.feature_map)
        return self.proj_drop(self.proj(o)).reshape(shape)


@register_notrace_module
class InLineReducedAttention(ReducedAttention):
    """Injective linear attention with PVT's projections. Keys are not reduced: the local residual needs their map.

    Args:
        dim: Channels C.
        num_heads: H.
        qkv_bias: Whether the projections to q, k and v have a bias.
        proj_drop: Dropout of the output.
        **dd: Device and dtype of the parameters.
    """

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool = True, proj_drop: float = 0.0, **dd: Any) -> None:
        super().__init__(dim, num_heads, qkv_bias=qkv_bias, proj_drop=proj_drop, **dd)
        self.residual = residual_of(dim, num_heads, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Return the attended map `[B, height, width, C]`."""
        kernels = self.residual(x.mean([1, 2]).unsqueeze(2)).reshape(x.shape[0], -1, 3, 3)
        height, width = x.shape[1], x.shape[2]
        o = attend(self.project(x), kernels, None, None, [height, width, height, width])
        return self.proj_drop(self.proj(o)).reshape(x.shape)


@register_notrace_module
class InLineStripeAttention(StripeAttention):
    """CSwin's attention inside stripes, injective and linear. See `StripeAttention` for the arguments.

    All stripes of a sample have the kernels of its mean token. The authors' code runs with one stripe only.
    """

    def __init__(
        self, dim: int, resolution: tuple[int, int], idx: int, split_size: int, num_heads: int, **dd: Any
    ) -> None:
        super().__init__(dim, resolution, idx, split_size, num_heads, **dd)
        self.residual = residual_of(dim, num_heads, **dd)

    def forward(self, qkv: Tensor, size: tuple[int, int], mean: Tensor) -> Tensor:  # type: ignore[override]
        """Return `[B, N, C]`.

        Args:
            qkv: `[3, B, N, C]` of a map.
            size: Height and width of the map.
            mean: The mean of the tokens that entered the block `[B, C]`.
        """
        heads = qkv.unflatten(3, [self.num_heads, -1]).unbind(0)
        cell = self.cell(size)
        stripes = ((size[0] + cell[0] - 1) // cell[0]) * ((size[1] + cell[1] - 1) // cell[1])
        kernels = self.residual(mean.unsqueeze(2)).reshape(mean.shape[0], -1, 3, 3)
        if stripes > 1:
            kernels = kernels.unsqueeze(1).repeat(1, stripes, 1, 1, 1).flatten(0, 1)
        sizes = [size[0], size[1], cell[0], cell[1]]
        return attend(heads, kernels, self.get_v.weight, self.get_v.bias, sizes)


class InLineCSwinBlock(CSwinBlock):
    """CSwin's block, whose attention is also told the mean of the tokens that enter it."""

    def branch_outputs(self, x: Tensor) -> list[Tensor]:
        """Return what each branch makes of its channels, `[B, N, C / branches]`."""
        qkv, mean = self.project(x), x.mean([1, 2])
        outputs: list[Tensor] = []
        for i, attn in enumerate(self.attns):
            part = qkv[..., i * self.share : (i + 1) * self.share]
            outputs.append(attn(part, (x.shape[1], x.shape[2]), mean[:, i * self.share : (i + 1) * self.share]))
        return outputs
