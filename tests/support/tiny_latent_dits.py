"""Tiny diffusion transformers over latents `[B, C, height, width]`."""

from functools import partial
from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed, get_2d_rotary_pos_embed_lumina
from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid
from tiny_host_case import (
    CHANNELS,
    POOLED_DIM,
    TEXT_DIM,
    HostCase,
    Layout,
    alone,
    build,
    noise,
    pixels,
    sample,
    text_first,
)
from torch import Tensor


def latents(height: int, width: int, batch: int, text: int, **extra: Tensor) -> dict[str, Any]:
    inputs = dict(
        hidden_states=noise(batch, CHANNELS, 2 * height, 2 * width),
        encoder_hidden_states=noise(batch, text, TEXT_DIM, seed=1),
        timestep=torch.full((batch,), 600.0),
    )
    return inputs | extra


def _dit_inputs(height: int, width: int, batch: int, text: int) -> dict[str, Any]:
    labels = torch.arange(batch) % 8
    return dict(
        hidden_states=noise(batch, CHANNELS, 2 * height, 2 * width),
        timestep=torch.full((batch,), 600),
        class_labels=labels,
    )


def _pixart_inputs(height: int, width: int, batch: int, text: int) -> dict[str, Any]:
    mask = (torch.arange(text) < text - torch.arange(batch)[:, None]).long()
    condition = dict(resolution=None, aspect_ratio=None)
    return latents(height, width, batch, text) | dict(encoder_attention_mask=mask, added_cond_kwargs=condition)


def _sd3_inputs(height: int, width: int, batch: int, text: int) -> dict[str, Any]:
    return latents(height, width, batch, text, pooled_projections=noise(batch, POOLED_DIM, seed=2))


def _auraflow_inputs(height: int, width: int, batch: int, text: int) -> dict[str, Any]:
    return latents(height, width, batch, text, timestep=torch.full((batch,), 0.6))


def _hunyuandit_inputs(height: int, width: int, batch: int, text: int) -> dict[str, Any]:
    crop = get_resize_crop_region_for_grid((height, width), 32)
    size = [16.0 * height, 16.0 * width]
    return latents(height, width, batch, 4) | dict(
        text_embedding_mask=torch.tensor([1, 1, 1, 0]).repeat(batch, 1),
        encoder_hidden_states_t5=noise(batch, 6, TEXT_DIM, seed=2),
        text_embedding_mask_t5=torch.tensor([1, 1, 1, 1, 0, 0]).repeat(batch, 1),
        image_meta_size=torch.tensor([[1024.0, 1024.0, *size, 0.0, 0.0]]).repeat(batch, 1),
        style=torch.zeros(batch, dtype=torch.long),
        image_rotary_emb=get_2d_rotary_pos_embed(16, crop, (height, width), device="cpu", output_type="pt"),
    )


def _cogview4_inputs(height: int, width: int, batch: int, text: int) -> dict[str, Any]:
    size = torch.tensor([[16.0 * height, 16.0 * width]]).repeat(batch, 1)
    sizes = dict(original_size=size, target_size=size, crop_coords=torch.zeros(batch, 2))
    return latents(height, width, batch, text) | sizes


def _sizes(height: int, width: int, batch: int) -> dict[str, Tensor]:
    return dict(
        target_size=torch.tensor([[16.0 * height, 16.0 * width]]).repeat(batch, 1), crop_coords=torch.zeros(batch, 2)
    )


def _lengths(text: int, batch: int) -> Tensor:
    """Return how many tokens of text each sample has: all, all but one, ..."""
    return (text - torch.arange(batch)).clamp(min=1)


def _seen(text: int, batch: int) -> Tensor:
    return torch.arange(text) < _lengths(text, batch)[:, None]


def _glm_inputs(height: int, width: int, batch: int, text: int) -> dict[str, Any]:
    tokens = torch.arange(batch * height * width).view(batch, -1)
    prior = dict(prior_token_id=tokens % 16, prior_token_drop=tokens % 5 == 0)
    return latents(height, width, batch, text) | prior | _sizes(height, width, batch)


