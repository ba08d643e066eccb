"""`distill cache`: latents and prompt embeddings as safetensors shards, so that training needs only the denoiser.

A shard holds samples of one size: `latents`, `cond.*` with a row per sample, `shared.*` with one value for all samples,
and `null.*`, the embeddings of the empty prompt. It appears complete or not at all. Its name is a digest of what it was
made of, so a second run goes on where the first one was stopped and encodes again what has changed since. The cache of
an earlier run stays in use until the new one is finished. Images that cannot be read are left out, counted, and listed
in `skipped.txt`.
"""

import hashlib
import json
import logging
import re
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from vision_attn.distill.config import Config
from vision_attn.distill.data import FORMAT, INDEX, read_index
from vision_attn.distill.denoiser import Interface, denoiser_of, encode_images, interface_of, load_pipeline, record
from vision_attn.distill.images import Item, find_items, nearest_size, to_pixels
from vision_attn.highres.positions import position_ids
from vision_attn.highres.redraw import unit_of

SKIPPED = "skipped.txt"
_SHARD = re.compile(r"\d+x\d+-\d{5,}(-[0-9a-f]{16})?\.(safetensors|part)")
_PROMPTS = 8  # encoded at a time
_log = logging.getLogger(__name__)


def write_cache(config: Config, *, device: str = "cpu", pipe: Any = None) -> dict[str, int]:
    """Encode all images and captions.

    Args:
        config: `model`, `data` and `run.quiet` are used.
        device: Where the encoders run.
        pipe: The pipeline, if it is loaded already.

    Returns:
        The numbers of samples, of shards, and of images that were skipped.

    Raises:
        FileNotFoundError: If the images do not exist.
        ValueError: If no image can be used, or the folder holds the cache of another model.
    """
    items = _items(config)
    pipe = load_pipeline(config.model).to(device) if pipe is None else pipe
    height, width = config.data.sizes[0]
    interface = interface_of(pipe, height, width, config.model.guidance, prompt="")
    folder = config.data.cache
    folder.mkdir(parents=True, exist_ok=True)
    identity = _identity(config, pipe, interface)
    _refuse_other_model(folder, identity)
    planned, skipped = _plan(items, config)
    samples = 0
    shards: list[Path] = []
    count = sum(len(part) for _, _, part in planned)
    with tqdm(total=count, desc="cache", unit="image", disable=config.run.quiet) as bar:
        for path, size, part in planned:
            made, failed = _shard(path, part, size, pipe, interface, config)
            skipped |= failed
            samples += made
            shards += [path] if made else []
            bar.update(len(part))
    (folder / SKIPPED).write_text("".join(f"{key}: {why}\n" for key, why in sorted(skipped.items())), "utf-8")
    if not samples:
        raise ValueError(f"none of the {len(items)} images in {config.data.images} can be used: see {folder / SKIPPED}")
    _write_index(folder, identity, config.data.sizes, shards)
    return {"samples": samples, "shards": len(shards), "skipped": len(skipped)}


def is_current(config: Config) -> bool:
    """Whether the cache was finished, and would be made of the same files, settings and sizes again.

    A shard of which no image could be read is not stored, so that such a cache is never current.

    Raises:
        FileNotFoundError: If the images do not exist.
        ValueError: If `data.images` is missing or has no image, or the index is damaged.
    """
    items = _items(config)
    if not (config.data.cache / INDEX).exists():
        return False
    planned, _ = _plan(items, config)
    named = set(read_index(config.data.cache).get("shards", []))
    return named == {path.name for path, _, _ in planned} and all(path.exists() for path, _, _ in planned)


def _items(config: Config) -> list[Item]:
    if config.data.images is None:
        raise ValueError("data.images is missing: where are the images to encode?")
    return find_items(config.data.images)


Shard = tuple[Path, tuple[int, int], list[Item]]


def _plan(items: list[Item], config: Config) -> tuple[list[Shard], dict[str, str]]:
    """Return the shards that items go to, each with its size, and by key why other items cannot be read."""
    buckets, skipped = _buckets(items, config)
    planned: list[Shard] = []
    for size, members in sorted(buckets.items()):
        for first in range(0, len(members), config.data.shard_size):
            part = members[first : first + config.data.shard_size]
            digest, number = _digest([one for one, _ in part], size, config), first // config.data.shard_size
            path = config.data.cache / f"{size[0]}x{size[1]}-{number:05d}-{digest}.safetensors"
            planned.append((path, size, [item for _, item in part]))
    return planned, skipped


def _buckets(items: list[Item], config: Config) -> tuple[dict[tuple[int, int], list[tuple[str, Item]]], dict[str, str]]:
    """Return items with their digests by size, and by key why the others cannot be read."""
    buckets: dict[tuple[int, int], list[tuple[str, Item]]] = defaultdict(list)
    skipped: dict[str, str] = {}
    for item in tqdm(items, desc="read", unit="image", disable=config.run.quiet):
        try:
            width, height = item.open().size
            buckets[nearest_size(width, height, config.data.sizes)].append((item.digest(), item))
        except (OSError, ValueError, SyntaxError) as error:  # PIL raises SyntaxError for some broken PNGs
            skipped[item.key] = str(error)
    return buckets, skipped


