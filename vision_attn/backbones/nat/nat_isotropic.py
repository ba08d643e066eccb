"""Isotropic NAT and DiNAT, whose maps all have one width and one size, and ViT-rpb, their twin with dense attention.

There are no position embeddings and there is no class token: the last map is averaged.

Paper: 'Dilated Neighborhood Attention Transformer' - https://arxiv.org/abs/2209.15001
"""

from typing import Any

import torch
from timm.layers import calculate_drop_path_rates
from timm.models import generate_default_cfgs

from vision_attn.backbones.backbone import Backbone
from vision_attn.backbones.blocks import PreNormBlock, last_layers, patches
from vision_attn.backbones.nat.attention import NeighborhoodAttention, RelativeAttention
from vision_attn.backbones.nat.checkpoint import checkpoint_filter_fn
from vision_attn.backbones.nat.dinat import CHECKPOINTS
from vision_attn.backbones.registry import cfg, register


class NATIsotropic(Backbone):
    """Neighborhood attention on patches of one size; the output of each block is a feature.

    Args:
        img_size: Side in pixels of the images for which dense attention's bias is made; other sizes run as well.
        patch_size: Pixels per side of a patch.
        in_chans: Channels of an image.
        num_classes: Classes of the head; 0 for no classifier.
        global_pool: How the last map is pooled.
        embed_dim: Channels.
        depth: Blocks.
        num_heads: Heads.
        kernel_size: Side of the window in patches; 0 for dense attention (ViT-rpb).
        dilation: Dilation of every second block.
        mlp_ratio: Hidden channels of an MLP over `embed_dim`.
        qkv_bias: Whether queries, keys and values have a bias.
        qk_scale: Factor of the logits; `head_dim ** -0.5` if None.
        layer_scale: Initial value of the factors of the branches; None for no factors.
        patch_norm: Whether a norm follows the patch embedding.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout of attention and MLP outputs.
        drop_path_rate: Share of samples that skip a branch in the last block; it rises linearly from 0 in the first.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - timm builds models from flat arguments
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 12,
        kernel_size: int = 7,
        dilation: int = 1,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        layer_scale: float | None = None,
        patch_norm: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        attention = NeighborhoodAttention if kernel_size else RelativeAttention
        same: dict[str, Any] = dict(qkv_bias=qkv_bias, scale=qk_scale, proj_drop=proj_drop_rate, **dd)
        blocks = [
            PreNormBlock(
                embed_dim,
                attention(
                    embed_dim, num_heads, kernel_size or img_size // patch_size, dilation=(1, dilation)[i % 2], **same
                ),
                mlp_ratio=mlp_ratio,
                layer_scale=layer_scale,
                proj_drop=proj_drop_rate,
                drop_path=skip,
                **dd,
            )
            for i, skip in enumerate(calculate_drop_path_rates(drop_path_rate, depth))
        ]
        super().__init__(
            patches(in_chans, embed_dim, patch_size, norm=patch_norm, **dd),
            blocks,
            *last_layers(embed_dim, num_classes, global_pool, drop_rate, **dd),
            in_chans=in_chans,
            num_classes=num_classes,
            levels=[(embed_dim, patch_size)] * depth,
        )


def _cfg(file: str) -> dict[str, Any]:
    fields: dict[str, Any] = dict(
        first_conv="patch_embed.proj", license="mit", paper_ids="arXiv:2209.15001", pool_size=(14, 14)
    )
    return cfg(f"{CHECKPOINTS}/isotropic/{file}_in1k_224.pth", **fields)


default_cfgs = generate_default_cfgs(
    {
        "nat_iso_small.shi_in1k": _cfg("nat_isotropic_small"),
        "nat_iso_base.shi_in1k": _cfg("nat_isotropic_base"),
        "dinat_iso_small.shi_in1k": _cfg("dinat_isotropic_small"),
        "dinat_iso_base.shi_in1k": _cfg("dinat_isotropic_base"),
        "vitrpb_small.shi_in1k": _cfg("vitrpb_small"),
        "vitrpb_base.shi_in1k": _cfg("vitrpb_base"),
    }
)

_SMALL = dict(embed_dim=384, num_heads=12, drop_path_rate=0.1)
_BASE = dict(embed_dim=768, num_heads=24, drop_path_rate=0.4)

register(
    __name__,
    NATIsotropic,
    dict(
        nat_iso_small=_SMALL,
        nat_iso_base=_BASE,
        dinat_iso_small=_SMALL | dict(dilation=2),
        dinat_iso_base=_BASE | dict(dilation=2),
        vitrpb_small=_SMALL | dict(kernel_size=0),
        vitrpb_base=_BASE | dict(kernel_size=0),
    ),
    checkpoint_filter_fn,
    out_indices=3,
    flatten_sequential=True,
    feature_cls="getter",
)
