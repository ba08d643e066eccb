"""Tiny diffusion transformers over packed tokens `[B, N, C]`, and Z-Image over a list of latents."""

from functools import partial
from typing import Any

import diffusers
import torch
from tiny_host_case import (
    CHANNELS,
    POOLED_DIM,
    REFERENCE,
    TEXT_DIM,
    HostCase,
    Layout,
    build,
    noise,
    packed,
    sample,
    text_first,
)
from torch import Tensor, nn


def _flux_ids(segment: int, height: int, width: int) -> Tensor:
    return torch.cartesian_prod(torch.tensor([segment]), torch.arange(height), torch.arange(width))


def _flux_inputs(height: int, width: int, batch: int, text: int, reference: bool = False) -> dict[str, Any]:
    grids = [(height, width)] + [REFERENCE] * reference
    ids = torch.cat([_flux_ids(segment, *grid) for segment, grid in enumerate(grids)])
    return dict(
        hidden_states=noise(batch, len(ids), 4 * CHANNELS),
        encoder_hidden_states=noise(batch, text, TEXT_DIM, seed=1),
        pooled_projections=noise(batch, POOLED_DIM, seed=2),
        timestep=torch.full((batch,), 0.6),
        img_ids=ids.float(),
        txt_ids=torch.zeros(text, 3),
        guidance=torch.full((batch,), 3.5),
    )


def _flux2_inputs(height: int, width: int, batch: int, text: int, reference: bool = False) -> dict[str, Any]:
    grids = [(height, width)] + [REFERENCE] * reference
    ids = torch.cat([_flux_ids(10 * segment, *grid) for segment, grid in enumerate(grids)])
    ids = nn.functional.pad(ids, (0, 1))  # columns: time, row, column, layer
    txt_ids = nn.functional.pad(torch.arange(text)[:, None], (3, 0))
    return dict(
        hidden_states=noise(batch, len(ids), 4 * CHANNELS),
        encoder_hidden_states=noise(batch, text, TEXT_DIM, seed=1),
        timestep=torch.full((batch,), 0.6),
        img_ids=ids.expand(batch, -1, -1),
        txt_ids=txt_ids.expand(batch, -1, -1),
        guidance=torch.full((batch,), 4.0),
    )


def _qwen_inputs(
    height: int, width: int, batch: int, text: int, reference: bool = False, masked: bool = False
) -> dict[str, Any]:
    shapes = [(1, height, width)] + [(1, *REFERENCE)] * reference
    tokens = sum(rows * columns for _, rows, columns in shapes)
    mask = (torch.arange(text) < text - 2 * torch.arange(batch)[:, None]).long() if masked else None
    return dict(
        hidden_states=noise(batch, tokens, 4 * CHANNELS),
        encoder_hidden_states=noise(batch, text, TEXT_DIM, seed=1),
        encoder_hidden_states_mask=mask,
        timestep=torch.full((batch,), 0.6),
        img_shapes=[shapes] * batch,
    )


def _zimage_inputs(height: int, width: int, batch: int, text: int, ragged: bool = False) -> dict[str, Any]:
    return dict(
        x=[noise(CHANNELS, 1, 2 * height, 2 * width, seed=i) for i in range(batch)],
        t=torch.full((batch,), 0.4),
        cap_feats=[noise(text + 32 * i * ragged, TEXT_DIM, seed=9 + i) for i in range(batch)],
    )


def _zimage_layouts(height: int, width: int, text: int, ragged: bool = False) -> set[Layout]:
    padding = -height * width % 32
    caption = text + -text % 32 + 32 * ragged  # the longest caption of a batch of two
    return {Layout(0, (height, width), padding), Layout(0, (height, width), padding + caption)}


def _zimage_texts(text: int, ragged: bool = False) -> set[int]:
    return {text + -text % 32 + 32 * ragged}


_FLUX = dict(
    in_channels=4 * CHANNELS, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=TEXT_DIM,
)  # fmt: skip
_FLUX1 = _FLUX | dict(pooled_projection_dim=POOLED_DIM, guidance_embeds=True, axes_dims_rope=(4, 6, 6))
_FLUX2 = _FLUX | dict(axes_dims_rope=(4, 4, 4, 4))
_QWEN = dict(
    in_channels=4 * CHANNELS, out_channels=CHANNELS, num_layers=2, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=TEXT_DIM, axes_dims_rope=(4, 6, 6),
)  # fmt: skip
_ZIMAGE = dict(
    in_channels=CHANNELS, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=TEXT_DIM,
    axes_dims=[4, 6, 6], axes_lens=[256, 64, 64],
)  # fmt: skip


def _packed_case(name: str, model_class: type, config: dict[str, Any], inputs: Any, **facts: Any) -> HostCase:
    facts = dict(shape=packed(4 * CHANNELS), layouts=text_first) | facts
    return HostCase(name, partial(build, model_class, **config), inputs, sample, **facts)


def _referring_case(name: str, model_class: type, config: dict[str, Any], inputs: Any, notes: str) -> HostCase:
    facts = dict(shape=packed(4 * CHANNELS, REFERENCE[0] * REFERENCE[1]), notes=notes)
    layouts = partial(text_first, reference=(REFERENCE,))
    return _packed_case(name, model_class, config, partial(inputs, reference=True), layouts=layouts, **facts)


def _zimage_case(name: str, ragged: bool, notes: str) -> HostCase:
    return HostCase(
        name,
        partial(build, diffusers.ZImageTransformer2DModel, **_ZIMAGE),
        partial(_zimage_inputs, ragged=ragged),
        output=lambda output: torch.stack(output.sample),
        shape=lambda height, width, batch: (batch, CHANNELS, 1, 2 * height, 2 * width),
        layouts=partial(_zimage_layouts, ragged=ragged),
        text_only=partial(_zimage_texts, ragged=ragged),
        notes=notes,
    )


PACKED_DITS = [
    _packed_case("flux", diffusers.FluxTransformer2DModel, _FLUX1, _flux_inputs),
    _referring_case(
        "flux-kontext", diffusers.FluxTransformer2DModel, _FLUX1, _flux_inputs, "img_ids[:, 0] is 0, then 1"
    ),
    _packed_case("flux2", diffusers.Flux2Transformer2DModel, _FLUX2, _flux2_inputs, notes="ids are int64 [B, N, 4]"),
    _referring_case(
        "flux2-reference", diffusers.Flux2Transformer2DModel, _FLUX2, _flux2_inputs, "img_ids[..., 0] is 0, then 10"
    ),
    _packed_case("qwen-image", diffusers.QwenImageTransformer2DModel, _QWEN, _qwen_inputs),
    _packed_case(
        "qwen-image-masked", diffusers.QwenImageTransformer2DModel, _QWEN, partial(_qwen_inputs, masked=True),
        notes="padding inside the prefix, masked by bool [B, 1, 1, N]",
    ),
    _referring_case(
        "qwen-image-edit", diffusers.QwenImageTransformer2DModel, _QWEN, _qwen_inputs, "two img_shapes per sample"
    ),
    _zimage_case("z-image", False, "image and text are each padded to 32 tokens, unmasked; both come after the grid"),
    _zimage_case("z-image-ragged", True, "sample i has 32 * i more text tokens: bool [B, 1, 1, N] masks the tail"),
]  # fmt: skip
