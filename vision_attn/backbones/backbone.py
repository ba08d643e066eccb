"""The frame that all families share: patch embedding, stages, norm and head, and timm's conventions over them."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import ClassifierHead, get_device_dtype
from timm.models import named_apply, register_notrace_function
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import get_init_weights_vit
from torch import Tensor, nn


@register_notrace_function
def checked_image(x: Tensor, in_chans: int, cut: int = 1) -> Tensor:
    """Return the images, cut to a multiple, or refuse what is no batch of images with that many channels."""
    if x.dim() != 4 or x.shape[1] != in_chans or x.numel() == 0:
        raise ValueError(f"images must be [B, {in_chans}, height, width] and not empty, got shape {list(x.shape)}")
    if cut == 1:
        return x
    return x[:, :, : max(cut, x.shape[2] // cut * cut), : max(cut, x.shape[3] // cut * cut)]


class Backbone(nn.Module):
    """An image classifier whose parts a family builds, and which timm's tools can use.

    A family's constructor builds the parts as plain variables and hands them to this one. A module that owns a
    gradient checkpoint has an attribute `grad_checkpointing`; a module that owns bare parameters has a
    `reset_parameters`. Any height and width may come in.

    Args:
        patch_embed: From images `[B, in_chans, height, width]` to a map in `output_fmt`.
        stages: From map to map; the output of each is a feature.
        norm: Of the last map.
        head: Pools a map and classifies it.
        in_chans: Channels of an image.
        num_classes: Classes of the head, 0 for none.
        levels: Channels and reduction (pixels per side of a map's cell) of each feature.
        output_fmt: Format of the maps, 'NHWC' or 'NCHW'.
        cut: Pixels that height and width are cut to multiples of, where they are more; 1 for not at all.
    """

    def __init__(
        self,
        patch_embed: nn.Module,
        stages: Sequence[nn.Module],
        norm: nn.Module,
        head: ClassifierHead,
        *,
        in_chans: int,
        num_classes: int,
        levels: Sequence[tuple[int, int]],
        output_fmt: str = "NHWC",
        cut: int = 1,
    ) -> None:
        super().__init__()
        self.in_chans, self.num_classes, self.output_fmt, self.cut = in_chans, num_classes, output_fmt, cut
        self.patch_embed = patch_embed
        self.stages = nn.Sequential(*stages)
        self.norm = norm
        self.head = head
        self.global_pool = head.global_pool.pool_type
        self.num_features, self.head_hidden_size = head.in_features, head.num_features
        self.feature_info: list[dict[str, Any]] = [
            dict(num_chs=channels, reduction=reduction, module=f"stages.{i}")
            for i, (channels, reduction) in enumerate(levels)
        ]
        # One width throughout: the norm fits every feature, as in a plain vision transformer.
        self.isotropic = len(stages) > 1 and len(set(levels)) == 1
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialize linear layers like a vision transformer's; with `needs_reset` everything else anew as well."""
        named_apply(get_init_weights_vit("", needs_reset=needs_reset), self)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the parameters that are not decayed: position biases."""
        return {name for name, _ in self.named_parameters() if name.endswith("rpb")}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        """Return the patterns that order parameters by depth: a group per stage, or per block."""
        blocks = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        if coarse or self.isotropic:
            blocks = [(r"^stages\.(\d+)", None)]
        return dict(stem=r"^patch_embed", blocks=[*blocks, (r"^norm", (99999,))])

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the inputs of blocks for the backward pass, and compute the rest again."""
        for module in self.modules():
            if hasattr(module, "grad_checkpointing"):
                module.grad_checkpointing = enable  # type: ignore[assignment]

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the last layer, an identity without classes."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new last layer in place.

        Args:
            num_classes: Classes, 0 for none.
            global_pool: How maps are pooled ('avg', 'max', ..., '' for not at all); None leaves it as it is.
        """
        self.num_classes = num_classes
        self.head.reset(num_classes, pool_type=global_pool, in_features=self.num_features, **get_device_dtype(self))
        self.head_hidden_size = self.head.num_features
        if global_pool is not None:
            self.global_pool = global_pool

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return what `forward_features` does, and the features on the way.

        Args:
            x: Images `[B, in_chans, height, width]`.
            indices: Which features: the last n, a list, or None for all.
            norm: Whether the final norm is applied to features that it fits.
            stop_early: Whether stages after the last feature asked for are left out.
            output_fmt: 'NCHW', the only format of features.
            intermediates_only: Whether features alone are returned.

        Returns:
            Features `[B, C, height, width]`, preceded by the last map unless `intermediates_only`.

        Raises:
            ValueError: If `output_fmt` is another one, or the images have another number of channels.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got '{output_fmt}'")
        take, last_taken = feature_take_indices(len(self.stages), indices)
        last = len(self.stages) - 1
        features: list[Tensor] = []
        x = self.patch_embed(checked_image(x, self.in_chans, self.cut))
        fits = self.isotropic
        for i, stage in enumerate(self.stages):
            if not stop_early or i <= last_taken:
                x = stage(x)
                fits = self.isotropic or i == last
                if i in take:
                    feature = self.norm(x) if norm and fits else x
                    features.append(feature.permute(0, 3, 1, 2).contiguous() if self.output_fmt == "NHWC" else feature)
        if intermediates_only:
            return features
        return self.norm(x) if fits else x, features

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the features asked for do not need.

        Args:
            indices: Which features: the last n, or a list.
            prune_norm: Whether the final norm goes as well.
            prune_head: Whether the head goes as well; it does if stages go.

        Returns:
            The indices of the features that are left.
        """
        take, last_taken = feature_take_indices(len(self.stages), indices)
        ends_early = last_taken < len(self.stages) - 1
        self.stages = nn.Sequential(*list(self.stages)[: last_taken + 1])
        if prune_norm or (ends_early and not self.isotropic):
            self.norm = nn.Identity()
            self.num_features = self.head_hidden_size = self.feature_info[last_taken]["num_chs"]
        if prune_head or ends_early:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last map, not pooled, from images `[B, in_chans, height, width]`."""
        x = self.patch_embed(checked_image(x, self.in_chans, self.cut))
        return self.norm(self.stages(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify a map; with `pre_logits` only pool it."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits `[B, num_classes]` of images `[B, in_chans, height, width]`."""
        return self.forward_head(self.forward_features(x))
