"""A vision transformer with a class token, and its parts: stem, attention, block and head."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, calculate_drop_path_rates, global_pool_nlc, trunc_normal_
from timm.models import checkpoint, register_notrace_module
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from vision_attn.backbones.backbone import checked_image
from vision_attn.backbones.blocks import attend_densely, map_size
from vision_attn.backbones.checkpoints import Rule
from vision_attn.backbones.leaplab import PositionedBackbone
from vision_attn.backbones.position import resized_positions

TOKEN_RULES: tuple[Rule, ...] = (
    (r"^(cls_token|pos_embed)$", r"patch_embed.\1"),
    (r"^blocks\.", "stages."),
)


@register_notrace_module
class TokenEmbed(nn.Module):
    """A class token and the patches of an image, with position embeddings that are resized (bicubic) to other sizes.

    Args:
        in_chans: Channels of an image.
        dim: Channels C.
        patch_size: Pixels per side of a patch; images are padded with zeros to whole patches.
        size: Height and width of the map for which the position embeddings are made.
        **dd: Device and dtype of the parameters.
    """

    def __init__(self, in_chans: int, dim: int, patch_size: int, size: tuple[int, int], **dd: Any) -> None:
        super().__init__()
        self.patch_size, self.size = patch_size, size
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size, **dd)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim, **dd))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + size[0] * size[1], dim, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw a new class token and new position embeddings."""
        trunc_normal_(self.cls_token, std=0.02)
        trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens `[B, 1 + N, C]` of images `[B, in_chans, height, width]`."""
        x = checked_image(x, self.proj.in_channels)
        x = F.pad(x, [0, -x.shape[3] % self.patch_size, 0, -x.shape[2] % self.patch_size])
        x = self.proj(x).permute(0, 2, 3, 1)
        x = x + resized_positions(self.pos_embed[:, 1:], self.size, (x.shape[1], x.shape[2]), "bicubic")
        token = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
        return torch.cat([token, x.flatten(1, 2)], 1)


@register_notrace_module
class TokenAttention(nn.Module):
    """Softmax attention over all tokens. It takes the map's size as agent attention does, and does not use it."""

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool = True, proj_drop: float = 0.0, **dd: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the attended tokens `[B, N, C]`."""
        q, k, v = self.qkv(x).unflatten(2, [3, self.num_heads, -1]).unbind(2)
        return self.proj_drop(self.proj(attend_densely(q, k, v).flatten(2)))


class TokenBlock(nn.Module):
    """Attention and an MLP, each after a norm, on the tokens of a map.

    Args:
        dim: Channels C.
        attn: Turns tokens and the map's size into tokens.
        mlp_ratio: Hidden channels of the MLP over C.
        proj_drop: Dropout of the MLP.
        drop_path: Share of the samples that skip a branch in training.
        **dd: Device and dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        *,
        mlp_ratio: float = 4.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = attn
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Return tokens of the shape of `x`."""
        if self.grad_checkpointing and not torch.jit.is_scripting():  # type: ignore[attr-defined]
            return checkpoint(self._forward, x, size)
        return self._forward(x, size)

    def _forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x = x + self.drop_path1(self.attn(self.norm1(x), size))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class TokenPool(nn.Module):
    """Pools tokens `[B, 1 + N, C]`: 'token' takes the class token, 'avg' and 'max' pool the others, '' does nothing."""

    def __init__(self, pool_type: str) -> None:
        super().__init__()
        if pool_type not in ("token", "avg", "max", "avgmax", ""):
            raise ValueError(f"global_pool must be 'token', 'avg', 'max', 'avgmax' or '', got {pool_type!r}")
        self.pool_type = pool_type

    def forward(self, x: Tensor) -> Tensor:
        """Return `[B, C]`."""
        return global_pool_nlc(x, pool_type=self.pool_type, num_prefix_tokens=1)


class TokenHead(nn.Module):
    """timm's `ClassifierHead` for tokens.

    Args:
        in_features: Channels C.
        num_classes: Classes; 0 for no classifier.
        pool_type: How tokens are pooled, see `TokenPool`.
        drop_rate: Dropout before the classifier.
        **dd: Device and dtype of the parameters.
    """

    def __init__(
        self, in_features: int, num_classes: int, pool_type: str = "token", drop_rate: float = 0.0, **dd: Any
    ) -> None:
        super().__init__()
        self.global_pool = TokenPool(pool_type)
        self.drop = nn.Dropout(drop_rate)
        self.fc: nn.Module = nn.Identity()
        self.in_features = self.num_features = in_features
        self.reset(num_classes, **dd)

    def reset(
        self, num_classes: int, pool_type: str | None = None, *, in_features: int | None = None, **dd: Any
    ) -> None:
        """Replace the classifier; None keeps the pooling or the channels."""
        if pool_type is not None:
            self.global_pool = TokenPool(pool_type)
        self.in_features = self.num_features = in_features or self.in_features
        self.fc = nn.Linear(self.in_features, num_classes, **dd) if num_classes else nn.Identity()
        self.train(self.training)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool tokens and, without `pre_logits`, classify them."""
        x = self.drop(self.global_pool(x))
        return x if pre_logits else self.fc(x)


