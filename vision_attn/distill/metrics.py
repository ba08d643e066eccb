"""The losses of a run: on the progress bar, in `metrics.jsonl`, and in the trackers."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vision_attn.distill.config import Config


class Metrics:
    """Collects the losses of an update over its batches and processes.

    Args:
        config: `run` is used.
        accelerator: Of the run.
        start: Step that the run goes on from; later lines of an earlier run are dropped.

    Attributes:
        norm: Of the last gradient, before clipping.
        out_of_time: Whether `run.minutes` have passed, for all processes alike.
    """

    def __init__(self, config: Config, accelerator: Any, start: int) -> None:
        self.run, self.accelerator = config.run, accelerator
        self.sums: dict[str, Tensor] = {}
        self.norm: Tensor | float | None = None
        self.begun, self.out_of_time = time.perf_counter(), False
        self.path = config.run.out / "metrics.jsonl"
        main = accelerator.is_main_process
        if main:
            _truncate(self.path, start)
        self.file = self.path.open("a") if main else None
        self.bar = tqdm(
            total=config.run.steps, initial=start, unit="step", disable=config.run.quiet or not main, mininterval=0.5
        )

    def add(self, losses: dict[str, Tensor]) -> None:
        """Add the losses of a batch."""
        for name, loss in losses.items():
            self.sums[name] = self.sums.get(name, 0) + loss.detach() / self.run.accumulate

    def log(self, step: int, rate: float) -> None:
        """End an update: write its losses, the norm of the gradient and the learning rate."""
        seconds = time.perf_counter() - self.begun
        values = [*self.sums.values(), torch.tensor(seconds)]
        device = self.accelerator.device
        means = self.accelerator.reduce(torch.stack([v.float().to(device) for v in values]), "mean").tolist()
        found = dict(zip(self.sums, means[:-1], strict=True))
        self.sums = {}
        self.out_of_time = self.run.minutes is not None and means[-1] > 60 * self.run.minutes
        found |= {"norm": float(self.norm)} if self.norm is not None else {}
        found["learning_rate"] = rate
        if self.file is not None:
            self.file.write(json.dumps({"step": step, **found, "seconds": round(seconds, 3)}) + "\n")
            self.file.flush()
        self.accelerator.log(found, step=step)
        self.bar.update()
        self.bar.set_postfix({k: f"{v:.4g}" for k, v in found.items() if k not in ("norm", "learning_rate")})

    def close(self) -> None:
        """End the run."""
        self.bar.close()
        if self.file is not None:
            self.file.close()
        self.accelerator.end_training()


def _truncate(path: Path, start: int) -> None:
    """Drop the lines after a step: they are computed again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= start:
                kept.append(line)
        except ValueError:  # the line that was being written when the run was stopped
            break
    part = path.with_suffix(".part")
    part.write_text("".join(f"{line}\n" for line in kept))
    part.replace(path)
