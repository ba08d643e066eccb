"""How the Triton kernels are launched: a table for each GPU architecture, its lookup, and launches that fit the GPU.

A table is a file `ARCHITECTURE.json` beside this one, or in the user's folder, as `vision-attn tune` writes it. A row
names the size of an element, channels of a head and columns of a window at most; the first row that suits a call
counts. A GPU without a table takes that of the nearest architecture. Where a launch does not fit, its pipeline and its
tiles are made smaller until it does: the kernel is compiled, and the shared memory that it takes is compared with what
the GPU has, before anything runs.
"""

import functools
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from vision_attn.kernels.backend import LaunchError, warn

T = TypeVar("T")
Tile = tuple[int, ...]  # rows and columns of the grid, or tokens of a sequence

_LEAST = 16  # tokens of a tile: what a product takes
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched.

    Args:
        own: The tile that a program owns; empty where it owns none.
        walk: The tile that it walks by; empty where that is its own one.
        warps: Warps of a program.
        stages: Stages of the pipeline that loads what is walked.
        programs: Programs that one multiprocessor holds, by which loops are cut.
        features: Features that are multiplied at a time.
        registers: Registers of a thread at most, so that a multiprocessor holds more programs; 0 for any. It counts for
            kernels that are launched with `options`: those of local, multipole, window and linear-local attention.
        boxes: The launch where TMA can load, if it is another one.
        exact: Whether no smaller one takes its place where it does not fit: of a launch that is tried.
    """

    own: Tile = ()
    walk: Tile = ()
    warps: int = 4
    stages: int = 1
    programs: int = 1
    features: int = 0
    registers: int = 0
    boxes: "Launch | None" = None
    exact: bool = False

    @property
    def rows(self) -> int:
        """Tokens that a program owns."""
        return math.prod(self.own)

    @property
    def length(self) -> int:
        """Tokens that it walks at a time."""
        return math.prod(self.walk or self.own)

    @property
    def options(self) -> dict[str, int]:
        """What Triton is told beside the kernel's arguments."""
        limit = dict(maxnreg=self.registers) if self.registers else {}
        return dict(num_warps=self.warps, num_stages=self.stages, **limit)

    def smaller(self) -> Iterator["Launch"]:
        """Yield this launch and ever smaller ones; those without a pipeline come last, as they are slow."""
        if self.boxes is not None or self.exact:
            yield self
        if self.exact:
            return
        tiles = [replace(self, boxes=None)]
        while (less := tiles[-1]._half()) is not None:
            tiles.append(less)
        yield from (replace(one, stages=n) for one in tiles for n in range(self.stages, 1, -1))
        yield from (replace(one, stages=1) for one in tiles)

    def _half(self) -> "Launch | None":
        """Halve the larger tile, what is walked first, or the features if no tile can be halved."""
        if self.walk and self.length >= max(self.rows, 2 * _LEAST):
            return replace(self, walk=_halved(self.walk))
        if self.rows >= 2 * _LEAST:
            return replace(self, own=_halved(self.own))
        if self.features >= 2 * _LEAST:
            return replace(self, features=self.features // 2)
        return None


def _halved(tile: Tile) -> Tile:
    """Halve the longest side, the first of equal ones."""
    at = tile.index(max(tile))
    return *tile[:at], tile[at] // 2, *tile[at + 1 :]


@dataclass(frozen=True)
class Row:
    """A launch, and the calls that it is for.

    Args:
        size: Bytes of an element.
        channels: Channels of a head at most.
        launch: The launch.
        columns: Columns of a window at most.
        why: Why the launch is as it is, where that is not its time.
    """

    size: int
    channels: int
    launch: Launch
    columns: float = math.inf
    why: str = ""


@dataclass(frozen=True)
class Table:
    """The launches of an architecture, by the names of kernels.

    Args:
        rows: Rows of each kernel, those of fewer channels and columns first.
        about: Where they come from, for the reader.
    """

    rows: Mapping[str, Sequence[Row]]
    about: str = ""

    def find(self, kernel: str, size: int, channels: int, columns: float) -> Launch | None:
        """Return the launch of a kernel for a call; None if no row suits."""
        for row in self.rows.get(kernel, ()):
            if row.size == size and channels <= row.channels and columns <= row.columns:
                return row.launch
        return None

    @classmethod
    def read(cls, path: Path) -> "Table":
        """Read a table.

        Raises:
            ValueError: If the file is none.
        """
        try:
            found = json.loads(path.read_text())
            return cls({name: [_row(**row) for row in rows] for name, rows in found["kernels"].items()}, found["about"])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is no table of launches: {type(error).__name__}: {error}") from error

    def write(self, path: Path) -> None:
        """Write the table, one row to a line."""
        kernels = []
        for name, rows in self.rows.items():
            lines = ",\n".join(f"   {json.dumps(_plain(row))}" for row in rows)
            kernels.append(f"  {json.dumps(name)}: [\n{lines}\n  ]")
        text = f'{{\n "about": {json.dumps(self.about)},\n "kernels": {{\n' + ",\n".join(kernels) + "\n }\n}\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}")  # another process may read the table now
        part.write_text(text)
        part.replace(path)


