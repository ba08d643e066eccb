"""HaloNet: a residual network whose 3 x 3 convolutions are attention of blocks to themselves and their halos.

    o_i = softmax_j(scale * q_i . k_j + q_i . r_{j - i}) v_j,    j in block(i) and its halo, zeros beyond the border

timm has the attention (`HaloAttn`), the frame (`ByobNet`), `halonet_h1`, and smaller models of its own such as
`halonet26t`. Here are the others of the paper's family, H0 and H2 to H7, for images of any size. The authors have
released neither code nor weights. The paper's table 3, and the parameters that it gives beside those of these models:

    | model | b  | h | r_v | r_b  | l_3 | s   | d_f  | published | here   |
    | H0    | 8  | 3 | 1   | 0.5  | 7   | 256 | -    | 5.5 M     | 5.5 M  |
    | H2    | 8  | 3 | 1   | 1.25 | 11  | 256 | -    | 9.4 M     | 9.4 M  |
    | H3    | 10 | 3 | 1   | 1.5  | 12  | 320 | 1024 | 11.8 M    | 11.8 M |
    | H4    | 12 | 2 | 1   | 3    | 12  | 384 | 1280 | 19.1 M    | 19.1 M |
    | H5    | 14 | 2 | 2.5 | 2    | 23  | 448 | 1536 | 30.7 M    | 30.7 M |
    | H6    | 8  | 4 | 3   | 2.75 | 24  | 512 | 1536 | 43.4 M    | 43.5 M |
    | H7    | 10 | 3 | 4   | 3.5  | 26  | 600 | 2048 | 67.4 M    | 67.4 M |

b and h are the sides of block and halo, r_v the channels of the values and r_b those of a stage's output over those of
queries and keys, l_3 the blocks of the third stage, s the side of an image, d_f the channels of the last layer.

Paper: 'Scaling Local Self-Attention for Parameter Efficient Visual Backbones' - https://arxiv.org/abs/2103.12731
"""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from timm.layers import DropPath
from timm.layers.halo_attn import HaloAttn
from timm.models import generate_default_cfgs
from timm.models.byobnet import (
    ByoBlockCfg,
    ByobNet,
    ByoModelCfg,
    SelfAttnBlock,
    create_shortcut,
    register_block,
)
from torch import Tensor, nn

from vision_attn.backbones.checkpoints import refuse_mismatch, unwrap
from vision_attn.backbones.registry import cfg, register

_CHANNELS = (64, 128, 256, 512)  # of queries and keys, by stage
_HEADS = (4, 8, 8, 8)


class HaloBlock(SelfAttnBlock):
    """timm's bottleneck with attention, where queries and keys, values and the output have channels of their own.

    A map of any size is padded with zeros to whole blocks, as its halos are.

    Args:
        in_chs: Channels of the input.
        out_chs: Channels of the output.
        stage: Number of the stage, from 0.
        block_size: Side of a block.
        halo_size: Tokens of the halo on each side.
        value_ratio: Channels of the values over those of queries and keys.
        stride: Of the queries.
        layers: timm's layers.
        drop_path_rate: Share of the samples that skip the branch in training.
        device: Device of the parameters.
        dtype: Type of the parameters.
        **unused: What timm gives to blocks of other kinds.
    """

    def __init__(  # noqa: PLR0913 - timm builds blocks from flat arguments
        self, in_chs: int, out_chs: int, *, stage: int, block_size: int, halo_size: int, value_ratio: float,
        stride: int = 1, layers: Any = None, drop_path_rate: float = 0.0, device: Any = None, dtype: Any = None,
        **unused: Any,
    ) -> None:  # fmt: skip
        nn.Module.__init__(self)  # the attention of timm's block has channels for all alike
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        channels, heads = _CHANNELS[stage], _HEADS[stage]
        values = int(channels * value_ratio)
        self.shortcut = create_shortcut(
            "conv1x1", in_chs, out_chs, stride=stride, dilation=(1, 1), apply_act=False, layers=layers, **dd
        )
        self.conv1_1x1 = layers.conv_norm_act(in_chs, channels, 1, **dd)
        self.conv2_kxk = nn.Identity()
        self.block_size, self.stride = block_size, stride
        self.self_attn = HaloAttn(
            channels, values, stride=stride, num_heads=heads, dim_head=channels // heads, block_size=block_size,
            halo_size=halo_size, **dd,
        )  # fmt: skip
        self.post_attn = layers.norm_act(values, **dd)
        self.conv3_1x1 = layers.conv_norm_act(values, out_chs, 1, apply_act=False, **dd)
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()
        self.act = layers.act(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return the map `[B, out_chs, ceil(height / stride), ceil(width / stride)]`."""
        height, width, side = x.shape[2], x.shape[3], self.block_size
        y = F.pad(self.conv1_1x1(x), [0, -width % side, 0, -height % side])
        y = self.self_attn(y)[:, :, : -(-height // self.stride), : -(-width // self.stride)]
        y = self.drop_path(self.conv3_1x1(self.post_attn(y)))
        return self.act(y + self.shortcut(x))


register_block("vision_attn_halo", HaloBlock)


def halonet_cfg(
    block_size: int, halo_size: int, value_ratio: float, bottleneck_ratio: float, depth: int, num_features: int = 0
) -> ByoModelCfg:
    """Return timm's configuration of a HaloNet.

    Args:
        block_size: b.
        halo_size: h.
        value_ratio: r_v.
        bottleneck_ratio: r_b.
        depth: l_3.
        num_features: d_f; 0 for no last layer.
    """
    same = dict(block_size=block_size, halo_size=halo_size, value_ratio=value_ratio)
    blocks = tuple(
        ByoBlockCfg(
            type="vision_attn_halo",
            d=depth if i == 2 else 3,
            c=int(channels * bottleneck_ratio),
            s=1 if i == 0 else 2,
            gs=0,
            br=1.0,
            block_kwargs=dict(stage=i, **same),
        )
        for i, channels in enumerate(_CHANNELS)
    )
    return ByoModelCfg(blocks=blocks, stem_chs=64, stem_type="7x7", stem_pool="maxpool", num_features=num_features)


_MODELS = dict(
    halonet_h0=(256, halonet_cfg(8, 3, 1, 0.5, 7)),
    halonet_h2=(256, halonet_cfg(8, 3, 1, 1.25, 11)),
    halonet_h3=(320, halonet_cfg(10, 3, 1, 1.5, 12, 1024)),
    halonet_h4=(384, halonet_cfg(12, 2, 1, 3, 12, 1280)),
    halonet_h5=(448, halonet_cfg(14, 2, 2.5, 2, 23, 1536)),
    halonet_h6=(512, halonet_cfg(8, 4, 3, 2.75, 24, 1536)),
    halonet_h7=(600, halonet_cfg(10, 3, 4, 3.5, 26, 2048)),
)

default_cfgs = generate_default_cfgs(
    {
        f"{name}.untrained": cfg(
            size=size, pool_size=(-(-size // 32),) * 2, first_conv="stem.conv1.conv", paper_ids="arXiv:2103.12731"
        )
        for name, (size, _) in _MODELS.items()
    }
)


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint of this package by name.

    Raises:
        ValueError: If the checkpoint is of another variant; the error names the first few differences.
    """
    state_dict = unwrap(checkpoint)
    refuse_mismatch(state_dict, model)
    return state_dict


register(
    __name__,
    ByobNet,
    {name: dict(model_cfg=model_cfg) for name, (_, model_cfg) in _MODELS.items()},
    checkpoint_filter_fn,
    flatten_sequential=True,
)
