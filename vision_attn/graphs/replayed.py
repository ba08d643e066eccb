"""Puts recordings in the place of a model's forward: which call replays, which records, and which runs as it is."""

import functools
import inspect
import logging
import threading
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from vision_attn._checks import check_int
from vision_attn.graphs.recording import Recording
from vision_attn.graphs.watch import Watch, keys_of, reason_of, settings
from vision_attn.hosts.selection import candidates_of, denoisers_of, distinct

_LOG = logging.getLogger(__name__)
_MANY = 4
_RECORDING = threading.Lock()  # to begin and end a recording, the whole GPU is waited for: no other may be under way
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


class Replayed:
    """The forward of one model: recorded at the second call of its kind, replayed from then on.

    Calls are of one kind if their tensors have the same shapes, strides, dtypes and devices, and all else is equal:
    Python values, and PyTorch's settings. Numbers and CPU tensors given as `timestep` are no part of that, as they are
    moved to the GPU first. A change of the model's state (see `Watch`) drops all recordings.

    Args:
        model: The model, whose forward this becomes.
        most: How many recordings are kept; the one that was not used for longest makes room.

    Attributes:
        reasons: Why the last call of each kind ran eagerly.
    """

    def __init__(self, model: nn.Module, most: int) -> None:
        self.model, self.most = model, most
        self.within = vars(model).get("forward")  # what others put there
        self.run: Callable[..., Any] = model.forward
        functools.update_wrapper(self, self.run, updated=())
        self.__signature__ = inspect.signature(self.run)
        self.recordings: OrderedDict[Any, Recording] = OrderedDict()
        self.reasons: dict[Any, str] = {}
        self._seen: set[Any] = set()
        self._watch: Watch | None = None
        self._keys: list[Callable[[], Any]] = []
        self._reason: str | None = None
        self._changes = 0  # since the last recording
        self._pool: Any = None
        self._done: Any = None  # the last replay, on whatever stream
        self._lock = threading.RLock()
        self.enabled = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward."""
        if torch.compiler.is_compiling() or not self.enabled:
            return self.run(*args, **kwargs)
        reason = _reason_now()
        if reason is None:
            with self._lock:
                recording, leaves = self._recording_of(args, kwargs)
                if recording is not None:
                    return self._replay(recording, leaves)
        else:
            self.reasons["surroundings"] = reason
        return self.run(*args, **kwargs)  # outside the lock: threads may run at the same time

    def _recording_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Recording | None, list[Any]]:
        """Return the recording of a call, made now if this is the second of its kind, and the leaves of its arguments.

        None if the call is to run eagerly.
        """
        if self._watch is None or self._watch.changed():
            self._begin_anew()
        if self._reason is not None:
            return None, []
        leaves, tree = pytree.tree_flatten(self._moved(args, kwargs))
        reason = next((reason for leaf in leaves if (reason := _unfit(leaf))), None)
        if reason is not None:
            self.reasons["arguments"] = reason
            return None, []
        key = (tree, *map(_kind, leaves), settings(), *[other() for other in self._keys])
        recording = self.recordings.get(key)
        here = threading.get_ident(), key  # a thread's first call makes handles of libraries, which no graph may hold
        if recording is None and here in self._seen and key not in self.reasons:
            recording = self._record(key, leaves, tree)
        if recording is None:
            self._seen.add(here)
        else:
            self.recordings.move_to_end(key)
        return recording, leaves

    def _replay(self, recording: Recording, leaves: list[Any]) -> Any:
        """Replay after the last replay has ended: recordings share memory, and threads have their own streams."""
        stream = torch.cuda.current_stream(recording.device)
        if self._done is not None:
            stream.wait_event(self._done)
        output = recording.replay(leaves)
        self._done = stream.record_event()
        return output

    def _record(self, key: Any, leaves: list[Any], tree: Any) -> Recording | None:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        while len(self.recordings) >= self.most:
            self.recordings.popitem(last=False)

        def forward(static: list[Any]) -> Any:
            args, kwargs = pytree.tree_unflatten(static, tree)
            return self.run(*args, **kwargs)

        try:
            with _RECORDING:
                recording = Recording(forward, leaves, self._pool)
        except Exception as error:  # an eager call follows, and raises what is really wrong
            self.reasons[key] = f"it cannot be recorded: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
            _LOG.warning("%s runs without a CUDA graph: %s", type(self.model).__name__, self.reasons[key])
            return None
        self.recordings[key] = recording
        self._changes = 0
        assert self._watch is not None
        self._watch.changed()  # what recording itself wrote to modules is no change
        _LOG.info("recorded a forward of %s: %.0f MiB", type(self.model).__name__, recording.bytes / 2**20)
        return recording

    def _begin_anew(self) -> None:
        """Drop all recordings: the model is not what it was."""
        self.recordings.clear()
        self.reasons.clear()
        self._seen.clear()
        self._pool = None
        if self._watch is None:
            self._watch = Watch(self.model)
        self._keys = keys_of(self.model)
        self._reason = reason_of(self.model)
        self._changes += 1

    def _moved(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with a timestep that is a number, or on the CPU, on the model's device."""
        names = list(self.__signature__.parameters)
        device = next(self.model.parameters()).device
        args = tuple(
            _on(device, value) if n < len(names) and names[n] == "timestep" else value for n, value in enumerate(args)
        )
        return args, {name: _on(device, value) if name == "timestep" else value for name, value in kwargs.items()}

    @property
    def status(self) -> str:
        """What becomes of calls: how many kinds are recorded, their memory, and why others are not."""
        if vars(self.model).get("forward") is not self and not _is_wrapped(self.model, self):
            return "the forward of the model was replaced: graphs are off"
        if self._reason is not None:
            return f"eager: {self._reason}"
        parts = [f"{len(self.recordings)} recorded, {sum(r.bytes for r in self.recordings.values()) / 2**20:.0f} MiB"]
        if self._changes > _MANY:
            parts = [f"eager: the model changed {self._changes} times since anything was recorded"]
        return "; ".join([*parts, *(f"eager: {reason}" for reason in dict.fromkeys(self.reasons.values()))])

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _own_forward(memo.get(id(self.model), self.model))

    def __reduce__(self) -> Any:
        return _own_forward, (self.model,)


