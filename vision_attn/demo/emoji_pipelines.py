"""The emoji pipelines: diffusers' own FLUX and Stable Diffusion pipelines, whose prompts are known words."""

from typing import Any, ClassVar

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

from vision_attn.demo.pixel_vae import PixelVAE
from vision_attn.demo.word_encoder import WordEncoder


class WordPrompts(DiffusionPipeline):
    """A pipeline whose text encoder is a `WordEncoder`. It has its own vocabulary and needs no tokenizer."""

    def _encode_words(
        self, prompts: str | list[str], device: torch.device, repeats: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return embeddings `[B * repeats, 8, C]` and pooled embeddings `[B * repeats, C]`; '' is the null prompt."""
        ids = self.text_encoder.tokenize([prompts] if isinstance(prompts, str) else list(prompts))
        sequence, pooled = self.text_encoder(ids.to(self.text_encoder.device))
        return sequence.to(device).repeat_interleave(repeats, 0), pooled.to(device).repeat_interleave(repeats, 0)

    def _negative_prompts(self, negative_prompt: str | list[str] | None, batch_size: int) -> list[str]:
        """Return one negative prompt per prompt: the null prompt unless the user gave one."""
        if negative_prompt is None or isinstance(negative_prompt, str):
            return [negative_prompt or ""] * batch_size
        if len(negative_prompt) != batch_size:
            raise ValueError(f"{len(negative_prompt)} negative prompts do not match {batch_size} prompts")
        return negative_prompt


class FluxWordPrompts(WordPrompts):
    """What both FLUX pipelines change in their parent: the text encoder, and guidance against the null prompt.

    Args:
        scheduler: Flow matching with a static shift of 3, as in training.
        vae: The exact pixel autoencoder.
        text_encoder: The word encoder; FLUX's other text models stay None.
        transformer: An ordinary FLUX transformer with 48 input channels.
    """

    _optional_components: ClassVar = [
        "tokenizer",
        "text_encoder_2",
        "tokenizer_2",
        "image_encoder",
        "feature_extractor",
    ]

    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: PixelVAE,
        text_encoder: WordEncoder,
        transformer: FluxTransformer2DModel,
        tokenizer: Any = None,
        text_encoder_2: Any = None,
        tokenizer_2: Any = None,
        image_encoder: Any = None,
        feature_extractor: Any = None,
    ) -> None:
        super().__init__(
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            transformer=transformer,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
        )
        self.default_sample_size = 64  # latents per side: 128 px, the training size

    def encode_prompt(
        self,
        prompt: str | list[str],
        prompt_2: str | list[str] | None = None,
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        max_sequence_length: int = 512,
        lora_scale: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Encode the words of prompts. The signature is the parent's.

        Args:
            prompt: One prompt or several; '' is the null prompt.
            prompt_2: Must be None: there is one text encoder.
            device: Device of the embeddings; the pipeline's device if None.
            num_images_per_prompt: Copies of each row.
            prompt_embeds: Embeddings `[B, 8, C]` to return as they are.
            pooled_prompt_embeds: Pooled embeddings `[B, C]` to return as they are.
            max_sequence_length: Ignored; the sequence always has `num_positions` tokens.
            lora_scale: Ignored; the word encoder takes no LoRA.

        Returns:
            Embeddings `[B, 8, C]`, pooled embeddings `[B, C]` and text ids `[8, 3]`, all zero.

        Raises:
            ValueError: If `prompt_2` is given, or a prompt has unknown or too many words.
        """
        if prompt_2 is not None:
            raise ValueError("the emoji teacher has one text encoder: pass prompt, not prompt_2")
        device = device or self._execution_device
        if prompt_embeds is None:
            prompt_embeds, pooled_prompt_embeds = self._encode_words(prompt, device, num_images_per_prompt)
        text_ids = torch.zeros(prompt_embeds.shape[1], 3, device=device, dtype=self.text_encoder.dtype)
        return prompt_embeds, pooled_prompt_embeds, text_ids

    def _with_negative_prompt(self, call: dict[str, Any]) -> dict[str, Any]:
        """Return `call` with one negative prompt per prompt; FLUX by itself would guide against nothing."""
        if call.get("negative_prompt_embeds") is not None:
            return call
        prompt, embeds = call.get("prompt"), call.get("prompt_embeds")
        batch_size = len(prompt) if isinstance(prompt, list) else 1 if embeds is None else len(embeds)
        return {**call, "negative_prompt": self._negative_prompts(call.get("negative_prompt"), batch_size)}


class EmojiPipeline(FluxWordPrompts, FluxPipeline):
    """Generate emoji from words: `EmojiPipeline.from_pretrained(folder)("red apple").images[0]`."""

    image_to_image: ClassVar[Any] = None  # set below

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        true_cfg_scale: float = 3.0,
        num_inference_steps: int = 14,
        **kwargs: Any,
    ) -> Any:
        """Generate images.

        Args:
            prompt: One prompt or several, in words of `pipe.text_encoder.config.vocabulary`.
            true_cfg_scale: Scale of the guidance against `negative_prompt`, or the null prompt; 1 turns it off.
            num_inference_steps: Denoising steps; with guidance each runs the transformer twice.
            **kwargs: All other arguments of `FluxPipeline.__call__`; `height` and `width` default to 128 pixels.

        Returns:
            An object with `images`, as `FluxPipeline` returns it.

        Raises:
            ValueError: If a prompt has unknown words.
        """
        call = {"prompt": prompt, "true_cfg_scale": true_cfg_scale, "num_inference_steps": num_inference_steps}
        return super().__call__(**self._with_negative_prompt({**call, **kwargs}))


