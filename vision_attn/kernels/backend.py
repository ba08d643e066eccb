"""What every operator does around its formula: it checks its inputs, picks an implementation, and keeps float32 sums.

An implementation is `reference`, `torch` or `triton`. `auto` takes the first of `triton`, `torch` that can run. An
implementation asked for by name runs or raises: it never falls back to another one.

Code that PyTorch cannot look into, like a kernel, is a `CustomOp`. Its first derivative is code of the same kind. For
everything else - second and forward-mode derivatives, `torch.func`, export - it has a plain form in PyTorch or refuses.
"""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from vision_attn._checks import is_int
from vision_attn.grid import Grid
from vision_attn.kernels.tapes import HERE, Tapes

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# `torch.compile` of torch 2.11 cannot trace the question
_AUTOCAST = {device: torch.amp.is_autocast_available(device) for device in ("cpu", "cuda", "xpu", "mps", "meta")}

_logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")
PerAxis = int | tuple[int, int]


class LaunchError(RuntimeError):
    """No launch of a Triton kernel fits the GPU; it is raised before anything runs."""


class Implementation(NamedTuple):
    """One way to run an operator: `run` computes it, `reasons` lists why it cannot for the inputs at hand."""

    run: Callable[..., Any]
    reasons: Sequence[str] = ()


def check_backend(backend: str, known: Sequence[str] = ("triton", "torch", "reference")) -> None:
    """Refuse a backend name that no operator has.

    Raises:
        ValueError: If `backend` is neither 'auto' nor in `known`.
    """
    if backend != "auto" and backend not in known:
        names = ", ".join(repr(name) for name in ("auto", *known))
        raise ValueError(f"backend must be one of {names}, got {backend!r}")


def for_inference(backend: str, *tensors: Tensor | None) -> str:
    """Return by which backend an operator runs that has no gradient but in PyTorch, and no definition of its own."""
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return "torch" if wanted or backend == "reference" else backend


def pick(operator: str, backend: str, implementations: Mapping[str, Implementation]) -> Callable[..., Any]:
    """Return the function that runs `operator` with the chosen backend.

    Args:
        operator: Name of the operator, for the message.
        backend: 'auto' or a key of `implementations`.
        implementations: By name, the fastest first; 'auto' never chooses 'reference'.

    Raises:
        ValueError: If the named backend is unknown or cannot run; every reason is listed.
    """
    check_backend(backend, tuple(implementations))
    if backend != "auto":
        chosen = implementations[backend]
        if chosen.reasons:
            raise ValueError(f"{operator} with backend={backend!r}: {'; '.join(chosen.reasons)}")
        return chosen.run
    able = [i.run for name, i in implementations.items() if name != "reference" and not i.reasons]
    if able:
        return able[0] if len(able) == 1 else _or_next(operator, *able[:2])
    refusals = "; ".join(f"{name}: {', '.join(i.reasons)}" for name, i in implementations.items() if i.reasons)
    raise ValueError(f"no backend of {operator} can run: {refusals}")


def _or_next(operator: str, run: Callable[..., Any], following: Callable[..., Any]) -> Callable[..., Any]:
    """Return `run`, or `following` where no launch of `run` fits the GPU, with a warning once."""

    def either(*args: Any) -> Any:
        try:
            return run(*args)
        except LaunchError as error:
            warn(f"{operator} runs without Triton: {error}")
            return following(*args)

    return either


@functools.cache
def warn(message: str) -> None:
    """Warn, once a message."""
    _logger.warning(message)