def _digest(items: list[str], size: tuple[int, int], config: Config) -> str:
    """Return 16 hexadecimal digits that change with everything that a shard is made of."""
    settings = json.dumps([asdict(config.model), config.data.native, size])
    return hashlib.sha256("\n".join([settings, *items]).encode()).hexdigest()[:16]


def _identity(config: Config, pipe: Any, interface: Interface) -> dict[str, Any]:
    """Return what must be equal in a cache and in the training that reads it."""
    name, model = denoiser_of(pipe)
    return {
        "base": config.model.base,
        "component": name,
        "denoiser": type(model).__name__,
        "interface": interface.config(),
        "native": list(config.data.native) if config.data.native else None,
    }


def _refuse_other_model(folder: Path, identity: dict[str, Any]) -> None:
    """Refuse a folder that holds the cache of another model, or a damaged index."""
    if not (folder / INDEX).exists():
        return
    old = read_index(folder)
    what = ", ".join(f"{k} {old.get(k)!r}, not {identity[k]!r}" for k in identity if old.get(k) != identity[k])
    if what:
        raise ValueError(f"data.cache: {folder} holds another cache ({what}): give another folder")


def _write_index(folder: Path, identity: dict[str, Any], sizes: list[tuple[int, int]], shards: list[Path]) -> None:
    """Put a finished cache in the place of the last one, and delete the shards that it does not use.

    The index is written when all shards are there, so it never names half a cache.
    """
    index = {"format": FORMAT, **identity, "sizes": sizes, "shards": [path.name for path in shards]}
    (folder / f"{INDEX}.part").write_text(json.dumps(index, indent=2) + "\n")
    (folder / f"{INDEX}.part").replace(folder / INDEX)
    for path in set(folder.iterdir()) - set(shards):
        if _SHARD.fullmatch(path.name):
            path.unlink()


def _shard(
    path: Path, items: list[Item], size: tuple[int, int], pipe: Any, interface: Interface, config: Config
) -> tuple[int, dict[str, str]]:
    """Write one shard unless it exists; return its number of samples, and why images were skipped by their keys."""
    try:
        with safe_open(path, "pt") as file:
            old = file.metadata()
        return len(json.loads(old["captions"])), json.loads(old["skipped"])
    except FileNotFoundError:
        pass
    except SafetensorError as error:
        _log.warning("%s is damaged and is made again: %s", path, error)
    latents, captions, skipped = [], [], {}
    for item in items:
        try:
            pixels, caption = to_pixels(item.open(), size), item.caption()
        except (OSError, ValueError, SyntaxError) as error:
            skipped[item.key] = str(error)
            continue
        with torch.no_grad():
            latents.append(encode_images(pipe, pixels[None]).cpu())
        captions.append(caption)
    if not captions:
        return 0, skipped
    tensors = {"latents": torch.cat(latents), **_embeddings(pipe, captions, size, interface, config)}
    metadata = {
        "captions": json.dumps(captions),
        "skipped": json.dumps(skipped),
        "size": json.dumps(size),
    }
    part = path.with_suffix(".part")
    save_file(tensors, part, metadata)
    part.replace(path)
    return len(captions), skipped


def _embeddings(
    pipe: Any, captions: list[str], size: tuple[int, int], interface: Interface, config: Config
) -> dict[str, Tensor]:
    """Encode captions and the empty prompt."""
    rows: dict[str, list[Tensor]] = defaultdict(list)
    shared: dict[str, Tensor] = {}
    prompts = ["", *captions]
    for first in range(0, len(prompts), _PROMPTS):
        call = record(pipe, *size, config.model.guidance, prompt=prompts[first : first + _PROMPTS])
        for name, value in call.items():
            if name in interface.batched:
                rows[name].append(value.cpu())
            elif isinstance(value, Tensor) and name not in (interface.latents, "timestep"):
                shared[f"shared.{name}"] = value.cpu().contiguous()
    shared |= _positions(pipe, shared, size, config)
    try:
        stacked = {name: torch.cat(parts) for name, parts in rows.items()}
    except RuntimeError as error:
        raise ValueError(
            f"a {type(pipe).__name__} gives embeddings of different lengths, which do not stack: {error}"
        ) from None
    null = {f"null.{name}": value[:1].clone() for name, value in stacked.items()}
    return {**{f"cond.{name}": value[1:].contiguous() for name, value in stacked.items()}, **null, **shared}


def _positions(pipe: Any, shared: dict[str, Tensor], size: tuple[int, int], config: Config) -> dict[str, Tensor]:
    """Return the position ids of a size scaled into `data.native`, nothing without it."""
    stretch, name = config.data.stretch(size), "shared.img_ids"
    if stretch <= 1 or name not in shared:
        return {}
    ids = position_ids((size[0] // unit_of(pipe), size[1] // unit_of(pipe)), stretch)
    if ids.shape != shared[name].shape:
        raise ValueError(f"data.native: the positions of a {type(pipe).__name__} are not FLUX.1's")
    return {name: ids}
