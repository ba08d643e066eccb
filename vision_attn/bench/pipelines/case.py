"""One row of the pipelines' benchmark: a denoiser at one size, attending in several ways, eager or compiled."""

from dataclasses import dataclass
from typing import Any

import torch

from vision_attn.bench.musts import Must
from vision_attn.bench.pipelines.architectures import ARCHITECTURES, Architecture
from vision_attn.grid import Grid


@dataclass(frozen=True)
class PipelineCase:
    """Steps of one denoiser, batch 1.

    Args:
        architecture: Its name.
        pixels: Side of the square image.
        ways: Names of the candidates, see `attention.py`.
        compiled: Whether the repeated blocks are compiled.
        musts: What must hold.
        small: Whether the twin for a CPU runs, in float32.
    """

    architecture: str
    pixels: int
    ways: tuple[str, ...]
    compiled: bool = False
    musts: tuple[Must, ...] = ()
    small: bool = False

    @property
    def name(self) -> str:
        """As in 'flux-8192', 'flux-8192-compiled'."""
        return f"{self.architecture}-{self.pixels}{'-compiled' * self.compiled}"

    @property
    def model(self) -> Architecture:
        """The architecture, or its twin."""
        whole = ARCHITECTURES[self.architecture]
        return whole.twin() if self.small else whole

    @property
    def group(self) -> str:
        """The table it belongs to."""
        return self.model.title

    @property
    def grid(self) -> Grid:
        """The tokens of the finest attention."""
        side = self.pixels // self.model.patch
        return Grid(side, side, prefix=512 if self.architecture == "flux" else 0)

    @property
    def label(self) -> str:
        """As in '4096 px, 65536 tokens, eager'."""
        native = " (native)" if self.pixels == self.model.native else ""
        return f"{self.pixels} px{native}, {self.grid.image_tokens} tokens, {self.mode}"

    @property
    def mode(self) -> str:
        """How blocks run."""
        return "compiled" if self.compiled else "eager"

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and latents."""
        return torch.float32 if self.small else torch.bfloat16

    def shape(self) -> dict[str, Any]:
        """Return what defines the case, for the JSON."""
        model = self.model
        about = dict(architecture=self.architecture, source=model.source, native=model.native)
        dtype = str(self.dtype).removeprefix("torch.")
        return about | dict(pixels=self.pixels, tokens=self.grid.image_tokens, batch=1, dtype=dtype, mode=self.mode)
