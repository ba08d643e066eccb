"""Agent-Swin: Swin with agent attention over the whole map in its first stages, shifted windows in its last.

The authors' weights (https://github.com/LeapLabTHU/Agent-Attention) load in their layout. Any image size runs: the
agents' biases are resized to the map, and shifted windows pad it to whole windows.

Paper: 'Agent Attention: On the Integration of Softmax and Linear Attention' - https://arxiv.org/abs/2312.08874
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import calculate_drop_path_rates
from timm.models import checkpoint, generate_default_cfgs, register_notrace_module
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock
from torch import Tensor, nn

from vision_attn.backbones.agent.attention import AgentSelfAttention
from vision_attn.backbones.agent.family import AgentBackbone, agent_cfg, checkpoint_filter
from vision_attn.backbones.blocks import PreNormBlock, Stage, last_layers, levels_of, map_size, patches
from vision_attn.backbones.checkpoints import Rule
from vision_attn.backbones.registry import register


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


def block_types(attn_types: str, depths: Sequence[int]) -> list[str]:
    """Return the letters of the blocks of each stage: 'A' agent attention, 'B' windows.

    Args:
        attn_types: A letter per stage: 'A', 'B', or 'M', whose first blocks are 'A' and the others 'B'. A number at the
            end says how many are 'A': 'AAMB2'.
        depths: Blocks of each stage.

    Raises:
        ValueError: If the number of letters is wrong or a letter is unknown.
    """
    found = re.fullmatch(r"([ABM]+)(\d*)", attn_types)
    if found is None or len(found[1]) != len(depths) or ("M" in found[1]) != bool(found[2]):
        raise ValueError(
            f"attn_types must be {len(depths)} letters A, B or M, a number after them for M: {attn_types!r}"
        )
    mixed = int(found[2] or 0)
    return [
        "A" * min(mixed, depth) + "B" * max(0, depth - mixed) if letter == "M" else letter * depth
        for letter, depth in zip(found[1], depths, strict=True)
    ]


class AgentSwin(AgentBackbone):
    """Agent attention and shifted windows in stages.

    Args:
        img_size: Height and width of the images, or one number for both, for which the biases are made. Other sizes
            run as well.
        patch_size: Pixels per side of a patch.
        in_chans: Channels of an image.
        num_classes: Classes of the head; 0 for no classifier.
        global_pool: How the last map is pooled.
        embed_dim: Channels of the first stage.
        depths: Blocks of each stage.
        num_heads: Heads of each stage.
        window_size: Side of the windows of agent attention in cells; a map that is not larger for `img_size` is one
            window. Shifted windows have an eighth of it as their side, but at least 7.
        attn_types: A letter per stage, see `block_types`.
        agent_nums: Agents of each stage, square numbers.
        agent_grids: Rows and columns of the agents of each stage; if None, the square roots of `agent_nums`.
        mlp_ratio: Hidden channels of an MLP over its channels.
        qkv_bias: Whether queries, keys and values have a bias.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout of attention and MLP outputs.
        drop_path_rate: Share of samples that skip a branch in the last block; it rises linearly from 0 in the first.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        ValueError: If the arguments have different numbers of stages, or a value is unknown.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - timm builds models from flat arguments
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 56,
        attn_types: str = "AAAB",
        agent_nums: Sequence[int] = (9, 16, 49, 49),
        agent_grids: Sequence[tuple[int, int]] | None = None,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        if not len(depths) == len(num_heads) == len(agent_nums):
            raise ValueError(
                f"depths, num_heads and agent_nums must fit each other, got depths={depths}, num_heads={num_heads}, "
                f"agent_nums={agent_nums}"
            )
        dims = [embed_dim * 2**i for i in range(len(depths))]
        skips = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        stages = []
        for i, types in enumerate(block_types(attn_types, depths)):
            height, width = map_size(img_size, patch_size * 2**i)
            window = None if window_size >= max(height, width) else (window_size, window_size)
            agents: dict[str, Any] = dict(agent_grid=None if agent_grids is None else agent_grids[i], window=window)
            same = dict(qkv_bias=qkv_bias, proj_drop=proj_drop_rate, **dd)
            options: dict[str, Any] = dict(mlp_ratio=mlp_ratio, proj_drop=proj_drop_rate)
            blocks: list[nn.Module] = []
            for j, letter in enumerate(types):
                if letter == "A":
                    size = (min(height, window_size), min(width, window_size))
                    attn = AgentSelfAttention(dims[i], num_heads[i], agent_nums[i], size, **agents, **same)
                    attn.shift = j % 2 == 1
                    blocks.append(PreNormBlock(dims[i], attn, drop_path=next(skips), **options, **dd))
                else:
                    side = max(7, window_size // 8)
                    place = (dims[i], (height, width), num_heads[i], None, side, side // 2 * (j % 2))
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


RULES: tuple[Rule, ...] = (
    (r"^layers\.(\d+)\.downsample\.", lambda match: f"stages.{int(match[1]) + 1}.downsample."),
    (r"^layers\.", "stages."),
)

default_cfgs = generate_default_cfgs(
    {
        "agent_swin_tiny.leaplab_in1k": agent_cfg("a2ddc1190c224f768a41"),
        "agent_swin_small.leaplab_in1k": agent_cfg("f607172c9fea4d6e99bb"),
        "agent_swin_small_288.leaplab_in1k": agent_cfg("09760394e93b4046a25e", 288, 1.0),
        "agent_swin_base.leaplab_in1k": agent_cfg("4fcd2d0114bb490483c3"),
        "agent_swin_base_384.leaplab_in1k": agent_cfg("bb84ee9058954706a557", 384, 1.0),
    }
)

_SMALL = dict(depths=(2, 2, 18, 2), attn_types="AABB", drop_path_rate=0.3)
_BASE = dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), attn_types="AAMB2", drop_path_rate=0.5)

register(
    __name__,
    AgentSwin,
    dict(
        agent_swin_tiny={},
        agent_swin_small=_SMALL,
        agent_swin_small_288=_SMALL | dict(img_size=288, window_size=72),
        agent_swin_base=_BASE,
        agent_swin_base_384=_BASE | dict(img_size=384, window_size=96),
    ),
    checkpoint_filter(RULES),
    out_indices=(0, 1, 2, 3),
    flatten_sequential=True,
)
