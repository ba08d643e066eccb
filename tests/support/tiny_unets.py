"""Tiny UNets and the ControlNet: no text in the self-attention, one grid per level."""

from functools import partial
from typing import Any

import diffusers
import torch
from tiny_host_case import (
    CHANNELS,
    POOLED_DIM,
    TEXT_DIM,
    HostCase,
    Layout,
    alone,
    build,
    half,
    noise,
    pixels,
    sample,
)

_UNET = dict(
    sample_size=16, in_channels=CHANNELS, out_channels=CHANNELS, layers_per_block=1, block_out_channels=(16, 32, 32),
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    norm_num_groups=8, cross_attention_dim=TEXT_DIM, attention_head_dim=2,
)  # fmt: skip
_SD21 = _UNET | dict(attention_head_dim=(1, 2, 2), use_linear_projection=True, upcast_attention=True)
_SDXL = _SD21 | dict(
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=(1, 1, 2), upcast_attention=False, addition_embed_type="text_time",
    addition_time_embed_dim=8, projection_class_embeddings_input_dim=POOLED_DIM + 6 * 8,
)  # fmt: skip
_DREAMLITE = dict(
    in_channels=CHANNELS, out_channels=CHANNELS, layers_per_block=1, block_out_channels=(16, 32, 32),
    down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", *["DreamLiteCrossAttnDownBlock2D"] * 2),
    up_block_types=(*["DreamLiteCrossAttnUpBlock2D"] * 2, "DreamLiteUpBlock2D"), norm_num_groups=8,
    cross_attention_dim=TEXT_DIM, attention_head_dim=(1, 2, 2), use_linear_projection=True,
)  # fmt: skip
_UVIT = dict(
    hidden_size=32, cond_embed_dim=POOLED_DIM, micro_cond_encode_dim=2, micro_cond_embed_dim=10,
    encoder_hidden_size=TEXT_DIM, vocab_size=20, codebook_size=16, in_channels=16, block_out_channels=32,
    num_res_blocks=1, block_num_heads=2, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
)  # fmt: skip
_CONTROLNET = {k: v for k, v in _UNET.items() if k not in ("sample_size", "out_channels", "up_block_types")}


def _unet_inputs(height: int, width: int, batch: int, text: int, channels: int = CHANNELS) -> dict[str, Any]:
    return dict(
        sample=noise(batch, channels, height, width),
        timestep=torch.tensor(600),
        encoder_hidden_states=noise(batch, text, TEXT_DIM, seed=1),
    )


def _sdxl_inputs(height: int, width: int, batch: int, text: int) -> dict[str, Any]:
    size = [16.0 * height, 16.0 * width]
    time_ids = torch.tensor([[*size, 0.0, 0.0, *size]]).repeat(batch, 1)
    added = dict(text_embeds=noise(batch, POOLED_DIM, seed=2), time_ids=time_ids)
    return _unet_inputs(2 * height, 2 * width, batch, text) | dict(added_cond_kwargs=added)


def _controlnet_inputs(height: int, width: int, batch: int, text: int) -> dict[str, Any]:
    condition = noise(batch, 3, 8 * height, 8 * width, seed=2).sigmoid()
    return _unet_inputs(height, width, batch, text) | dict(controlnet_cond=condition)


def _union_inputs(height: int, width: int, batch: int, text: int) -> dict[str, Any]:
    inputs = _controlnet_inputs(height, width, batch, text)
    kinds = torch.tensor([[0.0, 1.0, 0.0]]).repeat(batch, 1)
    return inputs | dict(controlnet_cond=[inputs["controlnet_cond"]], control_type=kinds, control_type_idx=[1])


def _unconditional_inputs(height: int, width: int, batch: int, text: int) -> dict[str, Any]:
    return dict(sample=noise(batch, CHANNELS, 2 * height, 2 * width), timestep=torch.tensor(600))


def _kandinsky_inputs(height: int, width: int, batch: int, text: int) -> dict[str, Any]:
    inputs = _unet_inputs(8 * height, 8 * width, batch, text)
    return inputs | dict(encoder_attention_mask=torch.ones(batch, text))


def _kandinsky_levels(height: int, width: int, text: int) -> set[Layout]:
    return {Layout(0, (scale * height, scale * width)) for scale in (4, 2, 1)}


def _cascade_inputs(height: int, width: int, batch: int, text: int, patch: int) -> dict[str, Any]:
    return dict(
        sample=noise(batch, CHANNELS, patch * height, patch * width),
        timestep_ratio=torch.full((batch,), 0.6),
        clip_text_pooled=noise(batch, 1, POOLED_DIM, seed=1),
        clip_text=noise(batch, text, TEXT_DIM, seed=2),
        clip_img=noise(batch, 1, POOLED_DIM, seed=3),
    )


_CASCADE = dict(
    in_channels=CHANNELS, out_channels=CHANNELS, timestep_ratio_embedding_dim=8, conditioning_dim=24,
    block_out_channels=(16, 32), num_attention_heads=(2, 2), down_num_layers_per_block=(1, 1),
    up_num_layers_per_block=(1, 1), down_blocks_repeat_mappers=(1, 1), up_blocks_repeat_mappers=(1, 2),
    clip_text_in_channels=TEXT_DIM, clip_text_pooled_in_channels=POOLED_DIM, clip_image_in_channels=POOLED_DIM,
    clip_seq=2,
)  # fmt: skip


