"""Agent-DeiT: a vision transformer with a class token and agent attention in some or all blocks.

The authors' weights (https://github.com/LeapLabTHU/Agent-Attention) load in their layout. Any image size runs:
position embeddings and biases are resized to the map.

Paper: 'Agent Attention: On the Integration of Softmax and Linear Attention' - https://arxiv.org/abs/2312.08874
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import calculate_drop_path_rates
from timm.models import generate_default_cfgs
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from vision_attn.backbones.agent.attention import AgentSelfAttention
from vision_attn.backbones.agent.family import AgentBackbone, agent_cfg, checkpoint_filter
from vision_attn.backbones.blocks import map_size
from vision_attn.backbones.checkpoints import Rule
from vision_attn.backbones.registry import register
from vision_attn.backbones.token_layers import TokenAttention, TokenBlock, TokenEmbed, TokenHead

AGENTS_OF_BLOCKS = (0, 0, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3)  # the twelve blocks are treated as four stages


class AgentDeiT(AgentBackbone):
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
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        with_agents = depth if agent_layers is None else min(agent_layers, depth)
        if with_agents > len(AGENTS_OF_BLOCKS) or len(agent_nums) != 4:
            raise ValueError(
                f"agent_nums must be four numbers, of blocks 1-2, 3-4, 5-10 and 11-12, got {agent_nums} for "
                f"{with_agents} blocks with agents"
            )
        height, width = map_size(img_size, patch_size)
        options: dict[str, Any] = dict(qkv_bias=qkv_bias, proj_drop=proj_drop_rate, **dd)
        blocks = []
        for i, skip in enumerate(calculate_drop_path_rates(drop_path_rate, depth)):
            attn: nn.Module
            if i < with_agents:
                agents = agent_nums[AGENTS_OF_BLOCKS[i]]
                attn = AgentSelfAttention(embed_dim, num_heads, agents, (height, width), class_token=True, **options)
            else:
                attn = TokenAttention(embed_dim, num_heads, **options)
            blocks.append(
                TokenBlock(embed_dim, attn, mlp_ratio=mlp_ratio, proj_drop=proj_drop_rate, drop_path=skip, **dd)
            )
        super().__init__(
            TokenEmbed(in_chans, embed_dim, patch_size, (height, width), **dd),
            blocks,
            nn.LayerNorm(embed_dim, eps=1e-6, **dd),
            TokenHead(embed_dim, num_classes, global_pool, drop_rate, **dd),
            in_chans=in_chans,
            num_classes=num_classes,
            levels=[(embed_dim, patch_size)] * depth,
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


RULES: tuple[Rule, ...] = (
    (r"^(cls_token|pos_embed)$", r"patch_embed.\1"),
    (r"^blocks\.", "stages."),
)

default_cfgs = generate_default_cfgs(
    {
        "agent_deit_tiny.leaplab_in1k": agent_cfg("57e0904221824ee7b7af", pool_size=None),
        "agent_deit_small.leaplab_in1k": agent_cfg("fdd43304372541db8ea7", pool_size=None),
        "agent_deit_small_448.leaplab_in1k": agent_cfg("a228f86241c445f1969b", 448, pool_size=None),
        "agent_deit_base.leaplab_in1k": agent_cfg("5115f15fdd7e4ab58fbc", pool_size=None),
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
    checkpoint_filter(RULES),
    out_indices=3,
    feature_cls="getter",
)
