"""LITv2: convolutional MLPs in the first stages, HiLo attention in the third, plain attention in the last.

Released weights: https://github.com/ziplab/LITv2 (Apache-2.0).

Paper: 'Fast Vision Transformers with HiLo Attention' - https://arxiv.org/abs/2205.13213
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import calculate_drop_path_rates
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from vision_attn.backbones.backbone import Backbone
from vision_attn.backbones.blocks import Stage, last_layers, levels_of, patches
from vision_attn.backbones.checkpoints import refuse_mismatch, rename, unwrap
from vision_attn.backbones.litv2.attention import HiLoSelfAttention
from vision_attn.backbones.litv2.layers import DeformableMerging, LITBlock
from vision_attn.backbones.registry import cfg, register


class LITv2(Backbone):
    """HiLo attention in stages; between stages deformable convolutions merge the cells of a map.

    Args:
        in_chans: Channels of an image.
        num_classes: Classes of the head; 0 for no classifier.
        global_pool: How the last map is pooled.
        patch_size: Pixels per side of a patch.
        embed_dim: Channels of the first stage.
        depths: Blocks of each stage.
        num_heads: Heads of each stage.
        window_sizes: Side of HiLo's window in each stage; 1 for plain attention, 0 for no attention.
        alpha: Share of low heads.
        mlp_ratio: Hidden channels of an MLP over its channels.
        qkv_bias: Whether queries, keys and values have a bias.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout of MLP outputs.
        drop_path_rate: Share of samples that skip a branch in the last block; it rises linearly from 0 in the first.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        ValueError: If `depths`, `num_heads` and `window_sizes` do not fit each other.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - timm builds models from flat arguments
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        patch_size: int = 4,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_sizes: Sequence[int] = (0, 0, 2, 1),
        alpha: float = 0.9,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        if not len(depths) == len(num_heads) == len(window_sizes):
            raise ValueError(
                f"depths, num_heads and window_sizes must fit each other, got depths={depths}, num_heads={num_heads}, "
                f"window_sizes={window_sizes}"
            )
        dims = [embed_dim * 2**i for i in range(len(depths))]
        skips = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        stages = []
        for i, dim in enumerate(dims):
            blocks = []
            for _ in range(depths[i]):
                attn = None
                if window_sizes[i]:
                    options: dict[str, Any] = dict(window_size=window_sizes[i], alpha=alpha, qkv_bias=qkv_bias)
                    attn = HiLoSelfAttention(dim, num_heads[i], **options, **dd)
                rest: dict[str, Any] = dict(mlp_ratio=mlp_ratio, proj_drop=proj_drop_rate, drop_path=next(skips))
                blocks.append(LITBlock(dim, attn, **rest, **dd))
            stages.append(Stage(DeformableMerging(dims[i - 1], **dd) if i else nn.Identity(), blocks))
        super().__init__(
            patches(in_chans, embed_dim, patch_size, **dd),
            stages,
            *last_layers(dims[-1], num_classes, global_pool, drop_rate, **dd),
            levels=levels_of(dims, patch_size),
            in_chans=in_chans,
            num_classes=num_classes,
        )


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, of the authors or of this package, under the model's names.

    Args:
        checkpoint: Tensors by name, or a wrapper around them.
        model: The model that loads them.

    Raises:
        ValueError: If the checkpoint is of another variant; the error names the first few differences.
    """
    rules = (
        (r"^layers\.(\d+)\.downsample\.", lambda match: f"stages.{int(match[1]) + 1}.downsample."),
        (r"^layers\.", "stages."),
        (r"\.norm_layer\.", ".norm."),
        (r"\.dwconv\.dwconv\.", ".dwconv."),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
    )
    state_dict = rename(unwrap(checkpoint), rules)
    refuse_mismatch(state_dict, model)
    return state_dict


_RELEASES = "https://github.com/ziplab/LITv2/releases/download"


def _cfg(file: str, size: int = 224, **fields: Any) -> dict[str, Any]:
    fields = dict(first_conv="patch_embed.proj", license="apache-2.0", paper_ids="arXiv:2205.13213") | fields
    return cfg(f"{_RELEASES}/{file}.pth", size, **fields)


_ALPHAS = (0.0, 0.2, 0.4, 0.5, 0.7, 1.0)

default_cfgs = generate_default_cfgs(
    {
        "litv2_small.ziplab_in1k": _cfg("v1.0/litv2_s"),
        "litv2_medium.ziplab_in1k": _cfg("v1.0/litv2_m"),
        "litv2_base.ziplab_in1k": _cfg("v1.0/litv2_b"),
        "litv2_base_384.ziplab_in1k": _cfg("v1.0/litv2_b_384", 384, crop_mode="squash"),
    }
    | {f"litv2_small_alpha{alpha * 10:02.0f}.ziplab_in1k": _cfg(f"v1.1/alpha_{alpha:g}") for alpha in _ALPHAS}
)

_SMALL = dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), drop_path_rate=0.2)
_MEDIUM = dict(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24), drop_path_rate=0.3)
_BASE = dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), drop_path_rate=0.5)

register(
    __name__,
    LITv2,
    dict(litv2_small=_SMALL, litv2_medium=_MEDIUM, litv2_base=_BASE, litv2_base_384=_BASE)
    | {f"litv2_small_alpha{alpha * 10:02.0f}": _SMALL | dict(alpha=alpha) for alpha in _ALPHAS},
    checkpoint_filter_fn,
    out_indices=(0, 1, 2, 3),
    flatten_sequential=True,
)
