"""The embedded teachers: small text-to-image pipelines that draw emoji, FLUX or Stable Diffusion by type, with weights.

Importing this package adds the pipeline classes to diffusers, because `DiffusionPipeline.from_pretrained` looks up the
class of a saved pipeline there and nowhere else.
"""

from pathlib import Path

from vision_attn._compat import ensure_torchvision

ensure_torchvision()

import diffusers  # noqa: E402

from vision_attn.demo.emoji_pipelines import (  # noqa: E402
    EmojiImg2ImgPipeline,
    EmojiPipeline,
    EmojiUNetImg2ImgPipeline,
    EmojiUNetPipeline,
)
from vision_attn.demo.pixel_vae import PixelVAE  # noqa: E402
from vision_attn.demo.word_encoder import WordEncoder  # noqa: E402

__all__ = [
    "TEACHERS",
    "EmojiImg2ImgPipeline",
    "EmojiPipeline",
    "EmojiUNetImg2ImgPipeline",
    "EmojiUNetPipeline",
    "PixelVAE",
    "WordEncoder",
    "load_teacher",
    "shipped_adapters",
]

for _pipeline in (EmojiPipeline, EmojiImg2ImgPipeline, EmojiUNetPipeline, EmojiUNetImg2ImgPipeline):
    setattr(diffusers, _pipeline.__name__, _pipeline)

_HERE = Path(__file__).parent
TEACHERS = {"base": "flux", "nano": "flux_nano", "unet": "unet"}  # name: folder of the weights; the only list


def load_teacher(name: str = "base") -> EmojiPipeline | EmojiUNetPipeline:
    """Load an embedded teacher in fp32 on the CPU.

    Args:
        name: 'base', a FLUX transformer of 7.8 M parameters; 'nano', a quicker and rougher one of 1.8 M for tests; or
            'unet', a UNet of Stable Diffusion's type with 5 M.

    Returns:
        A pipeline; move it with `.to("cuda", torch.bfloat16)` like any other.

    Raises:
        ValueError: If there is no teacher of that name.
    """
    _refuse_unknown(name)
    pipeline = EmojiUNetPipeline if name == "unet" else EmojiPipeline
    return pipeline.from_pretrained(_HERE / "weights" / TEACHERS[name])


def shipped_adapters(teacher: str = "base") -> list[Path]:
    """Return the folders of the distilled adapters that come with a teacher, for `vision_attn.load`.

    The repository's `docs/distill.json` says how they were trained and how well they draw.

    Raises:
        ValueError: If there is no teacher of that name.
    """
    _refuse_unknown(teacher)
    return sorted((_HERE / "adapters").glob(f"{teacher}-*"))


def _refuse_unknown(teacher: str) -> None:
    if teacher not in TEACHERS:
        raise ValueError(f"the teacher must be one of {', '.join(map(repr, TEACHERS))}, got {teacher!r}")