def _hidream_inputs(height: int, width: int, batch: int, text: int) -> dict[str, Any]:
    return dict(
        hidden_states=noise(batch, CHANNELS, 2 * height, 2 * width),
        timesteps=torch.full((batch,), 600.0),
        encoder_hidden_states_t5=noise(batch, text, TEXT_DIM, seed=1),
        encoder_hidden_states_llama3=noise(2, batch, text, TEXT_DIM, seed=2),
        pooled_embeds=noise(batch, POOLED_DIM, seed=3),
    )


def _hunyuan_image_inputs(height: int, width: int, batch: int, text: int) -> dict[str, Any]:
    return latents(height, width, batch, text) | dict(encoder_attention_mask=_seen(text, batch))


def _ernie_inputs(height: int, width: int, batch: int, text: int) -> dict[str, Any]:
    return dict(
        hidden_states=noise(batch, CHANNELS, 2 * height, 2 * width),
        timestep=torch.full((batch,), 600.0),
        text_bth=noise(batch, text, TEXT_DIM, seed=1),
        text_lens=_lengths(text, batch),
    )


def _prx_inputs(height: int, width: int, batch: int, text: int) -> dict[str, Any]:
    return latents(height, width, batch, text, timestep=torch.full((batch,), 0.6), attention_mask=_seen(text, batch))


def _sd3_controlnet_inputs(height: int, width: int, batch: int, text: int) -> dict[str, Any]:
    return _sd3_inputs(height, width, batch, text) | dict(
        controlnet_cond=noise(batch, CHANNELS, 2 * height, 2 * width, seed=3)
    )


def _hunyuandit_controlnet_inputs(height: int, width: int, batch: int, text: int) -> dict[str, Any]:
    return _hunyuandit_inputs(height, width, batch, text) | dict(
        controlnet_cond=noise(batch, CHANNELS, 2 * height, 2 * width, seed=3)
    )


def _lumina2_inputs(height: int, width: int, batch: int, text: int, ragged: bool = False) -> dict[str, Any]:
    lengths = text - 2 * ragged * torch.arange(batch)
    mask = (torch.arange(text + 3) < lengths[:, None]).long()  # as the pipeline pads prompts to 256 tokens
    return latents(height, width, batch, text + 3, timestep=torch.full((batch,), 0.4)) | dict(
        encoder_attention_mask=mask
    )


def _lumina_next_inputs(height: int, width: int, batch: int, text: int) -> dict[str, Any]:
    """Scaled as its pipeline does above its native size: the base length reaches both attentions."""
    return latents(height, width, batch, text, timestep=torch.full((batch,), 0.4)) | dict(
        encoder_mask=_seen(text, batch).long(),
        image_rotary_emb=get_2d_rotary_pos_embed_lumina(16, 384, 384, linear_factor=1.5),
        cross_attention_kwargs=dict(base_sequence_length=48),
    )


def kandinsky_inputs(
    height: int, width: int, batch: int, text: int, frames: int = 1, edit: bool = False
) -> dict[str, Any]:
    """An image to edit comes as more channels."""
    channels = 2 * CHANNELS + 1 if edit else CHANNELS
    return latents(height, width, batch, text) | dict(
        hidden_states=noise(batch, frames, 2 * height, 2 * width, channels),
        pooled_projections=noise(batch, POOLED_DIM, seed=2),
        visual_rope_pos=[torch.arange(side) for side in (frames, height, width)],
        text_rope_pos=torch.arange(text),
    )


_DIT = dict(num_attention_heads=2, attention_head_dim=16, in_channels=CHANNELS, patch_size=2, num_layers=2)
_SD3 = _DIT | dict(
    sample_size=16, pos_embed_max_size=32, joint_attention_dim=TEXT_DIM, caption_projection_dim=32,
    pooled_projection_dim=POOLED_DIM, out_channels=CHANNELS,
)  # fmt: skip
_LUMINA2 = dict(
    sample_size=16, in_channels=CHANNELS, hidden_size=32, num_layers=2, num_refiner_layers=1, num_attention_heads=2,
    num_kv_heads=1, multiple_of=32, axes_dim_rope=(4, 6, 6), axes_lens=(64, 64, 64), cap_feat_dim=TEXT_DIM,
)  # fmt: skip