class EmojiImg2ImgPipeline(FluxWordPrompts, FluxImg2ImgPipeline):
    """Redraw an image: `EmojiImg2ImgPipeline.from_pipe(pipe)("red apple", image=image, strength=0.2).images[0]`."""

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        image: Any = None,
        strength: float = 0.2,
        true_cfg_scale: float = 3.0,
        num_inference_steps: int = 20,
        **kwargs: Any,
    ) -> Any:
        """Add noise to images and denoise them again.

        Args:
            prompt: One prompt or several, in words of `pipe.text_encoder.config.vocabulary`.
            image: A PIL image, an array, a tensor, or a list of them.
            strength: Share of the steps that run, in (0, 1]; 1 keeps nothing of `image`. The teacher was trained at 128
                px: above that size it redraws edges up to about 0.25 (noise level 0.5), and repeats the object beyond.
            true_cfg_scale: Scale of the guidance against `negative_prompt`, or the null prompt; 1 turns it off.
            num_inference_steps: Steps of the whole schedule; about the share `strength` of them runs.
            **kwargs: All other arguments of `FluxImg2ImgPipeline.__call__`; sides default to those of `image`.

        Returns:
            An object with `images`, as `FluxImg2ImgPipeline` returns it.

        Raises:
            ValueError: If `image` is missing or a prompt has unknown words.
        """
        if image is None:
            raise ValueError("image is missing: pass the image to redraw, or use EmojiPipeline to start from noise")
        height, width = self.image_processor.get_default_height_width(image[0] if isinstance(image, list) else image)
        call = {"prompt": prompt, "true_cfg_scale": true_cfg_scale, "num_inference_steps": num_inference_steps}
        call = {**call, "image": image, "strength": strength, "height": height, "width": width, **kwargs}
        return super().__call__(**self._with_negative_prompt(call))


EmojiPipeline.image_to_image = EmojiImg2ImgPipeline


class UNetWordPrompts(WordPrompts):
    """What both UNet pipelines change in their parent: the text encoder; and they have no safety checker.

    Args:
        scheduler: DDIM with Stable Diffusion's noise levels.
        vae: The pixel autoencoder with a `center`, because Stable Diffusion has no `shift_factor`.
        text_encoder: The word encoder; the tokenizer stays None.
        unet: An ordinary conditional UNet with 48 input and output channels; it predicts the noise.
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
        """Encode the words of prompts, followed by the pooled vector of all words. The signature is the parent's.

        Args:
            prompt: One prompt or several; '' is the null prompt.
            device: Device of the embeddings; the pipeline's device if None.
            num_images_per_prompt: Copies of each row.
            do_classifier_free_guidance: Also encode the negative prompts.
            negative_prompt: One for all prompts, or one per prompt; the null prompt if None.
            prompt_embeds: Embeddings `[B, 9, C]` to use instead of prompts.
            negative_prompt_embeds: Embeddings `[B, 9, C]` to use instead of negative prompts.
            lora_scale: Ignored; the word encoder takes no LoRA.
            clip_skip: Ignored; the word encoder has no layers to skip.

        Returns:
            Embeddings `[B * num_images_per_prompt, 9, C]` of the prompts and of the negative prompts, or None.

        Raises:
            ValueError: If a prompt has unknown or too many words, or there is not one negative prompt per prompt.
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
        """Return the parent's latents without the mean of each channel; latents that the user gives stay as they are.

        At the highest noise level some signal is left (`alphas_cumprod` 0.0047), mostly in the means of the channels.
        The UNet would mistake the means of the noise for those of a picture, and tint the white.
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
            prompt: One prompt or several, in words of `pipe.text_encoder.config.vocabulary`.
            guidance_scale: Scale of the guidance against `negative_prompt`, or the null prompt; 1 turns it off.
            num_inference_steps: Denoising steps; with guidance each runs the UNet on a batch twice as large.
            **kwargs: All other arguments of `StableDiffusionPipeline.__call__`; both sides default to 128 pixels.

        Returns:
            An object with `images`, as `StableDiffusionPipeline` returns it.

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
            prompt: One prompt or several, in words of `pipe.text_encoder.config.vocabulary`.
            image: A PIL image, an array, a tensor, or a list of them.
            strength: Share of the steps that run, in (0, 1]; 1 keeps nothing of `image`. The teacher was trained at 128
                px: above that size it redraws edges up to about 0.2 (as much noise as picture), and repeats the object
                beyond.
            guidance_scale: Scale of the guidance against `negative_prompt`, or the null prompt; 1 turns it off.
            num_inference_steps: Steps of the whole schedule; about the share `strength` of them runs.
            **kwargs: All other arguments of `StableDiffusionImg2ImgPipeline.__call__`.

        Returns:
            An object with `images`, as `StableDiffusionImg2ImgPipeline` returns it.

        Raises:
            ValueError: If `image` is missing or a prompt has unknown words.
        """
        if image is None:
            raise ValueError("image is missing: pass the image to redraw, or use EmojiUNetPipeline to start from noise")
        call = {"image": image, "strength": strength, "guidance_scale": guidance_scale}
        return super().__call__(prompt=prompt, num_inference_steps=num_inference_steps, **call, **kwargs)


EmojiUNetPipeline.image_to_image = EmojiUNetImg2ImgPipeline
