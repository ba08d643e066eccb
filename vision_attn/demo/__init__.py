"""The embedded teacher: a small FLUX-type text-to-image pipeline on emoji, with its weights.

Importing this package also tells diffusers the two pipeline classes, as `diffusers.DiffusionPipeline.from_pretrained`
finds a pipeline class by its name there and nowhere else.
"""

from pathlib import Path

from vision_attn.torchvision_stub import ensure_torchvision

ensure_torchvision()

import diffusers  # noqa: E402

from vision_attn.demo.emoji_pipeline import EmojiImg2ImgPipeline, EmojiPipeline  # noqa: E402
from vision_attn.demo.pixel_vae import PixelVAE  # noqa: E402
from vision_attn.demo.word_encoder import WordEncoder  # noqa: E402

__all__ = ["EmojiImg2ImgPipeline", "EmojiPipeline", "PixelVAE", "WordEncoder", "load_teacher"]

diffusers.EmojiPipeline = EmojiPipeline
diffusers.EmojiImg2ImgPipeline = EmojiImg2ImgPipeline

_FOLDERS = {"base": "flux", "nano": "flux_nano"}


def load_teacher(size: str = "base") -> EmojiPipeline:
    """Load the embedded teacher in fp32 on the CPU.

    Args:
        size: 'base', 7.8 M parameters, or 'nano', 1.7 M: quicker and rougher, meant for tests.

    Returns:
        A pipeline; move it with `.to("cuda", torch.bfloat16)` as any other.

    Raises:
        ValueError: If there is no teacher of that size.
    """
    if size not in _FOLDERS:
        raise ValueError(f"size must be one of {', '.join(map(repr, _FOLDERS))}, got {size!r}")
    return EmojiPipeline.from_pretrained(Path(__file__).parent / "weights" / _FOLDERS[size])
