"""What a converted model as a whole remembers, the check of its forward passes, and how to give it back."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vision_attn.intercept import is_rerouted, remove_hooks, restore, state_of, unwatch
from vision_attn.layer_state import Shared

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
        fingerprints: Of each parameter at conversion, to tell later which were trained.
        originals: Parameters whose data `load` replaced, with that data, to put back on revert.
    """

    shared: Shared
    fingerprints: dict[str, Fingerprint]
    originals: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def changed(self, model: nn.Module) -> set[str]:
        """Return the names of the model's own parameters that were written to or replaced since conversion."""
        replaced = {id(parameter) for parameter, _ in self.originals}
        names = dict(model.named_parameters())
        written = {name for name, print_ in self.fingerprints.items() if name in names and print_.differs(names[name])}
        return written | {name for name, parameter in names.items() if id(parameter) in replaced}


def is_converted(model: nn.Module) -> bool:
    """Whether a model was converted and not reverted."""
    return _STATE in vars(model)


def model_state(model: nn.Module) -> ModelState:
    """Return the state of a converted model."""
    return vars(model)[_STATE]


def mark(model: nn.Module, shared: Shared) -> None:
    """Make a model a converted one and watch its forward passes."""
    fingerprints = {name: Fingerprint.of(parameter) for name, parameter in model.named_parameters()}
    setattr(model, _STATE, ModelState(shared, fingerprints))
    model.register_forward_pre_hook(_begin)
    model.register_forward_hook(_end)


def undo(model: nn.Module) -> None:
    """Give a converted model back as it was."""
    state = model_state(model)
    for module in list(model.modules()):
        if is_rerouted(module):
            for name, value in state_of(module).replaced.items():
                setattr(module, name, value)
            restore(module)
        unwatch(module)
    for hook in (_begin, _end):
        remove_hooks(model, hook)
    for tensor, original in state.originals:
        tensor.data = original
    delattr(model, _STATE)


def _begin(model: nn.Module, args: Any) -> None:
    """A forward of the whole model begins."""
    if not torch.compiler.is_compiling():
        shared = model_state(model).shared
        shared.ran = shared.rerouted = 0


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
