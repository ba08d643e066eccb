"""Models that no processor can serve are refused by name, with the reason, and left as they are."""

from collections.abc import Callable

import diffusers
import pytest
import timm
import transformers
from tiny_host_case import CHANNELS, TEXT_DIM
from tiny_hosts import HOST
from torch import nn
from untouched import assert_untouched, state

from vision_attn import Softmax, convert

_SWIN = dict(img_size=64, window_size=4, embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))
_SANA = dict(
    in_channels=CHANNELS, out_channels=CHANNELS, num_attention_heads=2, attention_head_dim=16, num_layers=1,
    num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=TEXT_DIM,
)  # fmt: skip
_SAM2 = transformers.Sam2HieraDetConfig(
    hidden_size=16, num_attention_heads=1, blocks_per_stage=[1, 1, 1, 1], embed_dim_per_stage=[16, 32, 64, 128],
    num_attention_heads_per_stage=[1, 1, 1, 1], window_size_per_stage=[4, 2, 2, 2], global_attention_blocks=[3],
)  # fmt: skip


def flex() -> nn.Module:
    model = HOST["qwen-image-2.1"].build()
    model.set_attn_processor(diffusers.models.transformers.transformer_qwenimage21.QwenImage21FlexAttnProcessor())
    return model


def eager() -> nn.Module:
    model = HOST["hf-dinov2"].build()
    model.set_attn_implementation("eager")
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "sana": (lambda: diffusers.SanaTransformer2DModel(**_SANA), "linear already"),
    "ideogram": (
        lambda: diffusers.Ideogram4Transformer2DModel(
            in_channels=16, num_layers=1, attention_head_dim=16, num_attention_heads=2, intermediate_size=32,
            adaln_dim=16, llm_features_dim=32, mrope_section=(4, 2, 2),
        ),
        "packs text and images",
    ),
    "xcit": (lambda: timm.models.xcit.Xcit(img_size=32, embed_dim=32, depth=1, num_heads=2), "between channels"),
    "swin": (lambda: timm.models.swin_transformer.SwinTransformer(**_SWIN), "in windows already"),
    "swin-v2-cr": (lambda: timm.models.swin_transformer_v2_cr.SwinTransformerV2Cr(**_SWIN), "in windows already"),
    "swin-v2": (lambda: timm.models.swin_transformer_v2.SwinTransformerV2(**_SWIN), "in windows already"),
    "hiera": (
        lambda: timm.models.hiera.Hiera(img_size=(64, 64), embed_dim=16, num_heads=1, stages=(1, 1, 1, 1)),
        "in windows already",
    ),
    "sam2": (lambda: transformers.Sam2HieraDetModel(_SAM2), "is a Hiera"),
    "qwen-2.1-flex": (flex, "call model.set_attn_processor.QwenImage21AttnProcessor"),
    "transformers-eager": (eager, "its attention is 'eager': call model.set_attn_implementation.'sdpa'"),
}  # fmt: skip


@pytest.mark.parametrize("build, reason", REFUSED.values(), ids=REFUSED)
def test_it_is_refused_by_name(build: Callable[[], nn.Module], reason: str) -> None:
    model = build()
    before = state(model)
    with pytest.raises(ValueError, match=f"{type(model).__name__} cannot be converted: .*{reason}"):
        convert(model, Softmax())
    assert_untouched(model, before)
