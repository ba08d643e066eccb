"""`distill cache`: latents and prompt embeddings as safetensors shards, so that training needs only the denoiser.

A shard holds samples of one size: `latents`, `cond.*` with a row per sample, `shared.*` that all have in common, and
`null.*`, the embeddings of the empty prompt. It appears complete or not at all, and a second run goes on where the
first one was stopped. Images that cannot be read are left out, counted, and listed in `skipped.txt`.
"""

import hashlib
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from vision_attn.distill.config import Config
from vision_attn.distill.hosts import Interface, denoiser_of, encode_images, interface_of, load_pipeline, record
from vision_attn.distill.images import Item, find_items, nearest_size, to_pixels
from vision_attn.highres_options import unit_of
from vision_attn.positions import position_ids

INDEX, SKIPPED = "index.json", "skipped.txt"
FORMAT = "vision_attn.cache.v1"
_PROMPTS = 8  # encoded at a time


def write_cache(config: Config, *, device: str = "cpu", pipe: Any = None) -> dict[str, int]:
    """Encode all images and captions.

    Args:
        config: `model`, `data` and `run.quiet` are used.
        device: Where the encoders run.
        pipe: The pipeline, if it is loaded already.

    Returns:
        How many samples and shards there are, and how many images were skipped.

    Raises:
        FileNotFoundError: If the images do not exist.
        ValueError: If none of them can be used, or the folder holds another cache.
    """
    if config.data.images is None:
        raise ValueError("data.images is missing: where are the images to encode?")
    items = find_items(config.data.images)
    pipe = load_pipeline(config.model).to(device) if pipe is None else pipe
    height, width = config.data.sizes[0]
    interface = interface_of(pipe, height, width, config.model.guidance, prompt="")
    folder = config.data.cache
    folder.mkdir(parents=True, exist_ok=True)
    _write_index(folder, _identity(config, pipe, interface))
    buckets: dict[tuple[int, int], list[Item]] = defaultdict(list)
    skipped: dict[str, str] = {}
    for item in items:
        try:
            buckets[_size_of(item, config)].append(item)
        except (OSError, ValueError, SyntaxError) as error:  # PIL raises SyntaxError for some broken PNGs
            skipped[item.key] = str(error)
    samples = shards = 0
    with tqdm(total=sum(map(len, buckets.values())), unit="image", disable=config.run.quiet) as bar:
        for size, members in sorted(buckets.items()):
            for first in range(0, len(members), config.data.shard_size):
                part = members[first : first + config.data.shard_size]
                path = folder / f"{size[0]}x{size[1]}-{first // config.data.shard_size:05d}.safetensors"
                made, failed = _shard(path, part, size, pipe, interface, config)
                skipped |= failed
                samples, shards = samples + made, shards + bool(made)
                bar.update(len(part))
    (folder / SKIPPED).write_text("".join(f"{key}: {why}\n" for key, why in sorted(skipped.items())))
    if not samples:
        raise ValueError(f"none of the {len(items)} images in {config.data.images} can be used: see {folder / SKIPPED}")
    return {"samples": samples, "shards": shards, "skipped": len(skipped)}


def _size_of(item: Item, config: Config) -> tuple[int, int]:
    width, height = item.open().size
    return nearest_size(width, height, config.data.sizes)


def _identity(config: Config, pipe: Any, interface: Interface) -> dict[str, Any]:
    """What a cache must agree in with the training that reads it."""
    name, model = denoiser_of(pipe)
    return {
        "format": FORMAT,
        "base": config.model.base,
        "component": name,
        "denoiser": type(model).__name__,
        "interface": interface.config(),
        "native": list(config.data.native) if config.data.native else None,
    }


def _write_index(folder: Path, identity: dict[str, Any]) -> None:
    if (folder / INDEX).exists():
        old = read_index(folder)
        if old != identity:
            what = ", ".join(f"{k} {old.get(k)!r}, not {identity[k]!r}" for k in identity if old.get(k) != identity[k])
            raise ValueError(f"data.cache: {folder} holds another cache ({what}): give another folder")
        return
    (folder / f"{INDEX}.part").write_text(json.dumps(identity, indent=2) + "\n")
    (folder / f"{INDEX}.part").replace(folder / INDEX)


def read_index(folder: Path) -> dict[str, Any]:
    """Read what a cache says of itself.

    Raises:
        FileNotFoundError: If there is no cache.
        ValueError: If it is damaged.
    """
    path = folder / INDEX
    if not path.exists():
        raise FileNotFoundError(f"data.cache: {folder} holds no cache: make it with 'vision-attn distill cache'")
    try:
        index = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"data.cache: {path} is damaged: {error}") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise ValueError(f"data.cache: {path} is not of the format {FORMAT!r}")
    return index


def _shard(
    path: Path, items: list[Item], size: tuple[int, int], pipe: Any, interface: Interface, config: Config
) -> tuple[int, dict[str, str]]:
    """Write one shard, unless it was written; returns its number of samples and what was skipped."""
    keys = hashlib.sha256("\n".join(item.key for item in items).encode()).hexdigest()
    if path.exists():
        with safe_open(path, "pt") as file:
            old = file.metadata()
        if old["keys"] != keys:
            raise ValueError(f"data.cache: {path} was made of other images: give another folder, or delete the old one")
        return len(json.loads(old["captions"])), json.loads(old["skipped"])
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
        "keys": keys,
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
            f"a {type(pipe).__name__} gives prompts of unlike length, which do not stack: {error}"
        ) from None
    null = {f"null.{name}": value[:1].clone() for name, value in stacked.items()}
    return {**{f"cond.{name}": value[1:].contiguous() for name, value in stacked.items()}, **null, **shared}


def _positions(pipe: Any, shared: dict[str, Tensor], size: tuple[int, int], config: Config) -> dict[str, Tensor]:
    """Return position ids of a larger size scaled into the native one, if that is wanted."""
    native, name = config.data.native, "shared.img_ids"
    stretch = math.sqrt(size[0] * size[1] / (native[0] * native[1])) if native else 1.0
    if stretch <= 1 or name not in shared:
        return {}
    ids = position_ids((size[0] // unit_of(pipe), size[1] // unit_of(pipe)), stretch)
    if ids.shape != shared[name].shape:
        raise ValueError(f"data.native: the positions of a {type(pipe).__name__} are not FLUX.1's")
    return {name: ids}
