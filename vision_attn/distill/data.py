"""Reads a cache: its index, its samples in batches of one size, and an order that follows from seed and step alone.

A process that reads without workers keeps the samples, up to 2 GiB: training on a small cache waits for no disk.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vision_attn.distill.config import DataConfig
from vision_attn.distill.denoiser import Batch, Interface

INDEX = "index.json"
FORMAT = "vision_attn.cache.v2"
EARLIER = "vision_attn.cache.v1"  # does not say which shards are in use
_ROOM = 2**31  # bytes of samples that a process without workers keeps, so that it reads a small cache once


def read_index(folder: Path) -> dict[str, Any]:
    """Read the `index.json` of a cache: its model, its sizes and its shards.

    Raises:
        FileNotFoundError: If there is no cache, or it was never finished.
        ValueError: If the index is damaged.
    """
    path = folder / INDEX
    if not path.exists():
        raise FileNotFoundError(
            f"data.cache: {folder} holds no cache that was finished: make it with 'vision-attn distill cache'"
        )
    try:
        index = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"data.cache: {path} is damaged: {error}") from None
    if not isinstance(index, dict) or index.get("format") not in (FORMAT, EARLIER):
        raise ValueError(f"data.cache: {path} is not of the format {FORMAT!r}")
    return index


class CachedData(Dataset[Batch]):
    """The cache that `distill cache` wrote last. An index is a list of samples `(shard, row)` of one size.

    Args:
        config: `cache` and `sizes` are used.
        base: Name of the pipeline in training.
        denoiser: Class name of its denoiser.

    Raises:
        FileNotFoundError: If there is no cache.
        ValueError: If the cache is damaged, of an earlier version, or was made for another model or other sizes.
    """

    def __init__(self, config: DataConfig, base: str, denoiser: str) -> None:
        folder, index = config.cache, read_index(config.cache)
        if index["format"] == EARLIER:
            raise ValueError(
                f"data.cache: {folder} was made by an earlier version, which did not keep what it was made of: "
                "run 'vision-attn distill cache' again"
            )
        for name, wanted in (("base", base), ("denoiser", denoiser)):
            if index[name] != wanted:
                raise ValueError(f"data.cache: {folder} was made for the {name} {index[name]!r}, not for {wanted!r}")
        _check_sizes(config, index["sizes"])
        self.interface = Interface.from_config(index["interface"])
        self.shards = [folder / name for name in index["shards"]]
        self.captions: dict[tuple[int, int], str] = {}
        self.buckets: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
        self.files: dict[int, Any] = {}
        self.sizes: dict[int, tuple[int, int]] = {}
        self.kept: dict[tuple[int, int | None], dict[str, Tensor]] = {}  # by shard and row, None for what rows share
        self.room = _ROOM
        for number, path in enumerate(self.shards):
            try:
                with safe_open(path, "pt") as file:
                    metadata = file.metadata()
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"data.cache: {path} is missing or damaged: {error}; run 'vision-attn distill cache' again"
                ) from None
            self.sizes[number] = tuple(json.loads(metadata["size"]))
            for row, caption in enumerate(json.loads(metadata["captions"])):
                self.captions[number, row] = caption
                self.buckets[self.sizes[number]].append((number, row))

    def __len__(self) -> int:
        return len(self.captions)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "files": {}, "kept": {}, "room": 0}  # each worker opens its own, and reads ahead

    def _open(self, number: int) -> Any:
        if number not in self.files:
            self.files[number] = safe_open(self.shards[number], "pt")
        return self.files[number]

    def _tensors(self, number: int, row: int | None, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Return the tensors of a shard whose names begin so: one row `[1, ...]`, or whole."""
        found = self.kept.get((number, row))
        if found is None:
            file = self._open(number)
            found = {
                name: file.get_tensor(name) if row is None else file.get_slice(name)[row : row + 1]
                for name in file.keys() if name.startswith(names)  # noqa: SIM118, it is no dictionary
            }  # fmt: skip
            size = sum(t.nbytes for t in found.values())
            if size <= self.room:
                self.room -= size
                self.kept[number, row] = found
        return found

    def __getitem__(self, samples: list[tuple[int, int]]) -> Batch:
        parts: dict[str, list[Tensor]] = defaultdict(list)
        for number, row in samples:
            for name, tensor in self._tensors(number, row, ("latents", "cond.")).items():
                parts[name].append(tensor)
        first = samples[0][0]
        rest = self._tensors(first, None, ("shared.", "null."))
        rows = {name.removeprefix("cond."): torch.cat(tensors) for name, tensors in parts.items()}
        latents = rows.pop("latents")
        shared = {name.removeprefix("shared."): t for name, t in rest.items() if name.startswith("shared.")}
        null = {name.removeprefix("null."): t for name, t in rest.items() if name.startswith("null.")}
        return Batch(self.sizes[first], latents, {**rows, **shared}, null)


def _check_sizes(config: DataConfig, cached: list[list[int]]) -> None:
    """Refuse a cache of other sizes than `data.sizes`; their order does not matter."""
    wanted = [list(size) for size in config.sizes]
    if sorted(wanted) != sorted(cached):
        raise ValueError(
            f"data.sizes: {config.cache} was cached at {cached}, not at {wanted}: run 'vision-attn distill cache' with "
            f"these sizes, or give data.sizes {cached}"
        )


class Order:
    """Gives each process its samples of each batch.

    All processes get the same size at a time. Samples that fill no batch are left out for an epoch.

    Args:
        buckets: Samples by size.
        batch_size: Samples per process.
        rank: Number of this process.
        world: How many processes there are.
        seed: Seed of the order.
        start: Batches to leave out, for training that goes on.
    """

    def __init__(
        self,
        buckets: dict[tuple[int, int], list[tuple[int, int]]],
        *,
        batch_size: int,
        rank: int,
        world: int,
        seed: int,
        start: int = 0,
    ) -> None:
        self.buckets, self.batch_size, self.rank, self.world = buckets, batch_size, rank, world
        self.seed, self.start = seed, start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        together, done, epoch = self.batch_size * self.world, 0, 0
        while True:
            batches = []
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            for _, samples in sorted(self.buckets.items()):
                places = torch.randperm(len(samples), generator=generator).tolist()
                places *= -(-together // len(places))  # a size with few samples repeats them
                whole = range(0, len(places) - together + 1, together)
                batches += [[samples[p] for p in places[first : first + together]] for first in whole]
            for place in torch.randperm(len(batches), generator=generator).tolist():
                if done >= self.start:
                    yield batches[place][self.rank * self.batch_size :][: self.batch_size]
                done += 1
            epoch += 1


def batches_of(data: CachedData, order: Order, workers: int) -> Iterator[Batch]:
    """Yield batches without end."""
    ahead = 2 if workers else None
    loader: Any = DataLoader(data, sampler=order, batch_size=None, num_workers=workers, prefetch_factor=ahead)
    return iter(loader)
