"""Agent-CSwin: agent attention over the whole map in the first stages, cross-shaped stripes in the last.

The authors' weights (https://github.com/LeapLabTHU/Agent-Attention) load in their layout; a moving average is preferred
to the raw weights. Any image size runs: the agents' biases are resized to the map.

Paper: 'Agent Attention: On the Integration of Softmax and Linear Attention' - https://arxiv.org/abs/2312.08874
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.models import generate_default_cfgs

from vision_attn.backbones.agent.attention import AgentStripeAttention
from vision_attn.backbones.cswin_layers import CSwinBackbone, stripe_filter
from vision_attn.backbones.leaplab import leaplab_cfg
from vision_attn.backbones.registry import register
from vision_attn.backbones.swin_layers import block_types

PAPER = "2312.08874"


class AgentCSwin(CSwinBackbone):
    """Agent attention and cross-shaped stripes in stages.

    Args:
        img_size: Height and width of the images, or one number for both, for which the biases are made. Other sizes
            run as well.
        patch_size: Pixels per side of a cell of the first map; the stem's windows are larger and overlap.
        in_chans: Channels of an image.
        num_classes: Classes of the head; 0 for no classifier.
        global_pool: How the last map is pooled.
        embed_dim: Channels of the first stage.
        depths: Blocks of each stage.
        num_heads: Heads of each stage.
        split_sizes: Width of the stripes of softmax attention in each stage.
        agent_split_sizes: Width of the stripes of agent attention in each stage. A stage whose map is not larger for
            `img_size`, and the last stage, attend over the whole map. Weights fit a model in which the same stages do.
        attn_types: A letter per stage: 'A' agent attention, 'B' softmax attention.
        agent_nums: Agents of each stage, square numbers.
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
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 4, 18, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        split_sizes: Sequence[int] = (1, 2, 7, 7),
        agent_split_sizes: Sequence[int] = (56, 28, 14, 7),
        attn_types: str = "AABB",
        agent_nums: Sequence[int] = (9, 16, 49, 49),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        given: dict[str, Any] = dict(num_heads=num_heads, split_sizes=split_sizes, agent_split_sizes=agent_split_sizes)
        given |= dict(attn_types=attn_types, agent_nums=agent_nums)
        if any(len(values) != len(depths) for values in given.values()) or set(attn_types) - {"A", "B"}:
            raise ValueError(f"there must be one value per stage of depths={depths}, 'A' or 'B', got {given}")
        makers = [partial(AgentStripeAttention, agent_num=agent_num) for agent_num in agent_nums]
        super().__init__(
            makers, block_types(attn_types, depths), "A", img_size=img_size, patch_size=patch_size, in_chans=in_chans,
            num_classes=num_classes, global_pool=global_pool, embed_dim=embed_dim, num_heads=num_heads,
            split_sizes=split_sizes, own_split_sizes=agent_split_sizes, mlp_ratio=mlp_ratio, qkv_bias=qkv_bias,
            drop_rate=drop_rate, proj_drop_rate=proj_drop_rate, drop_path_rate=drop_path_rate, device=device,
            dtype=dtype,
        )  # fmt: skip


default_cfgs = generate_default_cfgs(
    {
        "agent_cswin_tiny.leaplab_in1k": leaplab_cfg(PAPER, "8c562a74441e46d5902b"),
        "agent_cswin_small.leaplab_in1k": leaplab_cfg(PAPER, "30eb8af675bc4b7a8747"),
        "agent_cswin_base.leaplab_in1k": leaplab_cfg(PAPER, "c8035b0839b2410c8c9f"),
        "agent_cswin_base_384.leaplab_in1k": leaplab_cfg(PAPER, "1239be0df44b47719432", 384),
    }
)

_DEEP = (3, 6, 29, 2)
_BASE = dict(embed_dim=96, depths=_DEEP, num_heads=(4, 8, 16, 32), drop_path_rate=0.5)
_AT_384 = dict(img_size=384, split_sizes=(1, 2, 12, 12), agent_split_sizes=(96, 48, 24, 12), drop_path_rate=0.7)

register(
    __name__,
    AgentCSwin,
    dict(
        agent_cswin_tiny={},
        agent_cswin_small=dict(depths=_DEEP, drop_path_rate=0.4),
        agent_cswin_base=_BASE,
        agent_cswin_base_384=_BASE | _AT_384,
    ),
    stripe_filter("agent_split_sizes"),
    out_indices=(0, 1, 2, 3),
    flatten_sequential=True,
)
