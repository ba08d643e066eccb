"""What a converted model remembers: of each rerouted layer, of all layers together, and of the host as it was.

All state lives on the host's modules, without closures: copies, pickles and saved models take it along.
"""

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vision_attn.adapters.adapter import Adapter
from vision_attn.conversion.grids import AwaitingBackward, GridContext, backward_running
from vision_attn.grid import Grid, largest
from vision_attn.hosts.host import Found, Host
from vision_attn.kernels.tapes import Tapes
from vision_attn.processors.base import CHILD, AttnSpec, Processor

MASKED = "dense: the attention mask says that the grid lies elsewhere in each sample"
ADDED = "dense: the attention mask is added to the logits; a bool mask would hide padding"
LAYER, _MODEL = "_vision_attn", "_vision_attn_model"  # attributes of a rerouted module, and of its model


class _Here(threading.local):
    """What one thread's forward of a converted model knows.

    Attributes:
        running: Whether a forward of the whole model is running.
        rerouted: Calls in the running forward that processors answered, or that were expected to stay dense.
        ran: All self-attention calls in that forward.
        moment: The last threshold that the running forward has passed, None if it is not known; and the tokens of the
            host's finest grid, None if all grids are equal. None before the first forward of this thread.
        generator: Draws the random numbers of all layers.
    """

    running = False
    rerouted = 0
    ran = 0
    moment: tuple[float | None, int | None] | None = None
    generator: torch.Generator | None = None


@dataclass
class Shared:
    """What all layers of one converted model share.

    Attributes:
        min_tokens: Layers with fewer grid tokens run their own attention.
        bypassed: Whether all layers run their own attention.
        warned: Whether the log said that a mask keeps a layer dense.
        padding: The mask that `key_padding` checked last, with its grid and result: a model gives its layers one mask.
        thresholds: Where the schedules of the layers change, as shares of the denoising.
        awaiting: What forwards knew of the denoising whose backward is still to come.
        here: What the forward of this thread knows.
        moment: As in `here`, of the forward that began last in any thread, for compiled layers.
        generator: As in `here`, for compiled layers.
        traced: Whether a compiled forward of the whole model is running. Parts of it may run uncompiled.
    """

    min_tokens: int = 0
    bypassed: bool = False
    warned: bool = False
    padding: Any = None
    thresholds: tuple[float, ...] = ()
    awaiting: AwaitingBackward = field(default_factory=AwaitingBackward)
    here: _Here = field(default_factory=_Here)
    moment: tuple[float | None, int | None] = (None, None)
    generator: torch.Generator | None = None
    traced: bool = False

    @property
    def running(self) -> bool:
        """Whether a forward of the whole model is running, in this thread or compiled."""
        return self.here.running or self.traced

    def random(self, device: torch.device) -> torch.Generator:
        """Return the generator that all layers share in this thread, which starts as a copy of PyTorch's own."""
        place: Any = self if torch.compiler.is_compiling() else self.here
        if place.generator is None or place.generator.device != device:
            default = (
                torch.get_rng_state() if device.type == "cpu" else getattr(torch, device.type).get_rng_state(device)
            )
            place.generator = torch.Generator(device)
            place.generator.set_state(default)
        generator: torch.Generator = place.generator
        return generator

    def seed(self) -> None:
        """Let the generator begin again as a copy of PyTorch's."""
        self.generator = self.here.generator = None

    def __getstate__(self) -> dict[str, Any]:
        # a copy made inside bypassed() is not bypassed for ever
        return {**self.__dict__, "bypassed": False, "generator": None, "here": None, "padding": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, here=_Here())


Decision = tuple[Grid | tuple[Grid, ...] | None, Grid | tuple[Grid, ...] | None, str]
"""The grid to answer over, or that of each sample; the one that is known; and why they differ."""


class _Block(threading.local):
    """What one thread's block handed to a layer: the tokens that entered the block, kept until its attention runs."""

    input: Tensor | None = None


