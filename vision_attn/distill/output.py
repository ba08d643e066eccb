"""What a run writes into `run.out`: checkpoints, `metrics.jsonl`, sheets of pictures, the adapter and its export.

A checkpoint is a folder `checkpoint-00000100` that appears complete or not at all. It holds the trained parameters, the
state of the optimiser and of the schedule, and the mean of the parameters. The order of the data, the noise and all
other random numbers follow from the step, so training goes on from a checkpoint exactly.
"""

import json
import logging
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from vision_attn.adapters.published import export_clear, export_linfusion
from vision_attn.distill.config import Config
from vision_attn.distill.data import CachedData
from vision_attn.distill.denoiser import sample, to_images
from vision_attn.distill.parameters import Shards, checksum, is_sharded
from vision_attn.distill.student import Student, merge_lora
from vision_attn.processors.base import model_name

STATE, TRAINED = "state.json", "trained.safetensors"
_PREFIX = "checkpoint-"
_FREE_RUN = {"out", "steps", "minutes", "save_every", "keep", "sheet_every", "sheet_inference_steps"}
_FREE_RUN |= {"trackers", "save_dtype", "export", "quiet", "share", "measure_every"}
_FREE_DATA = {"cache", "images", "prompts", "num_inference_steps", "shard_size", "workers"}
_PICTURES = 6  # of a sheet's row
_log = logging.getLogger(__name__)


class Checkpoints:
    """Saves and restores a run.

    Args:
        config: `run.out`, `run.keep`, and the settings that a run cannot change.
        accelerator: The models, optimisers and objects that are registered with it are saved.
        parameters: The trained parameters by name. Of a model that is not sharded, only they are saved.
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
        return complete(self.folder)

    def save(self, step: int) -> Path:
        """Save a checkpoint, then delete old ones until `run.keep` are left.

        Raises:
            OSError: If it cannot be written. Earlier checkpoints stay.
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
        """Return a sum over the trained parameters for each process; the sums are equal unless the model is sharded."""
        sums = self.accelerator.gather(checksum(self.parameters)).tolist()
        if len(set(sums)) > 1 and not is_sharded(self.accelerator):
            raise RuntimeError(f"the processes hold different parameters, whose sums are {sums}: this is a bug")
        return sums

    def resume(self) -> int | None:
        """Restore the last complete checkpoint and return its step, None if there is none.

        Raises:
            ValueError: If it belongs to a run with other settings.
        """
        if not self.found():
            return None
        last = self.found()[-1]
        state = json.loads((last / STATE).read_text())
        old, new = flat(state["settings"]), flat(self.settings)
        changed = [f"{k} was {old.get(k)!r}, is {new.get(k)!r}" for k in old | new if old.get(k) != new.get(k)]
        if changed:
            raise ValueError(
                f"run.out: {self.folder} holds a run with other settings: {'; '.join(changed[:6])}. Give another "
                "folder, or delete it to begin anew"
            )
        if state["processes"] != self.accelerator.num_processes:
            _log.warning("%s was written by %d processes: the data now come in another order", last, state["processes"])
        self.accelerator.load_state(str(last))
        return int(state["step"])


def complete(folder: Path) -> list[Path]:
    """Return the complete checkpoints in a folder, the oldest first."""
    return sorted(path.parent for path in folder.glob(f"{_PREFIX}*/{STATE}") if path.parent.suffix != ".part")


def is_finished(config: Config) -> bool:
    """Whether a training with these settings has ended: its adapter is newer than its last checkpoint.

    A run that `run.minutes` ended has, whatever its steps. With stages, the last one counts.
    """
    config = config.each_stage()[-1]
    adapter, found = config.run.out / "adapter" / "config.json", complete(config.run.out)
    if not found or not adapter.exists():
        return False
    state = json.loads((found[-1] / STATE).read_text())
    if state["settings"] != settings_of(config) or adapter.stat().st_mtime < (found[-1] / STATE).stat().st_mtime:
        return False
    return state["step"] >= config.run.steps or config.run.minutes is not None


def settings_of(config: Config) -> dict[str, Any]:
    """Return the settings that a run cannot change, as JSON holds them."""
    settings = asdict(config)
    del settings["eval"]
    for section, free in (("run", _FREE_RUN), ("data", _FREE_DATA)):
        settings[section] = {name: value for name, value in settings[section].items() if name not in free}
    return json.loads(json.dumps(settings, default=str))


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested settings by names with dots."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for name, item in value.items() for k, v in flat(item, f"{prefix}.{name}" if prefix else name).items()}


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
                parameters[model_name(name)].copy_(tensor)

    return hook


