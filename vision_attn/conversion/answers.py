"""One forward of a converted layer: which calls of attention its processor answers, and how.

They are calls of `scaled_dot_product_attention`, and of the attention backends of diffusers. A call is answered if
queries and keys both are the layer's whole token sequence, and the grid in it is known. Every other call goes through.
What is decided from shapes is remembered with the layer.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vision_attn.conversion.doors import (
    ATTENTION,
    LINEAR,
    Below,
    Door,
    backend_door,
    backend_of,
    by_backend,
    describe,
    never_reached,
)
from vision_attn.conversion.grids import backward_running
from vision_attn.conversion.groups import grouped
from vision_attn.conversion.masks import is_bias, key_padding, stays_dense
from vision_attn.conversion.moments import moment_of, rotary_of
from vision_attn.conversion.projections import Projections
from vision_attn.conversion.quiet import Left, is_quiet, remembered, run_quietly
from vision_attn.conversion.repeats import look_of, remember, repeated
from vision_attn.conversion.state import ADDED, MASKED, LayerState
from vision_attn.grid import Grid, holds, largest
from vision_attn.kernels.dense import as_autocast
from vision_attn.kernels.tapes import DEVICES
from vision_attn.parallel.models import stock_attention
from vision_attn.parallel.processors import attend
from vision_attn.parallel.ranks import Ranks
from vision_attn.processors.base import CHILD, Processor
from vision_attn.processors.softmax import Softmax, SoftmaxAttention

_log = logging.getLogger(__name__)
_MODE = "dense: a mode around the layer answered its attention"
_MOST = 64  # decisions that a layer remembers


def answered(module: nn.Module, state: LayerState, run: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """Run a layer's own code, and let its processor answer the attention in it.

    Args:
        module: The layer.
        state: Its state.
        run: Its own code.
        args: Arguments of `run`.
        kwargs: Named arguments of `run`.

    Raises:
        RuntimeError: If it never called `scaled_dot_product_attention`, or torch.fx traces it.
        ValueError: If the processor cannot honour the call.
    """
    processor = _processor_of(module)
    if state.quiet is not None and not torch.compiler.is_compiling() and is_quiet(state, processor, args, kwargs):
        return run_quietly(state, processor, run, args, kwargs)
    if isinstance(next(iter(args or kwargs.values()), None), torch.fx.Proxy):
        raise RuntimeError(
            f"{state.name} cannot be traced by torch.fx, which knows no sizes, because its processor needs those of "
            "the grid: trace the model inside Conversion.bypassed() for the host's own attention, or use "
            "torch.jit.trace or torch.export. For features timm has forward_intermediates()"
        )
    mask = kwargs.get("attention_mask")
    call = Answers(module, state, mask is not None and stays_dense(mask, state), processor, kwargs)
    if call.backend is not None:
        run = functools.partial(_with_backend, call, run)
    if call.parallel is not None:
        run = functools.partial(_without_exchange, call, run)
    if call.projections is None:
        return _run(module, call, run, args, kwargs)
    if torch.compiler.is_compiling():  # Dynamo takes one `with` block around code that has others
        call.projections.__enter__()
        output = _run(module, call, run, args, kwargs)
        call.projections.__exit__()
        return output
    with call.projections:
        return _run(module, call, run, args, kwargs)


def _run(module: nn.Module, call: "Answers", run: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """Run a layer's own code through the doors, or inside a mode where that does not reach its attention."""
    state = call.state
    if torch.compiler.is_compiling():
        with _answering(call):
            output = run(*args, **kwargs)
        # modes of others may have answered
        if not (call.reached or isinstance(state.spec, Softmax) or torch._C._len_torch_function_stack()):
            raise RuntimeError(never_reached(state.name, module))
        return output
    if not state.imported:
        modes = ATTENTION.here.modes
        output = call.through_doors(run, args, kwargs)
        if call.reached:
            state.imported = False
            call.end()
            state.quiet = call.left and remembered(module, state, call.stock, call.left, args, kwargs)
            return output
        if ATTENTION.here.modes != modes:
            state.note(None, _MODE, expected=True)
            return output
        if isinstance(state.spec, Softmax):  # it changes nothing, and a second run would count in the host's own code
            state.note(None, "dense: the host's own code computed it", expected=True)
            return output
        first, state.imported = state.imported is None, True
        if _may_skip(module):
            state.imported = first
            return output
    with _answering(call):
        output = run(*args, **kwargs)
    if call.reached:
        call.end()
    else:
        state.imported = None
        if not _may_skip(module):
            raise RuntimeError(never_reached(state.name, module))
    return output