def autocasts(device: str) -> bool:
    """Whether autocast is on for a kind of device; some, such as 'meta', have none."""
    available = _AUTOCAST[device] if device in _AUTOCAST else torch.amp.is_autocast_available(device)
    return available and torch.is_autocast_enabled(device)


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Run an implementation outside of autocast, which would round the sums that it keeps in float32."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        device = args[0].device.type  # type: ignore[attr-defined]
        if not autocasts(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return run


def transformed() -> bool:
    """Whether a transform of `torch.func` or forward-mode differentiation is active, of which no kernel knows."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def exporting() -> bool:
    """Whether a program for elsewhere is being made, which has none of our kernels: `torch.export`, ONNX."""
    if torch.compiler.is_exporting():
        return True
    return torch._C._get_tracing_state() is not None and torch.onnx.is_in_onnx_export()


def passing() -> bool:
    """Whether tensors are those of a transform or a mode, and must not outlive it: what is made now is not kept."""
    if torch.compiler.is_compiling() or transformed():
        return True
    return torch._C._len_torch_dispatch_stack() > (HERE.recorder is not None)  # which makes real tensors


def upright(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """Return q and a scale above 0 for the same logits: hidden ones must stay the lowest after scaling."""
    if scale > 0:
        return q, scale
    return (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)


class CustomOp:
    """An operator of PyTorch around code that it cannot look into: autograd and `torch.compile` see it as one call.

    It is called directly where nothing of PyTorch has a part in the call: `torch.library` takes 50 us from Python to
    Python, which is too much in inference.

    Args:
        name: `vision_attn::` and what it computes.
        function: Of tensors, None and numbers.
        plain: The same in differentiable PyTorch. It takes over wherever the operator would have to be looked into. An
            operator without it raises an error there.
        repeats: Whether its launches are repeated in inference: see `tapes.py`. It is for the operators of a forward:
            all memory that a tape asks for lives until the end of the call.

    Attributes:
        registered: The operator of `torch.library`.
    """

    def __init__(
        self, name: str, function: Callable[..., Any], plain: Callable[..., Any] | None = None, repeats: bool = False
    ) -> None:
        self._name, self._function, self._plain = name, function, plain
        self._repeats, self._tapes = repeats, Tapes()
        self.registered = torch.library.custom_op(name, function, mutates_args=())
        self.register_fake, self.register_autograd = self.registered.register_fake, self.registered.register_autograd
        self.register_autograd(self._no_derivative)

    def __call__(self, *args: Any) -> Any:
        """Run the operator.

        Raises:
            NotImplementedError: If a plain form is needed and there is none.
        """
        if transformed() or exporting():
            if self._plain is not None:
                return self._plain(*args)
            if transformed() or torch.onnx.is_in_onnx_export():
                raise NotImplementedError(
                    f"{self._name} has no forward-mode derivative and runs neither under torch.func nor in ONNX: "
                    f"{_OTHERS}"
                )
        if _watched(args):
            return self.registered(*args)
        return self._tapes.call(self._function, args) if self._repeats else self._function(*args)

    def register_gradient(self, gradient: Callable[..., tuple[Tensor, ...]]) -> None:
        """Register the gradients of an operator of one output that has a plain form, for the derivatives beyond them.

        Args:
            gradient: Takes the output's gradient and the operator's arguments, and returns the gradients of the first
                of these; what it returns for None is dropped.
        """
        plain = self._plain
        assert plain is not None

        def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            ctx.tensors = [i for i, a in enumerate(inputs) if isinstance(a, Tensor)]
            ctx.save_for_backward(*[inputs[i] for i in ctx.tensors])
            ctx.args = [None if isinstance(a, Tensor) else a for a in inputs]

        def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
            args = list(ctx.args)
            for i, t in zip(ctx.tensors, ctx.saved_tensors, strict=True):
                args[i] = t
            if torch.is_grad_enabled() or transformed():  # derivatives of these gradients are wanted, or many at once
                return plain_gradients(plain, args, do)
            grads = [g if isinstance(a, Tensor) else None for g, a in zip(gradient(do, *args), args, strict=False)]
            return *grads, *[None] * (len(args) - len(grads))

        self.register_autograd(backward, setup_context=save)

    def _no_derivative(self, ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(f"{self._name} has no derivative: for second derivatives, {_OTHERS}")


_OTHERS = "use backend='torch' or backend='reference'"
_PLAIN = (Tensor, nn.Parameter)
_is_batched: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor  # by `is_grads_batched=True`


def custom_op(
    name: str, plain: Callable[..., Any] | None = None, *, repeats: bool = False
) -> Callable[[Callable[..., Any]], CustomOp]:
    """Return a decorator that makes a function of tensors and numbers a `CustomOp`."""
    return lambda function: CustomOp(name, function, plain, repeats)


def plain_gradients(plain: Callable[..., Tensor], args: Sequence[Any], do: Tensor) -> tuple[Tensor | None, ...]:
    """Return differentiable gradients of a function's floating-point arguments, None for the others.

    Args:
        plain: The function, in differentiable PyTorch.
        args: Its arguments.
        do: The gradient of its output.
    """
    at = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point()]

    def of(*tensors: Tensor) -> Tensor:
        whole = list(args)
        for i, t in zip(at, tensors, strict=True):
            whole[i] = t
        return plain(*whole)

    grads = dict(zip(at, torch.func.vjp(of, *[args[i] for i in at])[1](do), strict=True))
    return tuple(grads.get(i) for i in range(len(args)))


def _watched(args: tuple[Any, ...]) -> bool:
    """Whether autograd, a tracer, a mode or a subclass of tensors has to know of a call, or tensors have no values."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state():
        return True
    if torch._C._len_torch_dispatch_stack() and HERE.recorder is None:
        return True
    gradients, watched = torch.is_grad_enabled(), False
    for a in args:
        if isinstance(a, Tensor):
            if type(a) not in _PLAIN or a.is_meta or _is_batched(a):
                return True
            watched = watched or (gradients and a.requires_grad)
    return watched


def refuse_unlike(q: Tensor, **others: Tensor) -> None:
    """Refuse tensors that are not `[B, N, H, D]` of one floating dtype on one device.

    Raises:
        TypeError: If one is no tensor, or a dtype is not floating point, or differs from that of `q`.
        ValueError: If a tensor has no four axes, or is on another device.
    """
    _check_alike("all inputs", {"q": q, **others})


def _check_alike(who: str, tensors: Mapping[str, Tensor]) -> None:
    q = tensors["q"]
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor [B, N, H, D], got a {type(t).__name__}")
        if t.dim() != 4:
            raise ValueError(f"{name} must be [B, N, H, D], got shape {tuple(t.shape)}")
        if t.dtype not in FLOATS:
            raise TypeError(f"{who} must be floating point, got {name} {t.dtype}")
        if t.dtype != q.dtype:
            raise TypeError(f"{who} must share one floating dtype, got q {q.dtype} and {name} {t.dtype}")
        if t.device != q.device:
            raise ValueError(f"{who} must be on one device, got q on {q.device} and {name} on {t.device}")


def check_inputs(q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> None:
    """Refuse q, k, v that do not agree with each other or with the grid.

    Raises:
        TypeError: If dtypes differ or are not floating point, or an argument has another type.
        ValueError: If shapes or devices differ, or N is not the number of the grid's tokens.
    """
    if not isinstance(grid, Grid):
        raise TypeError(f"grid must be a Grid(height, width), got {grid!r}")
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        _check_alike("q, k and v", dict(q=q, k=k, v=v))
    shape, dtype, device = q.shape, q.dtype, q.device
    if (
        k.shape == shape == v.shape and k.dtype == dtype == v.dtype and k.device == device == v.device
        and len(shape) == 4 and shape[1] == grid.tokens and dtype in FLOATS
    ):  # fmt: skip
        return  # every call of an operator comes here, and the messages below take a tenth of its host time
    tensors = dict(q=q, k=k, v=v)
    _check_alike("q, k and v", tensors)
    for name, t in tensors.items():
        if t.shape != q.shape:
            raise ValueError(f"q, k and v must have one shape, got q {tuple(q.shape)} and {name} {tuple(t.shape)}")
    if q.shape[1] != grid.tokens:
        raise ValueError(f"N = {q.shape[1]} tokens, but {grid} has {grid.tokens}")


def check_mask(q: Tensor, grid: Grid, mask: Tensor | None) -> None:
    """Refuse a mask of the keys outside the grid that has another dtype, shape or device.

    Raises:
        TypeError: If the mask is not a bool tensor.
        ValueError: If its shape is not `[B, prefix + suffix]` or `[1, prefix + suffix]`, or it is on another device.
    """
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        given = mask.dtype if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise TypeError(f"mask must be bool, True where a key is seen, got {given}")
    outside = grid.prefix + grid.suffix
    if mask.dim() != 2 or mask.shape[1] != outside or mask.shape[0] not in (1, q.shape[0]):
        raise ValueError(
            f"mask must be [B, prefix + suffix] = [{q.shape[0]}, {outside}] for {grid}, got {tuple(mask.shape)}"
        )
    if mask.device != q.device:
        raise ValueError(f"mask must be on the device of q, {q.device}, got {mask.device}")


def per_axis(value: PerAxis, name: str, least: int) -> tuple[int, int]:
    """Return `value` as a (vertical, horizontal) pair of integers of at least `least`.

    Raises:
        TypeError: If it is neither an int nor a pair of ints.
        ValueError: If a side is below `least`.
    """
    if type(value) is int and value >= least:
        return value, value
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if torch._C._get_tracing_state():  # torch.jit.trace makes tensors of sizes
        pair = tuple(map(int, pair))
    if len(pair) != 2 or not all(map(is_int, pair)):
        raise TypeError(f"{name} must be an int or a pair of ints (vertical, horizontal), got {value!r}")
    if min(pair) < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    return pair
