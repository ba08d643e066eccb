"""InLine-PVT: the Pyramid Vision Transformer with injective linear attention instead of spatial reduction.

The authors' weights (https://github.com/LeapLabTHU/InLine) load in their layout. Any image size runs: position
embeddings are resized to the map. Images are cut to whole patches. Published parameters (table in the authors'
repository): 12.0, 21.6, 37.6 and 50.2 M; their code has 51.2 M for the last, as has ours.

Paper: 'Bridging the Divide: Reconsidering Softmax and Linear Attention' - https://arxiv.org/abs/2412.06590
"""

from collections.abc import Sequence

import torch
from timm.models import generate_default_cfgs

from vision_attn.backbones.inline.attention import InLineReducedAttention
from vision_attn.backbones.leaplab import checkpoint_filter, leaplab_cfg
from vision_attn.backbones.pvt_layers import PVT_RULES, PVTBackbone
from vision_attn.backbones.registry import register

PAPER = "2412.06590"


class InLinePVT(PVTBackbone):
    """Injective linear attention, or softmax attention to a reduced map, in stages.

    Args:
        img_size: Height and width of the images, or one number for both, for which position embeddings are made. Other
            sizes run as well.
        patch_size: Pixels per side of a patch.
        in_chans: Channels of an image.
        num_classes: Classes of the head; 0 for no classifier.
        global_pool: How the last map is pooled.
        embed_dims: Channels of each stage.
        depths: Blocks of each stage.
        num_heads: Heads of each stage.
        mlp_ratios: Hidden channels of an MLP over its channels, in each stage.
        attn_types: A letter per stage: 'I' injective linear attention, 'S' softmax attention.
        sr_ratios: How many times smaller per side the keys' maps of softmax attention are, in each stage.
        qkv_bias: Whether queries, keys and values have a bias.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout of attention and MLP outputs.
        drop_path_rate: Share of samples that skip a branch in the last block; it rises linearly from 0 in the first.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        ValueError: If the arguments have different numbers of stages, or a letter is unknown.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - timm builds models from flat arguments
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (2, 4, 10, 16),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        attn_types: str = "IIII",
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        def attend(stage: int, size: tuple[int, int]) -> InLineReducedAttention:
            return InLineReducedAttention(
                embed_dims[stage],
                num_heads[stage],
                qkv_bias=qkv_bias,
                proj_drop=proj_drop_rate,
                device=device,
                dtype=dtype,
            )

        super().__init__(
            attend, attn_types, "IS", img_size=img_size, patch_size=patch_size, in_chans=in_chans,
            num_classes=num_classes, global_pool=global_pool, embed_dims=embed_dims, depths=depths, num_heads=num_heads,
            mlp_ratios=mlp_ratios, sr_ratios=sr_ratios, qkv_bias=qkv_bias, drop_rate=drop_rate,
            proj_drop_rate=proj_drop_rate, drop_path_rate=drop_path_rate, device=device, dtype=dtype,
        )  # fmt: skip


default_cfgs = generate_default_cfgs(
    {
        "inline_pvt_tiny.leaplab_in1k": leaplab_cfg(PAPER, "90ac52b1555b401eb5e6"),
        "inline_pvt_small.leaplab_in1k": leaplab_cfg(PAPER, "1ab953b2479d433080a3"),
        "inline_pvt_medium.leaplab_in1k": leaplab_cfg(PAPER, "a72aec31e6084bc0a280"),
        "inline_pvt_large.leaplab_in1k": leaplab_cfg(PAPER, "efd91318ba964f01b288"),
    }
)

register(
    __name__,
    InLinePVT,
    dict(
        inline_pvt_tiny={},
        inline_pvt_small=dict(depths=(3, 4, 6, 3)),
        inline_pvt_medium=dict(depths=(3, 4, 18, 3), drop_path_rate=0.3),
        inline_pvt_large=dict(depths=(3, 8, 27, 3), drop_path_rate=0.3),
    ),
    checkpoint_filter(PVT_RULES),
    out_indices=(0, 1, 2, 3),
    flatten_sequential=True,
)
