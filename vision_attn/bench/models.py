"""Whole image classifiers: some models at one image size and batch, built, warmed up and timed beside each other.

A model of ours has a dense twin: the same with softmax attention over all cells where its attention is local or linear.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vision_attn.bench.candidate import AbsentError, reason_of
from vision_attn.bench.overview import Must, add_speedups, judge
from vision_attn.bench.timing import Launch, interleave, own_stream, peak_memory
from vision_attn.conversion.conversion import convert
from vision_attn.kernels.dense import dense_attention
from vision_attn.processors import Clear, Multipole

EAGER, COMPILED = "eager", "compiled"
GRAPH = " graph"  # after a mode: replayed from a CUDA graph, so that the host's time is not counted
MODES = (EAGER, COMPILED, EAGER + GRAPH, COMPILED + GRAPH)
_TWIN = " dense twin"
CONVERTED = {" multipole": Multipole(), " clear r16": Clear(radius=16)}  # after a model's name: how it attends


@dataclass(frozen=True)
class Entrant:
    """A model run one way: a candidate.

    Args:
        model: A name of timm's registry; with ' dense twin' after it, see `make_dense`, and with a name of `CONVERTED`
            after it, converted.
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
        batch: Images per forward.
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

        converted = next((name for name in CONVERTED if model.endswith(name)), "")
        name = model.removesuffix(converted).removesuffix(_TWIN)
        sized = dict(img_size=self.size) if name.startswith("swin") else {}  # its masks fit one size
        with torch.device(device):
            built = timm.create_model(name, **sized)
            if not sized and hasattr(built, "set_input_size"):
                built.set_input_size(self.size)  # dilations, as the authors choose them
            if model.endswith(_TWIN):
                make_dense(built)
        for module in built.modules():
            if isinstance(module, nn.Conv2d):  # what else has four axes are tables
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        built = built.eval().to(device, getattr(torch, self.dtype))
        if converted:
            convert(built, CONVERTED[converted])
        return built


def model_row(case: ModelCase, device: torch.device, *, rounds: int = 4, chosen: tuple[str, ...] = ()) -> dict:
    """Measure one case.

    Args:
        case: What to measure.
        device: Where.
        rounds: Turns of each candidate, see `interleave`.
        chosen: Names of the candidates that take part, all if empty.

    Returns:
        A row of `document.py`'s schema.
    """
    torch.compiler.reset()  # code that was compiled for another size is not needed any more
    entrants = [e for e in case.entrants if not chosen or e.name in chosen]
    results, launches, built = [], {}, {}
    with own_stream(device), torch.backends.cudnn.flags(enabled=True, benchmark=True), torch.no_grad():
        images = case.images(device)
        for entrant in entrants:
            result: dict[str, Any] = dict(name=entrant.name, computes=entrant.model, reason=None, forward=None)
            start = time.perf_counter()
            try:
                if entrant.model not in built:
                    built[entrant.model] = case.build(entrant.model, device)
                launches[entrant.name], result["forward"] = _ready(entrant, built[entrant.model], images, device)
            except Exception as error:  # a model may fail in any way: that is a result, and the others go on
                result["reason"] = reason_of(error)
            results.append(result | dict(ready_s=time.perf_counter() - start))
        timings = interleave(launches, rounds=rounds)
    for result in results:
        if timing := timings.get(result["name"]):
            result["forward"] |= asdict(timing)
            result["forward"]["images_per_s"] = 1e3 * result["forward"]["batch"] / timing.median_ms
    for mode in MODES:
        add_speedups([r for r in results if r["name"].endswith(mode)], [f"{case.reference} {mode}"])
    head = dict(case=case.name, label=case.label, group=case.group, shape=case.shape(), subject=None)
    return dict(**head, candidates=results, musts=judge(case.musts, results))


def _ready(entrant: Entrant, model: nn.Module, images: Tensor, device: torch.device) -> tuple[Launch, dict[str, Any]]:
    """Return what will be timed, and its batch and memory; the batch is halved until it fits."""
    run: Callable[[Tensor], Tensor] = model
    graph = entrant.mode.endswith(GRAPH)
    if device.type != "cuda" and (graph or entrant.mode == COMPILED):
        raise AbsentError("compiled and captured for CUDA only")
    if entrant.mode.startswith(COMPILED):
        run = torch.compile(model, dynamic=False)
    while True:
        try:
            call = _Forward(run, images)
            launch = Launch(call, device, graph=graph)
            if graph and launch.kind != "graph":
                raise AbsentError("it cannot be captured in a CUDA graph")
            memory = peak_memory(call, device)
        except torch.OutOfMemoryError:
            if len(images) < 2:
                raise
        else:
            return launch, dict(batch=len(images), memory=memory)
        images = images[: len(images) // 2]
        if device.type == "cuda":
            torch.cuda.empty_cache()


class _Forward:
    """A forward without arguments."""

    def __init__(self, run: Callable[[Tensor], Tensor], images: Tensor) -> None:
        self._run, self._images = run, images

    def __call__(self) -> None:
        # models share the code of `forward`, and each of them is compiled
        with torch._dynamo.config.patch(recompile_limit=256):
            self._run(self._images)


class DenseSelfAttention(nn.Module):
    """Softmax attention of a map `[B, height, width, C]` over all of its cells, without position bias."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the shape of `x`."""
        q, k, v = self.qkv(x.flatten(1, 2)).unflatten(2, (3, self.num_heads, -1)).unbind(2)
        return self.proj(dense_attention(q, k, v).flatten(2).unflatten(1, x.shape[1:3]))


def make_dense(model: nn.Module) -> nn.Module:
    """Replace a backbone's local and linear attention by dense softmax attention, in place.

    RALA's layers have softmax attention of their own, which they switch to. Windows of the last stages of Agent-Swin
    and InLine-Swin stay.

    Raises:
        ValueError: If there is nothing to replace.
    """
    from vision_attn.backbones.agent.attention import AgentSelfAttention  # noqa: PLC0415, a table needs no timm
    from vision_attn.backbones.inline.attention import InLineSelfAttention  # noqa: PLC0415
    from vision_attn.backbones.litv2.attention import HiLoSelfAttention  # noqa: PLC0415
    from vision_attn.backbones.nat.attention import NeighborhoodAttention  # noqa: PLC0415
    from vision_attn.backbones.ravlt.attention import RALASelfAttention  # noqa: PLC0415

    changed = 0
    module: Any
    for module in model.modules():
        attn = getattr(module, "attn", None)
        if isinstance(attn, RALASelfAttention):
            attn.linear = False
        elif isinstance(attn, (NeighborhoodAttention, AgentSelfAttention, InLineSelfAttention)):
            module.attn = DenseSelfAttention(attn.proj.in_features, attn.num_heads)
        elif isinstance(attn, HiLoSelfAttention):
            module.attn = DenseSelfAttention(module.norm1.normalized_shape[0], attn.low + attn.high)
        else:
            continue
        changed += 1
    if not changed:
        raise ValueError(f"{type(model).__name__} has no local or linear attention to replace")
    return model
