"""What a converted model remembers: of each rerouted layer, of all layers together, and of the host as it was.

All state lives on the host's modules, without closures: copies, pickles and saved models take it along.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vision_attn.conversion.grids import GridContext
from vision_attn.grid import Grid
from vision_attn.hosts.host import Host
from vision_attn.processors.base import AttnSpec

LAYER, _MODEL = "_vision_attn", "_vision_attn_model"  # attributes of a rerouted module, and of its model


@dataclass
class Shared:
    """What all layers of one converted model share.

    Attributes:
        min_tokens: Layers with fewer grid tokens run their own attention.
        bypassed: Whether all layers run their own attention.
        rerouted: Calls in the running forward that processors answered, or that were expected to stay dense.
        ran: All self-attention calls in that forward.
        warned: Whether the log said that a mask keeps a layer dense.
        thresholds: Where the schedules of the layers change, as shares of the denoising.
        progress: The last threshold that the running forward has passed, None if it is not known.
        finest: Tokens of the host's finest grid, None if all grids are equal.
        generator: Draws the random numbers of all layers.
    """

    min_tokens: int = 0
    bypassed: bool = False
    rerouted: int = 0
    ran: int = 0
    warned: bool = False
    thresholds: tuple[float, ...] = ()
    progress: float | None = None
    finest: int | None = None
    generator: torch.Generator | None = None

    def random(self, device: torch.device) -> torch.Generator:
        """Return the generator that all layers share, which starts as a copy of PyTorch's own."""
        if self.generator is None or self.generator.device != device:
            default = (
                torch.get_rng_state() if device.type == "cpu" else getattr(torch, device.type).get_rng_state(device)
            )
            self.generator = torch.Generator(device)
            self.generator.set_state(default)
        return self.generator

    def __getstate__(self) -> dict[str, Any]:
        # a copy made inside bypassed() is not bypassed for ever
        return {**self.__dict__, "bypassed": False, "generator": None}


@dataclass
class LayerState:
    """What a rerouted layer knows.

    Attributes:
        name: Name of the module in its model.
        num_heads: H.
        spec: What its processor was built from.
        context: Where it finds its grid.
        shared: State of the whole conversion.
        mask_means_dense: Whether an attention mask means that the grid lies elsewhere in each sample.
        break_even: Grids of fewer tokens run the host's own attention, which is faster there.
        replaced: Attributes of the module to put back on revert.
        grid: Grid of the last call over the grid.
        status: What became of that call.
        padding: The mask that `rerouting.key_padding` checked last, with its grid and result.
        block_input: Tokens that entered the block, kept until its attention runs.
    """

    name: str
    num_heads: int
    spec: AttnSpec
    context: GridContext
    shared: Shared
    mask_means_dense: bool = False
    break_even: float = 0
    replaced: dict[str, Any] = field(default_factory=dict)
    grid: Grid | None = None
    status: str = "not run yet"
    padding: Any = None
    block_input: torch.Tensor | None = None

    def note(self, grid: Grid | None, status: str, *, expected: bool = False) -> None:
        """Record a call, unless it is being traced; `expected` says that a dense call is not a failure."""
        if torch.compiler.is_compiling():
            return
        self.grid, self.status = grid, status
        self.shared.ran += 1
        self.shared.rerouted += status == "rerouted" or expected

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "padding": None, "block_input": None}


@dataclass(frozen=True)
class Fingerprint:
    """Tells whether a parameter was written to: its version, and at most 2047 of its values, spread evenly.

    The version counts writes, but not those through `.data`; a copy of the model has versions of its own.
    """

    version: int | None
    sample: Tensor | None

    @classmethod
    def of(cls, tensor: Tensor) -> "Fingerprint":
        """Take the fingerprint of a parameter."""
        if tensor.is_meta:
            return cls(None, None)
        flat = tensor.detach().flatten()
        version = None if tensor.is_inference() else tensor._version
        return cls(version, flat[:: max(1, flat.numel() // 1024)].to("cpu", copy=True))

    def differs(self, tensor: Tensor) -> bool:
        """Whether `tensor` was written to since."""
        now = Fingerprint.of(tensor)
        if self.sample is None or now.sample is None:
            return False
        written = self.version is not None and self.version != now.version
        return written or not torch.equal(self.sample.to(now.sample.dtype), now.sample)

    def __getstate__(self) -> dict[str, Any]:
        return {"version": None, "sample": self.sample}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


@dataclass
class ModelState:
    """What a converted model knows.

    Attributes:
        shared: State that the layers share.
        host: How the model's layers and their grids are found.
        fingerprints: Fingerprint of each parameter at conversion, to tell later which were trained.
        originals: The own data of the tensors that `load` replaced, by name, to put back on revert.
    """

    shared: Shared
    host: Host
    fingerprints: dict[str, Fingerprint]
    originals: dict[str, Tensor] = field(default_factory=dict)

    def changed(self, model: nn.Module) -> set[str]:
        """Return the names of the model's own parameters that were written to or replaced since conversion.

        Raises:
            ValueError: If a parameter was offloaded since, so that nobody can tell.
        """
        names = {plain(name): parameter for name, parameter in model.named_parameters()}
        known = {plain(name): print_ for name, print_ in self.fingerprints.items() if not is_lora(name)}
        refuse_offloaded({n: names[n] for n, print_ in known.items() if n in names and print_.sample is not None})
        written = {name for name, print_ in known.items() if name in names and print_.differs(names[name])}
        return written | (self.originals.keys() & names.keys())


def is_rerouted(module: nn.Module) -> bool:
    """Whether `module` answers its attention with a processor."""
    return LAYER in vars(module)


def state_of(module: nn.Module) -> LayerState:
    """Return the state of a rerouted module."""
    return vars(module)[LAYER]


def is_converted(model: nn.Module) -> bool:
    """Whether a model was converted and not reverted."""
    return _MODEL in vars(model)


def model_state(model: nn.Module) -> ModelState:
    """Return the state of a converted model."""
    return vars(model)[_MODEL]


def remember(model: nn.Module, state: ModelState) -> None:
    """Mark a model as converted."""
    setattr(model, _MODEL, state)


def forget(model: nn.Module) -> None:
    """Undo `remember`."""
    delattr(model, _MODEL)


def refuse_offloaded(tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors whose values are not here.

    Raises:
        ValueError: If hooks offloaded one of them, or sharded it.
    """
    for name, tensor in tensors.items():
        if tensor.is_meta or hasattr(tensor, "placements"):
            raise ValueError(
                f"{name} is offloaded or sharded, so its values are not known here: take off the hooks first "
                "(pipe.remove_all_hooks(), accelerate.hooks.remove_hook_from_submodules(model))"
            )


def plain(name: str) -> str:
    """Return the name that a parameter has in a model without LoRA."""
    return name.replace(".base_layer.", ".")


def is_lora(name: str) -> bool:
    """Whether a parameter belongs to a LoRA, which is saved in files of its own."""
    return ".lora_" in name