class Metrics:
    """Averages the losses of an update over its batches and processes; shows, writes and tracks them.

    Args:
        config: `run` is used.
        accelerator: The run's.
        start: The step that the run goes on from; lines of later steps are dropped.

    Attributes:
        norm: Norm of the last gradient, before clipping.
        spent: Which share of `run.minutes` has passed, 0 without them; equal in all processes.
    """

    def __init__(self, config: Config, accelerator: Any, start: int) -> None:
        self.run, self.accelerator = config.run, accelerator
        self.sums: dict[str, Tensor] = {}
        self.norm: Tensor | float | None = None
        self.begun, self.spent = time.perf_counter(), 0.0
        self.path = config.run.out / "metrics.jsonl"
        main = accelerator.is_main_process
        if main:
            truncate(self.path, start)
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
        self.spent = means[-1] / (60 * self.run.minutes) if self.run.minutes else 0.0
        found |= {"norm": float(self.norm)} if self.norm is not None else {}
        found["learning_rate"] = rate
        if self.file is not None:
            self.file.write(json.dumps({"step": step, **found, "seconds": round(seconds, 3)}) + "\n")
            self.file.flush()
        self.accelerator.log(found, step=step)
        shown = {k: f"{v:.4g}" for k, v in found.items() if k not in ("norm", "learning_rate")}
        self.bar.set_postfix(shown, refresh=False)  # the next update draws it, if it is time
        self.bar.update()

    def close(self) -> None:
        """Close the bar and the file."""
        self.bar.close()
        if self.file is not None:
            self.file.close()


def truncate(path: Path, start: int) -> None:
    """Drop the lines of later steps, which will be computed again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= start:
                kept.append(line)
        except ValueError:  # the run was stopped while it wrote this line
            break
    part = path.with_suffix(".part")
    part.write_text("".join(f"{line}\n" for line in kept))
    part.replace(path)


def write_sheet(config: Config, student: Student, data: CachedData, step: int, *, main: bool = True) -> Path:
    """Draw the first samples of the cache: a row by the teacher, and below it a row by the student from the same noise.

    Args:
        config: `run` is used.
        student: All processes run its model if it is sharded or shared.
        data: The cache.
        step: The file is named after it.
        main: Whether this process writes the file.
    """
    size, samples = max(data.buckets.items(), key=lambda bucket: len(bucket[1]))
    batch = data[samples[:_PICTURES]].to(next(student.model.parameters()).device, student.dtype)
    generator = torch.Generator().manual_seed(config.run.seed)
    noise = torch.randn(batch.latents.shape, generator=generator).to(batch.latents)
    steps = config.run.sheet_inference_steps

    def draw(model: Any) -> Tensor:
        return sample(model, student.pipe, data.interface, batch, noise, num_inference_steps=steps)

    with student.teaching(student.model) as teacher:
        rows = [draw(teacher)]
    rows.append(draw(student.model))
    path = config.run.out / "sheets" / f"step-{step:08d}.png"
    if main:
        save_sheet(path, [to_images(student.pipe, latents, size) for latents in rows])
    return path


def save_sheet(path: Path, rows: list[Tensor]) -> None:
    """Write rows of pictures `[B, 3, height, width]` in [0, 1] as one PNG."""
    from PIL import Image  # noqa: PLC0415, optional

    sheet = torch.cat([torch.cat(list(row), 2) for row in rows], 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    Image.fromarray((sheet * 255).round().byte().permute(1, 2, 0).numpy()).save(part, "PNG")
    part.replace(path)


def save_adapter(config: Config, accelerator: Any, student: Student, shards: Shards) -> Path:
    """Write the adapter in `run.save_dtype`, and the export if one is wanted; return the adapter's folder.

    Args:
        config: `run` is used.
        accelerator: The run's.
        student: The trained student.
        shards: Those of its model.
    """
    with shards.gathered(accelerator.is_main_process):
        if accelerator.is_main_process:
            _save(config, student)
    accelerator.wait_for_everyone()
    return config.run.out / "adapter"


def _save(config: Config, student: Student) -> None:
    folder = config.run.out / "adapter"
    dtype = getattr(torch, config.run.save_dtype)
    before = {name: parameter.data for name, parameter in student.parameters.items()}
    try:
        lora: Any = None if config.student.trainable != "lora" or merge_lora(student.model) else student.model
        for parameter in student.parameters.values():
            parameter.data = parameter.data.to(dtype)
        part = folder.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        student.conversion.save(part)
        if lora is not None:
            lora.save_lora_adapter(part)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
        if config.run.export == "clear":
            export_clear(student.conversion, config.run.out / "export")
        elif config.run.export == "linfusion":
            export_linfusion(student.conversion, config.run.out / "export")
    finally:
        for name, parameter in student.parameters.items():
            parameter.data = before[name]
