"""DiNAT_s: Swin with dilated neighborhood attention instead of shifted windows.

Paper: 'Dilated Neighborhood Attention Transformer' - https://arxiv.org/abs/2209.15001
"""

from typing import Any

from timm.models import generate_default_cfgs

from vision_attn.backbones.nat.checkpoint import checkpoint_filter_fn
from vision_attn.backbones.nat.dinat import AT_224, AT_384, CHECKPOINTS, alternating
from vision_attn.backbones.nat.nat import NAT
from vision_attn.backbones.registry import cfg, register


def _cfg(file: str, size: int = 224, **fields: Any) -> dict[str, Any]:
    fields = dict(first_conv="patch_embed.proj", license="mit", paper_ids="arXiv:2209.15001") | fields
    return cfg(f"{CHECKPOINTS}/{file}.pth", size, **fields)


default_cfgs = generate_default_cfgs(
    {
        "dinat_s_tiny.shi_in1k": _cfg("imagenet1k/dinat_s_tiny_in1k_224"),
        "dinat_s_small.shi_in1k": _cfg("imagenet1k/dinat_s_small_in1k_224"),
        "dinat_s_base.shi_in1k": _cfg("imagenet1k/dinat_s_base_in1k_224"),
        "dinat_s_large.shi_in22k_ft_in1k": _cfg("imagenet1k/dinat_s_large_in1k_224"),
        "dinat_s_large.shi_in22k": _cfg("imagenet22k/dinat_s_large_in22k_224", num_classes=21841),
        "dinat_s_large_384.shi_in22k_ft_in1k": _cfg("imagenet1k/dinat_s_large_in1k_384", 384),
    }
)

_SHALLOW, _DEEP = (2, 2, 6, 2), (2, 2, 18, 2)


def _variant(embed_dim: int, drop_path_rate: float, *, deep: bool = True, size: int = 224) -> dict[str, Any]:
    depths = _DEEP if deep else _SHALLOW
    return dict(
        patch_size=4,
        embed_dim=embed_dim,
        depths=depths,
        num_heads=tuple(embed_dim // 32 * 2**i for i in range(4)),
        dilations=alternating(depths, AT_224 if size == 224 else AT_384),
        mlp_ratio=4.0,
        drop_path_rate=drop_path_rate,
    )


register(
    __name__,
    NAT,
    dict(
        dinat_s_tiny=_variant(96, 0.2, deep=False),
        dinat_s_small=_variant(96, 0.3),
        dinat_s_base=_variant(128, 0.5),
        dinat_s_large=_variant(192, 0.35),
        dinat_s_large_384=_variant(192, 0.35, size=384),
    ),
    checkpoint_filter_fn,
    out_indices=(0, 1, 2, 3),
    flatten_sequential=True,
)
