"""InLine-Swin: Swin with injective linear attention over the map in its first stages, shifted windows in its last.

The authors' weights (https://github.com/LeapLabTHU/InLine) load in their layout. Any image size runs: shifted windows
pad a map to whole windows. Published parameters (table in the authors' repository): 30, 50 and 88 M; their code has
29.2, 49.8 and 88.4 M, as has ours. For 384 pixels they share a configuration and no weights.

Paper: 'Bridging the Divide: Reconsidering Softmax and Linear Attention' - https://arxiv.org/abs/2412.06590
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import generate_default_cfgs

from vision_attn.backbones.inline.attention import InLineSelfAttention
from vision_attn.backbones.leaplab import checkpoint_filter, leaplab_cfg
from vision_attn.backbones.registry import register
from vision_attn.backbones.swin_layers import SWIN_RULES, SwinBackbone, block_types

PAPER = "2412.06590"


class InLineSwin(SwinBackbone):
    """Injective linear attention and shifted windows in stages.

    Args:
        img_size: Height and width of the images, or one number for both, for which position biases are made. Other
            sizes run as well.
        patch_size: Pixels per side of a patch.
        in_chans: Channels of an image.
        num_classes: Classes of the head; 0 for no classifier.
        global_pool: How the last map is pooled.
        embed_dim: Channels of the first stage.
        depths: Blocks of each stage.
        num_heads: Heads of each stage.
        window_size: Side of the windows of linear attention in cells; a map that is not larger for `img_size` is one
            window. Shifted windows have an eighth of it as their side, but at least 7.
        attn_types: A letter per stage: 'I' injective linear attention, 'S' shifted windows, 'M' both, see
            `block_types`.
        mlp_ratio: Hidden channels of an MLP over its channels.
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
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 56,
        attn_types: str = "IIIS",
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if len(depths) != len(num_heads):
            raise ValueError(f"depths and num_heads must fit each other, got {depths} and {num_heads}")
        same: dict[str, Any] = dict(qkv_bias=qkv_bias, proj_drop=proj_drop_rate)

        def attend(stage: int, dim: int, size: tuple[int, int], window: tuple[int, int] | None) -> InLineSelfAttention:
            return InLineSelfAttention(dim, num_heads[stage], window=window, device=device, dtype=dtype, **same)

        super().__init__(
            attend, block_types(attn_types, depths, "IS"), "I", img_size=img_size, patch_size=patch_size,
            in_chans=in_chans, num_classes=num_classes, global_pool=global_pool, embed_dim=embed_dim,
            num_heads=num_heads, window_size=window_size, mlp_ratio=mlp_ratio, qkv_bias=qkv_bias, drop_rate=drop_rate,
            proj_drop_rate=proj_drop_rate, drop_path_rate=drop_path_rate, device=device, dtype=dtype,
        )  # fmt: skip


default_cfgs = generate_default_cfgs(
    {
        "inline_swin_tiny.leaplab_in1k": leaplab_cfg(PAPER, "32810869fcc34410966b"),
        "inline_swin_small.leaplab_in1k": leaplab_cfg(PAPER, "e9657fd247c04c7cb1a1"),
        "inline_swin_base.leaplab_in1k": leaplab_cfg(PAPER, "bf23564bb64c420aafe1"),
        "inline_swin_base_384.untrained": leaplab_cfg(PAPER, "", 384, 1.0),
    }
)

_BASE = dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), attn_types="IIMS2", drop_path_rate=0.5)

register(
    __name__,
    InLineSwin,
    dict(
        inline_swin_tiny={},
        inline_swin_small=dict(depths=(2, 2, 18, 2), attn_types="IISS", drop_path_rate=0.3),
        inline_swin_base=_BASE,
        inline_swin_base_384=_BASE | dict(img_size=384, window_size=96),
    ),
    checkpoint_filter(SWIN_RULES),
    out_indices=(0, 1, 2, 3),
    flatten_sequential=True,
)
