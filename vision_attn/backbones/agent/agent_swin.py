"""Agent-Swin: Swin with agent attention over the whole map in its first stages, shifted windows in its last.

The authors' weights (https://github.com/LeapLabTHU/Agent-Attention) load in their layout. Any image size runs: the
agents' biases are resized to the map, and shifted windows pad it to whole windows.

Paper: 'Agent Attention: On the Integration of Softmax and Linear Attention' - https://arxiv.org/abs/2312.08874
"""

from collections.abc import Sequence

import torch
from timm.models import generate_default_cfgs

from vision_attn.backbones.agent.attention import AgentSelfAttention
from vision_attn.backbones.leaplab import checkpoint_filter, leaplab_cfg
from vision_attn.backbones.registry import register
from vision_attn.backbones.swin_layers import SWIN_RULES, SwinBackbone, block_types

PAPER = "2312.08874"


class AgentSwin(SwinBackbone):
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
        if not len(depths) == len(num_heads) == len(agent_nums):
            raise ValueError(
                f"depths, num_heads and agent_nums must fit each other, got depths={depths}, num_heads={num_heads}, "
                f"agent_nums={agent_nums}"
            )

        def attend(stage: int, dim: int, size: tuple[int, int], window: tuple[int, int] | None) -> AgentSelfAttention:
            cells = (min(size[0], window_size), min(size[1], window_size))
            return AgentSelfAttention(
                dim, num_heads[stage], agent_nums[stage], cells, window=window,
                agent_grid=None if agent_grids is None else agent_grids[stage], qkv_bias=qkv_bias,
                proj_drop=proj_drop_rate, device=device, dtype=dtype,
            )  # fmt: skip

        super().__init__(
            attend, block_types(attn_types, depths), "A", img_size=img_size, patch_size=patch_size, in_chans=in_chans,
            num_classes=num_classes, global_pool=global_pool, embed_dim=embed_dim, num_heads=num_heads,
            window_size=window_size, mlp_ratio=mlp_ratio, qkv_bias=qkv_bias, drop_rate=drop_rate,
            proj_drop_rate=proj_drop_rate, drop_path_rate=drop_path_rate, device=device, dtype=dtype,
        )  # fmt: skip


default_cfgs = generate_default_cfgs(
    {
        "agent_swin_tiny.leaplab_in1k": leaplab_cfg(PAPER, "a2ddc1190c224f768a41"),
        "agent_swin_small.leaplab_in1k": leaplab_cfg(PAPER, "f607172c9fea4d6e99bb"),
        "agent_swin_small_288.leaplab_in1k": leaplab_cfg(PAPER, "09760394e93b4046a25e", 288, 1.0),
        "agent_swin_base.leaplab_in1k": leaplab_cfg(PAPER, "4fcd2d0114bb490483c3"),
        "agent_swin_base_384.leaplab_in1k": leaplab_cfg(PAPER, "bb84ee9058954706a557", 384, 1.0),
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
    checkpoint_filter(SWIN_RULES),
    out_indices=(0, 1, 2, 3),
    flatten_sequential=True,
)
