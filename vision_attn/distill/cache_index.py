"""`index.json` of a cache: what it was made for, in which sizes, and the shards that belong to it.

It is written when all shards are there, so it never names half a cache; other shards in the folder are left over from
earlier runs, and are deleted then.
"""

import json
import re
from pathlib import Path
from typing import Any

INDEX = "index.json"
FORMAT = "vision_attn.cache.v2"
_EARLIER = "vision_attn.cache.v1"  # does not say which shards are in use
_SHARD = re.compile(r"\d+x\d+-\d{5,}(-[0-9a-f]{16})?\.(safetensors|part)")


def shard_path(folder: Path, size: tuple[int, int], number: int, digest: str) -> Path:
    """Return the file of a shard.

    Args:
        folder: Of the cache.
        size: (height, width) in pixels.
        number: Among the shards of this size.
        digest: 16 hexadecimal digits, which tell what it was made of.
    """
    return folder / f"{size[0]}x{size[1]}-{number:05d}-{digest}.safetensors"


def read_index(folder: Path) -> dict[str, Any]:
    """Read what a cache says of itself.

    Raises:
        FileNotFoundError: If there is no cache, or it was never finished.
        ValueError: If it is damaged, or of an earlier version.
    """
    index = _read(folder)
    if index["format"] == _EARLIER:
        raise ValueError(
            f"data.cache: {folder} was made by an earlier version, which did not keep what it was made of: "
            "run 'vision-attn distill cache' again"
        )
    return index


def refuse_other_model(folder: Path, identity: dict[str, Any]) -> None:
    """Refuse a folder whose cache was made for another model than `identity` says.

    Raises:
        ValueError: If it was, or its index is damaged.
    """
    if not (folder / INDEX).exists():
        return
    old = _read(folder)
    what = ", ".join(f"{k} {old.get(k)!r}, not {identity[k]!r}" for k in identity if old.get(k) != identity[k])
    if what:
        raise ValueError(f"data.cache: {folder} holds another cache ({what}): give another folder")


def write_index(folder: Path, identity: dict[str, Any], sizes: list[tuple[int, int]], shards: list[Path]) -> None:
    """Put a finished cache in the place of the one before, and delete the shards that it does not use.

    Args:
        folder: Of the cache.
        identity: What it must agree in with the training that reads it.
        sizes: All of `data.sizes`.
        shards: Its files, in their order.
    """
    index = {"format": FORMAT, **identity, "sizes": sizes, "shards": [path.name for path in shards]}
    (folder / f"{INDEX}.part").write_text(json.dumps(index, indent=2) + "\n")
    (folder / f"{INDEX}.part").replace(folder / INDEX)
    for path in set(folder.iterdir()) - set(shards):
        if _SHARD.fullmatch(path.name):
            path.unlink()


def _read(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    if not path.exists():
        raise FileNotFoundError(
            f"data.cache: {folder} holds no cache that was finished: make it with 'vision-attn distill cache'"
        )
    try:
        index = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"data.cache: {path} is damaged: {error}") from None
    if not isinstance(index, dict) or index.get("format") not in (FORMAT, _EARLIER):
        raise ValueError(f"data.cache: {path} is not of the format {FORMAT!r}")
    return index