_HUNYUANDIT = _DIT | dict(
    num_layers=4, sample_size=8, hidden_size=32, cross_attention_dim=TEXT_DIM, cross_attention_dim_t5=TEXT_DIM,
    pooled_projection_dim=POOLED_DIM, text_len=4, text_len_t5=6,
)  # fmt: skip
_COGVIEW = _DIT | dict(out_channels=CHANNELS, text_embed_dim=TEXT_DIM, time_embed_dim=32, condition_dim=8)
_HIDREAM_TOKENS = 144  # what it pads images to that are not square


def _hidream_layouts(height: int, width: int, text: int) -> set[Layout]:
    padding = 0 if height == width else _HIDREAM_TOKENS - height * width
    return {Layout(0, (height, width), suffix=padding + 3 * text)}


def _lumina2_layouts(height: int, width: int, text: int) -> set[Layout]:
    return {Layout(text, (height, width)), Layout(0, (height, width))}


def _sd3_layouts(height: int, width: int, text: int, dual: bool = False) -> set[Layout]:
    joint = Layout(0, (height, width), suffix=text)
    return {joint, Layout(0, (height, width))} if dual else {joint}


_KANDINSKY = dict(
    in_visual_dim=CHANNELS, out_visual_dim=CHANNELS, in_text_dim=TEXT_DIM, in_text_dim2=POOLED_DIM, time_dim=32,
    model_dim=32, ff_dim=48, num_text_blocks=1, num_visual_blocks=1, axes_dims=(4, 6, 6),
)  # fmt: skip
_CONTROLNET_FACTS = dict(
    output=lambda output: output.controlnet_block_samples[-1],
    shape=lambda height, width, batch: (batch, height * width, 32),
)


def _latent_case(name: str, model_class: type, config: dict[str, Any], inputs: Any, **facts: Any) -> HostCase:
    facts = dict(output=sample, shape=pixels(CHANNELS), layouts=alone) | facts
    return HostCase(name, partial(build, model_class, **config), inputs, **facts)


