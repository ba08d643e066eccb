"""Tiny vision encoders of transformers."""

from functools import partial
from typing import Any

import torch
import transformers
from tiny_host_case import HostCase, Layout, build, noise
from torch import Tensor, nn

from vision_attn._compat import ensure_torchvision

ensure_torchvision()

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=8)
_MLP = SIZES | dict(intermediate_size=32, image_size=32)


def _pixels(height: int, width: int, batch: int, text: int, **options: Any) -> dict[str, Any]:
    return dict(pixel_values=noise(batch, 3, 8 * height, 8 * width), **options)


def packed_patches(grids: list[tuple[int, int]], channels: int = 192) -> dict[str, Tensor]:
    """Return patches of images of several sizes, each padded to the tokens of the largest."""
    tokens = [height * width for height, width in grids]
    seen = torch.arange(max(tokens)) < torch.tensor(tokens)[:, None]
    return dict(
        pixel_values=noise(len(grids), max(tokens), channels) * seen[..., None],
        pixel_attention_mask=seen.long(),
        spatial_shapes=torch.tensor(grids),
    )


def _siglip2(height: int, width: int, batch: int, text: int) -> dict[str, Any]:
    return packed_patches([(height, width)] * batch)


def _build(kind: str, config: dict[str, Any]) -> nn.Module:
    """Build a model with a configuration of its own: models change theirs."""
    return build(getattr(transformers, f"{kind}Model"), getattr(transformers, f"{kind}Config")(**config))


def _case(name: str, kind: str, prefix: int, config: dict[str, Any], inputs: Any = _pixels, **facts: Any) -> HostCase:
    facts = dict(output=lambda output: output.last_hidden_state, notes="") | facts
    return HostCase(
        name,
        partial(_build, kind, config),
        inputs,
        shape=lambda height, width, batch: (batch, prefix + height * width, 32),
        layouts=lambda height, width, text: {Layout(prefix, (height, width))},
        patch=8,
        **facts,
    )


def _depth_anything() -> nn.Module:
    backbone = transformers.Dinov2Config(**_DINOV2, out_features=["stage1", "stage2"], reshape_hidden_states=False)
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone, patch_size=8, reassemble_hidden_size=32, neck_hidden_sizes=[16, 16],
        reassemble_factors=[2, 1], fusion_hidden_size=16, head_hidden_size=8,
    )  # fmt: skip
    return build(transformers.DepthAnythingForDepthEstimation, config)


_DINOV2 = SIZES | dict(mlp_ratio=1, image_size=32)
_INTERPOLATED = partial(_pixels, interpolate_pos_encoding=True)

ENCODERS = [
    _case("hf-dinov2", "Dinov2", 1, _DINOV2 | dict(use_mask_token=False)),
    _case("hf-dinov2-registers", "Dinov2WithRegisters", 5, _DINOV2),
    _case("hf-dinov3", "DINOv3ViT", 5, _MLP | dict(num_register_tokens=4)),
    _case("hf-clip", "CLIPVision", 1, _MLP, _INTERPOLATED),
    _case("hf-siglip", "SiglipVision", 0, _MLP | dict(vision_use_head=False), _INTERPOLATED),
    _case(
        "hf-siglip2", "Siglip2Vision", 0,
        SIZES | dict(intermediate_size=32, num_patches=16, vision_use_head=False), _siglip2,
        notes="patches `[B, N, C]`, whose rows and columns are in a tensor",
    ),
    _case("hf-vit", "ViT", 1, _MLP, _INTERPOLATED),
    HostCase(
        "hf-depth-anything", _depth_anything, _pixels, output=lambda output: output.predicted_depth[:, None],
        shape=lambda height, width, batch: (batch, 1, 8 * height, 8 * width),
        layouts=lambda height, width, text: {Layout(1, (height, width))},
        patch=8, notes="the encoder is its backbone",
    ),
]  # fmt: skip