def _with_backend(call: "Answers", run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a layer's own code, whose calls of its attention backend are answered too."""
    if torch.compiler.is_compiling():  # the calls come to PyTorch's attention, where a mode answers them
        processor = call.stock
        before, processor._attention_backend = processor._attention_backend, "native"
        output = run(*args, **kwargs)
        processor._attention_backend = before
        return output
    door = backend_door(call.backend)
    answer = door.open(functools.partial(call.dispatched, door.through))
    try:
        return run(*args, **kwargs)
    finally:
        door.close(answer)


def _without_exchange(call: "Answers", run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a layer's own code, which would else exchange heads or keys between processes before it attends."""
    call.stock._parallel_config = None
    try:
        return run(*args, **kwargs)
    finally:
        call.stock._parallel_config = call.parallel


def _processor_of(module: nn.Module) -> Any:
    """Return diffusers' processor of a layer, None if it has none."""
    return vars(module).get("processor") or module._modules.get("processor")


def _may_skip(module: nn.Module) -> bool:
    """Whether a hook has replaced the `forward` of a module, and may answer without it (a cache).

    A hook that was taken off again leaves the module's own method there.
    """
    forward = vars(module).get("forward")
    return forward is not None and getattr(forward, "__self__", None) is not module


class Answers:
    """The answers of a layer to the calls of one forward.

    Args:
        module: The layer.
        state: Its state.
        masked: Whether the forward was given an attention mask that keeps the layer dense.
        stock: diffusers' processor of the layer, None if it has none.
        given: The named arguments of the layer.

    Attributes:
        backend: The attention backend of diffusers that the layer calls, None for PyTorch's own.
        parallel: diffusers' configuration of several processes over which the layer attends, None for one.
        left: What became of the calls, if the host answered them all.
    """

    __slots__ = (
        "_across", "_noted", "backend", "left", "module", "moment", "parallel", "processor", "projections", "reached",
        "state", "stock",
    )  # fmt: skip

    def __init__(self, module: nn.Module, state: LayerState, masked: bool, stock: Any, given: dict[str, Any]) -> None:
        self.module, self.state, self.stock, self.backend = module, state, stock, backend_of(stock)
        self.parallel = getattr(stock, "_parallel_config", None)
        self.reached, self._noted, self._across = False, False, ""
        self.left: Left | None = None
        processor: Any = module._modules[CHILD]
        self.moment = None
        if processor.wants:
            moment = moment_of(state, rotary_of(given))
            processor = processor.at(moment)
            self.moment = moment if processor.wants else None
        self.processor: Processor = processor
        residuals = processor.residuals()
        if residuals and not state.adds_residuals(masked):
            residuals = {}
        self.projections = Projections(module, residuals, processor.add_residuals) if residuals else None

    def through_doors(self, run: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """Run the layer's own code, whose calls come to `attend` and `linear`."""
        described = describe(self.stock)
        fused = self.projections is not None and self.projections.fused
        linear = LINEAR.open(self.linear) if fused else None
        before = ATTENTION.open(self.attend)
        try:
            return run(*args, **kwargs)
        finally:
            ATTENTION.close(before)
            if fused:
                LINEAR.close(linear)
            if described is not None:
                described.pop("__call__", None)

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Answer one call of `linear`."""
        assert self.projections is not None
        return self.projections.linear(LINEAR.through, input, weight, bias)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Answer one call of `scaled_dot_product_attention` on `[B, H, N, D]` tensors."""
        tensors = query, key, value
        plain = attn_mask is None and not dropout_p and not is_causal and query.device.type in DEVICES
        look = look_of(self, tensors, scale) if plain else None
        if look is not None and (known := repeated(self, look, tensors)) is not None:
            self.reached = self._noted = True
            self.state.note(known[0], "rerouted")
            return known[1].transpose(1, 2)
        masked = attn_mask is not None and stays_dense(attn_mask, self.state)
        grid = self._grid_of(query.dim(), query.shape[-2], key.shape[-2], masked)
        if grid is None and self.state.context.cut is not None:
            return stock_attention(self.state.name, self.stock, self.parallel, tensors, attn_mask, scale)
        if grid is None:
            own: Any = F.scaled_dot_product_attention if torch.compiler.is_compiling() else ATTENTION.through
            if self.backend is not None and torch.compiler.is_compiling():
                own = functools.partial(by_backend, self.backend)
            return own(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        flat = query.dim() == 3  # the heads of a sample one after the other, `[B * H, N, D]`
        if flat:
            query, key, value = (t.unflatten(0, (-1, self.state.num_heads)) for t in (query, key, value))
            attn_mask = None if attn_mask is None else attn_mask.unflatten(0, (-1, self.state.num_heads))
        q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        output = self._processed(grid, q, k, v, attn_mask, dropout_p, is_causal, scale).transpose(1, 2)
        if look is not None:
            remember(self, look, (q, k, v, grid, None, scale))
        return output.flatten(0, 1) if flat else output

    def dispatched(self, through: Callable[..., Tensor], **call: Any) -> Tensor:
        """Answer one call of an attention backend on `[B, N, H, D]` tensors; `through` is the backend itself."""
        query, key, value, attn_mask = call["query"], call["key"], call["value"], call.get("attn_mask")
        if attn_mask is not None and not isinstance(attn_mask, Tensor):
            self.reached, kind = True, type(attn_mask).__name__
            unchanged = isinstance(self.processor, SoftmaxAttention)
            self._note(None, f"dense: its attention has a mask of the type {kind}", expected=unchanged)
            return through(**call)
        here = ATTENTION.here
        before, here.answer = here.answer, None  # some backends, and all processors, call PyTorch's attention
        try:
            masked = attn_mask is not None and stays_dense(attn_mask, self.state)
            grid = self._grid_of(query.dim(), query.shape[1], key.shape[1], masked)
            if grid is None:
                return through(**call if self.parallel is None else {**call, "_parallel_config": self.parallel})
            if attn_mask is not None and attn_mask.shape == key.shape[:2]:
                attn_mask = attn_mask[:, None, None]
            here.answer = None
            if isinstance(grid, Grid) and self.parallel is None:
                here.answer = functools.partial(_rows, through, call, grid)
            rest = (call.get("dropout_p", 0.0), call.get("is_causal", False), call.get("scale"))
            return self._processed(grid, query, key, value, attn_mask, *rest)
        finally:
            here.answer = before

    def _processed(
        self, grid: Grid | tuple[Grid, ...], q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None,
        dropout_p: float, is_causal: bool, scale: float | None,
    ) -> Tensor:  # fmt: skip
        """Let the processor attend over `[B, N, H, D]` tensors."""
        state = self.state
        if dropout_p or is_causal:
            what = f"attention dropout {dropout_p}" if dropout_p else "a causal mask"
            raise ValueError(f"{state.name}: {what} cannot be rerouted: switch it off, or leave out the layer (where=)")
        q, k, v = as_autocast(q, k, v)
        if self.projections is not None and not torch.compiler.is_compiling() and self.projections.missing():
            raise RuntimeError(
                f"{state.name}: {state.spec} adds to the input of projections, but this {type(self.module).__name__} "
                f"ran none of {self.projections.missing()} that we know"
            )
        before, after = state.host.unasked(q.shape[1], k.shape[1])
        if before or after:
            q = F.pad(q, (0, 0, 0, 0, before, after))  # a query for each token; nobody reads what these get
        if state.context.cut is not None:
            output = self._over_processes(state.context.cut.of(largest(grid)), q, k, v, attn_mask, scale)
        elif attn_mask is not None and state.host.biases and is_bias(attn_mask):
            output = self.processor.biased(q, k, v, largest(grid), attn_mask, scale)
        else:
            mask = None if attn_mask is None else key_padding(attn_mask, grid, state)
            if isinstance(grid, Grid):
                output = self._over(grid, q, k, v, mask, scale)
            else:
                if len(grid) != len(q):
                    raise ValueError(f"{state.name}: the host's probe found {len(grid)} grids for {len(q)} samples")
                masks = mask or [None] * len(grid)
                each = zip(grid, q.split(1), k.split(1), v.split(1), masks, strict=True)
                output = torch.cat([self._over(*sample, scale) for sample in each])
        self._note(grid, "rerouted")
        return output[:, before : output.shape[1] - after] if before or after else output

    def _over_processes(
        self, ranks: Ranks, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, scale: float | None
    ) -> Tensor:
        """Let the processor attend over a grid of which this process holds a slice."""
        mask = None if attn_mask is None else key_padding(attn_mask, ranks.held, self.state)
        if attn_mask is not None and mask is None and any(ranks.outside):  # other processes may hide keys
            mask = q.new_ones((len(attn_mask), ranks.outside[ranks.rank]), dtype=torch.bool)
        if q.shape[2] != k.shape[2]:
            k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], 2) for t in (k, v))
        return attend(self.processor, q, k, v, ranks, mask, scale, self.moment)

    def _over(self, grid: Grid, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        """Let the processor attend over one grid."""
        if q.shape[2] != k.shape[2]:
            run = functools.partial(self._over, grid, scale=scale)
            return grouped(self.processor, q, k, v, mask, run)
        if self.moment is not None:
            return self.processor(q, k, v, grid, mask, scale, self.moment)
        repeats = self.backend is None and q.device.type in DEVICES and not self.processor.repeats_itself
        if torch.compiler.is_compiling() or not repeats:
            return self.processor(q, k, v, grid, mask, scale)
        return self.state.tapes.call(self.processor, (q, k, v, grid, mask, scale), self.processor)

    def _grid_of(self, dim: int, queries: int, tokens: int, masked: bool) -> Grid | tuple[Grid, ...] | None:
        """Return the grid, or that of each sample, of a call that the processor is to answer; None lets it through."""
        self.reached = True
        state, context = self.state, self.state.context
        if self.parallel is not None and context.cut is None:
            raise ValueError(
                f"{state.name} runs with context parallelism of which its model does not know: call the model's own "
                "enable_parallelism"
            )
        unchanged = isinstance(self.processor, SoftmaxAttention)
        before, after = state.host.unasked(queries, tokens)
        own = dim in state.host.axes and (queries == tokens or (queries < tokens and state.host.more_keys))
        if torch.compiler.is_compiling():
            grid = None if unchanged or not own else state.decision(context.locate(tokens), masked)[0]
            return grid if grid is None or holds(grid, before, after) else None
        if not own:
            self._across = (
                f"{int(tokens)} keys for {int(queries)} queries (shared attention)"
                if dim in state.host.axes
                else "queries without an axis of heads"
            )
            return None
        if context.here.gradients or backward_running() != -1:
            found = context.locate(int(tokens), state.shared.running)
            grid, placed, reason = state.decision(found, masked)
        else:
            call = context.known(state.shared.running), int(tokens), masked
            decided = state.decisions.get(call)
            if decided is None:
                if len(state.decisions) >= _MOST:
                    state.decisions.clear()
                decided = state.decisions[call] = state.decision(context.placed(*call[:2]), masked)
            grid, placed, reason = decided
        if grid is not None and not holds(grid, before, after):
            grid, reason = None, f"dense: {int(queries)} queries do not hold {grid}"
        if grid is None:
            self._note(placed, reason, expected=placed is not None)
            if reason in (MASKED, ADDED) and not state.shared.warned:
                state.shared.warned = True
                _log.warning("%s runs %s", state.name, reason)
        elif unchanged:
            self._note(grid, "rerouted")
            return None
        return grid

    def _note(self, grid: Grid | tuple[Grid, ...] | None, status: str, *, expected: bool = False) -> None:
        grid = largest(grid) if isinstance(grid, tuple) else grid
        self.state.note(grid, status, expected=expected)
        host = expected or isinstance(self.processor, SoftmaxAttention)
        self.left = Left(grid, status, expected) if host and (self.left or not self._noted) else None
        self._noted = True

    def end(self) -> None:
        """Say why no call was over the layer's tokens, if none was."""
        if not self._noted and self._across:
            self.state.note(None, f"dense: {self._across}, so where the grid lies is not known")


def _rows(through: Callable[..., Tensor], call: dict[str, Any], grid: Grid, *tensors: Tensor, **more: Any) -> Tensor:
    """Answer a processor's own call of attention: by the backend, if tokens outside the grid attend to all tokens."""
    q, k, v = (t.transpose(1, 2) for t in tensors)
    if more.get("attn_mask") is None and q.shape[1] == grid.tokens - grid.image_tokens and k.shape[1] == grid.tokens:
        mask = {"attn_mask": None} if "attn_mask" in call else {}
        return through(**{**call, **mask, "query": q, "key": k, "value": v, "scale": more["scale"]}).transpose(1, 2)
    own: Tensor = ATTENTION.through(*tensors, **more)
    return own


class _Answering(TorchFunctionMode):
    """Brings the calls of a layer to its answers where the doors cannot: in compiled code, and by imported names."""

    def __init__(self, call: Answers) -> None:
        super().__init__()
        self.call = call

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.unflatten:  # its Python body cannot be traced inside a mode
            return torch.unflatten(*args, **kwargs)
        if func is F.scaled_dot_product_attention or _is_behind(ATTENTION, func):
            return self.call.attend(*args, **kwargs)
        if self.call.projections is not None and (func is F.linear or _is_behind(LINEAR, func)):
            return self.call.linear(*args, **kwargs)
        if func is F.multi_head_attention_forward and not torch.compiler.is_compiling():
            return self.call.through_doors(func, args, kwargs)  # no mode sees what its Python body calls
        return func(*args, **kwargs)


class _AnsweringLast(Below, _Answering):
    """The same below the modes that are active."""


def _answering(call: Answers) -> TorchFunctionMode:
    return (_AnsweringLast if torch._C._len_torch_function_stack() else _Answering)(call)


def _is_behind(door: Door, func: Callable[..., Any]) -> bool:
    """Whether a function is that of a door which other threads hold open."""
    return not torch.compiler.is_compiling() and func in (door.front, door.builtin)
