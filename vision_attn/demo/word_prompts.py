"""WordPrompts: what every emoji pipeline does with its prompts, whatever diffusers pipeline it is otherwise."""

import torch
from diffusers import DiffusionPipeline


class WordPrompts(DiffusionPipeline):
    """A pipeline whose `text_encoder` is a `WordEncoder`, which has its own vocabulary and needs no tokenizer."""

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
