"""What a run leaves: the adapter, its exports, and sheets of pictures with the teacher's above the student's."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vision_attn.adapters.published import export_clear, export_linfusion
from vision_attn.distill.config import Config
from vision_attn.distill.data import CachedData
from vision_attn.distill.denoiser import sample, to_images
from vision_attn.distill.sharding import Shards
from vision_attn.distill.student import Student
from vision_attn.distill.trainables import merge_lora

_PICTURES = 6


def save_adapter(config: Config, accelerator: Any, student: Student, shards: Shards) -> Path:
    """Write the adapter, in `run.save_dtype`, and the export.

    Args:
        config: `run` is used.
        accelerator: Of the run.
        student: What was trained.
        shards: Of its model.
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
        if config.student.trainable == "lora":
            merge_lora(student.model)
        for parameter in student.parameters.values():
            parameter.data = parameter.data.to(dtype)
        part = folder.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        student.conversion.save(part)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
        if config.run.export == "clear":
            export_clear(student.conversion, config.run.out / "export")
        elif config.run.export == "linfusion":
            export_linfusion(student.conversion, config.run.out / "export")
    finally:
        for name, parameter in student.parameters.items():
            parameter.data = before[name]


def write_sheet(config: Config, student: Student, data: CachedData, step: int, *, main: bool = True) -> Path:
    """Draw the first samples of the cache with the teacher and the student, from the same noise.

    Args:
        config: `run` is used.
        student: Its model is run by all processes if it is sharded.
        data: The cache.
        step: Names the file.
        main: Whether to write it.
    """
    size, samples = max(data.buckets.items(), key=lambda bucket: len(bucket[1]))
    batch = data[samples[:_PICTURES]].to(next(student.model.parameters()).device, student.dtype)
    generator = torch.Generator().manual_seed(config.run.seed)
    noise = torch.randn(batch.latents.shape, generator=generator).to(batch.latents)
    rows = []
    with student.teaching(student.model) as teacher:
        rows.append(sample(teacher, student.pipe, data.interface, batch, noise, steps=config.run.sheet_steps))
    rows.append(sample(student.model, student.pipe, data.interface, batch, noise, steps=config.run.sheet_steps))
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
