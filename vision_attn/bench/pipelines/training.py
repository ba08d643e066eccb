"""Training steps at high resolution: LoRA on a frozen denoiser, with each way to attend, timed and weighed.

A step is forward, backward and update with gradient checkpointing: what lies in memory between forward and backward are
the inputs of the blocks. A long step is extrapolated from three short ones, with one block of each kind and with two of
either kind: time and memory are linear in the numbers of blocks.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_attn.bench.pipelines.architectures import ARCHITECTURES, Architecture
from vision_attn.bench.pipelines.attention import DENSE, Way
from vision_attn.bench.pipelines.steps import figures_of, free, replaced, rerouted, row_of
from vision_attn.bench.timing import Clock, PeakMemory
from vision_attn.grid import Grid

RANK = 16
WHOLE_S = 12.0  # a step that is expected to take longer is extrapolated
# GPUs by their memory as it is sold, and what nvidia-smi shows of it in MiB
CARDS = {24: 24_564, 48: 49_140, 80: 81_559, 141: 143_771}
_CONTEXT = 2**30  # bytes that CUDA and its libraries take
_PROJECTIONS = re.compile(r"\.(to_[qkv]|to_out\.0|to_add_out|add_[qkv]_proj)$")


@dataclass(frozen=True)
class Fits:
    """The step of a candidate fits in a GPU.

    Args:
        subject: Name of the candidate.
        card: The GPU's memory as it is sold, in GB.
    """

    subject: str
    card: int

    def judge(self, candidates: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        """Return the verdict `{text, value, needed, holds}`, or None if the subject took no part on a GPU."""
        found = next((c for c in candidates if c["name"] == self.subject), None)
        memory = ((found or {}).get("forward") or {}).get("memory")
        if found is None or (found["forward"] and memory is None):
            return None
        value = memory and room_of(self.card) / memory["bytes"]
        text = f"the memory of {self.card} GB is at least the peak of {self.subject}"
        return dict(text=text, value=value, needed=1.0, holds=value is not None and value >= 1)


def room_of(card: int) -> int:
    """Return the bytes that a training can have on a GPU of so many GB."""
    return CARDS[card] * 2**20 - _CONTEXT


def smallest_card(size: int) -> int | None:
    """Return the smallest GPU, in GB, that holds a peak in bytes; None if none does."""
    return next((card for card in CARDS if size <= room_of(card)), None)


@dataclass(frozen=True)
class TrainingCase:
    """A training step of FLUX.1-dev with LoRA at one size, batch 1.

    Args:
        pixels: Side of the square image.
        ways: Names of the candidates, see `attention.py`.
        float8: Whether the frozen weights are kept in float8.
        offloaded: Whether the inputs of the blocks wait in the memory of the host.
        musts: What must hold.
        small: Whether to run the twin for a CPU, in float32.
    """

    pixels: int
    ways: tuple[str, ...]
    float8: bool = False
    offloaded: bool = False
    musts: tuple[Any, ...] = ()
    small: bool = False

    @property
    def name(self) -> str:
        """As in 'flux-4096', 'flux-float8-offloaded-8192'."""
        return f"flux{'-float8' * self.float8}{'-offloaded' * self.offloaded}-{self.pixels}"

    @property
    def model(self) -> Architecture:
        """The architecture, or its twin."""
        return ARCHITECTURES["flux"].twin() if self.small else ARCHITECTURES["flux"]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and latents."""
        return torch.float32 if self.small else torch.bfloat16

    @property
    def group(self) -> str:
        """The table."""
        weights = "float8" if self.float8 else str(self.dtype).removeprefix("torch.")
        kept = ", inputs of the blocks in the host's memory" * self.offloaded
        return f"{self.model.title}, frozen weights in {weights}{kept}"

    @property
    def grid(self) -> Grid:
        """The tokens."""
        side = self.pixels // self.model.patch
        return Grid(side, side, prefix=self.model.prefix)

    @property
    def label(self) -> str:
        """As in '4096 px, 65536 tokens'."""
        native = " (native)" * (self.pixels == self.model.native)
        return f"{self.pixels} px{native}, {self.grid.image_tokens} tokens"

    def shape(self) -> dict[str, Any]:
        """Return what defines the case, for the JSON."""
        about = dict(architecture=f"{'float8-' * self.float8}flux", source=self.model.source, pixels=self.pixels)
        about |= dict(tokens=self.grid.image_tokens, batch=1, rank=RANK, checkpointing=True, offloaded=self.offloaded)
        return about | dict(dtype=str(self.dtype).removeprefix("torch."), float8=self.float8)


@dataclass
class Trained:
    """A denoiser with LoRA.

    Attributes:
        model: The denoiser, checkpointing.
        float8: How its frozen weights are kept in float8, in words; None if they are not.
    """

    model: nn.Module
    float8: str | None


_BUILT: dict[tuple[bool, bool, torch.device], Trained] = {}


def build(case: TrainingCase, device: torch.device) -> Trained:
    """Build the model of a case: random frozen weights, LoRA on all projections of attention."""
    model = case.model.build(device, case.dtype)
    add_lora(model, case.dtype)
    kind = in_float8(model) if case.float8 else None
    model.enable_gradient_checkpointing()  # type: ignore[operator]
    return Trained(model.train(), kind)


