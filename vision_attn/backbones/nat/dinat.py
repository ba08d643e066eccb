"""DiNAT: NAT in which every second block is dilated as far as its map allows.

The dilations fit the pretrained size; `set_input_size` fits them to another size.

Paper: 'Dilated Neighborhood Attention Transformer' - https://arxiv.org/abs/2209.15001
"""

from collections.abc import Sequence
from typing import Any

from timm.models import generate_default_cfgs

from vision_attn.backbones.nat.checkpoint import checkpoint_filter_fn
from vision_attn.backbones.nat.nat import BASE, DEEP, MINI, NAT, SMALL, TINY
from vision_attn.backbones.registry import cfg, register

CHECKPOINTS = "https://shi-labs.com/projects/dinat/checkpoints"
AT_224 = (8, 4, 2, 1)
AT_384 = (13, 6, 3, 1)


def alternating(depths: Sequence[int], dilations: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Return the dilation of each block of each stage: 1 and the stage's dilation in turn."""
    return tuple(tuple((1, d)[j % 2] for j in range(depth)) for depth, d in zip(depths, dilations, strict=True))


def _cfg(file: str, size: int = 224, **fields: Any) -> dict[str, Any]:
    fields = dict(first_conv="patch_embed.proj.0", license="mit", paper_ids="arXiv:2209.15001") | fields
    return cfg(f"{CHECKPOINTS}/{file}.pth", size, **fields)


default_cfgs = generate_default_cfgs(
    {
        "dinat_mini.shi_in1k": _cfg("imagenet1k/dinat_mini_in1k_224"),
        "dinat_tiny.shi_in1k": _cfg("imagenet1k/dinat_tiny_in1k_224"),
        "dinat_small.shi_in1k": _cfg("imagenet1k/dinat_small_in1k_224"),
        "dinat_base.shi_in1k": _cfg("imagenet1k/dinat_base_in1k_224"),
        "dinat_large.shi_in22k_ft_in1k": _cfg("imagenet1k/dinat_large_in22k_in1k_224"),
        "dinat_large.shi_in22k": _cfg("imagenet22k/dinat_large_in22k_224", num_classes=21841),
        "dinat_large_384.shi_in22k_ft_in1k": _cfg("imagenet1k/dinat_large_in22k_in1k_384", 384),
        "dinat_large_384_11x11.shi_in22k_ft_in1k": _cfg("imagenet1k/dinat_large_in22k_in1k_384_11x11", 384),
    }
)

_DILATED = dict(dilations=alternating(DEEP, AT_224))
_LARGE = dict(embed_dim=192, depths=DEEP, num_heads=(6, 12, 24, 48), mlp_ratio=2.0, drop_path_rate=0.35)

register(
    __name__,
    NAT,
    dict(
        dinat_mini=MINI | dict(dilations=alternating((3, 4, 6, 5), AT_224)),
        dinat_tiny=TINY | _DILATED,
        dinat_small=SMALL | _DILATED,
        dinat_base=BASE | _DILATED,
        dinat_large=_LARGE | _DILATED,
        dinat_large_384=_LARGE | dict(dilations=alternating(DEEP, AT_384)),
        dinat_large_384_11x11=_LARGE | _DILATED | dict(kernel_size=11),
    ),
    checkpoint_filter_fn,
    out_indices=(0, 1, 2, 3),
    flatten_sequential=True,
)