LATENT_DITS = [
    _latent_case(
        "dit", diffusers.DiTTransformer2DModel, _DIT | dict(num_embeds_ada_norm=8, sample_size=8), _dit_inputs,
        fixed_size=True, notes="unpatchifies to sqrt(tokens): else raises or mixes the batch",
    ),
    _latent_case(
        "pixart", diffusers.PixArtTransformer2DModel,
        _DIT | dict(
            out_channels=2 * CHANNELS, cross_attention_dim=32, caption_channels=TEXT_DIM, sample_size=8,
            use_additional_conditions=False,
        ),
        _pixart_inputs, shape=pixels(2 * CHANNELS),
    ),
    _latent_case("sd3", diffusers.SD3Transformer2DModel, _SD3, _sd3_inputs, layouts=_sd3_layouts),
    _latent_case(
        "sd35", diffusers.SD3Transformer2DModel, _SD3 | dict(qk_norm="rms_norm", dual_attention_layers=(0,)),
        _sd3_inputs, layouts=partial(_sd3_layouts, dual=True), notes="attn2 of block 0 sees the image alone",
    ),
    _latent_case(
        "auraflow", diffusers.AuraFlowTransformer2DModel,
        dict(
            sample_size=16, in_channels=CHANNELS, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=TEXT_DIM, caption_projection_dim=32, pos_embed_max_size=1024,
        ),
        _auraflow_inputs, layouts=partial(text_first, extra=8), notes="8 register tokens before the text",
    ),
    _latent_case(
        "hunyuandit", diffusers.HunyuanDiT2DModel,
        _HUNYUANDIT,
        _hunyuandit_inputs, shape=pixels(2 * CHANNELS), notes="text lengths are fixed by its weights: `text` unused",
    ),
    _latent_case(
        "cogview4", diffusers.CogView4Transformer2DModel,
        _COGVIEW,
        _cogview4_inputs, layouts=text_first,
    ),
    _latent_case(
        "lumina2", diffusers.Lumina2Transformer2DModel, _LUMINA2, _lumina2_inputs, layouts=_lumina2_layouts,
        text_only=lambda text: {text + 3}, notes="the joint sequence drops the 3 padding tokens of the prompt",
    ),
    _latent_case(
        "lumina2-ragged", diffusers.Lumina2Transformer2DModel, _LUMINA2, partial(_lumina2_inputs, ragged=True),
        layouts=_lumina2_layouts, text_only=lambda text: {text + 3},
        notes="sample i has 2 * i text tokens fewer: its grid starts earlier, the tail is masked by bool [B, 1, 1, N]",
    ),
    _latent_case(
        "lumina-next", diffusers.LuminaNextDiT2DModel,
        dict(
            sample_size=16, in_channels=CHANNELS, hidden_size=64, num_layers=2, num_attention_heads=4, num_kv_heads=2,
            multiple_of=32, cross_attention_dim=TEXT_DIM,
        ),
        _lumina_next_inputs, shape=pixels(2 * CHANNELS),
        notes="always bool [B, H, N, N], all True; four heads share keys and values of two; the scale depends on N",
    ),
    _latent_case(
        "cogview3plus", diffusers.CogView3PlusTransformer2DModel, _COGVIEW | dict(pos_embed_max_size=32, sample_size=8),
        _cogview4_inputs, layouts=text_first,
    ),
    _latent_case(
        "glm-image", diffusers.GlmImageTransformer2DModel, _COGVIEW | dict(prior_vq_quantizer_codebook_size=16),
        _glm_inputs, layouts=text_first, more_keys=True,
    ),
    _latent_case(
        "hidream", diffusers.HiDreamImageTransformer2DModel,
        dict(
            patch_size=2, in_channels=CHANNELS, out_channels=CHANNELS, num_layers=1, num_single_layers=1,
            attention_head_dim=16, num_attention_heads=2, caption_channels=(TEXT_DIM, TEXT_DIM), llama_layers=(0, 1),
            text_emb_dim=POOLED_DIM, num_routed_experts=0, axes_dims_rope=(8, 4, 4), max_resolution=(24, 24),
        ),
        _hidream_inputs, layouts=_hidream_layouts, notes="images that are not square are padded, by keys of zeros",
    ),
    _latent_case(
        "hunyuan-image", diffusers.HunyuanImageTransformer2DModel,
        dict(
            in_channels=CHANNELS, out_channels=CHANNELS, num_attention_heads=2, attention_head_dim=16, num_layers=1,
            num_single_layers=1, num_refiner_layers=1, patch_size=(2, 2), text_embed_dim=TEXT_DIM, rope_axes_dim=(8, 8),
        ),
        _hunyuan_image_inputs, layouts=_sd3_layouts, text_only=lambda text: {text}, notes="always bool [B, 1, 1, N]",
    ),
    _latent_case(
        "ernie-image", diffusers.ErnieImageTransformer2DModel,
        dict(
            hidden_size=32, num_attention_heads=2, num_layers=2, ffn_hidden_size=48, in_channels=CHANNELS,
            out_channels=CHANNELS, patch_size=2, text_in_dim=TEXT_DIM, rope_axes_dim=(4, 6, 6),
        ),
        _ernie_inputs, layouts=_sd3_layouts, notes="always bool [B, 1, 1, N]",
    ),
    _latent_case(
        "prx", diffusers.PRXTransformer2DModel,
        dict(
            in_channels=CHANNELS, patch_size=2, context_in_dim=TEXT_DIM, hidden_size=32, num_heads=2, depth=2,
            axes_dim=[8, 8],
        ),
        _prx_inputs, layouts=text_first, more_keys=True, notes="the text gives keys and values, and no queries",
    ),
    *(
        _latent_case(
            f"kandinsky5{'-edit' * edit}", diffusers.Kandinsky5Transformer3DModel, _KANDINSKY | dict(visual_cond=edit),
            partial(kandinsky_inputs, edit=edit), text_only=lambda text: {text},
            shape=lambda height, width, batch: (batch, 1, 2 * height, 2 * width, CHANNELS),
            notes="channels last; queries and keys are rounded to bfloat16, and a second block would show it",
        )
        for edit in (False, True)
    ),
    _latent_case(
        "sd3-controlnet", diffusers.SD3ControlNetModel, _SD3, _sd3_controlnet_inputs, layouts=_sd3_layouts,
        **_CONTROLNET_FACTS,
    ),
    _latent_case(
        "hunyuandit-controlnet", diffusers.HunyuanDiT2DControlNetModel,
        {k: v for k, v in _HUNYUANDIT.items() if k != "num_layers"} | dict(transformer_num_layers=6),
        _hunyuandit_controlnet_inputs, **_CONTROLNET_FACTS,
    ),
]  # fmt: skip
