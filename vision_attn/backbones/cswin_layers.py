"""CSwin, and its layers on maps `[B, height, width, C]`: stem, merging, attention inside stripes, and the block.

    o = attention(q, k, v inside the stripe) + dwc(v inside the stripe)

The stripes of a branch have full height and `split_size` columns (`idx` 0), `split_size` rows and full width (1), or
they are one stripe, the map (-1). Where `split_size` does not divide the map, the last stripe is smaller.

Paper: 'CSWin Transformer' - https://arxiv.org/abs/2107.00652
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, calculate_drop_path_rates
from timm.models import checkpoint, register_notrace_module
from torch import Tensor, nn

from vision_attn.backbones.blocks import Stage, last_layers, levels_of, map_size, refuse_heads
from vision_attn.backbones.checkpoints import Rule, rename, unwrap
from vision_attn.backbones.leaplab import PositionedBackbone, checkpoint_filter
from vision_attn.backbones.registry import operator
from vision_attn.grid import Grid
from vision_attn.kernels.image import add_depthwise
from vision_attn.kernels.window import from_cells, to_cells, window_attention

CSWIN_RULES: tuple[Rule, ...] = (
    (r"^stage1_conv_embed\.0\.", "patch_embed.proj."),
    (r"^stage1_conv_embed\.2\.", "patch_embed.norm."),
    (r"^merge(\d)\.", r"stages.\1.downsample."),
    (r"^stage(\d)\.", lambda match: f"stages.{int(match[1]) - 1}.blocks."),
)
WRAPPERS = ("state_dict_ema", "model", "state_dict")


class ConvEmbed(nn.Module):
    """A 7 x 7 convolution of an image and a norm. The image is padded with zeros to whole cells.

    Args:
        in_chans: Channels of an image.
        dim: Channels C.
        patch_size: Pixels per side of a cell.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        patch_size: int = 4,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, 7, stride=patch_size, padding=2, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return the map of images `[B, in_chans, height, width]`."""
        x = F.pad(x, [0, -x.shape[3] % self.patch_size, 0, -x.shape[2] % self.patch_size])
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class NormedConv(nn.Module):
    """A strided 3 x 3 convolution and a norm, which halve a map's sides, rounded up."""

    def __init__(
        self, dim: int, out_dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(out_dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return the merged map."""
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


@operator("attend_in_stripes(Tensor[] qkv, Tensor weight, Tensor? bias, SymInt[] sizes) -> Tensor")
def attend_in_stripes(qkv: list[Tensor], weight: Tensor, bias: Tensor | None, sizes: list[int]) -> Tensor:
    """Attend inside cells and add the convolution of each cell's values.

    Args:
        qkv: Queries, keys and values `[B, N, H, D]`.
        weight: Weight of the convolution `[C, 1, 3, 3]`.
        bias: Bias of the convolution `[C]`.
        sizes: Height and width of the map, and of a cell.

    Returns:
        `[B, N, C]`.
    """
    assert bias is not None  # a convolution's type allows None
    size, cell = (sizes[0], sizes[1]), (sizes[2], sizes[3])
    q, k, v = qkv
    grid = Grid(*size)
    o = window_attention(q, k, v, grid, cell)
    if cell == size:
        return add_depthwise(o, v, grid, weight, bias, backend="torch").flatten(2)
    o, v = (to_cells(t, grid, cell).flatten(0, 1) for t in (o, v))
    o = add_depthwise(o, v, Grid(*cell), weight, bias, backend="torch").unflatten(0, (q.shape[0], -1))
    return from_cells(o, grid, cell).flatten(2)


@register_notrace_module
class StripeAttention(nn.Module):
    """Softmax attention inside stripes.

    Args:
        dim: Channels C of the branch.
        resolution: Height and width of the map for which the layer is made.
        idx: 0 for vertical stripes, 1 for horizontal stripes, -1 for the whole map.
        split_size: Width of a stripe in tokens.
        num_heads: H of the branch.
        **dd: Device and dtype of the parameters.

    Raises:
        ValueError: If `idx` is none of these, or `num_heads` does not divide `dim`.
    """

    def __init__(
        self, dim: int, resolution: tuple[int, int], idx: int, split_size: int, num_heads: int, **dd: Any
    ) -> None:
        super().__init__()
        refuse_heads(dim, num_heads)
        if idx not in (-1, 0, 1):
            raise ValueError(f"idx must be -1, 0 or 1, got {idx}")
        self.resolution, self.idx, self.split_size, self.num_heads = resolution, idx, split_size, num_heads
        self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)

    def cell(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return height and width of a stripe in a map of `size`."""
        return (
            size[0] if self.idx < 1 else min(self.split_size, size[0]),
            size[1] if self.idx != 0 else min(self.split_size, size[1]),
        )

    def forward(self, qkv: Tensor, size: tuple[int, int]) -> Tensor:
        """Return `[B, N, C]` for `[3, B, N, C]` of a map of `size` (height, width)."""
        heads = qkv.unflatten(3, [self.num_heads, -1]).unbind(0)
        cell = self.cell(size)
        sizes = [size[0], size[1], cell[0], cell[1]]
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return torch.ops.vision_attn.attend_in_stripes(heads, self.get_v.weight, self.get_v.bias, sizes)
        return attend_in_stripes(heads, self.get_v.weight, self.get_v.bias, sizes)


def branches(
    make: Callable[..., nn.Module], dim: int, size: tuple[int, int], num_heads: int, split: int | None, **dd: Any
) -> list[nn.Module]:
    """Return the attention of a block: two branches with half of the channels each, or one over the whole map.

    Args:
        make: Makes one branch: `StripeAttention`, or a class or function with the same arguments.
        dim: Channels of the block.
        size: Height and width of the map.
        num_heads: Heads of the block.
        split: Width of the stripes; None for the whole map.
        **dd: Device and dtype of the parameters.
    """
    if split is None:
        return [make(dim, size, -1, max(size), num_heads, **dd)]
    return [make(dim // 2, size, idx, split, num_heads // 2, **dd) for idx in (0, 1)]


class CSwinBlock(nn.Module):
    """Attention of one or two branches with shared projections, and an MLP, each after a norm.

    Args:
        dim: Channels C.
        attns: The branches, which split the channels evenly.
        mlp_ratio: Hidden channels of the MLP over C.
        qkv_bias: Whether queries, keys and values have a bias.
        proj_drop: Dropout of the MLP.
        drop_path: Share of the samples that skip a branch in training.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        dim: int,
        attns: list[nn.Module],
        *,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.norm1 = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.attns = nn.ModuleList(attns)
        self.share = dim // len(attns)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, device=device, dtype=dtype)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the shape of `x`."""
        if self.grad_checkpointing and not torch.jit.is_scripting():  # type: ignore[attr-defined]
            return checkpoint(self._forward, x)
        return self._forward(x)

    def project(self, x: Tensor) -> Tensor:
        """Return q, k and v `[3, B, N, C]` of a map."""
        return self.qkv(self.norm1(x)).flatten(1, 2).unflatten(2, [3, -1]).permute(2, 0, 1, 3)

    def branch_outputs(self, x: Tensor) -> list[Tensor]:
        """Return what each branch makes of its channels, `[B, N, C / branches]`."""
        qkv = self.project(x)
        outputs: list[Tensor] = []
        for i, attn in enumerate(self.attns):
            outputs.append(attn(qkv[..., i * self.share : (i + 1) * self.share], (x.shape[1], x.shape[2])))
        return outputs

    def _forward(self, x: Tensor) -> Tensor:
        attended = self.proj(torch.cat(self.branch_outputs(x), 2)).reshape(x.shape)
        x = x + self.drop_path1(attended)
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class CSwinBackbone(PositionedBackbone):
    """CSwin with another attention in some blocks.

    Args:
        makers: Make this attention, for each stage: with the arguments of `StripeAttention`.
        types: Letters of the blocks of each stage.
        own: The letter of this attention; the others stand for softmax attention.
        block: The class of the blocks with this attention.
        img_size: Height and width of the images, or one number for both, for which the layers are made.
        patch_size: Pixels per side of a cell of the first map.
        in_chans: Channels of an image.
        num_classes: Classes of the head; 0 for no classifier.
        global_pool: How the last map is pooled.
        embed_dim: Channels of the first stage.
        num_heads: Heads of each stage.
        split_sizes: Width of the stripes of softmax attention in each stage.
        own_split_sizes: Width of the stripes of this attention in each stage. A stage whose map is not larger for
            `img_size`, and the last stage, attend over the whole map.
        mlp_ratio: Hidden channels of an MLP over its channels.
        qkv_bias: Whether queries, keys and values have a bias.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout of MLP outputs.
        drop_path_rate: Share of samples that skip a branch in the last block; it rises linearly from 0 in the first.
        **dd: Device and dtype of the parameters.
    """

    def __init__(  # noqa: PLR0913 - timm builds models from flat arguments
        self,
        makers: Sequence[Callable[..., nn.Module]],
        types: Sequence[str],
        own: str,
        block: type[CSwinBlock] = CSwinBlock,
        *,
        img_size: int | tuple[int, int],
        patch_size: int,
        in_chans: int,
        num_classes: int,
        global_pool: str,
        embed_dim: int,
        num_heads: Sequence[int],
        split_sizes: Sequence[int],
        own_split_sizes: Sequence[int],
        mlp_ratio: float,
        qkv_bias: bool,
        drop_rate: float,
        proj_drop_rate: float,
        drop_path_rate: float,
        **dd: Any,
    ) -> None:
        dims = [embed_dim * 2**i for i in range(len(types))]
        skips = iter(calculate_drop_path_rates(drop_path_rate, sum(map(len, types))))
        options: dict[str, Any] = dict(mlp_ratio=mlp_ratio, qkv_bias=qkv_bias, proj_drop=proj_drop_rate, **dd)
        stages = []
        for i, dim in enumerate(dims):
            size = map_size(img_size, patch_size * 2**i)
            blocks = []
            for letter in types[i]:
                is_own = letter == own
                split = (own_split_sizes if is_own else split_sizes)[i]
                whole = i == len(dims) - 1 or max(size) <= split
                make = makers[i] if is_own else StripeAttention
                attns = branches(make, dim, size, num_heads[i], None if whole else split, **dd)
                blocks.append((block if is_own else CSwinBlock)(dim, attns, drop_path=next(skips), **options))
            stages.append(Stage(NormedConv(dims[i - 1], dim, **dd) if i else nn.Identity(), blocks))
        super().__init__(
            ConvEmbed(in_chans, embed_dim, patch_size, **dd),
            stages,
            *last_layers(dims[-1], num_classes, global_pool, drop_rate, **dd),
            in_chans=in_chans,
            num_classes=num_classes,
            levels=levels_of(dims, patch_size),
        )


def stripe_filter(argument: str) -> Callable[[Mapping[str, Any], nn.Module], dict[str, Tensor]]:
    """Return a function that turns a checkpoint into one in a model's layout, and refuses weights of other stripes.

    Args:
        argument: The name of the model's argument with the width of its own attention's stripes.
    """
    plain = checkpoint_filter(CSWIN_RULES, WRAPPERS)

    def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
        _refuse_other_stripes(rename(unwrap(checkpoint, WRAPPERS), CSWIN_RULES), model, argument)
        return plain(checkpoint, model)

    return checkpoint_filter_fn


def _refuse_other_stripes(state_dict: Mapping[str, Tensor], model: nn.Module, argument: str) -> None:
    """Refuse weights of whole maps for stripes, and of stripes for whole maps: they split channels differently."""
    for i, stage in enumerate(model.stages):  # type: ignore[arg-type]
        attns = stage.blocks[0].attns
        given = [name for name in state_dict if name.startswith(f"stages.{i}.blocks.0.attns.")]
        stripes = any(".attns.1." in name for name in given)
        if given and stripes != (len(attns) > 1):
            kinds = ("in stripes", "over the whole map")
            (height, width), most = attns[0].resolution, "below" if stripes else "at least"
            raise ValueError(
                f"stage {i + 1} of the checkpoint attends {kinds[not stripes]}, but {kinds[stripes]} in a model of "
                f"this img_size ({height} x {width} cells): use the checkpoint's img_size, other sizes run as well, "
                f"or give {argument} (for softmax attention split_sizes) {most} {max(height, width)}"
            )
