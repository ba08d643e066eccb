"""Tiny diffusion transformers that read their grid from position ids, as FLUX does."""

from functools import partial
from typing import Any

import diffusers
import torch
from tiny_host_case import CHANNELS, REFERENCE, TEXT_DIM, HostCase, Layout, noise, packed
from tiny_packed_dits import FLUX, FLUX2, flux_ids, flux_inputs, packed_case
from torch import Tensor, nn


def _taken(names: str, inputs: dict[str, Any], **extra: Any) -> dict[str, Any]:
    """Return some of the inputs of FLUX, and others."""
    return {name: inputs[name] for name in names.split()} | extra


_COMMON = "hidden_states encoder_hidden_states timestep img_ids txt_ids"


def _plain_inputs(height: int, width: int, batch: int, text: int) -> dict[str, Any]:
    return _taken(_COMMON, flux_inputs(height, width, batch, text))


def _seen(batch: int, text: int, image: int) -> Tensor:
    """Return which tokens are no padding: sample i has i tokens of text fewer."""
    tokens = torch.arange(text) < (text - torch.arange(batch)[:, None]).clamp(min=1)
    return torch.cat([tokens, tokens.new_ones(batch, image)], 1)


def _chroma_inputs(height: int, width: int, batch: int, text: int, added: bool = False) -> dict[str, Any]:
    mask = _seen(batch, text, height * width)
    return _plain_inputs(height, width, batch, text) | dict(attention_mask=mask.float() if added else mask)


def _fibo_inputs(height: int, width: int, batch: int, text: int) -> dict[str, Any]:
    layers = [noise(batch, text, TEXT_DIM, seed=3 + i) for i in range(2)]
    mask = _seen(batch, text, height * width)[:, None, None]
    inputs = _plain_inputs(height, width, batch, text)
    return inputs | dict(text_encoder_layers=layers, joint_attention_kwargs=dict(attention_mask=mask))


def _longcat_inputs(height: int, width: int, batch: int, text: int) -> dict[str, Any]:
    """Image ids start behind those of the text, and a reference image is of another modality."""
    start = torch.tensor([0, text, text])
    ids = torch.cat([flux_ids(1, height, width) + start, flux_ids(2, *REFERENCE) + start])
    tokens = noise(batch, len(ids), 4 * CHANNELS)
    return _plain_inputs(height, width, batch, text) | dict(hidden_states=tokens, img_ids=ids.float())


def _flux3_inputs(height: int, width: int, batch: int, text: int, reference: bool = False) -> dict[str, Any]:
    ids = [nn.functional.pad(flux_ids(10 * i, *grid), (0, 1)) for i, grid in enumerate([(height, width), REFERENCE])]
    txt_ids = nn.functional.pad(torch.arange(text)[:, None], (3, 0))
    inputs = _plain_inputs(height, width, batch, text) | dict(img_ids=ids[0], txt_ids=txt_ids)
    given = dict(image_cond_hidden_states=noise(batch, len(ids[1]), 4 * CHANNELS, seed=3), image_cond_ids=ids[1])
    return inputs | (given if reference else {})


def _flux3_layouts(height: int, width: int, text: int, reference: bool = False) -> set[Layout]:
    grid = (height, width)
    return {Layout(0, grid), Layout(text, grid, reference=(REFERENCE,) if reference else ())}


def _flux3_others(text: int, reference: bool = False) -> set[int]:
    return {text, REFERENCE[0] * REFERENCE[1]} if reference else {text}


def _krea2_inputs(height: int, width: int, batch: int, text: int, masked: bool = False) -> dict[str, Any]:
    ids = torch.cat([torch.zeros(text, 3), flux_ids(0, height, width)])
    return dict(
        hidden_states=noise(batch, height * width, 4 * CHANNELS),
        encoder_hidden_states=noise(batch, text, 3, TEXT_DIM, seed=1),
        encoder_attention_mask=_seen(batch, text, 0) if masked else None,
        timestep=torch.full((batch,), 0.6),
        position_ids=ids,
    )


_PLAIN = FLUX | dict(axes_dims_rope=(4, 6, 6))
_BRIA = _PLAIN | dict(pooled_projection_dim=None)
_FLUX3 = FLUX2 | dict(cond_in_channels=4 * CHANNELS, timestep_channels=16)
_KREA2 = dict(
    in_channels=4 * CHANNELS, num_layers=2, attention_head_dim=16, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=32, timestep_embed_dim=16, text_hidden_dim=TEXT_DIM, num_text_layers=3,
    text_num_attention_heads=2, text_num_key_value_heads=1, text_intermediate_size=32, num_layerwise_text_blocks=1,
    num_refiner_text_blocks=1, axes_dims_rope=(4, 6, 6),
)  # fmt: skip
_CHROMA = _PLAIN | dict(approximator_num_channels=16, approximator_hidden_dim=32, approximator_layers=1)


def _flux3_case(name: str, notes: str, reference: bool = False) -> HostCase:
    return packed_case(
        name, diffusers.Flux3Transformer2DModel, _FLUX3, partial(_flux3_inputs, reference=reference),
        layouts=partial(_flux3_layouts, reference=reference), text_only=partial(_flux3_others, reference=reference),
        notes=notes,
    )  # fmt: skip


def _krea2_case(name: str, masked: bool, notes: str) -> HostCase:
    inputs = partial(_krea2_inputs, masked=masked)
    return packed_case(
        name, diffusers.Krea2Transformer2DModel, _KREA2, inputs, text_only=lambda text: {3, text}, notes=notes
    )


ID_DITS = [
    _flux3_case("flux3", "its first blocks see the image alone, the last ones all tokens"),
    _flux3_case("flux3-reference", "the ids of the reference image are an argument of their own", reference=True),
    packed_case("chroma", diffusers.ChromaTransformer2DModel, _CHROMA, _plain_inputs),
    packed_case(
        "chroma-masked", diffusers.ChromaTransformer2DModel, _CHROMA, _chroma_inputs,
        notes="bool [B, 1, N, N]: padding neither sees nor is seen",
    ),
    packed_case("bria", diffusers.BriaTransformer2DModel, _BRIA, _plain_inputs),
    packed_case(
        "bria-fibo", diffusers.BriaFiboTransformer2DModel, _BRIA | dict(text_encoder_dim=TEXT_DIM), _fibo_inputs,
        patch=1, notes="bool [B, 1, 1, N] by joint_attention_kwargs; half of the text's channels come anew",
    ),
    packed_case(
        "longcat-edit", diffusers.LongCatImageTransformer2DModel, _PLAIN, _longcat_inputs,
        shape=packed(4 * CHANNELS, REFERENCE[0] * REFERENCE[1]),
        layouts=lambda height, width, text: {Layout(text, (height, width), reference=(REFERENCE,))},
        notes="img_ids[:, 0] is 1, then 2; rows and columns start at the number of text tokens",
    ),
    packed_case("ovis-image", diffusers.OvisImageTransformer2DModel, _PLAIN | dict(out_channels=16), _plain_inputs),
    _krea2_case("krea2", False, "4 heads of queries, 2 of keys; text and image have one table of ids"),
    _krea2_case("krea2-masked", True, "padding inside the prefix, masked by bool [B, 1, 1, N]"),
]  # fmt: skip