def _cascade_layouts(height: int, width: int, text: int, scales: tuple[int, ...]) -> set[Layout]:
    """Two tokens each of an image and of a pooled text come with the text."""
    return {Layout(0, (scale * height, scale * width), text + 4) for scale in scales}


def _uvit_inputs(height: int, width: int, batch: int, text: int, codes: int = 1) -> dict[str, Any]:
    sides = batch, codes * height, codes * width
    return dict(
        input_ids=torch.randint(20, sides, generator=torch.Generator().manual_seed(0)),
        encoder_hidden_states=noise(batch, text, TEXT_DIM, seed=1),
        pooled_text_emb=noise(batch, POOLED_DIM, seed=2),
        micro_conds=torch.tensor([[64.0, 48.0, 0.0, 0.0, 6.0]]).repeat(batch, 1),
    )


def _three_levels(height: int, width: int, text: int) -> set[Layout]:
    grid = (height, width)
    return {Layout(0, grid), Layout(0, half(grid)), Layout(0, half(half(grid)))}


def _two_levels(height: int, width: int, text: int) -> set[Layout]:
    return {Layout(0, (height, width)), Layout(0, half((height, width)))}


def _unet_case(name: str, config: dict[str, Any], **facts: Any) -> HostCase:
    facts = dict(inputs=_unet_inputs, shape=pixels(CHANNELS, 1), layouts=_three_levels, patch=1) | facts
    return HostCase(name, partial(build, diffusers.UNet2DConditionModel, **config), output=sample, **facts)


def _controlnet_case(name: str, model_class: type, inputs: Any, **config: Any) -> HostCase:
    config = _CONTROLNET | dict(conditioning_embedding_out_channels=(8, 8, 8, 8)) | config
    return HostCase(
        name,
        partial(build, model_class, **config),
        inputs,
        output=lambda output: output.mid_block_res_sample,
        shape=lambda height, width, batch: (batch, 32, *half(half((height, width)))),
        layouts=_three_levels,
        patch=1,
    )


UNETS = [
    _unet_case("sd15-unet", _UNET, notes="attention_head_dim is the number of heads (diffusers naming bug)"),
    _unet_case("sd21-unet", _SD21, notes="linear proj_in, heads per level"),
    _unet_case(
        "sdxl-unet", _SDXL, inputs=_sdxl_inputs, shape=pixels(CHANNELS), layouts=_two_levels, patch=2,
        notes="no attention at the resolution of the latents: (height, width) is half of it",
    ),
    _unet_case("sd15-inpaint-unet", _UNET | dict(in_channels=9), inputs=partial(_unet_inputs, channels=9)),
    HostCase(
        "dreamlite-unet",
        partial(build, diffusers.DreamLiteUNetModel, **_DREAMLITE),
        lambda height, width, batch, text: _unet_inputs(2 * height, 2 * width, batch, text),
        sample, shape=pixels(CHANNELS), layouts=_two_levels,
        notes="two heads share keys and values; no self-attention at the resolution of the latents",
    ),
    HostCase(
        "unet2d",
        partial(
            build, diffusers.UNet2DModel, in_channels=CHANNELS, out_channels=CHANNELS, layers_per_block=1,
            block_out_channels=(16, 32), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"), norm_num_groups=8, attention_head_dim=16,
        ),
        _unconditional_inputs, sample, shape=pixels(CHANNELS), layouts=alone,
        notes="attention takes [B, C, height, width]; it upsamples by 2, so only one level takes odd sides",
    ),
    HostCase(
        "kandinsky3-unet",
        partial(
            build, diffusers.Kandinsky3UNet, in_channels=CHANNELS, time_embedding_dim=16, groups=4, layers_per_block=2,
            attention_head_dim=8, block_out_channels=(16, 16, 32, 32), cross_attention_dim=16, encoder_hid_dim=TEXT_DIM,
        ),
        _kandinsky_inputs, sample, shape=pixels(CHANNELS, 8), layouts=_kandinsky_levels, patch=8,
        notes="no attention at the resolution of the latents; odd sides do not come back, so the grid is an eighth",
    ),
    *(
        HostCase(
            f"stable-cascade-{stage}",
            partial(build, diffusers.StableCascadeUNet, **_CASCADE, **config),
            partial(_cascade_inputs, patch=patch), sample, shape=pixels(CHANNELS, patch),
            layouts=partial(_cascade_layouts, scales=(1,) if patch == 1 else (2, 1)), patch=patch, more_keys="last",
            notes="text gives keys alone, behind the grid; attention takes [B, C, height, width]",
        )
        for stage, patch, config in (
            ("prior", 1, dict(switch_level=(False,))),
            ("decoder", 4, dict(patch_size=2)),
        )
    ),
    *(
        HostCase(
            f"uvit{'-down' * (codes > 1)}",
            partial(build, diffusers.UVit2DModel, **_UVIT, downsample=codes > 1, upsample=codes > 1),
            partial(_uvit_inputs, codes=codes), lambda output: output, layouts=alone, patch=codes,
            shape=lambda height, width, batch, codes=codes: (batch, 16, codes * height, codes * width),
            notes="codes in, logits out; both attentions of its blocks attend to the text",
        )
        for codes in (1, 2)
    ),
    _controlnet_case("sd15-controlnet", diffusers.ControlNetModel, _controlnet_inputs),
    _controlnet_case(
        "controlnet-union", diffusers.ControlNetUnionModel, _union_inputs, num_control_type=3, num_trans_channel=16,
        num_trans_head=2, num_proj_channel=16, addition_time_embed_dim=8, projection_class_embeddings_input_dim=24,
    ),
]  # fmt: skip
