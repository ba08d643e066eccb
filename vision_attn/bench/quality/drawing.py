"""Fidelity of drawing: an embedded teacher draws dense, then with each attention from the same noise, untrained."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vision_attn.bench.quality.contenders import Contender
from vision_attn.bench.quality.fidelity import Bound, keys_met
from vision_attn.processors.paro import calibrating

CALIBRATION = ("penguin", "house", "snail")  # pictures that no row shows
PROMPTS = ("red apple", "rocket", "octopus", "alarm clock", "pizza", "sunflower", "umbrella", "guitar")
MIN_TOKENS = 256  # the UNet's 8 x 8 grid stays dense at the training size
NAMES = {"base": "FLUX type", "unet": "UNet", "nano": "FLUX type, nano"}


@dataclass(frozen=True)
class DrawingCase:
    """A teacher at one size.

    Args:
        teacher: A name that `load_teacher` takes.
        pixels: Side of the pictures. They are drawn from noise, so that above 128 px they repeat the object.
        contenders: Who takes part.
        prompts: How many prompts are drawn, in one batch.
        steps: Denoising steps.
        bounds: What must hold.
    """

    teacher: str
    pixels: int
    contenders: tuple[Contender, ...]
    prompts: int = len(PROMPTS)
    steps: int = 10
    bounds: tuple[Bound, ...] = ()

    @property
    def name(self) -> str:
        """As in 'unet-256'."""
        return f"{'flux' if self.teacher == 'base' else self.teacher}-{self.pixels}"

    @property
    def label(self) -> str:
        """As in '256 px'."""
        return f"{self.pixels} px"

    @property
    def group(self) -> str:
        """The table: one for each teacher."""
        return NAMES[self.teacher]

    def shape(self) -> dict[str, Any]:
        """Return what defines the case, for the JSON."""
        about = dict(teacher=self.teacher, pixels=self.pixels, prompts=list(PROMPTS[: self.prompts]))
        return about | dict(steps=self.steps, min_tokens=MIN_TOKENS, dtype="float32")

    def reference(self, device: torch.device) -> "Drawing":
        """Draw with the dense teacher."""
        return Drawing(self, device)


class Drawing:
    """A teacher with its dense pictures, and all calls of its denoiser that they took.

    Args:
        case: What is drawn.
        device: Where.
    """

    def __init__(self, case: DrawingCase, device: torch.device) -> None:
        from vision_attn.demo import load_teacher  # noqa: PLC0415, with diffusers

        self.case = case
        self.pipe: Any = load_teacher(case.teacher).to(device)
        self.pipe.set_progress_bar_config(disable=True)
        self.denoiser: nn.Module = getattr(self.pipe, "transformer", None) or self.pipe.unet
        self.calls: list[tuple[tuple, dict[str, Any], Tensor]] = []
        hook = self.denoiser.register_forward_hook(self._keep, with_kwargs=True)
        self.pictures = self.draw()
        hook.remove()

    def _keep(self, module: nn.Module, arguments: tuple, named: dict[str, Any], output: Sequence[Tensor]) -> None:
        self.calls.append((arguments, named, output[0]))

    def draw(self) -> Tensor:
        """Draw all prompts in one batch: pictures `[prompts, 3, pixels, pixels]` in [0, 1]."""
        return self._drawn(list(itertools.islice(itertools.cycle(PROMPTS), self.case.prompts)), 0)

    def _drawn(self, prompts: list[str], first_seed: int) -> Tensor:
        seeds = [torch.Generator().manual_seed(first_seed + i) for i in range(len(prompts))]
        size = dict(height=self.case.pixels, width=self.case.pixels, num_inference_steps=self.case.steps)
        return self.pipe(prompts, generator=seeds, output_type="pt", **size).images.float()

    def measure(self, contender: Contender) -> dict[str, float]:
        """Compare the converted teacher with the dense one.

        Returns:
            `kd_error`, the squared error of the prediction over the square of the teacher's, in the mean over the
            teacher's own steps with both of guidance's calls; `psnr_db` of the pictures; `keys`, how many keys a token
            of the finest grid meets, in the mean.
        """
        conversion = contender.put_into(self.pipe, min_tokens=MIN_TOKENS)
        try:
            if contender.calibrated:
                with calibrating(self.pipe):
                    self._drawn(list(CALIBRATION), 1000)
            errors = []
            with torch.no_grad():
                for arguments, named, dense in self.calls:
                    output = self.denoiser(*arguments, **named)[0]
                    errors.append(((output - dense).square().sum() / dense.square().sum()).item())
            error = (self.draw() - self.pictures).square().mean((1, 2, 3)).clamp(min=1e-10)
            keys = keys_met(conversion)
        finally:
            conversion.revert()
        return dict(kd_error=sum(errors) / len(errors), psnr_db=(-10 * error.log10()).mean().item(), keys=keys)
