"""The emoji pipelines: diffusers' own FLUX pipelines with words for prompts and defaults for the small teacher."""

from typing import Any, ClassVar

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)

from vision_attn.demo.pixel_vae import PixelVAE
from vision_attn.demo.word_encoder import WordEncoder
from vision_attn.demo.word_prompts import WordPrompts


class FluxWordPrompts(WordPrompts):
    """What both emoji pipelines change in their FLUX parent: the text encoder, and guidance against the null prompt.

    Args:
        scheduler: Flow matching with the static shift of the training, 3.
        vae: The exact pixel autoencoder.
        text_encoder: The word encoder, which has its own vocabulary; FLUX's other text models stay None.
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
        self.default_sample_size = 64  # latents a side: 128 px, the size of the training

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
        """Encode prompts as words; the signature is the parent's.

        Args:
            prompt: One prompt or several; '' is the null prompt.
            prompt_2: Must be None: there is one text encoder.
            device: Where the embeddings go; the pipeline's device if None.
            num_images_per_prompt: How often each row is repeated.
            prompt_embeds: Ready embeddings `[B, 8, C]`, returned as they are.
            pooled_prompt_embeds: Ready pooled embeddings `[B, C]`, returned as they are.
            max_sequence_length: Ignored; the sequence is always `num_positions` long.
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
        """Return `call` with one negative prompt per prompt, null unless the user gave one; FLUX would use none."""
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
            prompt: One prompt or several, of words that the teacher knows: `pipe.text_encoder.config.vocabulary`.
            true_cfg_scale: Classifier-free guidance against `negative_prompt`, or the null prompt; 1 is none.
            num_inference_steps: Steps; each runs the transformer twice with guidance.
            **kwargs: Everything else of `FluxPipeline.__call__`; `height` and `width` default to 128 pixels.

        Returns:
            What `FluxPipeline` returns: an object with `images`.

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
            prompt: One prompt or several, of words that the teacher knows.
            image: What `FluxImg2ImgPipeline` takes: a PIL image, an array or tensor, or a list of them.
            strength: The part of the steps that is run, in (0, 1]; 1 keeps nothing of `image`. The teacher knows one
                size: above 128 px it redraws edges up to about 0.25 (noise level 0.5), and repeats the object beyond.
            true_cfg_scale: Classifier-free guidance against `negative_prompt`, or the null prompt; 1 is none.
            num_inference_steps: Steps of the whole schedule; about `strength` of them are run.
            **kwargs: All else of `FluxImg2ImgPipeline.__call__`; `height` and `width` default to those of `image`.

        Returns:
            What `FluxImg2ImgPipeline` returns: an object with `images`.

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