def _row(*, size: int, channels: int, columns: float = math.inf, why: str = "", **launch: Any) -> Row:
    return Row(size, channels, _launch(**launch), columns, why)


def _launch(*, own: Sequence[int] = (), walk: Sequence[int] = (), boxes: Any = None, **numbers: Any) -> Launch:
    tiles = tuple(own), tuple(walk)
    if not any(tiles) or any(n < 1 or n & (n - 1) for tile in tiles for n in tile):
        raise ValueError(f"tiles must be powers of two, got own {own} and walk {walk}")
    return Launch(*tiles, boxes=None if boxes is None else _launch(**boxes), **numbers)


def _plain(row: Row) -> dict[str, Any]:
    about = dict(size=row.size, channels=row.channels)
    columns = {} if row.columns == math.inf else dict(columns=row.columns)
    return {**about, **columns, **numbers_of(row.launch), **(dict(why=row.why) if row.why else {})}


_OPTIONAL = ("programs", 1), ("features", 0), ("registers", 0)


def numbers_of(launch: Launch) -> dict[str, Any]:
    """Return a launch as tables write it."""
    found: dict[str, Any] = {name: list(tile) for name in ("own", "walk") if (tile := getattr(launch, name))}
    found |= dict(warps=launch.warps, stages=launch.stages)
    found |= {name: n for name, least in _OPTIONAL if (n := getattr(launch, name)) != least}
    found |= dict(exact=True) if launch.exact else {}
    return found if launch.boxes is None else found | dict(boxes=numbers_of(launch.boxes))


@dataclass(frozen=True)
class Target:
    """What launches have to know of a GPU.

    Args:
        architecture: 'sm_90', 'gfx942'.
        shared: Bytes of shared memory that a block may take.
        multiprocessors: How many there are.
    """

    architecture: str
    shared: int
    multiprocessors: int

    @property
    def tma(self) -> bool:
        """Whether TMA fetches tiles, and a launch may start before the last one ends: Hopper and later."""
        return self.architecture.startswith("sm_") and _generation(self.architecture) >= 90

    @property
    def without_eight_bits(self) -> list[str]:
        """Why it cannot multiply e4m3 as NVIDIA's Ada and later do; empty if it can, as the interpreter."""
        able = not self.architecture.startswith("sm_") or _generation(self.architecture) >= 89
        if able and not self.amd:
            return []
        return [f"{self.architecture} has no products of e4m3 that these kernels know: sm_89 and later have them"]

    @property
    def amd(self) -> bool:
        """Whether it is AMD's, which has no TF32 products in three parts."""
        return self.architecture.startswith("gfx")

    @property
    def tensor_memory(self) -> bool:
        """Whether products are summed in tensor memory: Blackwell of data centres."""
        return self.architecture.startswith("sm_") and 100 <= _generation(self.architecture) < 120


INTERPRETER = Target("interpreter", sys.maxsize, 132)  # as many multiprocessors as an H200