def add_lora(model: nn.Module, dtype: torch.dtype) -> None:
    """Add trained LoRA layers, in the dtype of the weights, to all projections of attention."""
    from peft import LoraConfig, inject_adapter_in_model  # noqa: PLC0415, optional

    names = [name for name, _ in model.named_modules() if _PROJECTIONS.search(f".{name}")]
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names), model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
        if "lora_B" in name:  # zero in the beginning, when A would have no gradient
            nn.init.normal_(parameter, std=1e-3)


def in_float8(model: nn.Module) -> str:
    """Keep the frozen weights of the linear layers in float8; return how, in words."""

    def chosen(module: nn.Module, name: str) -> bool:
        return type(module) is nn.Linear and "lora_" not in name

    try:
        from torchao import quantization  # noqa: PLC0415, optional

        quantization.quantize_(model, quantization.Float8WeightOnlyConfig(), filter_fn=chosen)
    except ImportError:
        for name, module in list(model.named_modules()):
            if chosen(module, name):
                module.__class__ = CastLinear
                module.weight.data = module.weight.data.to(torch.float8_e4m3fn)
        return "cast to and from float8 layer by layer"
    return "torchao's Float8WeightOnlyConfig"


class CastLinear(nn.Linear):
    """A linear layer whose weight is stored in another dtype than it computes in."""

    def forward(self, input: Tensor) -> Tensor:
        """Multiply with the weight in the dtype of the input."""
        return F.linear(input, self.weight.to(input.dtype), self.bias)


def training_row(
    case: TrainingCase, device: torch.device, *, chosen: Sequence[str] = (), whole_s: float = WHOLE_S
) -> dict[str, Any]:
    """Measure one case.

    Args:
        case: What to measure.
        device: Where.
        chosen: Names of the candidates that take part, all if empty.
        whole_s: A step that is expected to take longer is extrapolated.

    Returns:
        A row of `document.py`'s schema.
    """

    def prepare(about: dict[str, Any]) -> Callable[[Way], dict[str, Any]]:
        key = (case.small, case.float8, device)
        if key not in _BUILT:
            _BUILT.clear()  # one at a time
            free(device)
            _BUILT[key] = build(case, device)
        trained = _BUILT[key]
        arguments = case.model.arguments(case.pixels, device, case.dtype)
        about |= dict(float8=trained.float8, trained=_count(trained.model))
        return lambda way: _measured(way, case, trained.model, arguments, whole_s)

    return row_of(case, device, chosen, prepare)


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _measured(
    way: Way, case: TrainingCase, model: nn.Module, arguments: Mapping[str, Any], whole_s: float
) -> dict[str, Any]:
    """Time the training with one way to attend."""
    device = next(model.parameters()).device
    target = torch.randn_like(arguments["hidden_states"])
    with way.use(model, case.grid, device) as conversion:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4)
        keeping: Callable[[], AbstractContextManager[Any]] = (
            torch.autograd.graph.save_on_cpu if case.offloaded else nullcontext
        )

        def step() -> None:
            with keeping():
                output = model(**arguments)[0]
                loss = F.mse_loss(output.float(), target.float())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        figures = train_steps(step, model, case.model.stacks, device, whole_s, compiles=way.name not in DENSE)
        if conversion is not None:
            figures["layers"] = rerouted(conversion, way.min_tokens, not figures["extrapolated"])
    return figures | dict(launch="cpu" if device.type == "cpu" else "eager")


def train_steps(
    step: Callable[[], object],
    model: nn.Module,
    stacks: Sequence[str],
    device: torch.device,
    whole_s: float,
    *,
    compiles: bool = True,
) -> dict[str, Any]:
    """Time a step, or extrapolate it.

    Args:
        step: One step of the model.
        model: The model.
        stacks: Names of its lists of equal blocks.
        device: Where.
        whole_s: A step that is expected to take longer is extrapolated.
        compiles: Whether the first step compiles kernels, so that its time says nothing.

    Returns:
        Figures of a step in milliseconds, `extrapolated`, and `memory`.
    """
    clock = Clock(device)
    lengths = {name: len(getattr(model, name)) for name in stacks}

    def short(counts: Mapping[str, int], samples: int = 1) -> tuple[float, dict[str, int] | None]:
        with replaced(model, {name: getattr(model, name)[:count] for name, count in counts.items()}):
            watch = PeakMemory(device)
            return min(clock.time(step) for _ in range(samples)), watch.read()

    one = dict.fromkeys(stacks, 1)
    first = short(one)
    if compiles or first[0] < 2e3:
        first = short(one)
    samples = 2 if first[0] < 2e3 else 1
    base, peak = short(one, samples) if samples > 1 else first
    more = {name: short(one | {name: 2}, samples) for name in stacks}
    expected = _linear(base, {name: ms for name, (ms, _) in more.items()}, lengths)
    if expected > 1e3 * whole_s:
        memory = None
        if peak is not None:
            parts = {key: _linear(peak[key], {n: m[key] for n, (_, m) in more.items() if m}, lengths) for key in peak}
            memory = {key: round(value) for key, value in parts.items()}
        return figures_of([expected], memory) | dict(extrapolated=True)
    watch = PeakMemory(device)
    timed = [clock.time(step)]
    timed += [clock.time(step) for _ in range(2 if timed[0] < 2e3 else 0)]
    return figures_of(timed, watch.read()) | dict(extrapolated=False)


def _linear(base: float, more: Mapping[str, float], lengths: Mapping[str, int]) -> float:
    """Return a figure of a whole model from that of one block of each kind, and those with two of one kind."""
    return base + sum((lengths[name] - 1) * (value - base) for name, value in more.items())
