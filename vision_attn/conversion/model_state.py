"""What a converted model as a whole remembers, the beginning and the end of its forwards, and how to give it back."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vision_attn.conversion.rerouting import is_rerouted, restore, state_of
from vision_attn.conversion.state import Shared
from vision_attn.conversion.watching import forget_input, remove_hooks, unwatch
from vision_attn.hosts.host import Host

_STATE = "_vision_attn_model"


@dataclass(frozen=True)
class Fingerprint:
    """Tells whether a parameter was written to: its version, and up to 1024 of its values, spread evenly.

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
        host: The model's family.
        fingerprints: Of each parameter at conversion, to tell later which were trained.
        originals: Parameters whose data `load` replaced, with that data, to put back on revert.
    """

    shared: Shared
    host: Host
    fingerprints: dict[str, Fingerprint]
    originals: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def changed(self, model: nn.Module) -> set[str]:
        """Return the names of the model's own parameters that were written to or replaced since conversion."""
        replaced = {id(parameter) for parameter, _ in self.originals}
        names = {plain(name): parameter for name, parameter in model.named_parameters()}
        known = {plain(name): print_ for name, print_ in self.fingerprints.items() if not is_lora(name)}
        written = {name for name, print_ in known.items() if name in names and print_.differs(names[name])}
        return written | {name for name, parameter in names.items() if id(parameter) in replaced}


def plain(name: str) -> str:
    """Return the name that a parameter has in a model without LoRA."""
    return name.replace(".base_layer.", ".")


def is_lora(name: str) -> bool:
    """Whether a parameter is one of LoRA, which has files of its own."""
    return ".lora_" in name


def is_converted(model: nn.Module) -> bool:
    """Whether a model was converted and not reverted."""
    return _STATE in vars(model)


def model_state(model: nn.Module) -> ModelState:
    """Return the state of a converted model."""
    return vars(model)[_STATE]


def mark(model: nn.Module, shared: Shared, host: Host) -> None:
    """Make a model a converted one and watch its forward passes."""
    fingerprints = {name: Fingerprint.of(parameter) for name, parameter in model.named_parameters()}
    setattr(model, _STATE, ModelState(shared, host, fingerprints))
    model.register_forward_pre_hook(_begin, with_kwargs=True)
    model.register_forward_hook(_end)


def undo(model: nn.Module) -> None:
    """Give a converted model back as it was.

    Raises:
        ValueError: If LoRA layers are fused into weights that `load` replaced.
    """
    state = model_state(model)
    replaced = {id(tensor) for tensor, _ in state.originals}
    for name, module in model.named_modules():
        if getattr(module, "merged", False) is True and any(id(p) in replaced for p in module.parameters()):
            raise ValueError(f"LoRA is fused into {name}, whose weights would be put back: call unfuse_lora() first")
    for module in list(model.modules()):
        if is_rerouted(module):
            for name, value in state_of(module).replaced.items():
                setattr(module, name, value)
            restore(module)
        unwatch(module)
        forget_input(module)
    for hook in (_begin, _end):
        remove_hooks(model, hook)
    for tensor, original in state.originals:
        tensor.data = original.to(tensor.device, tensor.dtype)
    delattr(model, _STATE)


def _begin(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward of the whole model begins."""
    state = model_state(model)
    shared, host = state.shared, state.host
    if torch.compiler.is_compiling():
        if shared.thresholds:
            raise RuntimeError("torch.compile cannot read the timestep of a schedule: compile the blocks only")
        return
    shared.ran = shared.rerouted = 0
    if not (shared.thresholds or host.finest):
        return
    inputs = {**dict(zip(list(inspect.signature(type(model).forward).parameters)[1:], args, strict=False)), **kwargs}
    if host.finest:
        height, width = inputs[host.finest].shape[-2:]
        shared.finest = height * width
    if shared.thresholds:
        shared.progress = _passed(shared.thresholds, host, inputs)


def _passed(thresholds: tuple[float, ...], host: Host, inputs: Mapping[str, Any]) -> float | None:
    """Return the last threshold that the denoising has passed: few values, for compiled blocks depend on it."""
    time = inputs.get(host.timestep.argument) if host.timestep is not None else None
    if time is None or host.timestep is None:
        return None
    _, noise, image = host.timestep
    value = float(time.flatten()[0]) if isinstance(time, Tensor) else float(time)
    progress = (value - noise) / (image - noise)
    return max((t for t in thresholds if t <= progress + 1e-6), default=0.0)


def _end(model: nn.Module, args: Any, output: Any) -> None:
    """Refuse a forward in which layers ran and none of them was rerouted."""
    if torch.compiler.is_compiling():
        return
    shared = model_state(model).shared
    if shared.ran and not shared.rerouted and not shared.bypassed:
        states = [state_of(module) for module in model.modules() if is_rerouted(module)]
        reasons = sorted({state.status for state in states})
        raise RuntimeError(
            f"none of the {len(states)} converted layers of this {type(model).__name__} was rerouted: "
            f"{'; '.join(reasons)}. Give a grid that cannot be read with use_grid(), or revert() the conversion"
        )
