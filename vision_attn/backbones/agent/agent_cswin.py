"""Agent-CSwin: agent attention over the whole map in the first stages, cross-shaped stripes in the last.

The authors' weights (https://github.com/LeapLabTHU/Agent-Attention) load in their layout; a moving average is preferred
to the raw weights. Any image size runs: the agents' biases are resized to the map.

Paper: 'Agent Attention: On the Integration of Softmax and Linear Attention' - https://arxiv.org/abs/2312.08874
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import calculate_drop_path_rates
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from vision_attn.backbones.agent.attention import AgentStripeAttention
from vision_attn.backbones.agent.family import AgentBackbone, agent_cfg, checkpoint_filter
from vision_attn.backbones.blocks import Stage, last_layers, levels_of, map_size
from vision_attn.backbones.checkpoints import Rule, rename, unwrap
from vision_attn.backbones.cswin_layers import ConvEmbed, CSwinBlock, NormedConv, StripeAttention, branches
from vision_attn.backbones.registry import register


class AgentCSwin(AgentBackbone):
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
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        given: dict[str, Any] = dict(num_heads=num_heads, split_sizes=split_sizes, agent_split_sizes=agent_split_sizes)
        given |= dict(attn_types=attn_types, agent_nums=agent_nums)
        if any(len(values) != len(depths) for values in given.values()) or set(attn_types) - {"A", "B"}:
            raise ValueError(f"there must be one value per stage of depths={depths}, 'A' or 'B', got {given}")
        dims = [embed_dim * 2**i for i in range(len(depths))]
        skips = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        stages = []
        for i, dim in enumerate(dims):
            height, width = map_size(img_size, patch_size * 2**i)
            has_agents = attn_types[i] == "A"
            make = partial(AgentStripeAttention, agent_num=agent_nums[i]) if has_agents else StripeAttention
            split = (agent_split_sizes if has_agents else split_sizes)[i]
            whole = i == len(dims) - 1 or (height <= split and width <= split)
            blocks = [
                CSwinBlock(
                    dim,
                    branches(make, dim, (height, width), num_heads[i], None if whole else split, **dd),
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    proj_drop=proj_drop_rate,
                    drop_path=next(skips),
                    **dd,
                )
                for _ in range(depths[i])
            ]
            stages.append(Stage(NormedConv(dims[i - 1], dim, **dd) if i else nn.Identity(), blocks))
        super().__init__(
            ConvEmbed(in_chans, embed_dim, patch_size, **dd),
            stages,
            *last_layers(dims[-1], num_classes, global_pool, drop_rate, **dd),
            in_chans=in_chans,
            num_classes=num_classes,
            levels=levels_of(dims, patch_size),
        )


RULES: tuple[Rule, ...] = (
    (r"^stage1_conv_embed\.0\.", "patch_embed.proj."),
    (r"^stage1_conv_embed\.2\.", "patch_embed.norm."),
    (r"^merge(\d)\.", r"stages.\1.downsample."),
    (r"^stage(\d)\.", lambda match: f"stages.{int(match[1]) - 1}.blocks."),
)

default_cfgs = generate_default_cfgs(
    {
        "agent_cswin_tiny.leaplab_in1k": agent_cfg("8c562a74441e46d5902b"),
        "agent_cswin_small.leaplab_in1k": agent_cfg("30eb8af675bc4b7a8747"),
        "agent_cswin_base.leaplab_in1k": agent_cfg("c8035b0839b2410c8c9f"),
        "agent_cswin_base_384.leaplab_in1k": agent_cfg("1239be0df44b47719432", 384),
    }
)

_DEEP = (3, 6, 29, 2)
_BASE = dict(embed_dim=96, depths=_DEEP, num_heads=(4, 8, 16, 32), drop_path_rate=0.5)
_AT_384 = dict(img_size=384, split_sizes=(1, 2, 12, 12), agent_split_sizes=(96, 48, 24, 12), drop_path_rate=0.7)

WRAPPERS = ("state_dict_ema", "model", "state_dict")
_filter = checkpoint_filter(RULES, WRAPPERS)


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Turn a checkpoint, of the authors or of this package, into one in the model's layout.

    Raises:
        ValueError: If the checkpoint is of another variant, or `img_size` gives the model other stripes.
    """
    _refuse_other_stripes(rename(unwrap(checkpoint, WRAPPERS), RULES), model)
    return _filter(checkpoint, model)


def _refuse_other_stripes(state_dict: Mapping[str, Tensor], model: nn.Module) -> None:
    """Refuse weights of whole maps for stripes, and of stripes for whole maps: they split channels differently."""
    for i, stage in enumerate(model.stages):  # type: ignore[arg-type]
        attns = stage.blocks[0].attns
        given = [name for name in state_dict if name.startswith(f"stages.{i}.blocks.0.attns.")]
        stripes = any(".attns.1." in name for name in given)
        if given and stripes != (len(attns) > 1):
            kinds = ("in stripes", "over the whole map")
            (height, width), most = attns[0].resolution, "below" if stripes else "at least"
            raise ValueError(
                f"stage {i + 1} of the checkpoint attends {kinds[not stripes]}, but {kinds[stripes]} in a model of "
                f"this img_size ({height} x {width} cells): use the checkpoint's img_size, other sizes run as well, "
                f"or give agent_split_sizes (for softmax attention split_sizes) {most} {max(height, width)}"
            )


register(
    __name__,
    AgentCSwin,
    dict(
        agent_cswin_tiny={},
        agent_cswin_small=dict(depths=_DEEP, drop_path_rate=0.4),
        agent_cswin_base=_BASE,
        agent_cswin_base_384=_BASE | _AT_384,
    ),
    checkpoint_filter_fn,
    out_indices=(0, 1, 2, 3),
    flatten_sequential=True,
)
