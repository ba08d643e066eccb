"""InLine-CSwin: injective linear attention over the whole map in the first stages, cross-shaped stripes in the last.

The authors' weights (https://github.com/LeapLabTHU/InLine) load in their layout; a moving average is preferred to the
raw weights. Any image size runs. Published parameters (table in the authors' repository): 25, 43 and 96 M; their code
has 20.6, 33.0 and 73.4 M, as has ours, so the shared weights may be of other code. For 384 pixels they share none.

Paper: 'Bridging the Divide: Reconsidering Softmax and Linear Attention' - https://arxiv.org/abs/2412.06590
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import generate_default_cfgs

from vision_attn.backbones.cswin_layers import CSwinBackbone, stripe_filter
from vision_attn.backbones.inline.attention import InLineCSwinBlock, InLineStripeAttention
from vision_attn.backbones.leaplab import leaplab_cfg
from vision_attn.backbones.registry import register
from vision_attn.backbones.swin_layers import block_types

PAPER = "2412.06590"


class InLineCSwin(CSwinBackbone):
    """Injective linear attention and cross-shaped stripes in stages.

    Args:
        img_size: Height and width of the images, or one number for both, for which the layers are made. Other sizes
            run as well.
        patch_size: Pixels per side of a cell of the first map; the stem's windows are larger and overlap.
        in_chans: Channels of an image.
        num_classes: Classes of the head; 0 for no classifier.
        global_pool: How the last map is pooled.
        embed_dim: Channels of the first stage.
        depths: Blocks of each stage.
        num_heads: Heads of each stage.
        split_sizes: Width of the stripes of softmax attention in each stage.
        linear_split_sizes: Width of the stripes of linear attention in each stage. A stage whose map is not larger for
            `img_size`, and the last stage, attend over the whole map. Weights fit a model in which the same stages do.
        attn_types: A letter per stage: 'I' injective linear attention, 'S' softmax attention, 'M' both, see
            `block_types`.
        mlp_ratio: Hidden channels of an MLP over its channels.
        qkv_bias: Whether queries, keys and values have a bias.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout of MLP outputs.
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
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 4, 18, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        split_sizes: Sequence[int] = (1, 2, 7, 7),
        linear_split_sizes: Sequence[int] = (56, 28, 14, 7),
        attn_types: str = "IISS",
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        given: dict[str, Any] = dict(num_heads=num_heads, split_sizes=split_sizes)
        given |= dict(linear_split_sizes=linear_split_sizes)
        if any(len(values) != len(depths) for values in given.values()):
            raise ValueError(f"there must be one value per stage of depths={depths}, got {given}")
        super().__init__(
            [InLineStripeAttention] * len(depths), block_types(attn_types, depths, "IS"), "I", InLineCSwinBlock,
            img_size=img_size, patch_size=patch_size, in_chans=in_chans, num_classes=num_classes,
            global_pool=global_pool, embed_dim=embed_dim, num_heads=num_heads, split_sizes=split_sizes,
            own_split_sizes=linear_split_sizes, mlp_ratio=mlp_ratio, qkv_bias=qkv_bias, drop_rate=drop_rate,
            proj_drop_rate=proj_drop_rate, drop_path_rate=drop_path_rate, device=device, dtype=dtype,
        )  # fmt: skip


default_cfgs = generate_default_cfgs(
    {
        "inline_cswin_tiny.leaplab_in1k": leaplab_cfg(PAPER, "49fa2ecc543647c4b970"),
        "inline_cswin_small.leaplab_in1k": leaplab_cfg(PAPER, "59f4e65f776f4052b93c"),
        "inline_cswin_base.leaplab_in1k": leaplab_cfg(PAPER, "91e17121df284ae38521"),
        "inline_cswin_base_384.untrained": leaplab_cfg(PAPER, "", 384),
    }
)

_DEEP = (3, 6, 29, 2)
_BASE = dict(embed_dim=96, depths=_DEEP, num_heads=(4, 8, 16, 32), drop_path_rate=0.5)
_AT_384 = dict(img_size=384, split_sizes=(1, 2, 12, 12), linear_split_sizes=(96, 48, 24, 12), drop_path_rate=0.7)

register(
    __name__,
    InLineCSwin,
    dict(
        inline_cswin_tiny={},
        inline_cswin_small=dict(depths=_DEEP, drop_path_rate=0.4),
        inline_cswin_base=_BASE,
        inline_cswin_base_384=_BASE | _AT_384,
    ),
    stripe_filter("linear_split_sizes"),
    out_indices=(0, 1, 2, 3),
    flatten_sequential=True,
)
