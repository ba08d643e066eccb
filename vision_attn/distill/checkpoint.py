"""Checkpoints that appear complete or not at all, are rotated, and from which training goes on exactly.

A checkpoint is a folder `checkpoint-00000100`: the trained parameters, the optimiser's state, the schedule, the mean of
the parameters and the random numbers of each process. The order of the data and the noise follow from the step.
"""

import json
import logging
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vision_attn.distill.config import Config
from vision_attn.distill.sharding import checksum, is_sharded

STATE, TRAINED = "state.json", "trained.safetensors"
_PREFIX = "checkpoint-"
_FREE = ("steps", "minutes", "save_every", "keep", "sheet_every", "sheet_steps", "trackers", "save_dtype", "export")
log = logging.getLogger(__name__)


class Checkpoints:
    """Saves and restores a run.

    Args:
        config: `run.out`, `run.keep`, and what must stay the same in a run.
        accelerator: Its models, optimisers and registered objects are saved.
        parameters: What is trained, by name: all that is saved of the model, unless it is sharded.
    """

    def __init__(self, config: Config, accelerator: Any, parameters: dict[str, nn.Parameter]) -> None:
        self.folder, self.keep, self.accelerator = config.run.out, config.run.keep, accelerator
        self.parameters = parameters
        self.settings = settings_of(config)
        if not is_sharded(accelerator):
            accelerator.register_save_state_pre_hook(_saving(accelerator, parameters))
            accelerator.register_load_state_pre_hook(_loading(parameters))

    def found(self) -> list[Path]:
        """Return the complete checkpoints, the oldest first."""
        return sorted(path.parent for path in self.folder.glob(f"{_PREFIX}*/{STATE}") if path.parent.suffix != ".part")

    def save(self, step: int) -> Path:
        """Save a checkpoint, then delete those that are too old.

        Raises:
            OSError: If it cannot be written. What was there before still is.
            RuntimeError: If the processes hold different parameters.
        """
        final = self.folder / f"{_PREFIX}{step:08d}"
        part, problem = final.with_suffix(".part"), None
        if final.exists():
            return final
        sums = self._checksums()
        if self.accelerator.is_main_process:
            shutil.rmtree(part, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            self.accelerator.save_state(str(part))
            if self.accelerator.is_main_process:
                state = {"step": step, "processes": len(sums), "checksums": sums, "settings": self.settings}
                (part / STATE).write_text(json.dumps(state, indent=2) + "\n")
        except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError where the disk is full
            problem = error
        failed = torch.tensor(float(problem is not None), device=self.accelerator.device)
        if self.accelerator.reduce(failed, "sum").item():
            shutil.rmtree(part, ignore_errors=True)
            last = self.found()[-1].name if self.found() else "there is none"
            raise OSError(
                f"the checkpoint of step {step} could not be written to {self.folder}: "
                f"{problem or 'another process failed'}. The last complete one: {last}. Make room and start again with "
                "the same command: training goes on from there"
            ) from problem
        if self.accelerator.is_main_process:
            part.rename(final)
            for old in self.found()[: -self.keep]:
                shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        return final

    def _checksums(self) -> list[float]:
        """Return a sum over the trained parameters for each process; they are equal, unless the model is sharded."""
        sums = self.accelerator.gather(checksum(self.parameters)).tolist()
        if len(set(sums)) > 1 and not is_sharded(self.accelerator):
            raise RuntimeError(f"the processes hold different parameters, whose sums are {sums}: this is a bug")
        return sums

    def resume(self) -> int | None:
        """Restore the last complete checkpoint and return its step, None if there is none.

        Raises:
            ValueError: If it is of a run with other settings.
        """
        if not self.found():
            return None
        last = self.found()[-1]
        state = json.loads((last / STATE).read_text())
        old, new = _flat(state["settings"]), _flat(self.settings)
        changed = [f"{k} was {old.get(k)!r}, is {new.get(k)!r}" for k in old | new if old.get(k) != new.get(k)]
        if changed:
            raise ValueError(
                f"run.out: {self.folder} holds a run with other settings: {'; '.join(changed[:6])}. Give another "
                "folder, or delete it to begin anew"
            )
        if state["processes"] != self.accelerator.num_processes:
            log.warning("%s is of %d processes: data come in another order", last, state["processes"])
        self.accelerator.load_state(str(last))
        return int(state["step"])


def settings_of(config: Config) -> dict[str, Any]:
    """Return what must stay the same in a run, as JSON has it."""
    settings = asdict(config)
    del settings["eval"]
    settings["run"] = {name: value for name, value in settings["run"].items() if name not in (*_FREE, "quiet", "out")}
    for name in ("workers", "images", "prompts", "steps", "shard_size", "cache"):
        del settings["data"][name]
    return json.loads(json.dumps(settings, default=str))


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        k: v for name, item in value.items() for k, v in _flat(item, f"{prefix}.{name}" if prefix else name).items()
    }


def _saving(accelerator: Any, parameters: dict[str, nn.Parameter]) -> Any:
    def hook(models: list[Any], weights: list[Any], folder: str) -> None:
        weights.clear()  # accelerate would write the frozen weights too
        if accelerator.is_main_process:
            tensors = {name: p.detach().cpu().contiguous() for name, p in parameters.items()}
            save_file(tensors, Path(folder) / TRAINED)

    return hook


def _loading(parameters: dict[str, nn.Parameter]) -> Any:
    def hook(models: list[Any], folder: str) -> None:
        models.clear()
        with torch.no_grad():
            for name, tensor in load_file(Path(folder) / TRAINED).items():
                parameters[name].copy_(tensor)

    return hook