def _own_forward(model: nn.Module) -> Any:
    """Return the forward of the model's class: copies and saved models are without graphs."""
    return types.MethodType(type(model).forward, model)


def _is_wrapped(model: nn.Module, forward: Any) -> bool:
    """Whether hooks of others run `forward`, as those of accelerate do."""
    return vars(model).get("_old_forward") is forward


def _reason_now() -> str | None:
    """Say why no call may be recorded or replayed at the moment."""
    if torch.is_grad_enabled():
        return "gradients are on: run it under torch.no_grad()"
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return "a mode of PyTorch watches all calls"
    if torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state():
        return "a transform of PyTorch traces the call"
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph of the user's own records the call"
    return None


def _on(device: torch.device, value: Any) -> Any:
    """Return a number or CPU tensor on `device`, in the dtype that diffusers gives it."""
    if isinstance(value, Tensor):
        return value if value.is_cuda else value.to(device)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64, device=device)
    return value


def _unfit(leaf: Any) -> str | None:
    """Say why an argument cannot be recorded."""
    if isinstance(leaf, Tensor):
        if type(leaf) not in (Tensor, nn.Parameter):
            return f"an argument is a {type(leaf).__name__}"
        return None if leaf.is_cuda else f"an argument, a tensor {tuple(leaf.shape)}, is on the {leaf.device}"
    return None if isinstance(leaf, _PLAIN) else f"an argument is a {type(leaf).__name__}"


