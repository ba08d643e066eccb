"""One batch: noise, the teacher's forward, the student's forward, the losses."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vision_attn.distill.config import Config
from vision_attn.distill.denoiser import Batch, Interface
from vision_attn.distill.losses import Noising, Outputs, distillation_losses
from vision_attn.distill.student import Student, attention_outputs


@dataclass(frozen=True)
class Noisy:
    """What both models are given for a batch, and what they are to predict.

    Attributes:
        call: The denoiser's arguments.
        latents: The noisy latents.
        target: The scheduler's.
    """

    call: dict[str, Any]
    latents: Tensor
    target: Tensor


class Step:
    """Computes the losses of a batch.

    Args:
        config: `loss`, `data.null_prob` and `run.seed` are used.
        student: What is trained.
        interface: How its denoiser is called.
    """

    def __init__(self, config: Config, student: Student, interface: Interface) -> None:
        self.config, self.student, self.interface = config, student, interface
        self.noising = Noising(student.pipe.scheduler)
        weights = config.loss
        self.layers = student.compared(weights.layers, weights.every) if weights.attention else []

    def noisy(self, batch: Batch, number: int) -> Noisy:
        """Add noise to a batch. It depends on the seed and `number` alone, whatever ran before."""
        generator = torch.Generator().manual_seed(self.config.run.seed * 7_368_787 + number)
        clean = batch.latents
        timesteps = self.noising.draw(len(clean), self.config.loss.noise_levels, generator)
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        chosen = torch.rand(len(clean), generator=generator) < self.config.data.null_prob
        latents = self.noising.add(clean, noise, timesteps)
        call = self.interface.arguments(latents.to(self.student.dtype), timesteps, batch.without_prompts(chosen))
        return Noisy(call, latents, self.noising.target(clean, noise, timesteps))

    def losses(self, model: Any, noisy: Noisy) -> dict[str, Tensor]:
        """Return the losses by name, and 'total'.

        Args:
            model: The student's model as it is called: wrapped for several processes.
            noisy: What `noisy` returned.
        """
        weights, student = self.config.loss, self.student
        with student.teaching(model) as teacher:
            needed = bool(weights.prediction or self.layers or weights.variance)
            taught = self._forward(teacher, student.copy or student.model, noisy) if needed else None
        learned = self._forward(model, student.model, noisy)
        return distillation_losses(learned, taught or learned, noisy.target, weights)

    def _forward(self, model: Any, inner: Any, noisy: Noisy) -> Outputs:
        with attention_outputs(inner, self.layers) as attention:
            output = model(**noisy.call)[0]
        return Outputs.of(output, noisy.latents, dict(attention))
