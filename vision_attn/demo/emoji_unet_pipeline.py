"""The emoji pipelines with a UNet: diffusers' own Stable Diffusion pipelines with words for prompts."""

from typing import Any, ClassVar

import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

from vision_attn.demo.pixel_vae import PixelVAE
from vision_attn.demo.word_encoder import WordEncoder
from vision_attn.demo.word_prompts import WordPrompts


class UNetWordPrompts(WordPrompts):
    """What both pipelines change in their Stable Diffusion parent: the text encoder, and no safety checker.

    Args:
        scheduler: DDIM with Stable Diffusion's noise levels.
        vae: The pixel autoencoder, centred: Stable Diffusion knows no `shift_factor`.
        text_encoder: The word encoder, which has its own vocabulary; the tokenizer stays None.
        unet: An ordinary conditional UNet with 48 channels in and out, that predicts the noise.
    """

    _optional_components: ClassVar = ["tokenizer", "safety_checker", "feature_extractor", "image_encoder"]

    def __init__(
        self,
        scheduler: DDIMScheduler,
        vae: PixelVAE,
        text_encoder: WordEncoder,
        unet: UNet2DConditionModel,
        tokenizer: Any = None,
        safety_checker: Any = None,
        feature_extractor: Any = None,
        image_encoder: Any = None,
        requires_safety_checker: bool = False,
    ) -> None:
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
            requires_safety_checker=requires_safety_checker,
        )

    def encode_prompt(
        self,
        prompt: str | list[str],
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Encode prompts as their words and, last, the pooled vector of all words; the signature is the parent's.

        Args:
            prompt: One prompt or several; '' is the null prompt.
            device: Where the embeddings go; the pipeline's device if None.
            num_images_per_prompt: How often each row is repeated.
            do_classifier_free_guidance: Also encode the negative prompts.
            negative_prompt: One, or one per prompt; the null prompt if None.
            prompt_embeds: Ready embeddings `[B, 9, C]`.
            negative_prompt_embeds: Ready embeddings of the negative prompts `[B, 9, C]`.
            lora_scale: Ignored; the word encoder takes no LoRA.
            clip_skip: Ignored; the word encoder has no layers to skip.

        Returns:
            Embeddings `[B * num_images_per_prompt, 9, C]` of the prompts and of the negative prompts, or None.

        Raises:
            ValueError: If a prompt has unknown or too many words, or the negative prompts are not one per prompt.
        """
        device = device or self._execution_device

        def encode(prompts: str | list[str], ready: torch.Tensor | None) -> torch.Tensor:
            if ready is not None:
                return ready.to(device).repeat_interleave(num_images_per_prompt, 0)
            sequence, pooled = self._encode_words(prompts, device, num_images_per_prompt)
            return torch.cat([sequence, pooled[:, None]], 1)

        embeds = encode(prompt, prompt_embeds)
        if not do_classifier_free_guidance:
            return embeds, None
        negatives = self._negative_prompts(negative_prompt, len(embeds) // num_images_per_prompt)
        return embeds, encode(negatives, negative_prompt_embeds)


class EmojiUNetPipeline(UNetWordPrompts, StableDiffusionPipeline):
    """Generate emoji from words: `EmojiUNetPipeline.from_pretrained(folder)("red apple").images[0]`."""

    def prepare_latents(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return what the parent does, with each channel's mean taken out unless the latents are the user's.

        These noise levels end with some signal left (`alphas_cumprod` 0.0047), and the means are where it shows: the
        UNet takes those of the noise for the picture's, and tints the white.
        """
        latents = super().prepare_latents(*args, **kwargs)
        given = kwargs.get("latents", args[7] if len(args) > 7 else None)
        return latents - latents.mean((2, 3), keepdim=True) if given is None else latents

    image_to_image: ClassVar[Any] = None  # set below

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        guidance_scale: float = 3.0,
        num_inference_steps: int = 20,
        **kwargs: Any,
    ) -> Any:
        """Generate images.

        Args:
            prompt: One prompt or several, of words that the teacher knows: `pipe.text_encoder.config.vocabulary`.
            guidance_scale: Classifier-free guidance against `negative_prompt`, or the null prompt; 1 is none.
            num_inference_steps: Steps; each runs the UNet on twice the batch with guidance.
            **kwargs: Everything else of `StableDiffusionPipeline.__call__`; `height` and `width` default to 128 pixels.

        Returns:
            What `StableDiffusionPipeline` returns: an object with `images`.

        Raises:
            ValueError: If a prompt has unknown words.
        """
        call = {"guidance_scale": guidance_scale, "num_inference_steps": num_inference_steps, **kwargs}
        return super().__call__(prompt=prompt, **call)


class EmojiUNetImg2ImgPipeline(UNetWordPrompts, StableDiffusionImg2ImgPipeline):
    """Redraw an image: `EmojiUNetImg2ImgPipeline.from_pipe(pipe)("red apple", image=image).images[0]`."""

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        image: Any = None,
        strength: float = 0.2,
        guidance_scale: float = 3.0,
        num_inference_steps: int = 20,
        **kwargs: Any,
    ) -> Any:
        """Add noise to images and denoise them again.

        Args:
            prompt: One prompt or several, of words that the teacher knows.
            image: What `StableDiffusionImg2ImgPipeline` takes: a PIL image, an array or tensor, or a list of them.
            strength: The part of the steps that is run, in (0, 1]; 1 keeps nothing of `image`. The teacher knows one
                size: above 128 px it redraws edges up to about 0.2 (as much noise as picture), and repeats the object
                beyond.
            guidance_scale: Classifier-free guidance against `negative_prompt`, or the null prompt; 1 is none.
            num_inference_steps: Steps of the whole schedule; about `strength` of them are run.
            **kwargs: All else of `StableDiffusionImg2ImgPipeline.__call__`.

        Returns:
            What `StableDiffusionImg2ImgPipeline` returns: an object with `images`.

        Raises:
            ValueError: If `image` is missing or a prompt has unknown words.
        """
        if image is None:
            raise ValueError("image is missing: pass the image to redraw, or use EmojiUNetPipeline to start from noise")
        call = {"image": image, "strength": strength, "guidance_scale": guidance_scale}
        return super().__call__(prompt=prompt, num_inference_steps=num_inference_steps, **call, **kwargs)


EmojiUNetPipeline.image_to_image = EmojiUNetImg2ImgPipeline
