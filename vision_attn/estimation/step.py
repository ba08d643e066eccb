"""A step of a denoiser at one size: what the device and the host do in it, and which layers a conversion makes faster.

Device and host work at the same time, so a step takes as long as the longer of the two. Each converted layer saves the
device some time and costs the host some: where a step waits for the host, no conversion makes it faster.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from vision_attn.estimation.cost import Machine, host_seconds, seconds
from vision_attn.grid import Grid
from vision_attn.hosts.host import Host, heads_of, input_dim
from vision_attn.processors.base import AttnSpec, Layer
from vision_attn.processors.softmax import Softmax

PARTS = ("projections", "linear", "convolutions", "other")  # of the device's time beside attention over grids
_OPERATIONS = 5.5  # of the host for a module without submodules, with the Python around it
_TOKENS = (*range(4, 64, 4), *range(64, 257, 16), *range(288, 1025, 32))  # sides of the largest grid that are tried
# how often the input and output of a layer go through memory, with norms, activations and sums around it; and how much
# longer than products a convolution takes
_LINEAR_PASSES, _CONVOLUTION_PASSES, _CONVOLUTION = 1.5, 15.0, 2.0


@dataclass(frozen=True)
class Attending:
    """What one layer costs for one sequence, in seconds.

    Attributes:
        name: Name of the layer.
        grid: Its tokens.
        dense: Of the device, for dense attention.
        converted: Of the device, for the processor.
        host: Of the host, for the processor in addition.
    """

    name: str
    grid: Grid
    dense: float
    converted: float
    host: float = 0.0


@dataclass(frozen=True)
class Step:
    """Seconds of one step.

    Attributes:
        layers: All layers that attend over a grid.
        projections: Of the device, in linear layers of attention modules.
        linear: Of the device, in other linear layers, those of MLPs.
        convolutions: Of the device, in convolutions.
        other: Of the device, in everything else: norms, activations, sums.
        host: Of the host, in the model without a conversion; 0 if the host is the device.
    """

    layers: tuple[Attending, ...]
    projections: float
    linear: float
    convolutions: float
    other: float
    host: float

    def __add__(self, step: "Step") -> "Step":
        parts = {name: getattr(self, name) + getattr(step, name) for name in (*PARTS, "host")}
        return Step(self.layers + step.layers, **parts)

    @property
    def attention(self) -> float:
        """Of the device, in dense attention over grids."""
        return sum(layer.dense for layer in self.layers)

    @property
    def device(self) -> float:
        """Of the device, without a conversion."""
        return self.attention + sum(getattr(self, part) for part in PARTS)

    def device_with(self, names: frozenset[str]) -> float:
        """Return the seconds of the device if these layers are converted."""
        return self.device - sum(layer.dense - layer.converted for layer in self.layers if layer.name in names)

    def host_with(self, names: frozenset[str]) -> float:
        """Return the seconds of the host if these layers are converted."""
        return self.host + sum(layer.host for layer in self.layers if layer.name in names)

    def seconds(self, names: frozenset[str] = frozenset(), *, graphs: bool = False) -> float:
        """Return what a step takes.

        Args:
            names: The converted layers.
            graphs: Whether it replays from a CUDA graph, which leaves the host out.
        """
        return max(self.device_with(names), 0.0 if graphs else self.host_with(names))

    @property
    def names(self) -> frozenset[str]:
        """The names of all layers."""
        return frozenset(layer.name for layer in self.layers)

    def faster(self, *, graphs: bool = False) -> frozenset[str]:
        """Return the layers to convert, so that a step takes as little time as it can.

        Layers that are alike are converted together, those that save most for the time of the host first, as long as
        the step becomes shorter.
        """
        alike: dict[tuple[float, float, float], list[str]] = {}
        for layer in self.layers:
            if layer.converted < layer.dense:
                alike.setdefault((layer.dense, layer.converted, layer.host), []).append(layer.name)
        chosen: frozenset[str] = frozenset()
        for _, names in sorted(alike.items(), key=lambda kind: -_worth(*kind[0])):
            more = chosen.union(names)
            if self.seconds(more, graphs=graphs) < self.seconds(chosen, graphs=graphs):
                chosen = more
        return chosen

    def times(self, batch: int) -> "Step":
        """Return the step of a larger batch: the device has more to do, the host has not."""
        layers = (replace(layer, dense=batch * layer.dense, converted=batch * layer.converted) for layer in self.layers)
        device = {part: batch * getattr(self, part) for part in PARTS}
        return replace(self, layers=tuple(layers), **device)


def _worth(dense: float, converted: float, host: float) -> float:
    """Seconds of the device that a layer saves for one of the host."""
    return math.inf if host == 0 else (dense - converted) / host


class Denoiser:
    """What of a model decides how long a step takes; its modules are looked through once.

    Args:
        model: The model, on any device.
        host: How its layers and their grids are found.
        component: Its name among several models, which the names in a step begin with; '' for a model by itself.

    Raises:
        ValueError: If it has no layer over a grid.
    """

    def __init__(self, model: nn.Module, host: Host, component: str = "") -> None:
        self.model, self.host, self.component = model, host, component
        self.names = host.layer_names(model)
        modules = dict(model.named_modules())
        self.layers = {
            name: Layer("", *heads_of(name, modules[name]), dim=input_dim(modules[name])) for name in self.names
        }
        blocks = {name.rpartition(".")[0]: name for name in self.names}
        leaves = [module for module in modules.values() if not module._modules]
        self._leaves = sum(not isinstance(module, nn.Identity) for module in leaves)
        # kind, the module or a layer with as many tokens, weights, channels in and out
        self._products: list[tuple[str, str, int, int]] = []
        for name, module in modules.items():
            kind = part_of(name, modules)
            if isinstance(module, nn.Conv2d):
                channels = module.in_channels + module.out_channels
                self._products.append((kind, name, module.weight.numel(), channels))
            elif isinstance(module, nn.Linear) and "norm" not in name:
                block = next((blocks[outer] for outer in _outer(name) if outer in blocks), None)
                if block is not None:
                    weights = module.in_features * module.out_features  # quantised ones are stored in fewer numbers
                    self._products.append((kind, block, weights, module.in_features + module.out_features))

    def grids(self, size: tuple[int, int]) -> dict[str, Grid]:
        """Return the sequence of each layer for an input of a size, in latents or pixels."""
        return {name: self.host.grid_at(self.model, name, *size) for name in self.names}

    def other_flops(self, size: tuple[int, int]) -> float:
        """Return twice the weights times the tokens, for linear layers in blocks that attend and for convolutions."""
        return sum(2.0 * weights * places for _, weights, _, places in self._at(size))

    def step(self, size: tuple[int, int], specs: Mapping[str, AttnSpec], machine: Machine, itemsize: int) -> Step:
        """Return the step for an input of a size, batch 1.

        Args:
            size: Height and width of the input, in latents or pixels.
            specs: The processor of each converted layer.
            machine: The rates.
            itemsize: Bytes of an element.

        Raises:
            ValueError: If a processor does not fit its grid.
        """
        parts = dict.fromkeys(PARTS, 0.0) | dict(other=self._leaves * _OPERATIONS * machine.launch)
        for kind, weights, channels, places in self._at(size):
            work = 2 * weights * places / machine.products
            moved = channels * places * itemsize / machine.bandwidth
            conv = kind == "convolutions"
            parts[kind] += work * (_CONVOLUTION if conv else 1.0)
            parts["other"] += moved * (_CONVOLUTION_PASSES if conv else _LINEAR_PASSES)
        known: dict[tuple[AttnSpec, Grid, Layer], tuple[float, float]] = {}
        layers = []
        for name, grid in self.grids(size).items():
            layer, spec = self.layers[name], specs.get(name)
            times = []
            for each in (Softmax(), spec or Softmax()):
                key = each, grid, layer
                if key not in known:
                    known[key] = seconds(each, grid, layer, machine, itemsize), host_seconds(each, machine)
                times.append(known[key])
            (dense, _), (converted, host) = times
            full = f"{self.component}.{name}" if self.component else name
            layers.append(Attending(full, grid, dense, converted, host if spec is not None else 0.0))
        return Step(tuple(layers), **parts, host=self._leaves * _OPERATIONS * machine.host)

    def _at(self, size: tuple[int, int]) -> Iterator[tuple[str, int, int, int]]:
        """Yield the kind of each linear layer and convolution, its weights, channels and places."""
        tokens = {name: grid.tokens for name, grid in self.grids(size).items()}
        for kind, name, weights, channels in self._products:
            conv = kind == "convolutions"
            places = self.host.positions(self.model, name, *size) if conv else tokens[name]
            yield kind, weights, channels, places

    def break_even(
        self, specs: Mapping[str, AttnSpec], machine: Machine, itemsize: int, *, graphs: bool = False
    ) -> dict[str, float]:
        """Return for each converted layer the tokens of its grid from which on converting it makes a step faster.

        Sizes are square, batch 1. A layer that is never faster has infinity. If the host does not tell its grid for an
        input, all layers have the same one.
        """
        try:
            sizes = self._sizes()
        except ValueError:
            whole = Denoiser(self.model, replace(self.host, size=_as_given))
            return whole.break_even(specs, machine, itemsize, graphs=graphs)
        found: dict[str, float] = dict.fromkeys(specs, math.inf)
        rising = set(specs)
        for size in reversed(sizes):
            try:
                step = self.step(size, specs, machine, itemsize)
            except ValueError:  # a processor does not fit its grid
                continue
            faster = step.faster(graphs=graphs)
            rising &= faster
            found.update({layer.name: layer.grid.image_tokens for layer in step.layers if layer.name in rising})
            if not rising:
                break
        return found

    def _sizes(self) -> list[tuple[int, int]]:
        """Return square inputs whose largest grids have the sides of `_TOKENS`.

        Raises:
            ValueError: If the host does not tell its grid.
        """
        large = 4096
        unit = max(1, large // max(max(grid.height, grid.width) for grid in self.grids((large, large)).values()))
        return [(side * unit, side * unit) for side in _TOKENS]


def device_of(model: nn.Module) -> torch.device:
    """Return where a model runs, also if a hook of accelerate keeps its weights elsewhere."""
    device = getattr(getattr(model, "_hf_hook", None), "execution_device", None)
    return next(model.parameters()).device if device is None else torch.device(device)


def part_of(name: str, modules: Mapping[str, nn.Module]) -> str:
    """Return to which of `PARTS` the time of a module belongs, given all modules of its model by name."""
    if isinstance(modules[name], nn.Conv2d):
        return "convolutions"
    if not isinstance(modules[name], nn.Linear):
        return "other"
    attends = any(hasattr(modules[outer], sign) for outer in _outer(name) for sign in ("heads", "num_heads"))
    return "projections" if attends else "linear"


def _as_given(model: nn.Module, layer: str, height: int, width: int) -> tuple[int, int]:
    return height, width


def _outer(name: str) -> Iterator[str]:
    """Yield the modules around a module, the innermost first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
