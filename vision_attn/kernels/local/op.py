"""Local attention in Triton: the operator, its gradient, and when it can run.

The kernels are in `forward.py` and `backward.py`; triton is imported when they first run.
"""

import importlib.util
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vision_attn.grid import Grid
from vision_attn.kernels.local.window import Window
from vision_attn.kernels.triton.custom_op import custom_op

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def triton_reasons(q: Tensor, window: Window) -> list[str]:
    """List why the Triton backend cannot run on `q`; empty if it can."""
    reasons = []
    if not _HAS_TRITON:
        reasons.append("triton is not installed")
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        reasons.append(f"q is on {q.device}, not on cuda")
    if q.dtype not in _DTYPES:
        reasons.append(f"dtype {q.dtype} is none of float32, float16, bfloat16")
    if q.shape[-1] > 256:
        reasons.append(f"head_dim {q.shape[-1]} is above 256")
    return reasons


def local_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, window: Window, mask: Tensor | None, scale: float
) -> Tensor:
    """Run `local_attention` on checked inputs."""
    return _run(q, k, v, grid, window, mask, scale)[0]


def local_attention_lse(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, window: Window, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Also return the log-sum-exp of the logits, `[B, H, N]` in float32, with which outputs can be merged."""
    o, lse = _run(q, k, v, grid, window, mask, scale)
    return o, lse * math.log(2)


def _run(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, window: Window, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    radius, kernel, steps = 0.0, [0, 0], [1, 1]
    if window.radius is None:
        kernel, steps = list(window.kernel), list(window.steps)
    else:
        radius = min(float(window.radius), float(grid.height + grid.width))
    size = [grid.height, grid.width, grid.prefix, grid.suffix]
    pooled = window.pooled or (None, None)
    return _local(q, k, v, *pooled, window.bias, mask, size, radius, kernel, steps, scale)


@custom_op("vision_attn::local_triton")
def _local(
    q: Tensor, k: Tensor, v: Tensor, pooled_k: Tensor | None, pooled_v: Tensor | None, bias: Tensor | None,
    mask: Tensor | None, size: Sequence[int], radius: float, kernel: Sequence[int], steps: Sequence[int], scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and log-sum-exp in base 2; `size` is height, width, prefix, suffix, and radius 0 means a square.

    In base 2 the backward takes it as it is: rounded twice, large logits would lose what float32 has.
    """
    from vision_attn.kernels.local.forward import forward  # noqa: PLC0415

    if scale <= 0:  # hidden logits must stay the lowest after scaling
        q, scale = (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
    return forward(_call(q, k, v, pooled_k, pooled_v, bias, mask, size, radius, kernel, steps, scale))


@_local.register_fake
def _(q: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    B, N, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, N), dtype=torch.float32)


@custom_op("vision_attn::local_triton_backward")
def _local_backward(
    do: Tensor, dlse: Tensor | None, o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, pooled_k: Tensor | None,
    pooled_v: Tensor | None, bias: Tensor | None, mask: Tensor | None, size: Sequence[int], radius: float,
    kernel: Sequence[int], steps: Sequence[int], scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, pooled_k, pooled_v and bias; empty for what is None."""
    from vision_attn.kernels.local.backward import backward  # noqa: PLC0415
    from vision_attn.kernels.local.call import packed  # noqa: PLC0415

    call = _call(q, k, v, pooled_k, pooled_v, bias, mask, size, radius, kernel, steps, scale)
    dq, dk, dv, pooled_dk, pooled_dv, dbias = backward(call, packed(do), dlse, o, lse)
    return dq, dk, dv, pooled_dk, pooled_dv, dbias


@_local_backward.register_fake
def _(
    do: Tensor, dlse: Tensor | None, o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, pooled_k: Tensor | None,
    pooled_v: Tensor | None, bias: Tensor | None, *args: object,
) -> tuple[Tensor, ...]:  # fmt: skip
    optional = (q.new_empty(0) if t is None else t.new_empty(t.shape) for t in (pooled_k, pooled_v, bias))
    return *(t.new_empty(t.shape) for t in (q, k, v)), *optional


def _call(
    q: Tensor, k: Tensor, v: Tensor, pooled_k: Tensor | None, pooled_v: Tensor | None, bias: Tensor | None,
    mask: Tensor | None, *rest: Any,
) -> Any:  # fmt: skip
    from vision_attn.kernels.local.call import Call, packed  # noqa: PLC0415

    pooled_k, pooled_v = (None if t is None else packed(t) for t in (pooled_k, pooled_v))
    if bias is not None:
        bias = bias.contiguous()
    if mask is not None:
        mask = mask.contiguous().view(torch.uint8)
    return Call(packed(q), packed(k), packed(v), pooled_k, pooled_v, bias, mask, *rest)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:7], *output)
    ctx.rest = inputs[7:]


def _backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple:
    *inputs, o, lse = ctx.saved_tensors
    do = torch.zeros_like(o) if do is None else do
    grads = _local_backward(do, dlse, o, lse, *inputs, *ctx.rest)
    return *(None if t is None else g for g, t in zip(grads, inputs[:6], strict=True)), *[None] * 6


_local.register_autograd(_backward, setup_context=_save)
