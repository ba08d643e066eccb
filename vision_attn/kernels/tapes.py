"""Repeats the launches of a call: at usual sizes Python's way to them takes longer than their work on the GPU.

A call of inference is recorded at the second time. If all it does is to ask for memory and to launch kernels of ours,
then calls on tensors of the same layouts launch the same again: on their own memory, but without asking anew what to
launch. A call that does anything else runs as ever. Unlike a CUDA graph this copies nothing, and works inside one.
"""

import math
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _modules
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from vision_attn.kernels.tables import is_fixed, lasting
from vision_attn.kernels.triton.direct import Box, launcher_of

_MOST = 64  # tapes kept of one function: shapes may come from a user's data
_ALIGNMENT = 256  # bytes
_EMPTY = (
    torch.ops.aten.empty.memory_format, torch.ops.aten.new_empty.default, torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default, torch.ops.aten.new_empty_strided.default,
)  # fmt: skip
_ZEROS = torch.ops.aten.new_zeros.default, torch.ops.aten.zeros.default
DEVICES = ("cuda",)  # tests add the CPU of the interpreter


class _Here(threading.local):
    """What listens to the calls of this thread."""

    recorder: "Recorder | None" = None


HERE = _Here()


class _Launches:
    """How often all launches were planned anew, in all threads."""

    changes = 0


def planned() -> int:
    """Return how often all launches were planned anew."""
    return _Launches.changes


def record_anew() -> None:
    """Record all calls anew: launches are planned anew."""
    _Launches.changes += 1


class Tapes(dict[Any, Any]):
    """Tapes of a function by all that its launches depend on: None before the second call, False if there is none.

    They hold addresses, so copies and pickles begin anew, and they hold launches: see `record_anew`.
    """

    changes = 0  # when these were recorded

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Tapes, ()

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], *owners: nn.Module) -> Any:
        """Call `function(*args)`, or repeat its launches.

        Args:
            function: Its result depends on nothing but its arguments, their values that are no tensors, and the
                parameters and buffers of `owners`.
            args: Its arguments; the first is a tensor.
            owners: The modules that `function` runs.
        """
        if not can_repeat(args[0]):
            return function(*args)
        if self.changes != _Launches.changes:
            self.clear()
            self.changes = _Launches.changes
        key = _key(args, owners)
        tape = self.get(key)
        if tape:
            if tape.valid():
                return tape.repeat([a for a in args if isinstance(a, Tensor)])
            self.pop(key, None)
        elif tape is None and is_plain(*owners):
            if key in self:
                result, self[key] = _record(function, args, owners)
                return result
            if len(self) >= _MOST:
                self.clear()
            self[key] = None
        return function(*args)

    def of(self, args: tuple[Any, ...], *owners: nn.Module) -> "Tape | None":
        """Return the tape of a call, if it was recorded."""
        return self.get(_key(args, owners)) or None


def can_repeat(t: Tensor) -> bool:
    """Whether nothing of PyTorch has a part in calls of this moment, and `t` is on the current GPU."""
    return (
        not torch.compiler.is_compiling()
        and t.device.type in DEVICES
        and not torch.is_grad_enabled()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and torch._C._get_tracing_state() is None
        and not torch._C._are_functorch_transforms_active()
        and (t.device.type == "cpu" or t.get_device() == torch._C._cuda_getDevice())
    )


def is_plain(*modules: nn.Module) -> bool:
    """Whether a call of each module is its class's forward and nothing else, and so with the modules that this runs.

    Those do not count that its class names in `apart`.
    """
    if _modules._global_forward_hooks or _modules._global_forward_pre_hooks:
        return False
    found = list(modules)
    for module in found:
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            return False
        if module._modules:
            apart = getattr(type(module), "apart", ())
            found += [part for name, part in module._modules.items() if part is not None and name not in apart]
    return True


def _key(args: tuple[Any, ...], owners: Sequence[nn.Module]) -> Any:
    about = tuple([(owner, owner.training, owner.__dict__.get("changes", 0)) for owner in owners])
    return threading.get_ident(), about, *[layout_of(a) for a in args]