def _kind(leaf: Any) -> Any:
    """What of an argument belongs to the kind of a call."""
    return (leaf.shape, leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else (type(leaf), leaf)


class Graphs:
    """The graphs of a pipeline's models, or of one model.

    Args:
        forwards: The forward of each model by component name, '' for a model by itself.
    """

    def __init__(self, forwards: Mapping[str, Replayed]) -> None:
        self.forwards = dict(forwards)

    @property
    def status(self) -> dict[str, str]:
        """What becomes of the calls of each model: what is recorded, the memory of that, and why others are eager."""
        return {name: forward.status for name, forward in self.forwards.items()}

    @property
    def memory(self) -> int:
        """Bytes that the recordings hold, inputs included."""
        return sum(r.bytes for forward in self.forwards.values() for r in forward.recordings.values())

    def disable(self) -> None:
        """Give the models their own forward back and free the memory of all recordings."""
        for forward in self.forwards.values():
            _take_off(forward)


def enable(target: Any, *, most: int = 8) -> Graphs:
    """Record the forwards of a model, or of a pipeline's denoisers and ControlNets, in CUDA graphs.

    The second call of each kind (shapes, dtypes and Python values of the arguments) is recorded, later ones replay. The
    outputs are bit for bit those of eager calls, and the caller's to keep.

    Args:
        target: A pipeline of diffusers, or a model; converted or not.
        most: How many kinds are kept for each model.

    Returns:
        The graphs, whose `status` says what became of calls. Enabling twice is the same as once.

    Raises:
        TypeError: If `target` is neither a model nor a pipeline.
        ValueError: If `most` is below 1, or the pipeline has no denoiser.
    """
    check_int("most", most, 1)
    found = {}
    for name, model in _models(target).items():
        now = replayed_of(model)
        if now is None:
            now = Replayed(model, most)
            model.forward = now
        now.most = most
        found[name] = now
    return Graphs(found)


@contextmanager
def replaying(models: Mapping[str, nn.Module], most: int = 8) -> Iterator[Graphs]:
    """Do `enable` inside a `with` block; what was enabled before it stays.

    Args:
        models: Models by component name.
        most: As for `enable`.
    """
    before = {name for name, model in models.items() if replayed_of(model) is not None}
    graphs = Graphs({name: enable(model, most=most).forwards[""] for name, model in models.items()})
    try:
        yield graphs
    finally:
        Graphs({name: forward for name, forward in graphs.forwards.items() if name not in before}).disable()


def disable(target: Any) -> None:
    """Undo `enable`; it does nothing where nothing is enabled.

    Raises:
        TypeError: If `target` is neither a model nor a pipeline.
    """
    for model in candidates_of(target).values():
        forward = replayed_of(model)
        if forward is not None:
            _take_off(forward)


def _models(target: Any) -> dict[str, nn.Module]:
    candidates = candidates_of(target)
    if isinstance(target, (nn.Module, list, tuple)):
        return distinct(candidates)
    names = [*denoisers_of(target), *(name for name in candidates if name.startswith("controlnet"))]
    if not names:
        raise ValueError(f"this {type(target).__name__} has no denoiser, only {', '.join(candidates) or 'no models'}")
    return distinct({name: candidates[name] for name in names})


def replayed_of(model: nn.Module) -> Replayed | None:
    """Return the forward that replays a model's graphs; None if they are not enabled."""
    for name in ("forward", "_old_forward"):
        if isinstance(vars(model).get(name), Replayed):
            return vars(model)[name]
    return None


def _take_off(forward: Replayed) -> None:
    model = forward.model
    forward.enabled = False  # others may hold it
    forward.recordings.clear()
    forward._pool = None
    if vars(model).get("forward") is forward:
        if forward.within is None:
            del model.forward
        else:
            model.forward = forward.within
    elif vars(model).get("_old_forward") is forward:
        model._old_forward = forward.run
