"""What `advise` returns: tables of what a step is made of, what helps and how much, and one line of code."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vision_attn.estimation.cost import Machine
from vision_attn.estimation.model import aligned
from vision_attn.estimation.step import Step
from vision_attn.processors import REGISTRY
from vision_attn.processors.base import AttnSpec

_MATTERS = 1.05  # times faster that a step must become to be worth a line of code; estimates are not much better
_COMPILED_HOST, _COMPILED_OTHER = 0.7, 0.5  # what `torch.compile` of blocks leaves of Python, and of norms and sums
_FP8 = 1.6  # times faster that linear layers are with 8-bit weights and inputs
_CACHED = 2 / 3  # share of the steps that a cache computes, at a threshold that pictures hardly show
_PARTS = {
    "projections": "projections of attention modules",
    "linear": "other linear layers (MLP)",
    "convolutions": "convolutions",
    "other": "norms, activations and the rest",
}


@dataclass(frozen=True)
class Help:
    """Something else that makes a step shorter.

    Attributes:
        name: What it is.
        stock: Estimated seconds of a step with it alone.
        converted: Estimated seconds of a step with it and the recommended processor.
        code: How to get it.
    """

    name: str
    stock: float
    converted: float
    code: str


@dataclass(frozen=True)
class Advice:
    """What helps a model at a size; prints as tables that end in a line of code.

    Attributes:
        title: The model and the size.
        stock: A step of the model as it is.
        rows: Each processor with a step of the model that is converted to it, or None and why it does not fit.
        machine: The rates.
        about: Where the times of the stock model come from: 'measured', or 'estimated' and why.
        pipeline: Whether the model belongs to a pipeline.
        component: How a program names the model.
        cached: Whether the model takes a cache of diffusers.
        eight_bits: Whether the GPU computes with 8-bit floats.
        vae: Seconds that the VAE takes once a picture, None if that was not measured.
    """

    title: str
    stock: Step
    rows: list[tuple[AttnSpec, Step | None, str]]
    machine: Machine
    about: str
    pipeline: bool
    component: str
    cached: bool
    eight_bits: bool
    vae: float | None = None

    @property
    def graphs(self) -> bool:
        """Whether CUDA graphs can help: the host is not the device."""
        return self.machine.host > 0

    def of_pipeline(self, component: str | None) -> "Advice":
        """Return the advice for the pipeline whose denoiser was looked at; None if it is of no pipeline."""
        if component is None:
            return self
        return dataclasses.replace(self, pipeline=True, component=f"pipe.{component}")

    @property
    def attention_share(self) -> float:
        """Share of attention over the grid in a step of the stock model."""
        return self.stock.attention / self.stock.seconds()

    @property
    def best(self) -> tuple[AttnSpec | None, Step, bool]:
        """The processor to convert to, None for none; its step; and whether to replay from CUDA graphs.

        Of the processors those count that need no training. What makes a step less than 5 % shorter is left out.
        """
        chosen: tuple[AttnSpec | None, Step, bool] = None, self.stock, False
        options: list[tuple[AttnSpec | None, Step, bool]] = [(None, self.stock, True)] if self.graphs else []
        for spec, step, _ in self.rows:
            if step is not None and _registration(spec).first:
                options += [(spec, step, graphs) for graphs in (False, True)[: 1 + self.graphs]]
        for option in options:
            if self._seconds(*chosen) > _MATTERS * self._seconds(*option):
                chosen = option
        return chosen

    def _seconds(self, spec: AttnSpec | None, step: Step, graphs: bool) -> float:
        """Return the seconds of a step in which those layers are converted that are faster then."""
        return step.seconds(frozenset() if spec is None else step.faster(graphs=graphs), graphs=graphs)

    @property
    def recommended(self) -> str:
        """One line of code."""
        spec, step, graphs = self.best
        if spec is None and not graphs:
            return "pass  # the model as it is: no conversion makes it faster at this size"
        enable = f"vision_attn.graphs.enable({self._target})"
        if spec is None:
            return f"import vision_attn.graphs; {enable}"
        options = ["only_if_faster=True"] * (step.faster(graphs=graphs) != step.names)
        if self.pipeline:
            options += ["graphs=True"] * graphs
            arguments = ", ".join([f'"{type(spec).__name__.lower()}"', *options])
            return f"import vision_attn.pipelines; pipe.set_attn_processor({arguments})"
        convert = f"vision_attn.convert({', '.join(['model', f'vision_attn.{spec}', *options])})"
        return f"import vision_attn.graphs; {enable}; {convert}" if graphs else f"import vision_attn; {convert}"

    @property
    def _target(self) -> str:
        return "pipe" if self.pipeline else "model"

    @property
    def helps(self) -> list[Help]:
        """What else makes a step shorter, the most effective first."""
        spec, step, _ = self.best
        if spec is None:
            spec, step = next(((spec, step) for spec, step, _ in self.rows if step is not None), (None, self.stock))
        found = []

        def consider(name: str, code: str, change: Callable[[Step], Step], *, graphs: bool = False) -> None:
            alone, both = (self._seconds(s, change(t), graphs) for s, t in ((None, self.stock), (spec, step)))
            found.append(Help(name, alone, both, code))

        if self.graphs:
            code = f"vision_attn.graphs.enable({self._target})"
            consider("CUDA graphs", code, lambda step: step, graphs=True)
            blocks = (
                f"{self.component}.compile_repeated_blocks()" if self.component != "model" else "torch.compile(model)"
            )
            consider("torch.compile of the blocks", blocks, _compiled)
        if self.graphs and self.eight_bits:
            quantize = f"quantize_({self.component}, Float8DynamicActivationFloat8WeightConfig())"
            consider("8-bit weights and inputs, by torchao.quantization", quantize, _in_fp8)
        if self.cached:
            code = f"{self.component}.enable_cache(FirstBlockCacheConfig())"
            stock, both = self.stock.seconds() * _CACHED, self._seconds(spec, step, False) * _CACHED
            found.append(Help("a cache of diffusers; pictures change a little", stock, both, code))
        return sorted(found, key=lambda each: each.stock)

    def __str__(self) -> str:
        stock, whole = self.stock, self.stock.seconds()
        rates = "measured rates of this GPU" if self.machine.source == "measured" else f"the {self.machine.source}"
        start = "the step of the model is measured, the rest is estimated"
        source = start if self.about == "measured" else f"all times are {self.about}"
        lines = [f"{self.title}, on {self.machine.name}: {source}, with {rates}", ""]
        cells = [("a step of the model as it is", "ms", "share")]
        parts = {"attention over the grid": stock.attention}
        parts |= {text: value for part, text in _PARTS.items() if (value := getattr(stock, part))}
        cells += [(name, _ms(value), f"{value / whole:.0%}") for name, value in parts.items()]
        if stock.host:
            cells.append(("the GPU in all", _ms(stock.device), f"{stock.device / whole:.0%}"))
            cells.append(("the host, at the same time (Python)", _ms(stock.host), f"{stock.host / whole:.0%}"))
        cells.append(("a step", _ms(whole), ""))
        if self.vae is not None:
            cells.append(("the VAE, once a picture", _ms(self.vae), ""))
        lines += [aligned(cells), "", aligned(self._processors())]
        lines += [f"{spec} does not fit: {why}" for spec, step, why in self.rows if step is None]
        if self.helps:
            lines += ["", aligned(self._others())]
        return "\n".join([*lines, "", *self._conclusion(), self.recommended])

    def _processors(self) -> list[tuple[str, ...]]:
        """Return the table of processors, with all layers converted."""
        head = [
            "processor",
            "step, ms",
            "gain",
            *["gain in graphs"] * self.graphs,
            "then most of a step is",
            "untrained",
        ]
        cells = [tuple(head)]
        whole = self.stock.seconds()
        for spec, step, _ in self.rows:
            if step is None:
                continue
            every = step.names
            gain = [f"{whole / step.seconds(every):.2f}x"]
            gain += [f"{whole / step.seconds(every, graphs=True):.2f}x"] * self.graphs
            cells.append((str(spec), _ms(step.seconds(every)), *gain, _limit(step), _untrained(spec)))
        return cells

    def _others(self) -> list[tuple[str, ...]]:
        """Return the table of what else helps."""
        whole, named = self.stock.seconds(), self.best[0]
        if named is None:
            named = next((spec for spec, step, _ in self.rows if step is not None), None)
        cells: list[tuple[str, ...]] = [("what else helps (estimated)", "gain", f"with {named}", "how")]
        for each in self.helps:
            cells.append((each.name, f"{whole / each.stock:.2f}x", f"{whole / each.converted:.2f}x", each.code))
        return cells

    def _conclusion(self) -> list[str]:
        spec, step, graphs = self.best
        share = f"Attention over the grid is {self.attention_share:.0%} of a step."
        if spec is None and not graphs:
            return [f"{share} Stock is best at this size: no processor that works untrained makes a step 5 % shorter."]
        gain = f"{self.stock.seconds() / self._seconds(spec, step, graphs):.2f}x"
        if spec is None:
            return [f"{share} Stock attention is best at this size; CUDA graphs make a step {gain} as fast:"]
        some = "" if step.faster(graphs=graphs) == step.names else ", where it is faster,"
        makes = " and CUDA graphs make" if graphs else " makes"
        return [f"{share} {spec}{some}{makes} a step {gain} as fast, without training:"]


def _registration(spec: AttnSpec) -> Any:
    return REGISTRY[type(spec).__name__.lower()]


def _untrained(spec: AttnSpec) -> str:
    """Say in a word or two what an untrained model draws."""
    known = _registration(spec)
    return "near the model" if known.first else "loses detail" if known.draws_untrained else "needs training"


def _limit(step: Step) -> str:
    """Say what takes most of a converted step."""
    every = step.names
    device, host = step.device_with(every), step.host_with(every)
    if host >= device:
        return "Python"
    parts = {text: getattr(step, part) for part, text in _PARTS.items()}
    name, value = max({**parts, "attention": device - sum(parts.values())}.items(), key=lambda part: part[1])
    return f"{name}, {value / device:.0%}"


def _compiled(step: Step) -> Step:
    layers = tuple(dataclasses.replace(layer, host=_COMPILED_HOST * layer.host) for layer in step.layers)
    return dataclasses.replace(step, layers=layers, host=_COMPILED_HOST * step.host, other=_COMPILED_OTHER * step.other)


def _in_fp8(step: Step) -> Step:
    return dataclasses.replace(step, linear=step.linear / _FP8, projections=step.projections / _FP8)


def _ms(value: float) -> str:
    return f"{value * 1e3:.3g}" if value < 0.1 else f"{value * 1e3:.0f}"