@dataclass
class LayerState:
    """What a rerouted layer knows.

    Attributes:
        name: Name of the module in its model.
        num_heads: H.
        spec: What its processor was built from.
        context: Where it finds its grid.
        shared: State of the whole conversion.
        host: How its model's grids and masks are to be read.
        break_even: Grids of fewer tokens run the host's own attention, which is faster there.
        replaced: Attributes of the module to put back on revert.
        grid: Grid of the last call over the grid.
        status: What became of that call.
        decisions: What becomes of a call, by the grid that was found and the call's shapes.
        tapes: The launches of the processor's calls.
        looks: What became of calls by how they looked: see `repeats.py`.
        block: The tokens that entered the block, in this thread.
        block_input: The same in any thread, for blocks and layers of which one is compiled.
        imported: Whether the host calls attention by a name that it imported, so that a mode must look for it; None if
            that is not known.
        quiet: The last forward, if the host answered its calls: see `quiet.py`.
    """

    name: str
    num_heads: int
    spec: AttnSpec
    context: GridContext
    shared: Shared
    host: Host
    break_even: float = 0
    replaced: dict[str, Any] = field(default_factory=dict)
    grid: Grid | None = None
    status: str = "not run yet"
    decisions: dict[Any, Any] = field(default_factory=dict)
    tapes: Tapes = field(default_factory=Tapes)
    looks: dict[Any, Any] = field(default_factory=dict)
    block: _Block = field(default_factory=_Block)
    block_input: torch.Tensor | None = None
    imported: bool | None = None
    quiet: Any = None

    def hand_over(self, tokens: Tensor | None) -> None:
        """Keep the tokens that enter the block of the layer; None forgets them."""
        self.block_input = tokens
        if not torch.compiler.is_compiling():
            self.block.input = tokens

    def take_over(self) -> Tensor | None:
        """Return the tokens that entered the block, once. Of block and layer one may be compiled alone."""
        own = None if torch.compiler.is_compiling() else self.block.input
        tokens = self.block_input if own is None else own
        self.hand_over(None)
        return tokens

    def note(self, grid: Grid | None, status: str, *, expected: bool = False) -> None:
        """Record a call, unless it is being traced; `expected` says that a dense call is not a failure."""
        if torch.compiler.is_compiling():
            return
        self.grid, self.status = grid, status
        here = self.shared.here
        here.ran += 1
        here.rerouted += status == "rerouted" or expected

    def dense_reason(self, found: Found, masked: bool) -> str | None:
        """Return why the layer runs the host's own attention over what its context found; None if it is rerouted.

        Args:
            found: A grid, or one for each sample, or the reason for none.
            masked: Whether there is an attention mask that keeps the layer dense.
        """
        if isinstance(found, str):
            return f"dense: {found}"
        if masked:
            return ADDED if self.host.mask_means_dense == "added" else MASKED
        found = largest(found)
        if found.image_tokens < self.shared.min_tokens:
            return f"dense: {found.image_tokens} tokens are below min_tokens={self.shared.min_tokens}"
        if found.image_tokens < self.break_even:
            least = "never faster" if self.break_even == math.inf else f"faster from {self.break_even:.0f} tokens on"
            return f"dense: {self.spec} is {least}, and there are {found.image_tokens}"
        return None

    def decision(self, found: Found, masked: bool) -> Decision:
        """Return the grid to answer over, None to let a call through; the grid that is known; and why it goes through.

        The arguments are those of `dense_reason`.
        """
        reason = self.dense_reason(found, masked)
        placed = None if isinstance(found, str) else found
        return placed if reason is None else None, placed, reason or ""

    def adds_residuals(self, masked: bool) -> bool:
        """Whether the projections of the forward that begins get what the processor adds to their input.

        Args:
            masked: As for `dense_reason`.
        """
        context, name = self.context, (self.name, "residuals")
        if torch.compiler.is_compiling():
            return self.dense_reason(context.known(), masked) is None
        running = self.shared.running
        if backward_running() != -1 and not running:
            recalled: bool = context.awaiting.recall(name, "with and without residual networks")
            return recalled
        adds = self.dense_reason(context.known(running), masked) is None
        if context.here.gradients:
            context.awaiting.remember(name, adds)
        return adds

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "block_input": None, "block": None, "decisions": {}, "looks": {}, "quiet": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, block=_Block())


@dataclass(frozen=True)
class Fingerprint:
    """Tells whether a parameter was written to: its version, and at most 2047 of its values, spread evenly.

    The version counts writes, but not those through `.data`; a copy of the model has versions of its own. Quantised
    weights do not learn, and libraries pack them anew when they first run, so they have no fingerprint.
    """

    version: int | None
    sample: Tensor | None
    quantised: bool = False

    @classmethod
    def of(cls, tensor: Tensor) -> "Fingerprint":
        """Take the fingerprint of a parameter."""
        quantised = is_quantised(tensor)
        if tensor.is_meta or quantised:
            return cls(None, None, quantised)
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
        return {"version": None, "sample": self.sample, "quantised": self.quantised}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def is_quantised(tensor: Tensor) -> bool:
    """Whether a parameter holds codes of weights: integers, or a class of tensors that a library has for them."""
    plain = type(tensor) in (nn.Parameter, Tensor) or hasattr(tensor, "placements")  # which a shard has
    return not (plain and tensor.is_floating_point())


def computing_dtype(module: nn.Module) -> torch.dtype | None:
    """Return the dtype in which a module computes, as its first layer that is not quantised tells; None if all are."""
    for part in module.modules():
        casting = getattr(getattr(part, "_diffusers_hook", None), "hooks", {}).get("layerwise_casting")
        if casting is not None:
            dtype: torch.dtype = casting.compute_dtype
            return dtype
        for parameter in part.parameters(recurse=False):
            if not is_quantised(parameter) and parameter.itemsize >= 2:
                return parameter.dtype
    return None


