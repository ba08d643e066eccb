"""Tiny real diffusers pipelines with random weights, and random LoRA and IP-Adapter weights for their denoisers.

No text encoder and no tokenizer: prompts come as embeddings, so nothing is downloaded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch
from peft import LoraConfig
from tiny_hosts import CHANNELS, HOST, POOLED_DIM, TEXT_DIM, noise, randomise
from torch import Tensor, nn

VAE_SCALE, TEXT, IMAGE_DIM = 8, 7, 12
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


@dataclass(frozen=True)
class PipelineCase:
    """A tiny pipeline: `pipe = case.build(); images = pipe(**case.call(height, width)).images`, sizes in pixels.

    Attributes:
        denoiser: Name of the component whose attention is rerouted.
        patch: Side in pixels of one token of its top attention level: `height` and `width` are multiples of it.
        build: Returns a new pipeline with equal weights on every call.
        call: `(height, width)` -> arguments of a call of two steps, equal on every call; images are numpy.
    """

    id: str
    denoiser: str
    patch: int
    build: Callable[[], diffusers.DiffusionPipeline]
    call: Callable[[int, int], dict[str, Any]]


def _vae(**config: Any) -> diffusers.AutoencoderKL:
    return randomise(
        diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            latent_channels=CHANNELS,
            norm_num_groups=4,
            **config,
        )
    )


def _pipeline(pipeline_class: type, **components: Any) -> diffusers.DiffusionPipeline:
    pipe = pipeline_class(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _stable_diffusion(pipeline_class: type, **components: Any) -> diffusers.DiffusionPipeline:
    return _pipeline(
        pipeline_class,
        vae=_vae(),
        text_encoder=None,
        tokenizer=None,
        unet=HOST["sd15-unet"].build(),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **components,
    )


def build_sd() -> diffusers.DiffusionPipeline:
    """Return a StableDiffusionPipeline."""
    return _stable_diffusion(diffusers.StableDiffusionPipeline)


def build_sd_img2img() -> diffusers.DiffusionPipeline:
    """Return a StableDiffusionImg2ImgPipeline."""
    return _stable_diffusion(diffusers.StableDiffusionImg2ImgPipeline)


def build_sd_controlnet() -> diffusers.DiffusionPipeline:
    """Return a StableDiffusionControlNetPipeline."""
    controlnet = HOST["sd15-controlnet"].build()
    return _stable_diffusion(diffusers.StableDiffusionControlNetPipeline, controlnet=controlnet)


def build_sdxl() -> diffusers.DiffusionPipeline:
    """Return a StableDiffusionXLPipeline."""
    return _pipeline(
        diffusers.StableDiffusionXLPipeline,
        vae=_vae(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=HOST["sdxl-unet"].build(),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        add_watermarker=False,
    )


def _flow(pipeline_class: type, host_id: str, encoders: int) -> diffusers.DiffusionPipeline:
    suffixes = ["", "_2", "_3"][:encoders]
    absent = {name + suffix: None for name in ("text_encoder", "tokenizer") for suffix in suffixes}
    vae = _vae(shift_factor=0.1, scaling_factor=0.4, use_quant_conv=False, use_post_quant_conv=False)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return _pipeline(pipeline_class, vae=vae, transformer=HOST[host_id].build(), scheduler=scheduler, **absent)


def build_flux() -> diffusers.DiffusionPipeline:
    """Return a FluxPipeline."""
    return _flow(diffusers.FluxPipeline, "flux", 2)


def build_flux_img2img() -> diffusers.DiffusionPipeline:
    """Return a FluxImg2ImgPipeline."""
    return _flow(diffusers.FluxImg2ImgPipeline, "flux", 2)


def build_chroma() -> diffusers.DiffusionPipeline:
    """Return a ChromaPipeline whose `encode_prompt` answers one prompt, with padding, as its own does."""
    pipe = _flow(diffusers.ChromaPipeline, "chroma", 1)
    encode = pipe.encode_prompt
    mask, ids = (torch.arange(TEXT) < TEXT - 2).float()[None], torch.zeros(TEXT, 3)
    found = [(noise(1, TEXT, TEXT_DIM, seed=seed), ids, mask) for seed in (3, 4)]
    pipe.encode_prompt = lambda prompt, **given: (*found[0], *found[1]) if prompt else encode(prompt, **given)
    return pipe


def build_sd3() -> diffusers.DiffusionPipeline:
    """Return a StableDiffusion3Pipeline with SD3.5 layers."""
    return _flow(diffusers.StableDiffusion3Pipeline, "sd35", 3)


def _image(height: int, width: int) -> Tensor:
    return noise(1, 3, height, width, seed=7).sigmoid()


def _call(height: int, width: int, **extra: Any) -> dict[str, Any]:
    return dict(
        prompt_embeds=noise(1, TEXT, TEXT_DIM, seed=3),
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ) | dict(height=height, width=width, **extra)


def _guided(height: int, width: int, **extra: Any) -> dict[str, Any]:
    return _call(height, width, negative_prompt_embeds=noise(1, TEXT, TEXT_DIM, seed=4), guidance_scale=3.0, **extra)


def _pooled(height: int, width: int) -> dict[str, Any]:
    pooled = dict(pooled_prompt_embeds=noise(1, POOLED_DIM, seed=5))
    return _guided(height, width, **pooled, negative_pooled_prompt_embeds=noise(1, POOLED_DIM, seed=6))


def _img2img(height: int, width: int) -> dict[str, Any]:
    arguments = _guided(height, width, image=_image(height, width), strength=1.0)
    return {name: value for name, value in arguments.items() if name not in ("height", "width")}


def _controlled(height: int, width: int) -> dict[str, Any]:
    return _guided(height, width, image=_image(height, width))


def _flux_call(height: int, width: int, **extra: Any) -> dict[str, Any]:
    return _call(height, width, pooled_prompt_embeds=noise(1, POOLED_DIM, seed=5), guidance_scale=3.5, **extra)


def _flux_img2img(height: int, width: int) -> dict[str, Any]:
    return _flux_call(height, width, image=_image(height, width), strength=1.0)


PIPELINES: list[PipelineCase] = [
    PipelineCase("sd", "unet", VAE_SCALE, build_sd, _guided),
    PipelineCase("sd-img2img", "unet", VAE_SCALE, build_sd_img2img, _img2img),
    PipelineCase("sd-controlnet", "unet", VAE_SCALE, build_sd_controlnet, _controlled),
    PipelineCase("sdxl", "unet", 2 * VAE_SCALE, build_sdxl, _pooled),
    PipelineCase("sd3", "transformer", 2 * VAE_SCALE, build_sd3, _pooled),
    PipelineCase("flux", "transformer", 2 * VAE_SCALE, build_flux, _flux_call),
    PipelineCase("flux-img2img", "transformer", 2 * VAE_SCALE, build_flux_img2img, _flux_img2img),
]
PIPELINE: dict[str, PipelineCase] = {case.id: case for case in PIPELINES}


def images_of(case: PipelineCase, pipe: diffusers.DiffusionPipeline, height: int, width: int) -> np.ndarray:
    """Run two steps and return images `[1, height, width, 3]` in 0..1."""
    return pipe(**case.call(height, width)).images


def add_lora(model: nn.Module, targets: list[str] = LORA_TARGETS) -> nn.Module:
    """Add a rank 2 LoRA through peft, in place, whose B is not zero: the output changes. Returns the model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=targets))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def _denoiser(pipe_or_model: Any) -> Any:
    components = getattr(pipe_or_model, "components", {})
    return components.get("unet") or components.get("transformer") or pipe_or_model