def layout_of(a: Any) -> Any:
    """Return all of an argument that launches depend on, but the address of a tensor."""
    if type(a) is Tensor:
        return a.dtype, a.shape, a.stride(), a.data_ptr() % 16, a.get_device()
    if isinstance(a, Tensor):
        return type(a), a.dtype, a.shape, a.stride(), a.data_ptr() % 16, a.get_device()
    return tuple(a) if isinstance(a, list) else a


class Recorder(TorchDispatchMode):
    """Listens to a call: the memory that it asks for, what it launches, and whether it does anything else.

    Args:
        inputs: The tensors among its arguments.

    Attributes:
        allocated: The tensors that it made, and whether they begin as zeros.
        launches: What it launched: the compiled kernel with its arguments, the grid, the tensors and boxes of them, and
            how to launch it anew.
        other: The first thing that it did besides.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.inputs = inputs
        self.allocated: list[tuple[Tensor, bool]] = []
        self.launches: list[tuple[Any, tuple[int, ...], Sequence[Any], Callable[..., None]]] = []
        self.other: str | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _EMPTY or func in _ZEROS:
            self.allocated.append((result, func in _ZEROS))
        elif not _is_view(func, args, result):
            self.other = self.other or str(func)
        return result

    def __enter__(self) -> "Recorder":
        HERE.recorder = self
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        HERE.recorder = None

    @staticmethod
    def paused() -> AbstractContextManager[Any]:
        """Return a block that is not listened to; the call's GPU is the current one."""
        context: AbstractContextManager[Any] = _disable_current_modes()
        return context

    def launched(
        self, compiled: Any, grid: tuple[int, ...], tensors: Sequence[Any], again: Callable[..., None]
    ) -> None:
        """Note a launch.

        Args:
            compiled: The compiled kernel, its arguments, and which of these are tensors and boxes; None in the
                interpreter.
            grid: Its programs.
            tensors: Its tensors and boxes of tensors, in the order of its arguments.
            again: Launches it on other ones.
        """
        self.launches.append((compiled, grid, tensors, again))


def _is_view(func: Any, args: tuple[Any, ...], result: Any) -> bool:
    """Whether an operator wrote nothing and returned memory of its first argument."""
    results = result if isinstance(result, (tuple, list)) else (result,)
    if func._schema.is_mutable or not args or not isinstance(args[0], Tensor):
        return False
    here = args[0].untyped_storage()._cdata
    return all(isinstance(r, Tensor) and r.untyped_storage()._cdata == here for r in results)


def _record(
    function: Callable[..., Any], args: tuple[Any, ...], owners: Sequence[nn.Module]
) -> tuple[Any, "Tape | bool"]:
    """Return the result of a call and its tape, False if it has none."""
    inputs = [a for a in args if isinstance(a, Tensor)]
    with Recorder(inputs) as heard:
        result = function(*args)
    return result, _tape_of(heard, result, owners) or False


