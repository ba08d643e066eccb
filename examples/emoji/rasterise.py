"""Rasterise the Fluent Emoji icons once: read the npm tarball, write one npz of 256 px WEBP images and their names.

Get the tarball with `npm pack @iconify-json/fluent-emoji-flat@1.2.6` (MIT, Microsoft Corporation), then

    python examples/emoji/rasterise.py iconify-json-fluent-emoji-flat-1.2.6.tgz emoji.npz
"""

import argparse
import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image
from tqdm import tqdm

SKIN_TONES = re.compile(r"-(light|medium|dark|medium-light|medium-dark)$")


def read_icons(path: Path) -> dict:
    """Return the parsed icons.json: the file itself, or the one in an npm tarball."""
    if path.suffix == ".json":
        return json.loads(path.read_text())
    with tarfile.open(path) as tar:
        return json.load(tar.extractfile("package/icons.json"))


def without_skin_tones(names: list[str]) -> list[str]:
    """Leave out the skin tones of a name: keep 'artist', not 'artist-dark'."""
    known = set(names)
    return [name for name in names if not ((tone := SKIN_TONES.search(name)) and name[: tone.start()] in known)]


def as_svg(body: str, width: float, height: float) -> str:
    """Return a square drawing with the body of an icon in its middle."""
    side = max(width, height)
    box = f"{(width - side) / 2} {(height - side) / 2} {side} {side}"
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{body}</svg>'


def rasterise(svg: str, size: int) -> Image.Image:
    """Draw an SVG on white, `size` x `size` pixels."""
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))
    drawn = Image.open(io.BytesIO(png)).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn).convert("RGB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("icons", type=Path, help="the npm tarball, or its icons.json")
    parser.add_argument("out", type=Path, help="the npz to write: data (all WEBP bytes), len (bytes of each), names")
    parser.add_argument("--size", type=int, default=256, help="side in pixels")
    args = parser.parse_args()

    pack = read_icons(args.icons)
    names = sorted(without_skin_tones(list(pack["icons"])))
    files = []
    for name in tqdm(names):
        icon = pack["icons"][name]
        svg = as_svg(icon["body"], icon.get("width", pack["width"]), icon.get("height", pack["height"]))
        buffer = io.BytesIO()
        rasterise(svg, args.size).save(buffer, "WEBP", lossless=True)
        files.append(buffer.getvalue())
    data = np.frombuffer(b"".join(files), np.uint8)
    np.savez(args.out, data=data, len=np.array([len(file) for file in files]), names=np.array(names))
    print(f"{len(names)} icons, {len(data) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