@dataclass
class ModelState:
    """What a converted model knows.

    Attributes:
        shared: State that the layers share.
        host: How the model's layers and their grids are found.
        names: The names of the arguments of its forward, in order.
        fingerprints: Fingerprint of each parameter at conversion, to tell later which were trained.
        originals: The own data of the tensors that `load` replaced, by name, to put back on revert.
        contexts: Where the layers find their grids.
    """

    shared: Shared
    host: Host
    names: tuple[str, ...]
    fingerprints: dict[str, Fingerprint]
    originals: dict[str, Tensor] = field(default_factory=dict)
    contexts: list[GridContext] = field(default_factory=list)

    def graph_key(self, model: nn.Module) -> tuple[Any, ...]:
        """Return what decides, beside its arguments, what the forward that begins runs: see `vision_attn.graphs`."""
        grids = [(context.fixed, context.known() if context.reads else None) for context in self.contexts]
        return self.shared.bypassed, self.shared.min_tokens, self.shared.here.moment, *grids

    def graph_reason(self, model: nn.Module) -> str | None:
        """Say why a forward cannot be recorded."""
        for name, module in model.named_modules():
            if isinstance(module, Processor) and module.counts_calls:
                return f"{plain(name)} counts calls, which a recording does not"
        return None

    def changed(self, model: nn.Module) -> set[str]:
        """Return the names of the model's own parameters that were written to or replaced since conversion.

        Raises:
            ValueError: If a parameter was offloaded or quantised since, so that nobody can tell.
        """
        added = of_adapters(model)
        names = {plain(name): parameter for name, parameter in model.named_parameters()}
        known = {plain(name): print_ for name, print_ in self.fingerprints.items() if name not in added}
        refuse_offloaded({n: names[n] for n, print_ in known.items() if n in names and print_.sample is not None})
        for name, print_ in known.items():
            if name in names and is_quantised(names[name]) != print_.quantised:
                raise ValueError(
                    f"{name} was {'quantised' if not print_.quantised else 'dequantised'} since the conversion, so "
                    "whether it was trained is not known: save before that, or convert after it"
                )
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
    """Return the name that a parameter has in a model without adapters of peft."""
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def of_adapters(model: nn.Module) -> set[str]:
    """Return the names of the parameters of peft's adapters (LoRA and all others), which have files of their own."""
    names: set[str] = set()
    for name, module in model.named_modules():
        for inner in ("base_layer", "original_module"):
            if inner in module._modules:
                own = f"{name}.{inner}."
                names |= {each for each, _ in module.named_parameters(name) if not each.startswith(own)}
    return names


def adapter_of(model: nn.Module, component: str) -> Adapter:
    """Return what is to be saved of a converted model; adapters of peft have files of their own.

    Raises:
        ValueError: If projections were fused since the conversion, and trained; or if weights are offloaded.
    """
    state = model_state(model)
    _refuse_fused(model, state)
    layers: dict[str | None, AttnSpec] = {s.name: s.spec for s in map(state_of, filter(is_rerouted, model.modules()))}
    changed = state.changed(model)
    own = {plain(name): tensor for name, tensor in model.state_dict().items()}
    kept = {name: tensor for name, tensor in own.items() if f".{CHILD}." in name or name in changed}
    refuse_offloaded(kept)
    return Adapter("", component, layers, kept, state.shared.min_tokens, type(model).__name__)


def base_name(model: nn.Module) -> str:
    """Return the name of the model that was converted, '' if it does not say."""
    config: Any = getattr(model, "config", None)
    return getattr(config, "_name_or_path", "") or getattr(model, "pretrained_cfg", {}).get("architecture", "")


def _refuse_fused(model: nn.Module, state: ModelState) -> None:
    """Refuse projections that were fused since the conversion and changed after that."""
    names: dict[str, Tensor] = {plain(name): parameter for name, parameter in model.named_parameters()}
    known = {plain(name) for name in state.fingerprints}
    for name, parameter in names.items():
        layer, _, rest = name.rpartition(".to_")
        role, _, kind = rest.partition(".")
        if name in known or role not in _FUSED:
            continue
        parts = [names[f"{layer}.{part}.{kind}"] for part in _FUSED[role] if f"{layer}.{part}.{kind}" in names]
        if not parts or not torch.equal(torch.cat(parts), parameter):
            raise ValueError(
                f"{name} was fused after the conversion and then trained, so it cannot be saved: call "
                "unfuse_qkv_projections() before training, and fuse again afterwards"
            )


_FUSED = {
    "qkv": ("to_q", "to_k", "to_v"),
    "kv": ("to_k", "to_v"),
    "added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
