"""One row of the models' benchmark: some classifiers at one image size and batch, eager and compiled."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vision_attn.bench.musts import Must

EAGER, COMPILED = "eager", "compiled"
GRAPH = " graph"  # behind a mode: replayed from a CUDA graph, without the host's part of the time
MODES = (EAGER, COMPILED, EAGER + GRAPH, COMPILED + GRAPH)
_TWIN = " dense twin"


@dataclass(frozen=True)
class Entrant:
    """A model run one way: a candidate.

    Args:
        model: A name of timm's registry; with ' dense twin' after it, see `dense_twin.py`.
        mode: One of MODES.
    """

    model: str
    mode: str

    @property
    def name(self) -> str:
        """As in 'nat_tiny eager'."""
        return f"{self.model} {self.mode}"


def twin_of(model: str) -> str:
    """Return the name of a model's dense twin."""
    return f"{model}{_TWIN}"


@dataclass(frozen=True)
class ModelCase:
    """Forward passes at one image size.

    Args:
        group: The table it belongs to; its first word, in lower case, begins the name.
        size: Side of the square images in pixels.
        batch: Images at once.
        models: Names of timm's registry, dense twins included.
        reference: The model that speed-ups refer to, mode by mode.
        factors: How many times faster than another a model must be, in each mode: (model, other, factor).
        dtype: Name of a torch dtype.
    """

    group: str
    size: int
    batch: int
    models: tuple[str, ...]
    reference: str
    factors: tuple[tuple[str, str, float], ...] = ()
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        """As in 'nat-384'."""
        return f"{self.group.split()[0].strip(',:').lower()}-{self.size}"

    @property
    def label(self) -> str:
        """As in '384 px, batch 128, bfloat16'."""
        return f"{self.size} px, batch {self.batch}, {self.dtype}"

    @property
    def entrants(self) -> list[Entrant]:
        """The candidates: every model in every mode."""
        return [Entrant(model, mode) for model in self.models for mode in MODES]

    @property
    def musts(self) -> list[Must]:
        """The musts of each mode."""
        return [
            Must(f"{model} {mode}", (f"{other} {mode}",), factor)
            for model, other, factor in self.factors for mode in (EAGER, COMPILED)
        ]  # fmt: skip

    def shape(self) -> dict[str, Any]:
        """Return what defines the case, for the JSON."""
        return dict(batch=self.batch, size=self.size, dtype=self.dtype, reference=self.reference)

    def images(self, device: torch.device) -> Tensor:
        """Draw a batch of images."""
        draw = torch.Generator(device).manual_seed(0)
        shape = self.batch, 3, self.size, self.size
        x = torch.randn(shape, generator=draw, device=device, dtype=getattr(torch, self.dtype))
        return x.contiguous(memory_format=torch.channels_last)

    def build(self, model: str, device: torch.device) -> nn.Module:
        """Build a model with random weights for the case's images, in evaluation mode."""
        import vision_attn.backbones  # noqa: PLC0415, F401, I001 - registers with timm, and comes before it
        import timm  # noqa: PLC0415
        from vision_attn.bench.models.dense_twin import make_dense  # noqa: PLC0415

        name = model.removesuffix(_TWIN)
        sized = dict(img_size=self.size) if name.startswith("swin") else {}  # its masks are of one size
        with torch.device(device):
            built = timm.create_model(name, **sized)
            if not sized and hasattr(built, "set_input_size"):
                built.set_input_size(self.size)  # dilations, as the authors choose them
            if name != model:
                make_dense(built)
        for module in built.modules():
            if isinstance(module, nn.Conv2d):  # not the whole: Agent's biases have five axes
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return built.eval().to(device, getattr(torch, self.dtype))
