"""Images with captions: a folder, a WebDataset tar, or a folder of tars."""

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

_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_CAPTIONS = (".txt", ".json")


@dataclass(frozen=True)
class Item:
    """One image.

    Attributes:
        key: Where it is.
        image: Reads the file.
        text: Reads its caption's file, which is called `text_name`.
    """

    key: str
    image: Callable[[], bytes]
    text: Callable[[], bytes]
    text_name: str

    def digest(self) -> str:
        """Return the SHA-256 of name, image and caption, as hexadecimal digits.

        Raises:
            OSError: If a file cannot be read.
        """
        parts = (self.key.encode(), self.image(), self.text_name.encode(), self.text())
        return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()

    def caption(self) -> str:
        """Return the caption.

        Raises:
            ValueError: If there is none in the file.
        """
        text = self.text().decode("utf-8")
        if self.text_name.endswith(".json"):
            content = json.loads(text)
            found = next((content[name] for name in ("caption", "prompt", "text") if name in content), None)
            if not isinstance(found, str):
                raise ValueError("its .json has no 'caption'")
            text = found
        return text.strip()

    def open(self) -> Any:
        """Return the image as PIL has it, on white where it is transparent.

        Raises:
            OSError: If it is damaged.
        """
        from PIL import Image  # noqa: PLC0415, optional

        drawn = Image.open(io.BytesIO(self.image())).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn).convert("RGB")


def find_items(place: Path) -> list[Item]:
    """List the images with captions in a folder or tar, in order of their names.

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
        raise ValueError(f"data.images: there is nothing in {place} to learn from: it needs {wanted}")
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
    """Yield the files of a tar, which are read where they lie.

    Raises:
        ValueError: If it is no tar.
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
    """Return the size whose shape is nearest to that of an image; of several, the one of the nearest area."""

    def distance(size: tuple[int, int]) -> tuple[float, float]:
        ratio = float(np.log(size[0] / size[1] * width / height))
        return round(abs(ratio), 6), abs(float(np.log(size[0] * size[1] / (width * height))))

    return min(sizes, key=distance)


def to_pixels(image: Any, size: tuple[int, int]) -> Tensor:
    """Scale an image to cover a size, cut what sticks out, and return `[3, height, width]` in [-1, 1]."""
    from PIL import Image, ImageOps  # noqa: PLC0415, optional

    fitted = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(fitted, np.float32) / 127.5 - 1).permute(2, 0, 1).contiguous()
