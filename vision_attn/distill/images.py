"""Images with captions: found in a folder, a WebDataset tar or a folder of tars, or drawn by the teacher.

`distill generate` draws image i from seed `run.seed + i`, alone or in a batch, so a run that was stopped goes on where
it was. It draws an image again if its caption is no longer line i of the prompts.
"""

import hashlib
import io
import json
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vision_attn.distill.config import Config
from vision_attn.distill.denoiser import load_pipeline

_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_CAPTIONS = (".txt", ".json")


@dataclass(frozen=True)
class Item:
    """One image with its caption.

    Attributes:
        key: Name of the image's file.
        image: Reads this file.
        text: Reads the file of the caption.
        text_name: Name of that file.
    """

    key: str
    image: Callable[[], bytes]
    text: Callable[[], bytes]
    text_name: str

    def digest(self) -> str:
        """Return the SHA-256 of names, image and caption, as hexadecimal digits.

        Raises:
            OSError: If a file cannot be read.
        """
        parts = (self.key.encode(), self.image(), self.text_name.encode(), self.text())
        return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()

    def caption(self) -> str:
        """Return the caption.

        Raises:
            ValueError: If the file holds none.
        """
        text = self.text().decode("utf-8-sig")
        if self.text_name.endswith(".json"):
            content = json.loads(text)
            found = next((content[name] for name in ("caption", "prompt", "text") if name in content), None)
            if not isinstance(found, str):
                raise ValueError("its .json has no 'caption'")
            text = found
        return text.strip()

    def open(self) -> Any:
        """Return the image in RGB, upright as its EXIF says, and on white where it is transparent.

        Raises:
            OSError: If it is damaged.
            ValueError: If its pixels are no numbers of 8 or 16 bits.
        """
        from PIL import Image, ImageOps  # noqa: PLC0415, optional

        drawn = _eight_bits(ImageOps.exif_transpose(Image.open(io.BytesIO(self.image())))).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn).convert("RGB")


def _eight_bits(image: Any) -> Any:
    """Scale grey of 16 bits to 8: PIL would cut it off at 255, which makes white of nearly all of it.

    Raises:
        ValueError: If the pixels are floats, or do not fit 16 bits.
    """
    from PIL import Image  # noqa: PLC0415, optional

    if image.mode != "F" and image.mode.partition(";")[0] != "I":
        return image
    grey = np.asarray(image)
    if image.mode == "F" or grey.min() < 0 or grey.max() > 65535:
        raise ValueError(f"its pixels (PIL's mode {image.mode}) are no numbers of 8 or 16 bits")
    return Image.fromarray((grey / 257).round().astype(np.uint8))


def find_items(place: Path) -> list[Item]:
    """List the images with captions in a folder or tar, in the order of their names.

    Raises:
        FileNotFoundError: If the place does not exist.
        ValueError: If there is no image with a caption.
    """
    if not place.exists():
        raise FileNotFoundError(f"data.images: {place} does not exist")
    tars = [place] if place.is_file() else sorted(place.rglob("*.tar"))
    files: Iterator[tuple[str, Callable[[], bytes]]] = (
        (str(path.relative_to(place)), path.read_bytes) for path in sorted(place.rglob("*")) if path.is_file()
    )
    items = [] if place.is_file() else list(_pairs(files))
    for tar in tars:
        items += _pairs(_members(tar))
    if not items:
        wanted = f"images ({', '.join(_IMAGES)}), each with a caption of the same name ({', '.join(_CAPTIONS)})"
        raise ValueError(f"data.images: {place} has nothing to learn from: it needs {wanted}")
    return items


def _pairs(files: Iterator[tuple[str, Callable[[], bytes]]]) -> Iterator[Item]:
    groups: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, read in files:
        stem, dot, suffix = name.rpartition(".")
        groups[stem][dot + suffix.lower()] = (name, read)
    for stem in sorted(groups):
        image = next((groups[stem][suffix] for suffix in _IMAGES if suffix in groups[stem]), None)
        text = next((groups[stem][suffix] for suffix in _CAPTIONS if suffix in groups[stem]), None)
        if image is not None and text is not None:
            yield Item(image[0], image[1], text[1], text[0])