def _tape_of(heard: Recorder, result: Any, owners: Sequence[nn.Module]) -> "Tape | None":
    """Return the tape of what was heard; None if it was more than launches."""
    inputs, outputs = heard.inputs, list(result) if isinstance(result, tuple) else [result]
    starts = [t.data_ptr() for t in inputs]
    if heard.other is not None or len(set(starts)) < len(starts):
        return None
    numbers = [next((n for n, (a, _) in enumerate(heard.allocated) if a is o or _same(a, o)), None) for o in outputs]
    if None in numbers or len(set(numbers)) < len(numbers):
        return None
    tape = Tape(isinstance(result, tuple), outputs[0].device)
    tape.hold(dict(enumerate(owners)))
    bases = dict(zip(numbers, range(len(inputs), len(inputs) + len(outputs)), strict=True))
    places = {}
    for n, (t, zero) in enumerate(heard.allocated):
        if n in bases:
            if zero:
                return None
            places[n] = bases[n], 0
            tape.outputs.append((tuple(t.shape), t.stride(), t.dtype, numbers.index(n)))
        elif zero:
            places[n] = len(inputs) + len(outputs) + 1 + len(tape.zeros), 0
            tape.zeros.append(t.numel() * t.element_size())
        else:
            places[n] = len(inputs) + len(outputs), tape.bytes
            tape.bytes += math.ceil(t.numel() * t.element_size() / _ALIGNMENT) * _ALIGNMENT
    tape.outputs.sort(key=lambda output: output[-1])
    fixed_base = len(inputs) + len(outputs) + 1 + len(tape.zeros)

    def place_of(t: Tensor) -> tuple[int, int] | None:
        address, storage = t.data_ptr(), t.untyped_storage()._cdata
        if not t.numel():
            return fixed_base, address
        if address in starts:
            return starts.index(address), 0
        within = [i for i, other in enumerate(inputs) if other.untyped_storage()._cdata == storage]
        if within:  # views of several inputs in one memory cannot be told apart
            return (within[0], address - starts[within[0]]) if len(within) == 1 else None
        for n, (made, _) in enumerate(heard.allocated):
            if made.untyped_storage()._cdata == storage:
                return places[n][0], places[n][1] + address - made.data_ptr()
        return (fixed_base, address) if tape.keep(t, owners) else None

    for compiled, grid, tensors, again in heard.launches:
        found = [place_of(_tensor_of(t)) for t in tensors]
        step_places = [place for place in found if place is not None]
        if len(step_places) < len(found):
            return None
        tape.steps.append(Step(compiled, grid, again, tensors, step_places))
    return tape


def _same(a: Tensor, b: Any) -> bool:
    return (
        isinstance(b, Tensor) and a.untyped_storage()._cdata == b.untyped_storage()._cdata
        and a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
    )  # fmt: skip


def _holds(parameter: Tensor, t: Tensor) -> bool:
    """Whether `t` begins inside a parameter; other ones may share its memory."""
    if parameter.untyped_storage()._cdata != t.untyped_storage()._cdata:
        return False
    span = sum((n - 1) * s for n, s in zip(parameter.shape, parameter.stride(), strict=True)) + 1
    return 0 <= t.data_ptr() - parameter.data_ptr() < span * parameter.element_size()


def _tensor_of(t: Any) -> Tensor:
    """Return the tensor of a kernel's argument: itself, or that of a box, which may be shifted."""
    base = t if isinstance(t, Tensor) else t.base
    return base if isinstance(base, Tensor) else base.tensor


class Step:
    """One launch of a tape.

    Args:
        compiled: The compiled kernel, its arguments, and which of these are `tensors`; None in the interpreter.
        grid: Its programs.
        again: Launches the kernel on tensors.
        tensors: Its tensors and boxes of tensors, in the order of its arguments.
        places: Which memory each of them lies in, and how far from its start.
    """

    def __init__(
        self, compiled: Any, grid: tuple[int, ...], again: Callable[..., None], tensors: Sequence[Any],
        places: Sequence[tuple[int, int]],
    ) -> None:  # fmt: skip
        self._again = None if compiled is not None else again
        self._like, self._places, self._boxes = tensors if compiled is None else (), [], []
        if compiled is None:
            self._places = [(number, *place) for number, place in enumerate(places)]
            return
        kernel, args, where = compiled
        args = list(args)
        for n, t in zip(where, tensors, strict=True):
            args[n] = t.data_ptr() if isinstance(t, Tensor) else Box(t)
        launcher = launcher_of(kernel, (*grid, 1, 1)[:3], args)
        self._values, self._launch = launcher.values, launcher.launch
        for n, t, (base, offset) in zip(where, tensors, places, strict=True):
            position, arg = launcher.position[n], args[n]
            if isinstance(arg, Box):
                shift = t.base.data_ptr() - _tensor_of(t).data_ptr()
                self._boxes.append((position, arg, base, offset + shift))
            else:
                self._places.append((position, base, offset))

    def run(self, bases: Sequence[int], stream: int) -> None:
        """Launch on memory at the addresses `bases`."""
        if self._again is not None:
            self._again(*[_at(bases[base] + offset, self._like[number]) for number, base, offset in self._places])
            return
        values = self._values.copy()
        for position, base, offset in self._places:
            values[position] = bases[base] + offset
        for position, box, base, offset in self._boxes:
            values[position] = box.at(bases[base] + offset)
        self._launch(stream, values)


