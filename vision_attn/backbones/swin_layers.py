"""Swin with another attention in its first stages, and its parts: shifted windows, and windows that are shifted.

Paper: 'Swin Transformer' - https://arxiv.org/abs/2103.14030
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import calculate_drop_path_rates
from timm.models import checkpoint, register_notrace_module
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock
from torch import Tensor, nn

from vision_attn.backbones.blocks import PreNormBlock, Stage, last_layers, levels_of, map_size, patches
from vision_attn.backbones.checkpoints import Rule
from vision_attn.backbones.leaplab import PositionedBackbone

SWIN_RULES: tuple[Rule, ...] = (
    (r"^layers\.(\d+)\.downsample\.", lambda match: f"stages.{int(match[1]) + 1}.downsample."),
    (r"^layers\.", "stages."),
)


@register_notrace_module
class ShiftedWindowBlock(SwinTransformerBlock):
    """timm's block of Swin for maps of any size, with gradient checkpointing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, dynamic_mask=True, **kwargs)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Return a map `[B, height, width, C]` of the shape of `x`."""
        if self.grad_checkpointing and not torch.jit.is_scripting():  # type: ignore[attr-defined]
            return checkpoint(self._forward, x)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self._attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


def block_types(attn_types: str, depths: Sequence[int], letters: str = "AB") -> list[str]:
    """Return the letters of the blocks of each stage: by default 'A' agent attention, 'B' windows.

    Args:
        attn_types: A letter per stage: 'A', 'B', or 'M', whose first blocks are 'A' and the others 'B'. A number at the
            end says how many are 'A': 'AAMB2'.
        depths: Blocks of each stage.
        letters: What stands for 'A' and 'B' in a family.

    Raises:
        ValueError: If the number of letters is wrong or a letter is unknown.
    """
    own, other = letters[0], letters[1]
    found = re.fullmatch(rf"([{own}{other}M]+)(\d*)", attn_types)
    if found is None or len(found[1]) != len(depths) or ("M" in found[1]) != bool(found[2]):
        raise ValueError(
            f"attn_types must be {len(depths)} letters {own}, {other} or M, a number after them for M: {attn_types!r}"
        )
    mixed = int(found[2] or 0)
    return [
        own * min(mixed, depth) + other * max(0, depth - mixed) if letter == "M" else letter * depth
        for letter, depth in zip(found[1], depths, strict=True)
    ]


class RolledAttention(nn.Module):
    """Attention inside windows that may be shifted; subclasses say how in `attend`.

    Args:
        window: Height and width of windows inside which tokens attend; None for the whole map.

    Attributes:
        shift: Whether windows that are smaller than the map are shifted by half a window, cyclically.
    """

    def __init__(self, window: tuple[int, int] | None) -> None:
        super().__init__()
        self.window, self.shift = window, False

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Return the attended tokens, of the shape of `x`.

        Args:
            x: A map `[B, height, width, C]`, or the tokens `[B, N, C]` of a map of `size`.
            size: Height and width of the map whose tokens `x` is; None if `x` is a map.
        """
        shape = x.shape
        if self.window is not None and self.shift and size is None:
            move = [-(w // 2) if w < s else 0 for w, s in zip(self.window, (shape[1], shape[2]), strict=True)]
            return self.attend(x.roll(move, (1, 2))).roll([-m for m in move], (1, 2))
        return self.attend(x, size)

    def attend(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Return what `forward` does for windows at their place."""
        raise NotImplementedError

    def cell(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return height and width of a window in a map of `size`."""
        if self.window is None:
            return size
        return min(self.window[0], size[0]), min(self.window[1], size[1])


class SwinBackbone(PositionedBackbone):
    """Swin with another attention in some blocks.

    Args:
        attend: Makes this attention: from the number of a stage, its channels, its map's height and width, and those of
            a window, None for the whole map.
        types: Letters of the blocks of each stage.
        own: The letter of this attention; the others stand for shifted windows.
        img_size: Height and width of the images, or one number for both, for which biases are made.
        patch_size: Pixels per side of a patch.
        in_chans: Channels of an image.
        num_classes: Classes of the head; 0 for no classifier.
        global_pool: How the last map is pooled.
        embed_dim: Channels of the first stage.
        num_heads: Heads of each stage.
        window_size: Side of the other attention's windows in cells; a map that is not larger for `img_size` is one
            window. Shifted windows have an eighth of it as their side, but at least 7.
        mlp_ratio: Hidden channels of an MLP over its channels.
        qkv_bias: Whether queries, keys and values have a bias.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout of attention and MLP outputs.
        drop_path_rate: Share of samples that skip a branch in the last block; it rises linearly from 0 in the first.
        **dd: Device and dtype of the parameters.
    """

    def __init__(  # noqa: PLR0913 - timm builds models from flat arguments
        self,
        attend: Callable[[int, int, tuple[int, int], tuple[int, int] | None], RolledAttention],
        types: Sequence[str],
        own: str,
        *,
        img_size: int | tuple[int, int],
        patch_size: int,
        in_chans: int,
        num_classes: int,
        global_pool: str,
        embed_dim: int,
        num_heads: Sequence[int],
        window_size: int,
        mlp_ratio: float,
        qkv_bias: bool,
        drop_rate: float,
        proj_drop_rate: float,
        drop_path_rate: float,
        **dd: Any,
    ) -> None:
        dims = [embed_dim * 2**i for i in range(len(types))]
        skips = iter(calculate_drop_path_rates(drop_path_rate, sum(map(len, types))))
        options: dict[str, Any] = dict(mlp_ratio=mlp_ratio, proj_drop=proj_drop_rate)
        stages = []
        for i, letters in enumerate(types):
            size = map_size(img_size, patch_size * 2**i)
            window = None if window_size >= max(size) else (window_size, window_size)
            blocks: list[nn.Module] = []
            for j, letter in enumerate(letters):
                if letter == own:
                    attn = attend(i, dims[i], size, window)
                    attn.shift = j % 2 == 1
                    blocks.append(PreNormBlock(dims[i], attn, drop_path=next(skips), **options, **dd))
                else:
                    side = max(7, window_size // 8)
                    place = (dims[i], size, num_heads[i], None, side, side // 2 * (j % 2))
                    blocks.append(ShiftedWindowBlock(*place, qkv_bias=qkv_bias, drop_path=next(skips), **options, **dd))
            stages.append(Stage(PatchMerging(dims[i - 1], **dd) if i else nn.Identity(), blocks))
        super().__init__(
            patches(in_chans, embed_dim, patch_size, **dd),
            stages,
            *last_layers(dims[-1], num_classes, global_pool, drop_rate, **dd),
            in_chans=in_chans,
            num_classes=num_classes,
            levels=levels_of(dims, patch_size),
        )
