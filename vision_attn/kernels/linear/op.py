"""Linear attention in Triton: the operators and their gradients.

The kernels are in `forward.py`, `backward.py` and `mean.py`; triton is imported when they first run.
"""

from typing import Any

import torch
from torch import Tensor

from vision_attn.kernels.backend import custom_op
from vision_attn.kernels.triton.launching import DTYPES, aligned


def linear_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, features: Any, key_weight: Tensor | None, global_query: Tensor | None, eps: float
) -> Tensor:
    """Run `linear_attention` on checked inputs."""
    cos, sin = features.rotary or (None, None)
    if key_weight is not None:
        key_weight = _narrow(key_weight).expand(k.shape[:3])
    if global_query is not None:
        global_query = global_query.float().contiguous()
    return _linear(q, k, v, cos, sin, key_weight, global_query, features.map, eps)[0]


def feature_mean_triton(q: Tensor, features: Any, weight: Tensor | None, scale: float) -> Tensor:
    """Run `feature_mean` on checked inputs."""
    if weight is not None:
        weight = _narrow(weight).expand(q.shape[:3])
    return _mean(q, weight, features.map, scale)[0]


def injective_attention_triton(q: Tensor, k: Tensor, v: Tensor, key_weight: Tensor | None, scale: float) -> Tensor:
    """Run `injective_attention` on checked inputs."""
    if key_weight is not None:
        key_weight = _narrow(key_weight).expand(k.shape[:3])
    return _injective(q, k, v, key_weight, scale)[0]


