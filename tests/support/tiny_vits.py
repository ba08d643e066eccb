"""Tiny vision transformers of timm."""

from functools import partial
from typing import Any

import timm
from tiny_host_case import HostCase, Layout, build, noise

_VIT = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=10, dynamic_img_size=True)


def _image_inputs(height: int, width: int, batch: int, text: int) -> dict[str, Any]:
    return dict(x=noise(batch, 3, 8 * height, 8 * width))


def _timm_case(name: str, model_name: str, prefix: int, notes: str = "", **config: Any) -> HostCase:
    return HostCase(
        name,
        partial(build, timm.create_model, model_name, **{k: v for k, v in (_VIT | config).items() if v is not None}),
        _image_inputs,
        output=lambda output: output,
        shape=lambda height, width, batch: (batch, 10),
        layouts=lambda height, width, text: {Layout(prefix, (height, width))},
        patch=8,
        notes=notes,
    )


VITS = [
    _timm_case("vit", "vit_tiny_patch16_224", 1),
    _timm_case("vit-avg", "vit_tiny_patch16_224", 0, class_token=False, global_pool="avg"),
    _timm_case("dinov2-reg4", "vit_small_patch14_reg4_dinov2", 5, "layer scale"),
    _timm_case("deit-distilled", "deit_tiny_distilled_patch16_224", 2),
    _timm_case("eva02", "eva02_tiny_patch14_224", 1, "EvaAttention, RoPE on the grid"),
    _timm_case("dinov3", "vit_small_patch16_dinov3", 5, "EvaAttention, 4 registers, RoPE in [-1, 1]"),
    _timm_case(
        "naflexvit", "naflexvit_base_patch16_gap", 4, "images as they are; packed patches have tests of their own",
        dynamic_img_size=None, reg_tokens=4,
    ),
    _timm_case(
        "qwen3-vit", "qwen3_vit_88m", 0, "EvaBlock, RoPE of integer places", dynamic_img_size=None,
        pos_embed_grid_size=4,
    ),
    _timm_case("deepseek-vit", "deepseek_vit_412m", 0, "AttentionRope", dynamic_img_size=None),
    _timm_case(
        "gemma4-vit", "gemma4_vit_167m", 0, "queries and keys are normalised; packed patches have tests of their own",
        dynamic_img_size=None, img_size=None,
    ),
    _timm_case("vit-rope", "vit_small_patch16_rope_224", 1, "AttentionRope"),
]  # fmt: skip
