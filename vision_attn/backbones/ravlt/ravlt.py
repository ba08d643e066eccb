"""RAVLT: rank-augmented linear attention in the first two stages, softmax attention in the last two.

Released weights: https://huggingface.co/aldjalkdf/RAVLT.

Paper: 'Breaking the Low-Rank Dilemma of Linear Attention' - https://arxiv.org/abs/2411.07635
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import ClassifierHead, calculate_drop_path_rates
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from vision_attn.backbones.backbone import Backbone
from vision_attn.backbones.blocks import levels_of
from vision_attn.backbones.checkpoints import refuse_mismatch, rename, unwrap
from vision_attn.backbones.conv_layers import ConvMerging, Projection
from vision_attn.backbones.ravlt.layers import ConvStem, RALABlock, RALAStage
from vision_attn.backbones.registry import cfg, register


class RAVLT(Backbone):
    """RALA in stages of convolutional blocks, on maps `[B, C, height, width]`.

    Args:
        in_chans: Channels of an image.
        num_classes: Classes of the head; 0 for no classifier.
        global_pool: How the last map is pooled.
        embed_dims: Channels of each stage.
        depths: Blocks of each stage.
        num_heads: Heads of each stage.
        mlp_ratios: Hidden channels of an MLP over its channels, of each stage.
        linear: Whether a stage's attention is linear rather than softmax.
        layer_scales: Initial value of the factors of the branches of each stage; None for no factors.
        projection: Channels of the last map, which is pooled.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout of MLP outputs.
        drop_path_rate: Share of samples that skip a branch in the last block; it rises linearly from 0 in the first.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        ValueError: If the arguments have different numbers of stages, or a value is unknown.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - timm builds models from flat arguments
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        mlp_ratios: Sequence[float] = (3.5, 3.5, 3.5, 3.5),
        linear: Sequence[bool] = (True, True, False, False),
        layer_scales: Sequence[float | None] = (1.0, 1.0, 1.0, 1.0),
        projection: int = 1024,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        given = dict(
            depths=depths, num_heads=num_heads, mlp_ratios=mlp_ratios, linear=linear, layer_scales=layer_scales
        )
        if any(len(values) != len(embed_dims) for values in given.values()):
            raise ValueError(f"there must be one value per stage of embed_dims={embed_dims}, got {given}")
        skips = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        stages = []
        for i, dim in enumerate(embed_dims):
            options: dict[str, Any] = dict(linear=linear[i], mlp_ratio=mlp_ratios[i], layer_scale=layer_scales[i])
            blocks = [
                RALABlock(dim, num_heads[i], proj_drop=proj_drop_rate, drop_path=next(skips), **options, **dd)
                for _ in range(depths[i])
            ]
            merging = ConvMerging(embed_dims[i - 1], dim, **dd) if i else nn.Identity()
            stages.append(RALAStage(merging, blocks, dim // num_heads[i]))
        super().__init__(
            ConvStem(in_chans, embed_dims[0], **dd),
            stages,
            Projection(embed_dims[-1], projection, **dd),
            ClassifierHead(projection, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd),
            in_chans=in_chans,
            num_classes=num_classes,
            levels=levels_of(embed_dims, 4),
            output_fmt="NCHW",
        )


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, of the authors or of this package, under the model's names.

    Args:
        checkpoint: Tensors by name, or a wrapper around them; `model_ema` is preferred to `model`.
        model: The model that loads them.

    Raises:
        ValueError: If the checkpoint is of another variant; the error names the first few differences.
    """
    rules = (
        (r"^layers\.(\d+)\.downsample\.", lambda match: f"stages.{int(match[1]) + 1}.downsample."),
        (r"^layers\.", "stages."),
        (r"\.norm([12])\.norm\.", r".norm\1."),
        (r"\.gamma_([12])$", r".ls\1.gamma"),
        (r"^proj\.", "norm.proj."),
        (r"^norm\.(weight|bias|running_mean|running_var|num_batches_tracked)$", r"norm.norm.\1"),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
    )
    state_dict = rename(unwrap(checkpoint, ("model_ema", "model", "state_dict")), rules)
    state_dict = {
        name: t.flatten() if name.endswith(".gamma") else t.flatten(1) if name == "head.fc.weight" else t
        for name, t in state_dict.items()
        if not name.endswith(".RoPE.angle")
    }
    refuse_mismatch(state_dict, model)
    return state_dict


def _cfg(size: str) -> dict[str, Any]:
    url = f"https://huggingface.co/aldjalkdf/RAVLT/resolve/main/RAVLT_{size}.pth"
    return cfg(url, first_conv="patch_embed.proj.0", license="mit", paper_ids="arXiv:2411.07635")


default_cfgs = generate_default_cfgs(
    {
        f"ravlt_{name}.rala_in1k": _cfg(size)
        for name, size in (("tiny", "T"), ("small", "S"), ("base", "B"), ("large", "L"))
    }
)

_TINY = dict(embed_dims=(64, 128, 256, 512), depths=(2, 2, 6, 2), num_heads=(1, 2, 4, 8), drop_path_rate=0.1)
_SMALL = dict(embed_dims=(64, 128, 320, 512), depths=(3, 5, 9, 3), num_heads=(1, 2, 5, 8), drop_path_rate=0.15)
_BASE = dict(
    embed_dims=(96, 192, 384, 512),
    depths=(4, 6, 12, 6),
    num_heads=(1, 2, 6, 8),
    layer_scales=(1.0, 1.0, 1e-6, 1e-6),
    drop_path_rate=0.4,
)
_LARGE = dict(
    embed_dims=(96, 192, 448, 640),
    depths=(4, 7, 19, 8),
    num_heads=(1, 2, 7, 10),
    layer_scales=(1e-6,) * 4,
    drop_path_rate=0.55,
)

register(
    __name__,
    RAVLT,
    dict(ravlt_tiny=_TINY, ravlt_small=_SMALL, ravlt_base=_BASE, ravlt_large=_LARGE),
    checkpoint_filter_fn,
    out_indices=(0, 1, 2, 3),
    flatten_sequential=True,
)
