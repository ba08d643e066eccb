"""Launches that ended a process's work on a GPU: they are kept in a file, and `vision-attn tune` tries none twice.

A kernel that reads or writes outside its memory takes all of its process's memory on the GPU with it: nothing can be
timed afterwards. Compilers make such kernels of right code too, so a launch counts for the versions that compiled it.
"""

import json
from pathlib import Path
from typing import Any

import torch

from vision_attn.kernels.launches import Launch, numbers_of


class GpuLostError(RuntimeError):
    """A launch has ended this process's work on the GPU.

    Attributes:
        row: The row of the table that was tuned.
        launch: The launch.
        error: What the GPU's driver said.
    """

    def __init__(self, row: str, launch: Launch, error: str) -> None:
        super().__init__(f"{row}: {short(launch)} ended this process's work on the GPU ({error})")
        self.row, self.launch, self.error = row, launch, error


class Faults:
    """The launches in a file, one a line.

    Args:
        path: The file, which need not be there.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.versions = path, _versions()
        lines = path.read_text().splitlines() if path.is_file() else []
        self._lines = [json.loads(line) for line in lines if line.strip()]

    def __contains__(self, tried: tuple[str, Launch]) -> bool:
        """Whether a launch of a row, `(row, launch)`, ended the work of a process with these versions."""
        return any(_same(line, self._line(*tried)) for line in self._lines)

    @property
    def last(self) -> str | None:
        """The row of the last launch with these versions."""
        rows = [line["row"] for line in self._lines if line.get("versions") == self.versions]
        return rows[-1] if rows else None

    def add(self, row: str, launch: Launch, error: str) -> None:
        """Keep a launch."""
        line = self._line(row, launch) | dict(error=error)
        self._lines.append(line)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _line(self, row: str, launch: Launch) -> dict[str, Any]:
        return dict(row=row, versions=self.versions, launch=numbers_of(launch))


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one.get(name) == other[name] for name in ("row", "versions", "launch"))


def _versions() -> str:
    import triton  # noqa: PLC0415

    return f"torch {torch.__version__}, triton {triton.__version__}"


def alive(device: torch.device) -> bool:
    """Whether a GPU takes work of this process; an error inside a kernel ends that."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def short(launch: Launch) -> str:
    """Return a launch in a few words."""
    tiles = " by ".join("x".join(map(str, tile)) for tile in (launch.own, launch.walk) if tile)
    more = f" {launch.programs} programs" if launch.programs > 1 else ""
    more += f" {launch.features} features" if launch.features else ""
    more += f" {launch.registers} registers" if launch.registers else ""
    boxes = f", TMA {short(launch.boxes)}" if launch.boxes else ""
    return f"{tiles} {launch.warps} warps {launch.stages} stages{more}{boxes}"
