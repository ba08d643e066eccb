"""Agent-DeiT: a vision transformer with a class token and agent attention in some or all blocks.

The authors' weights (https://github.com/LeapLabTHU/Agent-Attention) load in their layout. Any image size runs:
position embeddings and biases are resized to the map.

Paper: 'Agent Attention: On the Integration of Softmax and Linear Attention' - https://arxiv.org/abs/2312.08874
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import generate_default_cfgs

from vision_attn.backbones.agent.attention import AgentSelfAttention
from vision_attn.backbones.blocks import map_size
from vision_attn.backbones.leaplab import checkpoint_filter, leaplab_cfg
from vision_attn.backbones.registry import register
from vision_attn.backbones.token_layers import TOKEN_RULES, TokenAttention, TokenBackbone

PAPER = "2312.08874"
AGENTS_OF_BLOCKS = (0, 0, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3)  # the twelve blocks are treated as four stages


class AgentDeiT(TokenBackbone):
    """Agent attention on a class token and patches of one size; the output of each block is a feature.

    Args:
        img_size: Height and width of the images, or one number for both, for which position embeddings and biases are
            made. Other sizes run as well.
        patch_size: Pixels per side of a patch.
        in_chans: Channels of an image.
        num_classes: Classes of the head; 0 for no classifier.
        global_pool: How the last tokens are pooled; 'token' takes the class token.
        embed_dim: Channels.
        depth: Blocks.
        num_heads: Heads.
        agent_nums: Agents of blocks 1-2, 3-4, 5-10 and 11-12, square numbers.
        agent_layers: Number of blocks with agent attention, from the first on; None for all.
        mlp_ratio: Hidden channels of an MLP over `embed_dim`.
        qkv_bias: Whether queries, keys and values have a bias.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout of attention and MLP outputs.
        drop_path_rate: Share of samples that skip a branch in the last block; it rises linearly from 0 in the first.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        ValueError: If more than twelve blocks have agents.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - timm builds models from flat arguments
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        agent_nums: Sequence[int] = (49, 49, 49, 49),
        agent_layers: int | None = None,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        with_agents = depth if agent_layers is None else min(agent_layers, depth)
        if with_agents > len(AGENTS_OF_BLOCKS) or len(agent_nums) != 4:
            raise ValueError(
                f"agent_nums must be four numbers, of blocks 1-2, 3-4, 5-10 and 11-12, got {agent_nums} for "
                f"{with_agents} blocks with agents"
            )
        size = map_size(img_size, patch_size)
        options: dict[str, Any] = dict(qkv_bias=qkv_bias, proj_drop=proj_drop_rate, device=device, dtype=dtype)
        attns = [
            AgentSelfAttention(embed_dim, num_heads, agent_nums[AGENTS_OF_BLOCKS[i]], size, class_token=True, **options)
            if i < with_agents
            else TokenAttention(embed_dim, num_heads, **options)
            for i in range(depth)
        ]
        super().__init__(
            attns, img_size=img_size, patch_size=patch_size, in_chans=in_chans, num_classes=num_classes,
            global_pool=global_pool, embed_dim=embed_dim, mlp_ratio=mlp_ratio, drop_rate=drop_rate,
            proj_drop_rate=proj_drop_rate, drop_path_rate=drop_path_rate, device=device, dtype=dtype,
        )  # fmt: skip


default_cfgs = generate_default_cfgs(
    {
        "agent_deit_tiny.leaplab_in1k": leaplab_cfg(PAPER, "57e0904221824ee7b7af", pool_size=None),
        "agent_deit_small.leaplab_in1k": leaplab_cfg(PAPER, "fdd43304372541db8ea7", pool_size=None),
        "agent_deit_small_448.leaplab_in1k": leaplab_cfg(PAPER, "a228f86241c445f1969b", 448, pool_size=None),
        "agent_deit_base.leaplab_in1k": leaplab_cfg(PAPER, "5115f15fdd7e4ab58fbc", pool_size=None),
    }
)

_SMALL = dict(embed_dim=384, num_heads=6, drop_path_rate=0.1)

register(
    __name__,
    AgentDeiT,
    dict(
        agent_deit_tiny={},
        agent_deit_small=_SMALL,
        agent_deit_small_448=_SMALL | dict(img_size=448),
        agent_deit_base=dict(embed_dim=768, num_heads=12, agent_nums=(81,) * 4, agent_layers=4, drop_path_rate=0.3),
    ),
    checkpoint_filter(TOKEN_RULES),
    out_indices=3,
    feature_cls="getter",
)