def _at(address: int, like: Tensor) -> Tensor:
    """Return a tensor like another one at an address of the CPU."""
    import ctypes  # noqa: PLC0415

    span = sum((n - 1) * s for n, s in zip(like.shape, like.stride(), strict=True)) + 1 if like.numel() else 0
    if not span:
        return like
    memory = (ctypes.c_byte * (span * like.element_size())).from_address(address)
    return torch.frombuffer(memory, dtype=like.dtype).as_strided(like.shape, like.stride())


@dataclass
class Tape:
    """The launches of a call.

    Attributes:
        many: Whether the call returns a tuple.
        device: Where it runs.
        steps: The launches.
        outputs: Shape, strides, dtype and number of each tensor that is returned.
        zeros: Bytes of each further memory that begins as zeros.
        bytes: All other memory that is asked for.
        kept: Parameters: where each is kept, by what name, itself, and its address.
        modules: Owners and modules inside: where each is kept, by what name, itself, and how often it was changed.
        tables: Tensors that nobody writes to.
    """

    many: bool
    device: torch.device
    steps: list[Step] = field(default_factory=list)
    outputs: list[tuple[Any, ...]] = field(default_factory=list)
    zeros: list[int] = field(default_factory=list)
    bytes: int = 0
    kept: list[tuple[dict[str, Any], str, Tensor, int]] = field(default_factory=list)
    modules: list[tuple[dict[Any, Any], Any, nn.Module, int]] = field(default_factory=list)
    tables: list[Tensor] = field(default_factory=list)

    def keep(self, t: Tensor, owners: Sequence[nn.Module]) -> bool:
        """Whether the memory of `t` is that of a parameter or buffer of `owners`, or of a table."""
        if is_fixed(t):
            self.tables.append(t)
            return True
        for module in (module for owner in owners for module in owner.modules()):
            for among in (module._parameters, module._buffers):
                for name, found in among.items():
                    if found is not None and _holds(found, t):
                        self.kept.append((among, name, found, found.data_ptr()))
                        return True
        return False

    def hold(self, among: dict[Any, nn.Module | None], apart: Sequence[str] = ()) -> None:
        """Note where modules are kept, but those that are `apart`, and the modules that they may run."""
        for name, part in among.items():
            if part is not None and name not in apart:
                self.modules.append((among, name, part, part.__dict__.get("changes", 0)))
                self.hold(part._modules, getattr(type(part), "apart", ()))

    def valid(self) -> bool:
        """Whether all parameters and modules are where they were and as they were, and the modules without hooks."""
        if _modules._global_forward_hooks or _modules._global_forward_pre_hooks:
            return False
        for among, name, t, address in self.kept:
            if among.get(name) is not t or t.data_ptr() != address:
                return False
        for among, name, part, changes in self.modules:
            own = part.__dict__
            if (
                among.get(name) is not part or own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own
                or own.get("changes", 0) != changes
            ):  # fmt: skip
                return False
        return True

    def repeat(self, inputs: Sequence[Tensor]) -> Any:
        """Launch anew on other inputs and new memory; returns what the call returned."""
        device = self.device
        for table in self.tables:
            lasting(table)
        outputs = [
            torch.empty_strided(shape, strides, dtype=dtype, device=device) for shape, strides, dtype, _ in self.outputs
        ]
        more = [torch.empty(self.bytes, dtype=torch.uint8, device=device)] if self.bytes else [inputs[0]]
        more += [torch.zeros(count, dtype=torch.uint8, device=device) for count in self.zeros]
        bases = [t.data_ptr() for t in (*inputs, *outputs, *more)]
        bases.append(0)
        stream = 0 if device.type == "cpu" else torch._C._cuda_getCurrentRawStream(device.index)
        for step in self.steps:
            step.run(bases, stream)
        return tuple(outputs) if self.many else outputs[0]