class TokenBackbone(PositionedBackbone):
    """Blocks on a class token and patches of one size; the output of each block is a feature.

    Args:
        attns: The attention of each block: turns tokens and the map's size into tokens.
        img_size: Height and width of the images, or one number for both, for which position embeddings are made.
        patch_size: Pixels per side of a patch.
        in_chans: Channels of an image.
        num_classes: Classes of the head; 0 for no classifier.
        global_pool: How the last tokens are pooled; 'token' takes the class token.
        embed_dim: Channels.
        mlp_ratio: Hidden channels of an MLP over `embed_dim`.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout of MLP outputs.
        drop_path_rate: Share of samples that skip a branch in the last block; it rises linearly from 0 in the first.
        **dd: Device and dtype of the parameters.
    """

    def __init__(  # noqa: PLR0913 - timm builds models from flat arguments
        self,
        attns: Sequence[nn.Module],
        *,
        img_size: int | tuple[int, int],
        patch_size: int,
        in_chans: int,
        num_classes: int,
        global_pool: str,
        embed_dim: int,
        mlp_ratio: float,
        drop_rate: float,
        proj_drop_rate: float,
        drop_path_rate: float,
        **dd: Any,
    ) -> None:
        rates = calculate_drop_path_rates(drop_path_rate, len(attns))
        options: dict[str, Any] = dict(mlp_ratio=mlp_ratio, proj_drop=proj_drop_rate, **dd)
        super().__init__(
            TokenEmbed(in_chans, embed_dim, patch_size, map_size(img_size, patch_size), **dd),
            [TokenBlock(embed_dim, a, drop_path=rate, **options) for a, rate in zip(attns, rates, strict=True)],
            nn.LayerNorm(embed_dim, eps=1e-6, **dd),
            TokenHead(embed_dim, num_classes, global_pool, drop_rate, **dd),
            in_chans=in_chans,
            num_classes=num_classes,
            levels=[(embed_dim, patch_size)] * len(attns),
            output_fmt="NLC",
        )
        self.patch_size, self.num_prefix_tokens = patch_size, 1
        self.stages: Any = nn.ModuleList(self.stages)  # a Sequential would not pass the map's size to the blocks

    def map_size_of(self, x: Tensor) -> tuple[int, int]:
        """Return height and width of the map of images."""
        side = self.patch_size
        return (x.shape[2] + side - 1) // side, (x.shape[3] + side - 1) // side

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last tokens `[B, 1 + N, C]` of images `[B, in_chans, height, width]`."""
        tokens = self.patch_embed(x)
        size = self.map_size_of(x)
        for block in self.stages:
            tokens = block(tokens, size)
        return self.norm(tokens)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the result of `forward_features`, and the features: see `Backbone.forward_intermediates`.

        `output_fmt` may also be 'NLC'. Features have no class token.

        Raises:
            ValueError: If `output_fmt` is unknown, or the images have a wrong number of channels.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got '{output_fmt}'")
        take, last_taken = feature_take_indices(len(self.stages), indices)
        features: list[Tensor] = []
        tokens = self.patch_embed(x)
        size = self.map_size_of(x)
        for i, block in enumerate(self.stages):
            if not stop_early or i <= last_taken:
                tokens = block(tokens, size)
                if i in take:
                    feature = (self.norm(tokens) if norm else tokens)[:, 1:]
                    if output_fmt == "NCHW":
                        feature = feature.transpose(1, 2).unflatten(2, [size[0], size[1]]).contiguous()
                    features.append(feature)
        if intermediates_only:
            return features
        return self.norm(tokens), features

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the parts that the requested features do not need: see `Backbone.prune_intermediate_layers`."""
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        self.stages = nn.ModuleList(self.stages)
        return take
