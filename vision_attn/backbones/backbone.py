"""The frame of all families: patch embedding, stages, norm and head, with timm's conventions."""

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
    """Refuse anything but a batch of images with `in_chans` channels; cut its sides to multiples of `cut`."""
    if x.dim() != 4 or x.shape[1] != in_chans or x.numel() == 0:
        raise ValueError(f"images must be [B, {in_chans}, height, width] and not empty, got shape {list(x.shape)}")
    if cut == 1:
        return x
    return x[:, :, : max(cut, x.shape[2] // cut * cut), : max(cut, x.shape[3] // cut * cut)]


class Backbone(nn.Module):
    """An image classifier that timm's tools can use, for images of any height and width; families build its parts.

    A family's constructor builds the parts and passes them to this one. A module that can checkpoint its gradient has
    an attribute `grad_checkpointing`. A module with parameters of its own has a method `reset_parameters`.

    Args:
        patch_embed: Turns images `[B, in_chans, height, width]` into a map in `output_fmt`.
        stages: Each turns a map into a map; its output is a feature.
        norm: The norm of the last map.
        head: Pools a map and classifies it.
        in_chans: Channels of an image.
        num_classes: Classes of the head; 0 for no classifier.
        levels: Channels and reduction (pixels per side of a map's cell) of each feature.
        output_fmt: Format of the maps, such as 'NHWC' or 'NCHW'.
        cut: Height and width of an image are cut to multiples of this number of pixels; 1 cuts nothing.
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
        # All features have one width, as in a plain vision transformer, so the last norm fits each of them.
        self.isotropic = len(stages) > 1 and len(set(levels)) == 1
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialize linear layers as timm does for a vision transformer; with `needs_reset` also everything else."""
        named_apply(get_init_weights_vit("", needs_reset=needs_reset), self)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters without weight decay: position biases."""
        return {name for name, _ in self.named_parameters() if name.endswith("rpb")}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        """Return patterns that group parameters by depth: one group per stage, or per block."""
        blocks = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        if coarse or self.isotropic:
            blocks = [(r"^stages\.(\d+)", None)]
        return dict(stem=r"^patch_embed", blocks=[*blocks, (r"^norm", (99999,))])

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Store only the inputs of blocks for the backward pass, which computes the rest again."""
        for module in self.modules():
            if hasattr(module, "grad_checkpointing"):
                module.grad_checkpointing = enable  # type: ignore[assignment]

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the last layer; an identity if there are no classes."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the last layer.

        Args:
            num_classes: Classes; 0 for no classifier.
            global_pool: How maps are pooled: 'avg', 'max', ..., '' for no pooling, None for no change.
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
        """Return the result of `forward_features`, and the features of the stages.

        Args:
            x: Images `[B, in_chans, height, width]`.
            indices: Which features to return: the last n, a list, or None for all.
            norm: Apply the last norm to the features that it fits.
            stop_early: Skip the stages after the last requested feature.
            output_fmt: 'NCHW', the only format of features.
            intermediates_only: Return only the features.

        Returns:
            Features `[B, C, height, width]`, after the last map unless `intermediates_only`.

        Raises:
            ValueError: If `output_fmt` is not 'NCHW', or the images have a wrong number of channels.
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
        """Remove the parts that the requested features do not need.

        Args:
            indices: Which features to keep: the last n, or a list.
            prune_norm: Also remove the last norm.
            prune_head: Also remove the head; it is always removed if a stage is.

        Returns:
            The indices of the features that remain.
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
        """Return the last map of images `[B, in_chans, height, width]`, before pooling."""
        x = self.patch_embed(checked_image(x, self.in_chans, self.cut))
        return self.norm(self.stages(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool a map and, without `pre_logits`, classify it."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits `[B, num_classes]` of images `[B, in_chans, height, width]`."""
        return self.forward_head(self.forward_features(x))
