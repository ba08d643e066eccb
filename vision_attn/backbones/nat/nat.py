"""NAT, a pyramid with neighborhood attention. DiNAT and DiNAT_s are the same class with dilations and Swin's stem.

The released weights (https://github.com/SHI-Labs/Neighborhood-Attention-Transformer, MIT) load in the authors' layout
and in that of transformers.

Paper: 'Neighborhood Attention Transformer' - https://arxiv.org/abs/2204.07143
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import calculate_drop_path_rates, to_2tuple
from timm.models import generate_default_cfgs
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from vision_attn.backbones.backbone import Backbone
from vision_attn.backbones.blocks import PreNormBlock, Stage, last_layers, levels_of, patches
from vision_attn.backbones.nat.attention import NeighborhoodAttention
from vision_attn.backbones.nat.checkpoint import checkpoint_filter_fn
from vision_attn.backbones.registry import cfg, register


class ConvTokenizer(nn.Module):
    """Two 3 x 3 convolutions of stride 2, one after the other, from images to a map `[B, height, width, C]`."""

    def __init__(
        self,
        in_chans: int,
        dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd),
        )
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Return the map of images `[B, in_chans, height, width]`: each side a quarter, rounded up."""
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class ConvDownsample(nn.Module):
    """A 3 x 3 convolution of stride 2 that doubles the channels of a map `[B, height, width, C]`."""

    def __init__(self, dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False, **dd)
        self.norm = nn.LayerNorm(2 * dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map with half of each side, rounded up."""
        return self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class NAT(Backbone):
    """Neighborhood attention in stages; each has half the side and twice the channels of the one before.

    Args:
        in_chans: Channels of an image.
        num_classes: Classes of the head; 0 for no classifier.
        global_pool: How the last map is pooled.
        patch_size: Pixels per side of a patch. Patches are embedded and merged as in Swin (DiNAT_s); None embeds and
            merges by overlapping convolutions (NAT, DiNAT).
        embed_dim: Channels of the first stage.
        depths: Blocks of each stage.
        num_heads: Heads of each stage.
        kernel_size: Side of the window in cells of a map.
        dilations: Dilation of each block of each stage, in cells; None for 1.
        mlp_ratio: Hidden channels of an MLP over its channels.
        qkv_bias: Whether queries, keys and values have a bias.
        qk_scale: Factor of the logits; `head_dim ** -0.5` if None.
        layer_scale: Initial value of the factors of the branches; None for no factors.
        patch_norm: Whether a norm follows the patch embedding; one always follows overlapping convolutions.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout of attention and MLP outputs.
        drop_path_rate: Share of samples that skip a branch in the last block; it rises linearly from 0 in the first.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        ValueError: If `depths`, `num_heads` and `dilations` do not fit each other.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - timm builds models from flat arguments
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        patch_size: int | None = None,
        embed_dim: int = 64,
        depths: Sequence[int] = (3, 4, 6, 5),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        kernel_size: int = 7,
        dilations: Sequence[Sequence[int | None]] | None = None,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        layer_scale: float | None = None,
        patch_norm: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        steps = (
            [[1] * depth for depth in depths] if dilations is None else [[d or 1 for d in level] for level in dilations]
        )
        if len(num_heads) != len(depths) or [len(level) for level in steps] != list(depths):
            raise ValueError(
                f"depths, num_heads and dilations must fit each other, got depths={depths}, num_heads={num_heads}, "
                f"dilations={dilations}"
            )
        patch_embed: nn.Module = ConvTokenizer(in_chans, embed_dim, **dd)
        if patch_size is not None:
            patch_embed = patches(in_chans, embed_dim, patch_size, norm=patch_norm, **dd)
        dims = [embed_dim * 2**i for i in range(len(depths))]
        skips = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        stages = []
        for i, (dim, heads) in enumerate(zip(dims, num_heads, strict=True)):
            blocks = [
                PreNormBlock(
                    dim,
                    NeighborhoodAttention(
                        dim,
                        heads,
                        kernel_size,
                        dilation=dilation,
                        qkv_bias=qkv_bias,
                        scale=qk_scale,
                        proj_drop=proj_drop_rate,
                        **dd,
                    ),
                    mlp_ratio=mlp_ratio,
                    layer_scale=layer_scale,
                    proj_drop=proj_drop_rate,
                    drop_path=next(skips),
                    **dd,
                )
                for dilation in steps[i]
            ]
            merge = ConvDownsample if patch_size is None else PatchMerging
            stages.append(Stage(merge(dims[i - 1], **dd) if i else nn.Identity(), blocks))
        super().__init__(
            patch_embed,
            stages,
            *last_layers(dims[-1], num_classes, global_pool, drop_rate, **dd),
            in_chans=in_chans,
            num_classes=num_classes,
            levels=levels_of(dims, patch_size or 4),
        )
        self.kernel_size, self.dilated = kernel_size, any(max(level) > 1 for level in steps)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Dilate every second block as far as images of a size allow, as the authors do.

        Without this call any size runs with the dilations of the pretrained size. A model without dilations does not
        change.

        Args:
            img_size: Height and width of the images in pixels, or one number for both.
        """
        if not self.dilated:
            return
        stages: Any = self.stages
        for stage, info in zip(stages, self.feature_info, strict=False):
            side = -(-min(to_2tuple(img_size)) // info["reduction"])
            for block in stage.blocks[1::2]:
                block.attn.dilation = max(1, side // self.kernel_size)


def _cfg(name: str) -> dict[str, Any]:
    url = f"https://shi-labs.com/projects/nat/checkpoints/CLS/{name}.pth"
    return cfg(url, first_conv="patch_embed.proj.0", license="mit", paper_ids="arXiv:2204.07143")


default_cfgs = generate_default_cfgs(
    {f"nat_{size}.shi_in1k": _cfg(f"nat_{size}") for size in ("mini", "tiny", "small", "base")}
)

DEEP = (3, 4, 18, 5)
MINI = dict(embed_dim=64, depths=(3, 4, 6, 5), num_heads=(2, 4, 8, 16), mlp_ratio=3.0, drop_path_rate=0.2)
TINY = dict(embed_dim=64, depths=DEEP, num_heads=(2, 4, 8, 16), mlp_ratio=3.0, drop_path_rate=0.2)
SMALL = dict(embed_dim=96, depths=DEEP, num_heads=(3, 6, 12, 24), mlp_ratio=2.0, drop_path_rate=0.3)
BASE = dict(embed_dim=128, depths=DEEP, num_heads=(4, 8, 16, 32), mlp_ratio=2.0, layer_scale=1e-5, drop_path_rate=0.5)

register(
    __name__,
    NAT,
    dict(nat_mini=MINI, nat_tiny=TINY, nat_small={**SMALL, "layer_scale": 1e-5}, nat_base=BASE),
    checkpoint_filter_fn,
    out_indices=(0, 1, 2, 3),
    flatten_sequential=True,
)
