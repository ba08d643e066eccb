"""The KD error: how far predictions are from the teacher's at fixed noise levels, and its course over a training.

    error at s = sum |student(x_s) - teacher(x_s)|^2 / sum |teacher(x_s)|^2

where x_s is a sample of the cache with s parts of noise.
"""

import json
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vision_attn.distill.config import Config
from vision_attn.distill.data import CachedData
from vision_attn.distill.losses import Noising, Outputs
from vision_attn.distill.output import truncate
from vision_attn.distill.student import Student

CURVE = "curve.jsonl"
_SAMPLES = 16  # of the cache


def predictions(model: Any, scheduler: Any, data: CachedData, config: Config) -> dict[float, Tensor]:
    """Predict from the first samples of the cache at the noise levels `eval.sigmas`.

    Args:
        model: The denoiser as it is called.
        scheduler: That of its pipeline.
        data: The cache.
        config: `run.seed`, `run.quiet` and `eval` are used.

    Returns:
        Predictions on the CPU by noise level.
    """
    return {sigma: _predict(model, Noising(scheduler), data, config, sigma) for sigma in config.eval.sigmas}


def _predict(model: Any, noising: Noising, data: CachedData, config: Config, sigma: float) -> Tensor:
    parameter = next(model.parameters())
    samples = max(data.buckets.values(), key=len)[:_SAMPLES]
    generator = torch.Generator().manual_seed(config.run.seed)
    found, count = [], config.eval.batch_size
    firsts = range(0, len(samples), count)
    for first in tqdm(firsts, desc=f"noise {sigma:g}", unit="batch", disable=config.run.quiet, leave=False):
        batch = data[samples[first : first + count]]
        batch = batch.to(parameter.device, parameter.dtype)
        noise = torch.randn(batch.latents.shape, generator=generator).to(batch.latents)
        timesteps = noising.at_level(sigma).expand(len(noise))
        noisy = noising.add(batch.latents, noise, timesteps)
        call = data.interface.arguments(noisy.to(parameter.dtype), timesteps, batch.tensors)
        with torch.no_grad():
            found.append(Outputs.of(model(**call)[0], noisy, {}).prediction.float().cpu())
    return torch.cat(found)


def kd_error(student: dict[float, Tensor], teacher: dict[float, Tensor]) -> dict[str, Any]:
    """Return the error at each noise level, and their mean."""
    error = {
        str(sigma): ((student[sigma] - v).square().mean() / v.square().mean()).item() for sigma, v in teacher.items()
    }
    return {"kd_error": error, "kd_error_mean": sum(error.values()) / len(error)}


class Curve:
    """Measures a student every `run.measure_every` steps and writes a line of `run.out`/curve.jsonl each time.

    Args:
        config: `run` and `eval` are used.
        student: In training. If its model is sharded or shared, all processes measure.
        data: The cache.
        start: The step that the run goes on from; lines of later steps are dropped.
        main: Whether this process writes the file.
    """

    def __init__(self, config: Config, student: Student, data: CachedData, start: int, *, main: bool) -> None:
        self.config, self.student, self.data, self.main = config, student, data, main
        self.path = config.run.out / CURVE
        self.teacher: dict[float, Tensor] | None = None
        if main:
            truncate(self.path, start)

    def measure(self, step: int) -> None:
        """Measure the student as it is, and the teacher the first time."""
        model, scheduler = self.student.model, self.student.pipe.scheduler
        training = model.training
        model.eval()
        if self.teacher is None:
            with self.student.teaching(model) as teacher:
                self.teacher = predictions(teacher, scheduler, self.data, self.config)
        found = kd_error(predictions(model, scheduler, self.data, self.config), self.teacher)
        model.train(training)
        if self.main:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **found}) + "\n")
