"""InLine-DeiT: a vision transformer with a class token and injective linear attention in all blocks.

The authors' weights (https://github.com/LeapLabTHU/InLine) load in their layout. Any image size runs: position
embeddings are resized to the map. As linear attention costs less, the authors' larger variants are narrower than DeiT
and see larger images. Published parameters (table in the authors' repository): 6.5, 16.7 and 23.8 M.

Paper: 'Bridging the Divide: Reconsidering Softmax and Linear Attention' - https://arxiv.org/abs/2412.06590
"""

import torch
from timm.models import generate_default_cfgs

from vision_attn.backbones.inline.attention import InLineSelfAttention
from vision_attn.backbones.leaplab import checkpoint_filter, leaplab_cfg
from vision_attn.backbones.registry import register
from vision_attn.backbones.token_layers import TOKEN_RULES, TokenBackbone

PAPER = "2412.06590"


class InLineDeiT(TokenBackbone):
    """Injective linear attention on a class token and patches of one size; the output of each block is a feature.

    Args:
        img_size: Height and width of the images, or one number for both, for which position embeddings are made. Other
            sizes run as well.
        patch_size: Pixels per side of a patch.
        in_chans: Channels of an image.
        num_classes: Classes of the head; 0 for no classifier.
        global_pool: How the last tokens are pooled; 'token' takes the class token.
        embed_dim: Channels.
        depth: Blocks.
        num_heads: Heads.
        mlp_ratio: Hidden channels of an MLP over `embed_dim`.
        qkv_bias: Whether queries, keys and values have a bias.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout of attention and MLP outputs.
        drop_path_rate: Share of samples that skip a branch in the last block; it rises linearly from 0 in the first.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - timm builds models from flat arguments
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        attns = [
            InLineSelfAttention(
                embed_dim, num_heads, qkv_bias=qkv_bias, proj_drop=proj_drop_rate, device=device, dtype=dtype
            )
            for _ in range(depth)
        ]
        super().__init__(
            attns, img_size=img_size, patch_size=patch_size, in_chans=in_chans, num_classes=num_classes,
            global_pool=global_pool, embed_dim=embed_dim, mlp_ratio=mlp_ratio, drop_rate=drop_rate,
            proj_drop_rate=proj_drop_rate, drop_path_rate=drop_path_rate, device=device, dtype=dtype,
        )  # fmt: skip


default_cfgs = generate_default_cfgs(
    {
        "inline_deit_tiny.leaplab_in1k": leaplab_cfg(PAPER, "1d6b8191ad6d4114b291", pool_size=None),
        "inline_deit_small.leaplab_in1k": leaplab_cfg(PAPER, "2f3898b07e9247f3beb3", 288, pool_size=None),
        "inline_deit_base.leaplab_in1k": leaplab_cfg(PAPER, "10bdd726d4b0435eb34e", 448, pool_size=None),
    }
)

register(
    __name__,
    InLineDeiT,
    dict(
        inline_deit_tiny={},
        inline_deit_small=dict(img_size=288, embed_dim=320, num_heads=10),
        inline_deit_base=dict(img_size=448, embed_dim=384, num_heads=12),
    ),
    checkpoint_filter(TOKEN_RULES),
    out_indices=3,
    feature_cls="getter",
)