def linear_state(
    k: Tensor, v: Tensor, weight: Tensor | None = None, map_: str = "none", factor: float = 1.0,
    sum_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sum features times values, and features, over the tokens: for operators that fuse the rest themselves.

        S = factor sum_j w_j phi(k_j) v_j^T,    z = factor sum_j w_j phi(k_j)

    Runs in Triton and has no gradient.

    Args:
        k: Keys `[B, N, H, F]`, `aligned`.
        v: Values `[B, N, H, D]`, `aligned`.
        weight: Weights w `[B, N, H]`.
        map_: The feature map, as `Features` has it.
        factor: Of both sums.
        sum_weight: Further weights `[B, N, H]` of z alone, with the strides of `weight`.

    Returns:
        S `[B, H, F, D]` and z `[B, H, F]` in float32.
    """
    from vision_attn.kernels.linear.call import Call  # noqa: PLC0415
    from vision_attn.kernels.linear.forward import merged, state_parts  # noqa: PLC0415

    call = Call(k, k, v, None, None, weight, None, map_, 0.0)
    part, _ = state_parts(call, k, v, weight, sum_weight, None)
    state, norm, _ = merged(call, part, None, torch.float32, factor)
    return state, norm


def linear_output(q: Tensor, state: Tensor, norm: Tensor, map_: str, eps: float) -> Tensor:
    """Return what queries read from a state and its norm, both divided by the number of keys: `[B, N, H, D]`.

        o_i = phi(q_i) S / (phi(q_i) . z + eps)

    Runs in Triton and has no gradient.

    Args:
        q: Queries `[B, N, H, F]`, `aligned`.
        state: S `[B, H, F, D]`, float32.
        norm: z `[B, H, F]`, float32.
        map_: The feature map, as `Features` has it.
        eps: Added to the normaliser.
    """
    from vision_attn.kernels.linear.call import Call  # noqa: PLC0415
    from vision_attn.kernels.linear.forward import fill_output  # noqa: PLC0415

    o = q.new_empty((*q.shape[:3], state.shape[-1]))
    if o.numel():
        fill_output(Call(q, q, o, None, None, None, None, map_, eps), state.contiguous(), norm.contiguous(), o)
    return o


def _narrow(weight: Tensor) -> Tensor:
    return weight if weight.dtype in DTYPES else weight.float()


@custom_op("vision_attn::linear_triton", repeats=True)
def _linear(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, weight: Tensor | None,
    query: Tensor | None, map_: str, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Output; for the backward the state `[B, H, F, D]`, its norm `[B, H, F]`, and `[B, H, 2]` of the global query."""
    from vision_attn.kernels.linear.forward import forward  # noqa: PLC0415

    return forward(_call(q, k, v, cos, sin, weight, query, map_, eps))


@_linear.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, weight: Tensor | None,
    query: Tensor | None, *args: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (B, N, H, F), D = q.shape, v.shape[-1]
    norm = q.new_empty((B, H, F), dtype=torch.float32)
    tops = norm.new_empty((B, H, 2) if query is not None else (0,))
    return q.new_empty((B, N, H, D)), norm.new_empty((B, H, F, D)), norm, tops


@custom_op("vision_attn::linear_triton_backward")
def _linear_backward(
    do: Tensor, state: Tensor, norm: Tensor, tops: Tensor, q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None,
    sin: Tensor | None, weight: Tensor | None, query: Tensor | None, map_: str, eps: float, weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, weight and query; empty for what is None or not wanted."""
    from vision_attn.kernels.linear.backward import backward  # noqa: PLC0415

    return backward(_call(q, k, v, cos, sin, weight, query, map_, eps), aligned(do), state, norm, tops, weight_gradient)


@_linear_backward.register_fake
def _(
    do: Tensor, state: Tensor, norm: Tensor, tops: Tensor, q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None,
    sin: Tensor | None, weight: Tensor | None, query: Tensor | None, map_: str, eps: float, weight_gradient: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    dtype = q.dtype if weight is None else weight.dtype
    dweight = q.new_empty(k.shape[:3] if weight_gradient else (0,), dtype=dtype)
    dquery = norm.new_empty(norm.shape if query is not None else (0,))
    return *(t.new_empty(t.shape) for t in (q, k, v)), dweight, dquery


def _call(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, weight: Tensor | None,
    query: Tensor | None, map_: str, eps: float,
) -> Any:  # fmt: skip
    from vision_attn.kernels.linear.call import Call  # noqa: PLC0415

    q, k, v = (aligned(t) for t in (q, k, v))
    cos, sin = (None if t is None else t.contiguous() for t in (cos, sin))
    return Call(q, k, v, cos, sin, weight, query, map_, eps)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:7], *output[1:])
    ctx.rest = inputs[7:]


def _backward(ctx: Any, do: Tensor | None, *unused: object) -> tuple:
    q, k, v, cos, sin, weight, query, state, norm, tops = ctx.saved_tensors
    if do is None:
        do = v.new_zeros((*q.shape[:3], v.shape[-1]))
    wanted = ctx.needs_input_grad[5]
    inputs = (q, k, v, cos, sin, weight, query)
    dq, dk, dv, dweight, dquery = _linear_backward(do, state, norm, tops, *inputs, *ctx.rest, wanted)
    return dq, dk, dv, None, None, dweight if wanted else None, dquery if query is not None else None, None, None


_linear.register_autograd(_backward, setup_context=_save)


@custom_op("vision_attn::feature_mean_triton", repeats=True)
def _mean(q: Tensor, weight: Tensor | None, map_: str, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """`scale` times the mean; for the backward the mean, `[B, H, F]` both, and the sum of the weights `[B, H]`."""
    from vision_attn.kernels.linear.mean import scaled_mean  # noqa: PLC0415

    return scaled_mean(aligned(q), weight, map_, scale)


@_mean.register_fake
def _(q: Tensor, *args: object) -> tuple[Tensor, ...]:
    B, _, H, F = q.shape
    return tuple(q.new_empty((B, H, *rest), dtype=torch.float32) for rest in ((F,), (F,), ()))


@custom_op("vision_attn::feature_mean_triton_backward")
def _mean_backward(
    dmean: Tensor, mean: Tensor, total: Tensor, q: Tensor, weight: Tensor | None, map_: str, weight_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of q and weight; empty for what is not wanted."""
    from vision_attn.kernels.linear.mean import feature_sums_gradient  # noqa: PLC0415

    return feature_sums_gradient(aligned(q), weight, mean, total, dmean, map_, weight_gradient)


@_mean_backward.register_fake
def _(
    dmean: Tensor, mean: Tensor, total: Tensor, q: Tensor, weight: Tensor | None, map_: str, weight_gradient: bool
) -> tuple[Tensor, Tensor]:
    dtype = q.dtype if weight is None else weight.dtype
    return q.new_empty(q.shape), q.new_empty(q.shape[:3] if weight_gradient else (0,), dtype=dtype)


def _save_mean(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:2], *output[1:])
    ctx.map, ctx.scale = inputs[2:]


def _mean_gradient(ctx: Any, dmean: Tensor | None, *unused: object) -> tuple:
    q, weight, mean, total = ctx.saved_tensors
    dmean = torch.zeros_like(mean) if dmean is None else dmean * ctx.scale
    wanted = ctx.needs_input_grad[1]
    dq, dweight = _mean_backward(dmean, mean, total, q, weight, ctx.map, wanted)
    return dq, dweight if wanted else None, None, None


_mean.register_autograd(_mean_gradient, setup_context=_save_mean)


@custom_op("vision_attn::injective_triton", repeats=True)
def _injective(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output; for the backward the centred state with its factor, the means of keys and values, the sum of weights."""
    from vision_attn.kernels.linear.injective import forward  # noqa: PLC0415

    return forward(_call(q, k, v, None, None, weight, None, "none", 0.0), scale)


@_injective.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *args: object) -> tuple[Tensor, ...]:
    (B, N, H, F), D = q.shape, v.shape[-1]
    made = (q.new_empty(shape, dtype=torch.float32) for shape in ((B, H), (B, H, F), (B, H, D), (B, H)))
    return q.new_empty((B, N, H, D)), q.new_empty((B, H, F, D)), *made


@custom_op("vision_attn::injective_triton_backward")
def _injective_backward(
    do: Tensor, matrix: Tensor, factor: Tensor, norm: Tensor, middle: Tensor, total: Tensor, q: Tensor, k: Tensor,
    v: Tensor, weight: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v."""
    from vision_attn.kernels.linear.injective import backward  # noqa: PLC0415

    call = _call(q, k, v, None, None, weight, None, "none", 0.0)
    return backward(call, aligned(do), matrix, factor, norm, middle, total, scale)


@_injective_backward.register_fake
def _(
    do: Tensor, matrix: Tensor, factor: Tensor, norm: Tensor, middle: Tensor, total: Tensor, q: Tensor, k: Tensor,
    v: Tensor, *args: object,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(t.new_empty(t.shape) for t in (q, k, v))


def _save_injective(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4], *output[1:])
    ctx.scale = inputs[4]


def _injective_gradient(ctx: Any, do: Tensor | None, *unused: object) -> tuple:
    q, k, v, weight, *sums = ctx.saved_tensors
    do = v.new_zeros((*q.shape[:3], v.shape[-1])) if do is None else do
    return *_injective_backward(do, *sums, q, k, v, weight, ctx.scale), None, None


_injective.register_autograd(_injective_gradient, setup_context=_save_injective)
