"""The denoisers that are timed: diffusers' configurations of released models, filled with random weights.

Each configuration has the values of the released `config.json` on the Hugging Face hub, without those that are defaults
of diffusers' class. Nothing is downloaded.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vision_attn.bench.candidate import AbsentError

_FLUX_TEXT, _TEXT = 512, 256  # tokens
Draw = Callable[..., Tensor]
"""Draws normal noise of a shape, on the device and in the dtype of the model."""


@dataclass(frozen=True)
class Architecture:
    """One denoiser.

    Args:
        name: Short and stable: a row is called '<name>-<pixels>'.
        title: Title of its table.
        source: Repository on the Hugging Face hub that the configuration is from.
        model: Name of the class in diffusers.
        config: Arguments of the class.
        small: Arguments that differ in the twin for a CPU.
        native: Side in pixels of the images that it was trained on.
        inputs: Makes the arguments of one forward from the configuration, the image's side in pixels and a `Draw`.
        blocks: Classes of the blocks that are compiled, those of `compile_repeated_blocks`.
        stacks: Names of the lists of equal blocks: a step's time is linear in their lengths. None if all blocks differ,
            as in UNets.
        patch: Side in pixels of a token of the finest attention.
        prefix: Text tokens that attend together with those of the image.
    """

    name: str
    title: str
    source: str
    model: str
    config: Mapping[str, Any]
    small: Mapping[str, Any]
    native: int
    inputs: Callable[[Mapping[str, Any], int, Draw], dict[str, Any]]
    blocks: tuple[str, ...]
    stacks: tuple[str, ...] = ()
    patch: int = 16
    prefix: int = 0

    def twin(self) -> "Architecture":
        """Return the same architecture, small enough for a CPU."""
        return replace(self, config={**self.config, **self.small}, title=f"{self.title}, small", native=64)

    def build(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """Build the model with random weights, drawn on the device."""
        from vision_attn._compat import ensure_torchvision  # noqa: PLC0415

        ensure_torchvision()
        import diffusers  # noqa: PLC0415

        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                model: nn.Module = getattr(diffusers, self.model)(**self.config)
        finally:
            torch.set_default_dtype(before)
        # tensors made by numpy are still on the CPU and in a dtype of their own; the model's own `to` would log
        return nn.Module.to(model.eval().requires_grad_(False), device, dtype)

    def arguments(self, pixels: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """Draw the arguments of one forward, batch 1."""
        draw = torch.Generator(device).manual_seed(0)

        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw, device=device, dtype=dtype)

        return self.inputs(self.config, pixels, noise) | dict(return_dict=False)


def _flux_inputs(config: Mapping[str, Any], pixels: int, draw: Draw) -> dict[str, Any]:
    """Position ids are in the dtype of the embeddings, as the pipeline passes them."""
    side, x = pixels // 16, draw(1)
    ids = torch.zeros(side, side, 3, device=x.device)
    ids[..., 1] += torch.arange(side, device=x.device)[:, None]
    ids[..., 2] += torch.arange(side, device=x.device)
    return dict(
        hidden_states=draw(1, side**2, config["in_channels"]),
        encoder_hidden_states=draw(1, _FLUX_TEXT, config["joint_attention_dim"]),
        pooled_projections=draw(1, config["pooled_projection_dim"]),
        timestep=torch.full_like(x, 0.5),
        guidance=torch.full_like(x, 3.5, dtype=torch.float32),
        img_ids=ids.flatten(0, 1).to(x.dtype),
        txt_ids=torch.zeros_like(x).expand(_FLUX_TEXT, 3).contiguous(),
    )


def _unet_inputs(config: Mapping[str, Any], pixels: int, draw: Draw) -> dict[str, Any]:
    side = pixels // 8
    x = draw(1, 4, side, side)
    arguments: dict[str, Any] = dict(sample=x, timestep=torch.full((), 500, device=x.device))
    arguments |= dict(encoder_hidden_states=draw(1, 77, config["cross_attention_dim"]))
    if config.get("addition_embed_type"):
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        sizes = torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]], device=x.device, dtype=x.dtype)
        arguments |= dict(added_cond_kwargs=dict(text_embeds=draw(1, pooled), time_ids=sizes))
    return arguments


def _pixart_inputs(config: Mapping[str, Any], pixels: int, draw: Draw) -> dict[str, Any]:
    x = draw(1, config["in_channels"], pixels // 8, pixels // 8)
    return dict(
        hidden_states=x,
        encoder_hidden_states=draw(1, 300, config["caption_channels"]),
        encoder_attention_mask=torch.ones(1, 300, device=x.device),
        timestep=torch.full((1,), 500, device=x.device),
        added_cond_kwargs=dict(resolution=None, aspect_ratio=None),
    )


def _sd3_inputs(config: Mapping[str, Any], pixels: int, draw: Draw) -> dict[str, Any]:
    """The text is 77 tokens of CLIP and 256 of T5."""
    x = draw(1, config["in_channels"], pixels // 8, pixels // 8)
    return dict(
        hidden_states=x,
        encoder_hidden_states=draw(1, 333, config["joint_attention_dim"]),
        pooled_projections=draw(1, config["pooled_projection_dim"]),
        timestep=torch.full((1,), 500.0, device=x.device),
    )


def _qwen_inputs(config: Mapping[str, Any], pixels: int, draw: Draw) -> dict[str, Any]:
    side = pixels // 16
    x = draw(1, side**2, config["in_channels"])
    return dict(
        hidden_states=x,
        encoder_hidden_states=draw(1, _TEXT, config["joint_attention_dim"]),
        encoder_hidden_states_mask=None,
        timestep=x.new_full((1,), 0.5),
        img_shapes=[[(1, side, side)]],
    )


def _flux2_inputs(config: Mapping[str, Any], pixels: int, draw: Draw) -> dict[str, Any]:
    """Position ids have columns for time, row, column and the layer of a token of text."""
    side, x = pixels // 16, draw(1)
    image = torch.cartesian_prod(*(torch.arange(n, device=x.device) for n in (1, side, side, 1)))
    text = torch.cartesian_prod(*(torch.arange(n, device=x.device) for n in (1, 1, 1, _FLUX_TEXT)))
    return dict(
        hidden_states=draw(1, side**2, config["in_channels"]),
        encoder_hidden_states=draw(1, _FLUX_TEXT, config["joint_attention_dim"]),
        timestep=torch.full_like(x, 0.5),
        guidance=torch.full_like(x, 4.0, dtype=torch.float32),
        img_ids=image[None],
        txt_ids=text[None],
    )


def _zimage_inputs(config: Mapping[str, Any], pixels: int, draw: Draw) -> dict[str, Any]:
    x = draw(config["in_channels"], 1, pixels // 8, pixels // 8)
    return dict(x=[x], t=x.new_full((1,), 0.5), cap_feats=[draw(_TEXT, config["cap_feat_dim"])])


_UNET_SMALL = dict(
    block_out_channels=(16, 32, 32), norm_num_groups=8, cross_attention_dim=24, attention_head_dim=2, sample_size=8,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), layers_per_block=1,
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
)  # fmt: skip


def in_float8(model: nn.Module) -> nn.Module:
    """Quantise the linear layers of a model by torchao; on a GPU their inputs too, so that products run in float8.

    Raises:
        AbsentError: If torchao is not installed.
    """
    try:
        from torchao import quantization  # noqa: PLC0415, optional
    except ImportError as error:
        raise AbsentError(f"torchao cannot be imported: {error}") from None
    cuda = next(model.parameters()).is_cuda
    kind = "Float8DynamicActivationFloat8WeightConfig" if cuda else "Float8WeightOnlyConfig"
    quantization.quantize_(model, getattr(quantization, kind)())
    return model


ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture(
            "flux", "FLUX.1-dev", "black-forest-labs/FLUX.1-dev", "FluxTransformer2DModel",
            dict(in_channels=64, num_layers=19, num_single_layers=38, attention_head_dim=128, num_attention_heads=24,
                 joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=True,
                 axes_dims_rope=(16, 56, 56)),
            dict(in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=2,
                 joint_attention_dim=24, pooled_projection_dim=16, axes_dims_rope=(4, 6, 6)),
            1024, _flux_inputs, ("FluxTransformerBlock", "FluxSingleTransformerBlock"),
            ("transformer_blocks", "single_transformer_blocks"), prefix=_FLUX_TEXT,
        ),
        Architecture(
            "sdxl", "Stable Diffusion XL", "stabilityai/stable-diffusion-xl-base-1.0", "UNet2DConditionModel",
            dict(sample_size=128, block_out_channels=(320, 640, 1280), layers_per_block=2, cross_attention_dim=2048,
                 down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                 up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                 transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), use_linear_projection=True,
                 addition_embed_type="text_time", addition_time_embed_dim=256,
                 projection_class_embeddings_input_dim=2816),
            _UNET_SMALL | dict(transformer_layers_per_block=(1, 1, 2), addition_time_embed_dim=8,
                               projection_class_embeddings_input_dim=64),
            1024, _unet_inputs, ("BasicTransformerBlock",),
        ),
        Architecture(
            "sd15", "Stable Diffusion 1.5", "stable-diffusion-v1-5/stable-diffusion-v1-5", "UNet2DConditionModel",
            dict(sample_size=64, block_out_channels=(320, 640, 1280, 1280), layers_per_block=2, cross_attention_dim=768,
                 attention_head_dim=8),
            _UNET_SMALL, 512, _unet_inputs, ("BasicTransformerBlock",), patch=8,
        ),
        Architecture(
            "pixart", "PixArt-Sigma", "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", "PixArtTransformer2DModel",
            dict(num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=28,
                 cross_attention_dim=1152, caption_channels=4096, sample_size=128, patch_size=2, interpolation_scale=2,
                 use_additional_conditions=False),
            dict(num_attention_heads=2, attention_head_dim=16, num_layers=3, cross_attention_dim=32,
                 caption_channels=24, sample_size=8),
            1024, _pixart_inputs, ("BasicTransformerBlock",), ("transformer_blocks",),
        ),
        Architecture(
            "sd35", "Stable Diffusion 3.5 medium", "stabilityai/stable-diffusion-3.5-medium", "SD3Transformer2DModel",
            dict(sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=24, attention_head_dim=64,
                 num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536,
                 pooled_projection_dim=2048, pos_embed_max_size=384, dual_attention_layers=tuple(range(13)),
                 qk_norm="rms_norm"),
            dict(sample_size=8, num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24,
                 caption_projection_dim=32, pooled_projection_dim=16, pos_embed_max_size=32,
                 dual_attention_layers=(0,)),
            1024, _sd3_inputs, ("JointTransformerBlock",),
        ),
        Architecture(
            "qwen", "Qwen-Image", "Qwen/Qwen-Image", "QwenImageTransformer2DModel",
            dict(in_channels=64, joint_attention_dim=3584),
            dict(in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
                 joint_attention_dim=24, axes_dims_rope=(4, 6, 6)),
            1024, _qwen_inputs, ("QwenImageTransformerBlock",), ("transformer_blocks",), prefix=_TEXT,
        ),
        Architecture(
            "flux2", "FLUX.2-dev", "black-forest-labs/FLUX.2-dev", "Flux2Transformer2DModel",
            dict(in_channels=128, joint_attention_dim=15360),
            dict(in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
                 joint_attention_dim=24, axes_dims_rope=(4, 4, 4, 4)),
            1024, _flux2_inputs, ("Flux2TransformerBlock", "Flux2SingleTransformerBlock"),
            ("transformer_blocks", "single_transformer_blocks"), prefix=_FLUX_TEXT,
        ),
        Architecture(
            "zimage", "Z-Image", "Tongyi-MAI/Z-Image-Turbo", "ZImageTransformer2DModel",
            dict(in_channels=16, cap_feat_dim=2560, axes_lens=[1536, 512, 512]),
            dict(dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=24, axes_dims=[4, 6, 6],
                 axes_lens=[384, 64, 64]),
            1024, _zimage_inputs, ("ZImageTransformerBlock",), ("layers",),
        ),
    )
}  # fmt: skip