def ip_adapter_state_dict(model: Any) -> dict[str, dict[str, Tensor]]:
    """Return a random IP-Adapter for a UNet (every `attn2`) or a FLUX.1 transformer (every double-stream block).

    Its image projection makes 4 tokens out of one image embedding of `IMAGE_DIM` channels.
    """
    is_flux = hasattr(model, "single_transformer_blocks")
    names = [name.removesuffix(".processor") for name in model.attn_processors]
    wanted = [name for name in names if (not name.startswith("single") if is_flux else name.endswith("attn2"))]
    layers = [model.get_submodule(name) for name in wanted]
    text_dim = model.config.joint_attention_dim if is_flux else model.config.cross_attention_dim
    weights: dict[str, Tensor] = {}
    for index, layer in enumerate(layers):
        key = index if is_flux else 2 * index + 1  # odd in the published UNet adapters: they count attn1 too
        for kind in ("k", "v"):
            name = f"{key}.to_{kind}_ip"
            weights[f"{name}.weight"] = 0.5 * noise(layer.inner_dim, text_dim, seed=2 * index + (kind == "v"))
            if is_flux:
                weights[f"{name}.bias"] = 0.1 * noise(layer.inner_dim, seed=index)
    image_proj = {
        "proj.weight": noise(4 * text_dim, IMAGE_DIM, seed=8) / IMAGE_DIM**0.5,
        "proj.bias": 0.1 * noise(4 * text_dim, seed=9),
        "norm.weight": torch.ones(text_dim),
        "norm.bias": torch.zeros(text_dim),
    }
    return {"image_proj": image_proj, "ip_adapter": weights}


def load_ip_adapter(pipe_or_model: Any) -> Any:
    """Load a random IP-Adapter into a UNet, a FLUX.1 transformer, or the pipeline around one. Returns its argument.

    As in `load_ip_adapter` of a pipeline, diffusers replaces processors: those of every `attn2` of a UNet (and it makes
    those of `attn1` anew), those of every double-stream block of FLUX.1 (and makes those of single blocks anew).
    """
    model = _denoiser(pipe_or_model)
    model._load_ip_adapter_weights([ip_adapter_state_dict(model)], low_cpu_mem_usage=False)
    return pipe_or_model


def ip_adapter_inputs(pipe_or_model: Any, batch: int = 1) -> dict[str, Any]:
    """Return the keyword arguments that a forward of the model, or a call of the pipeline, needs with the adapter."""
    model = _denoiser(pipe_or_model)
    is_flux = hasattr(model, "single_transformer_blocks")
    embeds = [noise(batch, 1, IMAGE_DIM, seed=10)]
    if pipe_or_model is not model and is_flux:  # without a negative it encodes a black image, with an image encoder
        return dict(ip_adapter_image_embeds=embeds, negative_ip_adapter_image_embeds=embeds)
    if pipe_or_model is not model:  # with classifier-free guidance a UNet pipeline wants [negative, positive]
        return dict(ip_adapter_image_embeds=[noise(2 * batch, 1, IMAGE_DIM, seed=10)])
    if is_flux:
        return dict(joint_attention_kwargs=dict(ip_adapter_image_embeds=embeds))
    return dict(added_cond_kwargs=dict(image_embeds=embeds))
