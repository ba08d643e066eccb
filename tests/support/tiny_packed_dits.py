"""Tiny diffusion transformers over packed tokens `[B, N, C]`, and Z-Image over a list of latents."""

import math
from functools import partial
from typing import Any

import diffusers
import torch
from tiny_host_case import (
    CHANNELS,
    POOLED_DIM,
    REFERENCE,
    TEXT,
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


def flux_ids(segment: int, height: int, width: int) -> Tensor:
    return torch.cartesian_prod(torch.tensor([segment]), torch.arange(height), torch.arange(width))


def flux_inputs(height: int, width: int, batch: int, text: int, reference: bool = False) -> dict[str, Any]:
    grids = [(height, width)] + [REFERENCE] * reference
    ids = torch.cat([flux_ids(segment, *grid) for segment, grid in enumerate(grids)])
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
    ids = torch.cat([flux_ids(10 * segment, *grid) for segment, grid in enumerate(grids)])
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
    return dict(
        hidden_states=noise(batch, tokens, 4 * CHANNELS),
        encoder_hidden_states=noise(batch, text, TEXT_DIM, seed=1),
        encoder_hidden_states_mask=_lengths(batch, text) if masked else None,
        timestep=torch.full((batch,), 0.6),
        img_shapes=[shapes] * batch,
    )


_CONDITION = (2, 6)  # grid of the image given to Qwen-Image 2.1, whose text has a place for each 2 x 2 of its tokens


def _qwen21_inputs(
    height: int, width: int, batch: int, text: int, reference: bool = False, masked: bool = False
) -> dict[str, Any]:
    """The text, and in its middle the places of the reference image, if there is one."""
    shapes = [(1, *_CONDITION)] * reference + [(1, height, width)]
    places = _CONDITION[0] * _CONDITION[1] // 4 * reference
    before = text - text // 2
    is_image = torch.tensor([False] * before + [True] * places + [False] * (text // 2) + [True] * (height * width // 4))
    seen = torch.arange(text + places) < (text + places - 2 * torch.arange(batch)[:, None]).clamp(min=1)
    return dict(
        hidden_states=noise(batch, sum(rows * columns for _, rows, columns in shapes), CHANNELS),
        encoder_hidden_states=noise(batch, text + places, TEXT_DIM, seed=1),
        encoder_hidden_states_mask=seen if masked else None,
        timestep=torch.full((batch,), 0.6),
        img_shapes=[shapes] * batch,
        img_mask=is_image.expand(batch, -1),
    )


def _qwen21_layouts(height: int, width: int, text: int, reference: bool = False) -> set[Layout]:
    return {Layout(text + reference * _CONDITION[0] * _CONDITION[1], (height, width))}


def _qwen21_texts(text: int, reference: bool = False) -> set[int]:
    """The lengths at which a segment ends: the text, or its first half, the image, and the whole text."""
    before, image = text - text // 2, _CONDITION[0] * _CONDITION[1]
    return {before, before + image, text + image} if reference else {text}


def _qwen_controlnet_inputs(height: int, width: int, batch: int, text: int) -> dict[str, Any]:
    condition = noise(batch, height * width, 4 * CHANNELS, seed=3)
    return _qwen_inputs(height, width, batch, text) | dict(controlnet_cond=condition)


def _flux_controlnet_inputs(height: int, width: int, batch: int, text: int) -> dict[str, Any]:
    condition = noise(batch, height * width, 4 * CHANNELS, seed=3)
    return flux_inputs(height, width, batch, text) | dict(controlnet_cond=condition)


def _zimage_controlnet_inputs(height: int, width: int, batch: int, text: int) -> dict[str, Any]:
    inputs = _zimage_inputs(height, width, batch, text)
    return inputs | dict(control_context=[noise(*image.shape, seed=5 + i) for i, image in enumerate(inputs["x"])])


def _zimage_controlnet(**config: Any) -> nn.Module:
    """A ControlNet has the embedders and refiners of the transformer that it is for; here it has no refiners."""
    transformer = build(diffusers.ZImageTransformer2DModel, **_ZIMAGE | dict(n_refiner_layers=0))
    model: Any = build(diffusers.ZImageControlNetModel, **config)
    model.gradient_checkpointing = False  # diffusers 0.42 forgets it, and asks for it when there are gradients
    return diffusers.ZImageControlNetModel.from_transformer(model, transformer)


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


def _fibo2_inputs(
    height: int, width: int, batch: int, text: int, edit: bool = False, ragged: bool = False
) -> dict[str, Any]:
    context = [noise(batch, CHANNELS, 2 * REFERENCE[0], 2 * REFERENCE[1], seed=5)] if edit else None
    text += 3 * ragged
    mask = torch.arange(text) < text - 2 * torch.arange(batch)[:, None] if ragged else None
    return dict(
        hidden_states=noise(batch, CHANNELS, 2 * height, 2 * width), timestep=torch.full((batch,), 0.4),
        encoder_hidden_states=noise(batch, 2, text, TEXT_DIM, seed=9), encoder_attention_mask=mask,
        context_latents=context,
    )  # fmt: skip


def _joy_inputs(height: int, width: int, batch: int, text: int, references: int = 0) -> dict[str, Any]:
    """The image comes after its reference images, and alone it has one axis fewer."""
    items = (references + 1,) if references else ()
    return dict(
        hidden_states=noise(batch, *items, CHANNELS, 1, 2 * height, 2 * width),
        encoder_hidden_states=noise(batch, text, TEXT_DIM, seed=1),
        timestep=torch.full((batch,), 600.0),
    )


def _joy_layouts(height: int, width: int, text: int, references: int = 0) -> set[Layout]:
    return {Layout(0, (height, width), text, reference=((height, width),) * references)}


def _joy_plus_inputs(
    height: int, width: int, batch: int, text: int, ragged: bool = False, masked: bool = False
) -> dict[str, Any]:
    """Each sample has a reference image; if `ragged`, every second one has none."""
    shapes = [[(1, height, width)] + [(1, *REFERENCE)] * (1 - ragged * (i % 2)) for i in range(batch)]
    tokens = max(sum(rows * columns for _, rows, columns in images) for images in shapes)
    return dict(
        hidden_states=noise(batch, tokens, CHANNELS, 1, 2, 2),
        encoder_hidden_states=noise(batch, text, TEXT_DIM, seed=1),
        encoder_hidden_states_mask=_lengths(batch, text) if masked or ragged else None,
        timestep=torch.full((batch,), 600.0),
        shape_list=shapes,
    )


def _lengths(batch: int, text: int) -> Tensor:
    """Return a mask in which sample i has 2 * i tokens fewer."""
    return (torch.arange(text) < text - 2 * torch.arange(batch)[:, None]).long()


def _joy_plus_layouts(height: int, width: int, text: int) -> set[Layout]:
    return {Layout(0, (height, width), text, reference=(REFERENCE,))}


def _joy_shape(height: int, width: int, batch: int, references: int = 0) -> tuple[int, ...]:
    return (batch, *[references + 1] * (references > 0), CHANNELS, 1, 2 * height, 2 * width)


def _joy_plus_shape(height: int, width: int, batch: int) -> tuple[int, ...]:
    return batch, height * width + REFERENCE[0] * REFERENCE[1], CHANNELS, 1, 2, 2


def _nucleus_inputs(height: int, width: int, batch: int, text: int, masked: bool = False) -> dict[str, Any]:
    inputs = _qwen_inputs(height, width, batch, text, masked=masked)
    return inputs | dict(img_shapes=[(1, height, width)] * batch)


def _gist(text: int, ragged: bool = False) -> int:
    """Tokens to which the text is resampled, in the longest sample of a batch."""
    return max(2, min(4, math.ceil(2 + 2 * (text + 3 * ragged - 2) / 14)))


def _fibo2_layouts(height: int, width: int, text: int, edit: bool = False, ragged: bool = False) -> set[Layout]:
    """The refiner has no text."""
    grid, reference, gist = (height, width), (REFERENCE,) if edit else (), _gist(text, ragged)
    return {Layout(0, grid, 0, reference), Layout(0 if ragged else gist, grid, gist if ragged else 0, reference)}


FLUX = dict(
    in_channels=4 * CHANNELS, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=TEXT_DIM,
)  # fmt: skip
FLUX1 = FLUX | dict(pooled_projection_dim=POOLED_DIM, guidance_embeds=True, axes_dims_rope=(4, 6, 6))
FLUX2 = FLUX | dict(axes_dims_rope=(4, 4, 4, 4))
_QWEN = dict(
    in_channels=4 * CHANNELS, out_channels=CHANNELS, num_layers=2, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=TEXT_DIM, axes_dims_rope=(4, 6, 6),
)  # fmt: skip
_ZIMAGE = dict(
    in_channels=CHANNELS, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=TEXT_DIM,
    axes_dims=[4, 6, 6], axes_lens=[256, 64, 64],
)  # fmt: skip


_NUCLEUS = dict(
    in_channels=4 * CHANNELS, out_channels=CHANNELS, num_layers=2, attention_head_dim=16, num_attention_heads=2,
    num_key_value_heads=1, joint_attention_dim=TEXT_DIM, axes_dims_rope=(4, 6, 6), moe_enabled=False, mlp_ratio=8.0,
)  # fmt: skip
_JOY = dict(
    in_channels=CHANNELS, hidden_size=32, num_attention_heads=2, text_dim=TEXT_DIM, num_layers=2,
    rope_dim_list=[4, 6, 6],
)  # fmt: skip
_FIBO2 = dict(
    in_channels=CHANNELS, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, cap_feat_dim=TEXT_DIM,
    injection_layer_ids=(1,), perceiver_num_layers=1, min_num_gist_tokens=2, max_num_gist_tokens=4, gist_step=1,
    gist_min_text_len=2, gist_max_text_len=16, axes_dims=(4, 6, 6), axes_lens=(64, 64, 64),
)  # fmt: skip
_QWEN21 = dict(
    in_channels=CHANNELS, out_channels=CHANNELS, num_layers=2, attention_head_dim=16, num_attention_heads=2,
    context_in_dim=TEXT_DIM, mlp_ratio=1, axes_dims_rope=(4, 6, 6),
)  # fmt: skip


def _qwen21_case(name: str, notes: str, reference: bool = False, masked: bool = False) -> HostCase:
    return HostCase(
        name,
        partial(build, diffusers.QwenImage21Transformer2DModel, **_QWEN21),
        partial(_qwen21_inputs, reference=reference, masked=masked),
        output=sample,
        shape=packed(CHANNELS, TEXT + reference * _CONDITION[0] * _CONDITION[1]),
        layouts=partial(_qwen21_layouts, reference=reference),
        text_only=partial(_qwen21_texts, reference=reference),
        more_keys=True,
        patch=1,
        notes=notes,
    )


def _fibo2_case(name: str, notes: str, **how: bool) -> HostCase:
    return HostCase(
        name,
        partial(build, diffusers.BriaFibo2Transformer2DModel, **_FIBO2),
        partial(_fibo2_inputs, **how),
        output=sample,
        shape=lambda height, width, batch: (batch, CHANNELS, 2 * height, 2 * width),
        layouts=partial(_fibo2_layouts, **how),
        text_only=lambda text: {_gist(text, how.get("ragged", False))},
        notes=notes,
    )


def packed_case(name: str, model_class: type, config: dict[str, Any], inputs: Any, **facts: Any) -> HostCase:
    facts = dict(output=sample, shape=packed(4 * CHANNELS), layouts=text_first) | facts
    return HostCase(name, partial(build, model_class, **config), inputs, **facts)


def referring_case(name: str, model_class: type, config: dict[str, Any], inputs: Any, notes: str) -> HostCase:
    facts = dict(shape=packed(4 * CHANNELS, REFERENCE[0] * REFERENCE[1]), notes=notes)
    layouts = partial(text_first, reference=(REFERENCE,))
    return packed_case(name, model_class, config, partial(inputs, reference=True), layouts=layouts, **facts)


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
    packed_case("flux", diffusers.FluxTransformer2DModel, FLUX1, flux_inputs),
    referring_case(
        "flux-kontext", diffusers.FluxTransformer2DModel, FLUX1, flux_inputs, "img_ids[:, 0] is 0, then 1"
    ),
    packed_case("flux2", diffusers.Flux2Transformer2DModel, FLUX2, _flux2_inputs, notes="ids are int64 [B, N, 4]"),
    referring_case(
        "flux2-reference", diffusers.Flux2Transformer2DModel, FLUX2, _flux2_inputs, "img_ids[..., 0] is 0, then 10"
    ),
    packed_case("qwen-image", diffusers.QwenImageTransformer2DModel, _QWEN, _qwen_inputs),
    packed_case(
        "qwen-image-masked", diffusers.QwenImageTransformer2DModel, _QWEN, partial(_qwen_inputs, masked=True),
        notes="padding inside the prefix, masked by bool [B, 1, 1, N]",
    ),
    referring_case(
        "qwen-image-edit", diffusers.QwenImageTransformer2DModel, _QWEN, _qwen_inputs, "two img_shapes per sample"
    ),
    _zimage_case("z-image", False, "image and text are each padded to 32 tokens, unmasked; both come after the grid"),
    _zimage_case("z-image-ragged", True, "sample i has 32 * i more text tokens: bool [B, 1, 1, N] masks the tail"),
    _fibo2_case("fibo-2", "a gist of the text first; every second layer also attends across to the text"),
    _fibo2_case("fibo-2-edit", "an image to edit after the grid", edit=True),
    _fibo2_case("fibo-2-ragged", "sample i has 2 * i text tokens fewer: the gist is last, masked by bool", ragged=True),
    *(
        packed_case(
            f"joy-image-edit{'-references' * (n > 0)}", diffusers.JoyImageEditTransformer3DModel, _JOY,
            partial(_joy_inputs, references=n), layouts=partial(_joy_layouts, references=n),
            shape=partial(_joy_shape, references=n), notes="the last item comes first in the sequence",
        )
        for n in (0, 2)
    ),
    *(
        packed_case(
            "-".join(("joy-image-edit-plus", *how)), diffusers.JoyImageEditPlusTransformer3DModel, _JOY,
            partial(_joy_plus_inputs, **dict.fromkeys(how, True)), layouts=_joy_plus_layouts, shape=_joy_plus_shape,
        )
        for how in ((), ("masked",), ("ragged",))
    ),
    *(
        packed_case(
            f"nucleus{'-masked' * masked}", diffusers.NucleusMoEImageTransformer2DModel, _NUCLEUS,
            partial(_nucleus_inputs, masked=masked), more_keys="last", notes="text gives keys alone, behind the grid",
            layouts=lambda height, width, text: {Layout(0, (height, width), text)},
        )
        for masked in (False, True)
    ),
    packed_case(
        "flux-controlnet", diffusers.FluxControlNetModel, FLUX1, _flux_controlnet_inputs, shape=packed(32),
        output=lambda output: output.controlnet_single_block_samples[-1],
    ),
    packed_case(
        "qwen-controlnet", diffusers.QwenImageControlNetModel, _QWEN, _qwen_controlnet_inputs, shape=packed(32),
        output=lambda output: output.controlnet_block_samples[-1],
    ),
    HostCase(
        "z-image-controlnet",
        partial(
            _zimage_controlnet, control_layers_places=[0, 1], control_in_dim=CHANNELS, dim=32, n_refiner_layers=1,
            n_heads=2, n_kv_heads=2,
        ),
        _zimage_controlnet_inputs,
        output=lambda output: output[1][:, : -32],
        shape=lambda height, width, batch: (batch, height * width + -height * width % 32, 32),
        layouts=_zimage_layouts,
        autocast=False,
    ),
    _qwen21_case("qwen-image-2.1", "the text is causal; the image sees all of it, by a call of its own"),
    _qwen21_case("qwen-image-2.1-masked", "padding inside the prefix, masked by bool [B, 1, 1, N]", masked=True),
    _qwen21_case("qwen-image-2.1-edit", "a reference image in the middle of the text", reference=True),
]  # fmt: skip