def _members(path: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Yield the files of a tar, with readers that need not unpack it.

    Raises:
        ValueError: If it is no uncompressed tar.
    """

    def reader(start: int, size: int) -> Callable[[], bytes]:
        def read() -> bytes:
            with path.open("rb") as file:
                file.seek(start)
                return file.read(size)

        return read

    try:
        with tarfile.open(path, "r:") as tar:
            found = [(member.name, member.offset_data, member.size) for member in tar if member.isfile()]
    except tarfile.TarError as error:
        raise ValueError(f"data.images: {path} is no uncompressed tar: {error}") from None
    return ((f"{path.name}/{name}", reader(start, size)) for name, start, size in found)


def nearest_size(width: int, height: int, sizes: list[tuple[int, int]]) -> tuple[int, int]:
    """Return the size whose shape is nearest to an image's; among equal shapes, the one whose area is nearest."""

    def distance(size: tuple[int, int]) -> tuple[float, float]:
        ratio = float(np.log(size[0] / size[1] * width / height))
        return round(abs(ratio), 6), abs(float(np.log(size[0] * size[1] / (width * height))))

    return min(sizes, key=distance)


def to_pixels(image: Any, size: tuple[int, int]) -> Tensor:
    """Scale an image until it covers a size, crop it, and return `[3, height, width]` in [-1, 1]."""
    from PIL import Image, ImageOps  # noqa: PLC0415, optional

    fitted = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(fitted, np.float32) / 127.5 - 1).permute(2, 0, 1).contiguous()


def read_prompts(path: Path, setting: str) -> list[str]:
    """Read one prompt per line; skip empty lines.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it has no prompts, or is not UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{setting}: {path} does not exist")
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{setting}: {path} is not UTF-8: {error}") from None
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{setting}: {path} has no prompts")
    return prompts


def generate(config: Config, *, device: str = "cpu", pipe: Any = None, rank: int = 0, world: int = 1) -> dict[str, int]:
    """Have the teacher draw one image per prompt into the folder `data.images`, each with its caption.

    Args:
        config: `model`, `data` and `run.seed` are used; `data.sizes` take turns.
        device: Where to draw.
        pipe: The pipeline, if it is loaded already.
        rank: Number of this process. Each process draws its share.
        world: How many processes there are.

    Returns:
        How many images were drawn, and how many were there before.

    Raises:
        FileNotFoundError: If the file of prompts does not exist.
        ValueError: If `data.images` or `data.prompts` is missing, or there are no prompts.
    """
    data = config.data
    prompts = _wanted(config)
    pipe = load_pipeline(config.model).to(device) if pipe is None else pipe
    pipe.set_progress_bar_config(disable=True)
    assert data.images is not None
    data.images.mkdir(parents=True, exist_ok=True)
    own = range(rank, len(prompts), world)
    missing = [i for i in undrawn(config) if i in own]
    steps = {"num_inference_steps": data.num_inference_steps} if data.num_inference_steps else {}
    with tqdm(
        total=len(own), initial=len(own) - len(missing), desc="generate", unit="image", disable=config.run.quiet
    ) as bar:
        for turn, size in enumerate(data.sizes):
            mine = [i for i in missing if i % len(data.sizes) == turn]
            for first in range(0, len(mine), data.batch_size):
                part = mine[first : first + data.batch_size]
                seeds = [torch.Generator().manual_seed(config.run.seed + i) for i in part]
                chosen = [prompts[i] for i in part]
                images = pipe(chosen, height=size[0], width=size[1], generator=seeds, **steps).images
                for i, prompt, image in zip(part, chosen, images, strict=True):
                    path = _path(data.images, i)
                    path.unlink(missing_ok=True)  # an old image never lies beside a new caption
                    path.with_suffix(".txt").write_text(prompt + "\n", "utf-8")
                    image.save(path.with_suffix(".part"), "PNG")
                    path.with_suffix(".part").replace(path)
                bar.update(len(part))
    return {"drawn": len(missing), "before": len(own) - len(missing)}


def undrawn(config: Config) -> list[int]:
    """Return the numbers of the prompts whose pictures are missing.

    Raises:
        FileNotFoundError: If the file of prompts does not exist.
        ValueError: If `data.images` or `data.prompts` is missing, or there are no prompts.
    """
    prompts, folder = _wanted(config), config.data.images
    assert folder is not None
    return [i for i, prompt in enumerate(prompts) if not _is_drawn(_path(folder, i), prompt)]


def _wanted(config: Config) -> list[str]:
    """Return the prompts."""
    if config.data.images is None or config.data.prompts is None:
        raise ValueError("data.images and data.prompts are needed: where to draw to, and what to draw")
    return read_prompts(config.data.prompts, "data.prompts")


def _is_drawn(path: Path, prompt: str) -> bool:
    """Whether there is an image that was drawn from this prompt."""
    caption = path.with_suffix(".txt")
    return path.exists() and caption.exists() and caption.read_text("utf-8").strip() == prompt


def _path(folder: Path, i: int) -> Path:
    return folder / f"{i:08d}.png"
