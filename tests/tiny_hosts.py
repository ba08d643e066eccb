"""The table of hosts: every model family as a tiny random model, with its inputs, its sequence layout and its grids.

Nothing here imports `vision_attn`: the rows state what diffusers and timm do, and `test_tiny_hosts.py` proves it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import diffusers
import timm
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid
from torch import Tensor, nn

TEXT_DIM, POOLED_DIM, CHANNELS = 32, 16, 4
REFERENCE = (3, 5)  # grid of the reference image in the rows that have one


class Layout(NamedTuple):
    """One sequence of a self-attention layer: `prefix` tokens, the grid, grids of reference images, `suffix` tokens."""

    prefix: int
    grid: tuple[int, int]
    suffix: int = 0
    reference: tuple[tuple[int, int], ...] = ()

    @property
    def tokens(self) -> int:
        return self.prefix + sum(height * width for height, width in (self.grid, *self.reference)) + self.suffix


@dataclass(frozen=True)
class HostCase:
    """A tiny host. `height, width` count tokens of its top attention level, `text` its text tokens.

    Attributes:
        build: Returns the model: equal weights on every call, eval mode, fp32, no parameter left at zero.
        inputs: `(height, width, batch, text)` -> keyword arguments of the model, equal on every call.
        output: Picks the tensor out of what the model returns.
        shape: `(height, width, batch)` -> shape of that tensor.
        layouts: `(height, width, text)` -> the sequences of all self-attention layers that hold the grid.
        text_only: `text` -> lengths of self-attention over text alone (token refiners), which is not to be touched.
        fixed_size: True if only square grids run.
    """

    id: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int, int, int], dict[str, Any]]
    output: Callable[[Any], Tensor]
    shape: Callable[[int, int, int], tuple[int, ...]]
    layouts: Callable[[int, int, int], set[Layout]]
    text_only: Callable[[int], set[int]] = field(default=lambda text: set())
    fixed_size: bool = False
    notes: str = ""

    def joint(self, height: int, width: int, text: int) -> Layout:
        """Return the longest sequence: text and image together where the family attends jointly."""
        return max(self.layouts(height, width, text), key=lambda layout: layout.tokens)

    def prefix(self, text: int) -> int:
        """Return the number of tokens before the grid in the joint sequence."""
        return self.joint(4, 6, text).prefix

    def suffix(self, height: int, width: int, text: int) -> int:
        """Return the number of tokens after the grid in the joint sequence, reference images not counted."""
        return self.joint(height, width, text).suffix

    def grids(self, height: int, width: int) -> set[tuple[int, int]]:
        """Return the grids of its self-attention layers, reference images not counted."""
        return {layout.grid for layout in self.layouts(height, width, 8)}


def randomise(model: nn.Module) -> nn.Module:
    """Redraw all parameters, so that no gate or projection is zero and a wrong attention changes the output."""
    generator = torch.Generator().manual_seed(0)
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Conv3d)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if id(parameter) in linear:
                fan_in = parameter[0].numel()
                parameter.copy_(noise / fan_in**0.5)
            elif parameter.ndim > 1:
                parameter.copy_(0.5 * noise)
            else:
                is_scale = name.endswith("weight") or "gamma" in name
                parameter.copy_(is_scale + 0.05 * noise)
    return model.eval()


def _build(model_class: Callable[..., nn.Module], *args: Any, **config: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return randomise(model_class(*args, **config))


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Return fp32 normal noise that depends on nothing but its shape and `seed`."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _half(grid: tuple[int, int]) -> tuple[int, int]:
    return (grid[0] + 1) // 2, (grid[1] + 1) // 2


def _sample(output: Any) -> Tensor:
    return output.sample


def _pixels(channels: int, patch: int = 2) -> Callable[[int, int, int], tuple[int, ...]]:
    return lambda height, width, batch: (batch, channels, patch * height, patch * width)


def _packed(channels: int, reference: int = 0) -> Callable[[int, int, int], tuple[int, ...]]:
    return lambda height, width, batch: (batch, height * width + reference, channels)


def _alone(height: int, width: int, text: int) -> set[Layout]:
    return {Layout(0, (height, width))}


def _text_first(height: int, width: int, text: int, *, extra: int = 0, reference: tuple = ()) -> set[Layout]:
    return {Layout(extra + text, (height, width), reference=reference)}


# UNets and the ControlNet: no text in the self-attention, one grid per level.

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


def _three_levels(height: int, width: int, text: int) -> set[Layout]:
    grid = (height, width)
    return {Layout(0, grid), Layout(0, _half(grid)), Layout(0, _half(_half(grid)))}


def _two_levels(height: int, width: int, text: int) -> set[Layout]:
    return {Layout(0, (height, width)), Layout(0, _half((height, width)))}


def _unet_case(name: str, config: dict[str, Any], **facts: Any) -> HostCase:
    facts = dict(inputs=_unet_inputs, shape=_pixels(CHANNELS, 1), layouts=_three_levels) | facts
    return HostCase(name, partial(_build, diffusers.UNet2DConditionModel, **config), output=_sample, **facts)


UNETS = [
    _unet_case("sd15-unet", _UNET, notes="attention_head_dim is the number of heads (diffusers naming bug)"),
    _unet_case("sd21-unet", _SD21, notes="linear proj_in, heads per level"),
    _unet_case(
        "sdxl-unet", _SDXL, inputs=_sdxl_inputs, shape=_pixels(CHANNELS), layouts=_two_levels,
        notes="no attention at the resolution of the latents: (height, width) is half of it",
    ),
    _unet_case("sd15-inpaint-unet", _UNET | dict(in_channels=9), inputs=partial(_unet_inputs, channels=9)),
    HostCase(
        "sd15-controlnet",
        partial(
            _build, diffusers.ControlNetModel, **_CONTROLNET, conditioning_embedding_out_channels=(8, 8, 8, 8)
        ),
        inputs=_controlnet_inputs,
        output=lambda output: output.mid_block_res_sample,
        shape=lambda height, width, batch: (batch, 32, *_half(_half((height, width)))),
        layouts=_three_levels,
    ),
]  # fmt: skip


# Diffusion transformers over latents [B, C, height, width].


def _latents(height: int, width: int, batch: int, text: int, **extra: Tensor) -> dict[str, Any]:
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
    return _latents(height, width, batch, text) | dict(encoder_attention_mask=mask, added_cond_kwargs=condition)


def _sd3_inputs(height: int, width: int, batch: int, text: int) -> dict[str, Any]:
    return _latents(height, width, batch, text, pooled_projections=noise(batch, POOLED_DIM, seed=2))


def _auraflow_inputs(height: int, width: int, batch: int, text: int) -> dict[str, Any]:
    return _latents(height, width, batch, text, timestep=torch.full((batch,), 0.6))


def _hunyuandit_inputs(height: int, width: int, batch: int, text: int) -> dict[str, Any]:
    crop = get_resize_crop_region_for_grid((height, width), 32)
    size = [16.0 * height, 16.0 * width]
    return _latents(height, width, batch, 4) | dict(
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
    return _latents(height, width, batch, text) | sizes


def _lumina2_inputs(height: int, width: int, batch: int, text: int, ragged: bool = False) -> dict[str, Any]:
    lengths = text - 2 * ragged * torch.arange(batch)
    mask = (torch.arange(text + 3) < lengths[:, None]).long()  # as the pipeline pads prompts to 256 tokens
    return _latents(height, width, batch, text + 3, timestep=torch.full((batch,), 0.4)) | dict(
        encoder_attention_mask=mask
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


def _lumina2_layouts(height: int, width: int, text: int) -> set[Layout]:
    return {Layout(text, (height, width)), Layout(0, (height, width))}


def _sd3_layouts(height: int, width: int, text: int, dual: bool = False) -> set[Layout]:
    joint = Layout(0, (height, width), suffix=text)
    return {joint, Layout(0, (height, width))} if dual else {joint}


def _latent_case(name: str, model_class: type, config: dict[str, Any], inputs: Any, **facts: Any) -> HostCase:
    facts = dict(shape=_pixels(CHANNELS), layouts=_alone) | facts
    return HostCase(name, partial(_build, model_class, **config), inputs, _sample, **facts)


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
        _pixart_inputs, shape=_pixels(2 * CHANNELS),
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
        _auraflow_inputs, layouts=partial(_text_first, extra=8), notes="8 register tokens before the text",
    ),
    _latent_case(
        "hunyuandit", diffusers.HunyuanDiT2DModel,
        _DIT | dict(
            num_layers=4, sample_size=8, hidden_size=32, cross_attention_dim=TEXT_DIM, cross_attention_dim_t5=TEXT_DIM,
            pooled_projection_dim=POOLED_DIM, text_len=4, text_len_t5=6,
        ),
        _hunyuandit_inputs, shape=_pixels(2 * CHANNELS), notes="text lengths are fixed by its weights: `text` unused",
    ),
    _latent_case(
        "cogview4", diffusers.CogView4Transformer2DModel,
        _DIT | dict(out_channels=CHANNELS, text_embed_dim=TEXT_DIM, time_embed_dim=32, condition_dim=8),
        _cogview4_inputs, layouts=_text_first,
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
]  # fmt: skip


# Diffusion transformers over packed tokens [B, N, C], and Z-Image over a list of latents [C, frames, height, width].


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
    facts = dict(shape=_packed(4 * CHANNELS), layouts=_text_first) | facts
    return HostCase(name, partial(_build, model_class, **config), inputs, _sample, **facts)


def _referring_case(name: str, model_class: type, config: dict[str, Any], inputs: Any, notes: str) -> HostCase:
    facts = dict(shape=_packed(4 * CHANNELS, REFERENCE[0] * REFERENCE[1]), notes=notes)
    layouts = partial(_text_first, reference=(REFERENCE,))
    return _packed_case(name, model_class, config, partial(inputs, reference=True), layouts=layouts, **facts)


def _zimage_case(name: str, ragged: bool, notes: str) -> HostCase:
    return HostCase(
        name,
        partial(_build, diffusers.ZImageTransformer2DModel, **_ZIMAGE),
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


# timm.

_VIT = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=10, dynamic_img_size=True)


def _image_inputs(height: int, width: int, batch: int, text: int) -> dict[str, Any]:
    return dict(x=noise(batch, 3, 8 * height, 8 * width))


def _timm_case(name: str, model_name: str, prefix: int, notes: str = "", **config: Any) -> HostCase:
    return HostCase(
        name,
        partial(_build, timm.create_model, model_name, **_VIT | config),
        _image_inputs,
        output=lambda output: output,
        shape=lambda height, width, batch: (batch, 10),
        layouts=lambda height, width, text: {Layout(prefix, (height, width))},
        notes=notes,
    )


VITS = [
    _timm_case("vit", "vit_tiny_patch16_224", 1),
    _timm_case("vit-avg", "vit_tiny_patch16_224", 0, class_token=False, global_pool="avg"),
    _timm_case("dinov2-reg4", "vit_small_patch14_reg4_dinov2", 5, "layer scale"),
    _timm_case("deit-distilled", "deit_tiny_distilled_patch16_224", 2),
    _timm_case("eva02", "eva02_tiny_patch14_224", 1, "EvaAttention, RoPE on the grid"),
    _timm_case("dinov3", "vit_small_patch16_dinov3", 5, "EvaAttention, 4 registers, RoPE in [-1, 1]"),
    _timm_case("vit-rope", "vit_small_patch16_rope_224", 1, "AttentionRope"),
]


def _wan_inputs(height: int, width: int, batch: int, text: int) -> dict[str, Any]:
    video = noise(batch, CHANNELS, 2, 2 * height, 2 * width)
    return _latents(height, width, batch, text, hidden_states=video, timestep=torch.full((batch,), 600))


HOSTS: list[HostCase] = [*UNETS, *LATENT_DITS, *PACKED_DITS, *VITS]
VIDEO_HOSTS: list[HostCase] = [
    HostCase(
        "wan",
        partial(
            _build, diffusers.WanTransformer3DModel, num_attention_heads=2, attention_head_dim=16, num_layers=2,
            in_channels=CHANNELS, out_channels=CHANNELS, text_dim=TEXT_DIM, ffn_dim=32, rope_max_seq_len=32,
        ),
        _wan_inputs,
        _sample,
        shape=lambda height, width, batch: (batch, CHANNELS, 2, 2 * height, 2 * width),
        layouts=lambda height, width, text: {Layout(0, (height, width), reference=((height, width),))},
        notes="two frames, the second stated as a reference; it is here to be refused",
    )
]  # fmt: skip
HOST: dict[str, HostCase] = {case.id: case for case in [*HOSTS, *VIDEO_HOSTS]}