@functools.cache
def target_of(device: torch.device) -> Target:
    """Return what launches have to know of a device."""
    if device.type != "cuda":
        return INTERPRETER
    about, shared = torch.cuda.get_device_properties(device), _shared(device)
    if torch.version.hip is not None:
        return Target(about.gcnArchName.split(":")[0], shared, about.multi_processor_count)
    return Target(f"sm_{about.major}{about.minor}", shared, about.multi_processor_count)


def _shared(device: torch.device) -> int:
    """Return the bytes of shared memory that a block may take, by the number that Triton compares with itself.

    PyTorch tells on some versions only what a block gets unasked, which is less.
    """
    from triton.runtime import driver  # noqa: PLC0415

    index = torch.cuda.current_device() if device.index is None else device.index
    return int(driver.active.utils.get_device_properties(index)["max_shared_mem"])


def user_folder() -> Path:
    """Return the folder of the user's tables: $VISION_ATTN_LAUNCHES, or `vision_attn/launches` of the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("VISION_ATTN_LAUNCHES") or Path(cache) / "vision_attn" / "launches")


def tables(architecture: str) -> tuple[Table, ...]:
    """Return the tables that serve an architecture, the first before the others: the user's, its own, the nearest."""
    own, found = user_folder() / f"{architecture}.json", []
    if own.is_file():
        try:
            found.append(_read(own))
        except ValueError as error:
            warn(f"{error}; it is left out")
    there = {path.stem: path for path in Path(__file__).parent.glob("*.json")}
    number = _generation(architecture)
    order = sorted(there, key=lambda name: (name != architecture, abs(_generation(name) - number)))
    return *found, *(_read(there[name]) for name in order)


@functools.cache
def _read(path: Path) -> Table:
    return Table.read(path)


def _generation(architecture: str) -> int:
    """A number that is near where architectures are; where it is not known, that of the table we have."""
    text = architecture.removeprefix("sm_")
    return int(text) if text.isdigit() else 90


@functools.cache
def lookup(kernel: str, architecture: str, size: int, channels: int, columns: float = 0) -> Launch:
    """Return the launch of a kernel.

    Args:
        kernel: Operator and kernel: 'local.forward'.
        architecture: Of the GPU: 'sm_90'.
        size: Bytes of an element.
        channels: Channels of a head.
        columns: Columns of a window.

    Raises:
        LaunchError: If no table has a row.
    """
    for table in tables(architecture):
        found = table.find(kernel, size, channels, columns)
        if found is not None:
            return found
    raise LaunchError(f"no table of launches has a row of {kernel} for {channels} channels of {size} bytes")


def forget() -> None:
    """Read the tables anew at the next lookup; launches that are planned already stay."""
    _read.cache_clear()
    lookup.cache_clear()


def fitting(
    kernel: str, t: Tensor, attempt: Callable[[Launch], tuple[T, int]], *, channels: int, columns: float = 0,
    adjust: Callable[[Launch], Launch] | None = None,
) -> T:  # fmt: skip
    """Return what `attempt` makes of the first launch that fits the GPU.

    Args:
        kernel: Operator and kernel.
        t: A tensor on the GPU, of the dtype of the call.
        attempt: Takes a launch; returns anything, and the bytes of shared memory of the kernel, which it compiles.
        channels: Channels of a head.
        columns: Columns of a window.
        adjust: Changes the table's launch for calls that it does not know.

    Raises:
        LaunchError: If none fits.
    """
    target = target_of(t.device)
    first = lookup(kernel, target.architecture, t.element_size(), channels, columns)
    why, cause = "", None
    for launch in (first if adjust is None else adjust(first)).smaller():
        try:
            made, shared = attempt(launch)
        except LaunchError as error:
            why, cause = str(error), error
            continue
        if shared <= target.shared:
            if launch != first:
                _logger.info("%s: %s instead of %s fits %s", kernel, launch, first, target)
            return made
        why, cause = f"the smallest takes {shared} bytes of shared memory, a block has {target.shared}", None
    raise LaunchError(f"no launch of {kernel} fits {target.architecture}: {why}") from cause
