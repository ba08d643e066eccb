"""WordEncoder: the text encoder of the emoji teachers, with one learned vector per known word."""

import difflib
import re

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn


class WordEncoder(ModelMixin, ConfigMixin):
    """Turns the words of a prompt into a sequence of embeddings and one pooled vector.

    The sequence is `embedding(word) + position`. The pooled vector is an MLP of the mean over the words. A prompt
    without words is the null prompt of classifier-free guidance and has its own embedding.

    Args:
        vocabulary: The known words in lower case; word `i` has id `i + 1`, and id 0 means 'no word'.
        dim: Channels C of an embedding.
        num_positions: Length of the sequence, and the most words that a prompt may have.

    Raises:
        ValueError: If `vocabulary` is empty or repeats a word.
    """

    @register_to_config
    def __init__(self, vocabulary: list[str], dim: int = 64, num_positions: int = 8) -> None:
        super().__init__()
        if not vocabulary or len(set(vocabulary)) != len(vocabulary):
            raise ValueError(f"vocabulary must be words without repetition, got {len(vocabulary)} words")
        self.embedding = nn.Embedding(len(vocabulary) + 1, dim)
        self.position = nn.Parameter(torch.randn(num_positions, dim) * 0.02)
        self.null = nn.Parameter(torch.randn(num_positions, dim) * 0.02)
        self.pool = nn.Sequential(nn.Linear(dim, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, dim))
        self._word_to_id = {word: i + 1 for i, word in enumerate(vocabulary)}

    def tokenize(self, prompts: list[str]) -> torch.Tensor:
        """Look up the words of prompts. Case is ignored; spaces, hyphens, underscores and commas separate words.

        Args:
            prompts: Prompts such as 'red apple' or 'red-apple'; '' is the null prompt.

        Returns:
            Word ids `[B, num_positions]` on the CPU, int64, 0 after the last word.

        Raises:
            ValueError: If a prompt has unknown words (the error names them and known words like them), or more than
                `num_positions` words.
        """
        ids = torch.zeros(len(prompts), self.config.num_positions, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            words = [word for word in re.split(r"[\s,_-]+", prompt.lower()) if word]
            unknown = [word for word in words if word not in self._word_to_id]
            if unknown:
                raise ValueError(f"prompt {prompt!r} has words the teacher does not know: {self._suggest(unknown)}")
            if len(words) > self.config.num_positions:
                raise ValueError(f"prompt {prompt!r} has {len(words)} words, the most is {self.config.num_positions}")
            for position, word in enumerate(words):
                ids[row, position] = self._word_to_id[word]
        return ids

    def _suggest(self, unknown: list[str]) -> str:
        """Name each unknown word and the known words with the most similar spelling."""
        parts = []
        for word in unknown:
            close = difflib.get_close_matches(word, self.config.vocabulary, n=3, cutoff=0.6)
            hint = f"close to {', '.join(map(repr, close))}" if close else "nothing close is known"
            parts.append(f"{word!r} ({hint})")
        return "; ".join(parts)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed word ids.

        Args:
            ids: Word ids `[B, num_positions]` from `tokenize`.

        Returns:
            Embeddings `[B, num_positions, C]` and pooled embeddings `[B, C]`.
        """
        known = (ids > 0)[..., None]
        words = self.embedding(ids) * known
        pooled = words.sum(1) / known.sum(1).clamp(min=1)
        is_null = ~known.any(1)  # [B, 1]
        sequence = torch.where(is_null[..., None], self.null, words + self.position)
        return sequence, self.pool(torch.where(is_null, self.null.mean(0), pooled))
