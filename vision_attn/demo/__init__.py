"""The embedded teachers: small text-to-image pipelines on emoji, FLUX and Stable Diffusion by type, with weights.

Importing this package also tells diffusers the pipeline classes, as `diffusers.DiffusionPipeline.from_pretrained`
finds a pipeline class by its name there and nowhere else.
"""

from pathlib import Path

from vision_attn._compat import ensure_torchvision

ensure_torchvision()

import diffusers  # noqa: E402

from vision_attn.demo.emoji_pipeline import EmojiImg2ImgPipeline, EmojiPipeline  # noqa: E402
from vision_attn.demo.emoji_unet_pipeline import EmojiUNetImg2ImgPipeline, EmojiUNetPipeline  # noqa: E402
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
TEACHERS = {"base": "flux", "nano": "flux_nano", "unet": "unet"}  # and the folder of their weights


def load_teacher(name: str = "base") -> EmojiPipeline | EmojiUNetPipeline:
    """Load an embedded teacher in fp32 on the CPU.

    Args:
        name: 'base', a FLUX transformer of 7.8 M parameters; 'nano', one of 1.7 M: quicker and rougher, meant for
            tests; or 'unet', a UNet of Stable Diffusion's type of 5 M.

    Returns:
        A pipeline; move it with `.to("cuda", torch.bfloat16)` as any other.

    Raises:
        ValueError: If there is no teacher of that name.
    """
    if name not in TEACHERS:
        raise ValueError(f"the teacher must be one of {', '.join(map(repr, TEACHERS))}, got {name!r}")
    pipeline = EmojiUNetPipeline if name == "unet" else EmojiPipeline
    return pipeline.from_pretrained(_HERE / "weights" / TEACHERS[name])


def shipped_adapters(teacher: str = "base") -> list[Path]:
    """Return the folders of the distilled adapters that come with a teacher, for `vision_attn.load`.

    How they were trained and what they reach is in the repository's `docs/distill.json`.

    Raises:
        ValueError: If there is no teacher of that name.
    """
    if teacher not in TEACHERS:
        raise ValueError(f"the teacher must be one of {', '.join(map(repr, TEACHERS))}, got {teacher!r}")
    return sorted((_HERE / "adapters").glob(f"{teacher}-*"))
