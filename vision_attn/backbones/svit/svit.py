"""SViT: super token attention in the first two stages, softmax attention in the last two.

The authors' code is at https://github.com/hhb072/STViT, where the class is called STViT. They have released no weights.

Paper: 'Vision Transformer with Super Token Sampling' - https://arxiv.org/abs/2211.11167
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import ClassifierHead, DropPath, LayerNorm2d, LayerScale2d, calculate_drop_path_rates
from timm.models import checkpoint as checkpointed
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from vision_attn.backbones.backbone import Backbone
from vision_attn.backbones.blocks import Stage, levels_of
from vision_attn.backbones.checkpoints import refuse_mismatch, rename, unwrap
from vision_attn.backbones.conv_layers import ConvMerging, ConvolvedFfn, Projection
from vision_attn.backbones.registry import cfg, register
from vision_attn.backbones.svit.attention import SuperTokenSelfAttention


class NormLastStem(nn.Module):
    """Four 3 x 3 convolutions from an image to a map with a quarter of its sides, each with GELU and a batch norm."""

    def __init__(self, in_chans: int, dim: int, **dd: Any) -> None:
        super().__init__()
        half = dim // 2
        layers: list[nn.Module] = []
        for channels, out, stride in ((in_chans, half, 2), (half, half, 1), (half, dim, 2), (dim, dim, 1)):
            convolution = nn.Conv2d(channels, out, 3, stride=stride, padding=1, **dd)
            layers += [convolution, nn.GELU(), nn.BatchNorm2d(out, **dd)]
        self.proj = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Return the map."""
        return self.proj(x)


class SuperTokenBlock(nn.Module):
    """A positional convolution, attention and an MLP.

        x = x + pos(x),    x = x + gamma_1 * attn(LN(x)),    x = x + gamma_2 * ffn(BN(x))

    Args:
        dim: Channels C.
        num_heads: Heads.
        size: Side of a super token's cell.
        iterations: How often the association is computed.
        mlp_ratio: Hidden channels of the MLP over C.
        layer_scale: Initial value of the gammas; None for no gammas.
        proj_drop: Dropout of the MLP.
        drop_path: Share of the samples that skip a branch in training.
        **dd: Device and dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        size: int,
        iterations: int = 1,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.pos = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.norm1 = LayerNorm2d(dim, eps=1e-6, **dd)
        self.attn = SuperTokenSelfAttention(dim, num_heads, size=size, iterations=iterations, **dd)
        self.norm2 = nn.BatchNorm2d(dim, **dd)
        self.ffn = ConvolvedFfn(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale2d(dim, layer_scale, **dd)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale2d(dim, layer_scale, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the shape of `x`."""
        if self.grad_checkpointing and not torch.jit.is_scripting():  # type: ignore[attr-defined]
            return checkpointed(self._forward, x)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        x = x + self.pos(x)
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.ffn(self.norm2(x))))


class SViT(Backbone):
    """Super tokens in stages of convolutional blocks, on maps `[B, C, height, width]`.

    Args:
        in_chans: Channels of an image.
        num_classes: Classes of the head; 0 for no classifier.
        global_pool: How the last map is pooled.
        embed_dims: Channels of each stage.
        depths: Blocks of each stage.
        num_heads: Heads of each stage.
        sizes: Side of a super token's cell in each stage; 1 for softmax attention.
        iterations: How often the association is computed in each stage.
        mlp_ratio: Hidden channels of an MLP over its channels.
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
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (3, 5, 9, 3),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        sizes: Sequence[int] = (8, 4, 1, 1),
        iterations: Sequence[int] = (1, 1, 1, 1),
        mlp_ratio: float = 4.0,
        layer_scales: Sequence[float | None] = (None, None, None, None),
        projection: int = 1024,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        given = dict(depths=depths, num_heads=num_heads, sizes=sizes, iterations=iterations, layer_scales=layer_scales)
        if any(len(values) != len(embed_dims) for values in given.values()):
            raise ValueError(f"there must be one value per stage of embed_dims={embed_dims}, got {given}")
        skips = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        stages = []
        for i, dim in enumerate(embed_dims):
            options: dict[str, Any] = dict(size=sizes[i], iterations=iterations[i], layer_scale=layer_scales[i])
            options |= dict(mlp_ratio=mlp_ratio, proj_drop=proj_drop_rate)
            blocks = [
                SuperTokenBlock(dim, num_heads[i], drop_path=next(skips), **options, **dd) for _ in range(depths[i])
            ]
            stages.append(Stage(ConvMerging(embed_dims[i - 1], dim, **dd) if i else nn.Identity(), blocks))
        head = ClassifierHead(projection, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        stem, norm = NormLastStem(in_chans, embed_dims[0], **dd), Projection(embed_dims[-1], projection, **dd)
        options = dict(levels=levels_of(embed_dims, 4), output_fmt="NCHW", num_classes=num_classes)
        super().__init__(stem, stages, norm, head, in_chans=in_chans, **options)


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, of the authors or of this package, under the model's names.

    The weights of the authors' unfolding are constants, and are left out.

    Args:
        checkpoint: Tensors by name, or a wrapper around them; `model_ema` is preferred to `model`.
        model: The model that loads them.

    Raises:
        ValueError: If the checkpoint is of another variant; the error names the first few differences.
    """
    rules = (
        (r"^layers\.(\d+)\.downsample\.proj\.0\.", lambda match: f"stages.{int(match[1]) + 1}.downsample.reduction."),
        (r"^layers\.(\d+)\.downsample\.proj\.1\.", lambda match: f"stages.{int(match[1]) + 1}.downsample.norm."),
        (r"^layers\.", "stages."),
        (r"\.pos_embed\.conv\.", ".pos."),
        (r"\.norm1\.norm\.", ".norm1."),
        (r"\.attn\.stoken_refine\.", ".attn.attend."),
        (r"\.mlp2\.conv\.conv\.", ".ffn.dwconv."),
        (r"\.mlp2\.", ".ffn."),
        (r"\.gamma_([12])$", r".ls\1.gamma"),
        (r"^proj\.", "norm.proj."),
        (r"^norm\.(weight|bias|running_mean|running_var|num_batches_tracked)$", r"norm.norm.\1"),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
    )
    state_dict = {
        name: t.flatten() if name.endswith(".gamma") else t
        for name, t in rename(unwrap(checkpoint, ("model_ema", "model", "state_dict")), rules).items()
        if not name.endswith((".unfold.weights", ".fold.weights"))
    }
    refuse_mismatch(state_dict, model)
    return state_dict


_VARIANTS: dict[str, dict[str, Any]] = dict(
    svit_s={},
    svit_b=dict(
        embed_dims=(96, 192, 384, 512),
        depths=(4, 6, 14, 6),
        num_heads=(2, 3, 6, 8),
        layer_scales=(None, None, 1e-6, 1e-6),
    ),
    svit_l=dict(
        embed_dims=(96, 192, 448, 640),
        depths=(4, 7, 19, 8),
        num_heads=(2, 3, 7, 10),
        layer_scales=(None, None, 1e-6, 1e-6),
    ),
)

default_cfgs = generate_default_cfgs(
    {name: cfg(first_conv="patch_embed.proj.0", paper_ids="arXiv:2211.11167") for name in _VARIANTS}
)

register(__name__, SViT, _VARIANTS, checkpoint_filter_fn, out_indices=(0, 1, 2, 3), flatten_sequential=True)
