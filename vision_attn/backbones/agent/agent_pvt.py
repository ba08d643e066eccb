"""Agent-PVT: the Pyramid Vision Transformer with agent attention instead of spatial reduction.

The authors' weights (https://github.com/LeapLabTHU/Agent-Attention) load in their layout. Any image size runs: position
embeddings and biases are resized to the map. Images are cut to whole patches.

Paper: 'Agent Attention: On the Integration of Softmax and Linear Attention' - https://arxiv.org/abs/2312.08874
"""

from collections.abc import Sequence

import torch
from timm.models import generate_default_cfgs

from vision_attn.backbones.agent.attention import AgentReducedAttention
from vision_attn.backbones.leaplab import checkpoint_filter, leaplab_cfg
from vision_attn.backbones.pvt_layers import PVT_RULES, PVTBackbone
from vision_attn.backbones.registry import register

PAPER = "2312.08874"


class AgentPVT(PVTBackbone):
    """Agent attention in a pyramid of stages.

    Args:
        img_size: Height and width of the images, or one number for both, for which position embeddings and biases are
            made. Other sizes run as well.
        patch_size: Pixels per side of a patch.
        in_chans: Channels of an image.
        num_classes: Classes of the head; 0 for no classifier.
        global_pool: How the last map is pooled.
        embed_dims: Channels of each stage.
        depths: Blocks of each stage.
        num_heads: Heads of each stage.
        mlp_ratios: Hidden channels of an MLP over its channels, of each stage.
        attn_types: A letter per stage: 'A' agent attention, 'B' softmax attention.
        agent_nums: Agents of each stage, square numbers.
        agent_sr_ratios: Reduction of the keys' map per side under agent attention, of each stage.
        sr_ratios: Reduction of the keys' map per side under softmax attention, of each stage.
        agent_grids: Rows and columns of the agents of each stage; if None, the square roots of `agent_nums`.
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
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        attn_types: str = "AAAA",
        agent_nums: Sequence[int] = (9, 16, 49, 49),
        agent_sr_ratios: Sequence[int] = (1, 1, 1, 1),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        agent_grids: Sequence[tuple[int, int]] | None = None,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not len(agent_nums) == len(agent_sr_ratios) == len(embed_dims):
            given = dict(agent_nums=agent_nums, agent_sr_ratios=agent_sr_ratios)
            raise ValueError(f"there must be one value per stage of embed_dims={embed_dims}, got {given}")

        def attend(stage: int, size: tuple[int, int]) -> AgentReducedAttention:
            return AgentReducedAttention(
                embed_dims[stage], num_heads[stage], agent_nums[stage], size, sr_ratio=agent_sr_ratios[stage],
                agent_grid=None if agent_grids is None else agent_grids[stage], qkv_bias=qkv_bias,
                proj_drop=proj_drop_rate, device=device, dtype=dtype,
            )  # fmt: skip

        super().__init__(
            attend, attn_types, "AB", img_size=img_size, patch_size=patch_size, in_chans=in_chans,
            num_classes=num_classes, global_pool=global_pool, embed_dims=embed_dims, depths=depths, num_heads=num_heads,
            mlp_ratios=mlp_ratios, sr_ratios=sr_ratios, qkv_bias=qkv_bias, drop_rate=drop_rate,
            proj_drop_rate=proj_drop_rate, drop_path_rate=drop_path_rate, device=device, dtype=dtype,
        )  # fmt: skip


default_cfgs = generate_default_cfgs(
    {
        "agent_pvt_tiny.leaplab_in1k": leaplab_cfg(PAPER, "13fdf0e0a7c5498c934f"),
        "agent_pvt_small.leaplab_in1k": leaplab_cfg(PAPER, "36b8be9a8863456685a3"),
        "agent_pvt_medium.leaplab_in1k": leaplab_cfg(PAPER, "4d00ecacf18b45f9b88c"),
        "agent_pvt_medium_256.leaplab_in1k": leaplab_cfg(PAPER, "654df734121643b19c52", 256),
        "agent_pvt_large.leaplab_in1k": leaplab_cfg(PAPER, "040cfe0cfbbe4762ad09"),
    }
)

_MEDIUM = dict(depths=(3, 4, 18, 3), drop_path_rate=0.3)

register(
    __name__,
    AgentPVT,
    dict(
        agent_pvt_tiny=dict(depths=(2, 2, 2, 2)),
        agent_pvt_small=dict(depths=(3, 4, 6, 3)),
        agent_pvt_medium=_MEDIUM,
        agent_pvt_medium_256=_MEDIUM | dict(img_size=256),
        agent_pvt_large=dict(depths=(3, 8, 27, 3), drop_path_rate=0.3),
    ),
    checkpoint_filter(PVT_RULES),
    out_indices=(0, 1, 2, 3),
    flatten_sequential=True,
)
