"""Injective linear attention in Triton: the sums of linear attention, and one product of each row with a small matrix.

    S = sum_j w_j k_j v_j^T / W - k_m v_m^T,    o_i = scale q_i S + v_m
    G = scale sum_i q_i do_i^T,    dq_i = scale S do_i
    dk_j = w_j / W G (v_j - v_m),    dv_j = w_j / W (G^T (k_j - k_m) + sum_i do_i)

W is the sum of the weights, k_m and v_m are weighed means. The sums are those of `forward.py` and `mean.py`. Each
output is `factor * x M + c` with one M and one c per head: a kernel of its own, which reads x once.
"""

# ruff: noqa: ANN001, ANN202  # the compiler of a kernel reads no annotations
# mypy: disable-error-code="no-untyped-def"

import math
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from vision_attn.kernels.launches import Launch
from vision_attn.kernels.linear.call import Call, fitting_plan
from vision_attn.kernels.linear.forward import merged, state_parts
from vision_attn.kernels.linear.mean import feature_sums
from vision_attn.kernels.linear.tiles import state_block
from vision_attn.kernels.triton.launching import Bound, Kernel, block_of, cut, planned, unit_strides_of
from vision_attn.kernels.triton.rows import (
    Plan,
    head_of,
    load_rows_below,
    own_head,
    program_of,
    store_rows_below,
    unit_head_of,
    unit_of,
)


@Kernel
@triton.jit
def _rows(
    x, matrix, offset, factor, weight, o, x_b, x_n, x_h, w_b, w_n, w_h, tokens, heads, batch_heads, length, scale,
    WEIGHT: tl.constexpr, TURNED: tl.constexpr, LEN: tl.constexpr, STAGES: tl.constexpr, F: tl.constexpr,
    BLOCK_F: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute o_i = w_i (scale factor x_i M + c) of a part of the tokens.

    Inputs: x `[B, tokens, H, F]` with strides `_b, _n, _h` in units of 16 bytes; matrix M `[B, H, F, D]`, with `TURNED`
    `[B, H, D, F]`; offset c `[B, H, D]`, factor `[B, H]`; weight `[B, tokens, H]` with strides `w_`.
    Outputs: o `[B, tokens, H, D]`.
    Launch: blocks of `BLOCK_D` channels, parts of `length` tokens, in steps of `LEN`.
    """
    D_BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    b, h, bh, block, part = program_of(heads, batch_heads, D_BLOCKS)
    x, o = unit_head_of(x, b, h, x_b, x_h), own_head(o, b, h, tokens, heads, D)
    weight = head_of(weight, b, h, w_b, w_h)
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    matrix += bh.to(tl.int64) * F * D
    if TURNED:
        M = tl.trans(load_rows_below(matrix, d, D, F, 0, F, BLOCK_F))  # [BLOCK_F, BLOCK_D]
    else:
        M = state_block(matrix, block * BLOCK_D, F, BLOCK_F, D, BLOCK_D)  # [BLOCK_F, BLOCK_D]
    c = tl.load(offset + bh * D + d, mask=d < D, other=0.0)  # [BLOCK_D]
    size = tl.load(factor + bh) * scale
    stop = tl.minimum(tokens, (part + 1) * length)
    for j in tl.range(part * length, stop, LEN, num_stages=STAGES):
        row = j + tl.arange(0, LEN)  # [LEN]
        x_rows = load_rows_below(x, row, stop, x_n * unit_of(x), 0, F, BLOCK_F)  # [LEN, BLOCK_F]
        o_rows = tl.dot(x_rows, M, input_precision=PRECISION) * size + c[None, :]  # [LEN, BLOCK_D]
        if WEIGHT:
            w = tl.load(weight + row.to(tl.int64) * w_n, mask=row < stop, other=0.0).to(tl.float32)  # [LEN]
            o_rows *= w[:, None]
        store_rows_below(o, row, stop, heads * D, block * BLOCK_D, o_rows, D, BLOCK_D)


@Kernel
@triton.jit
def _centre(
    sums, norm_sums, middle, total, matrix, factor, norm, SCALED: tl.constexpr, ROWS: tl.constexpr, F: tl.constexpr,
    BLOCK_F: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Turn one head's sums into means, and into S as products take it.

    Inputs: sums `[B, H, F, D]`, norm_sums `[B, H, F]`; middle v_m `[B, H, D]` and total W `[B, H]`, of which those
    without a key become 0 and 1.
    Outputs: matrix `[B, H, F, D]`, with `SCALED` divided by its largest number; that number or one, factor `[B, H]`;
    norm k_m `[B, H, F]`.
    Launch: `ROWS` rows of S at a time.
    """
    bh = tl.program_id(0).to(tl.int64)
    d, f = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_F)  # [BLOCK_D], [BLOCK_F]
    W = tl.load(total + bh)
    m = tl.where(W > 0.0, tl.load(middle + bh * D + d, mask=d < D, other=0.0), 0.0)  # [BLOCK_D]
    W = tl.where(W > 0.0, W, 1.0)
    sums += bh * F * D
    norm_sums += bh * F
    most = 1.0
    if SCALED:
        high = tl.zeros([ROWS, BLOCK_D], tl.float32)  # [ROWS, BLOCK_D]
        for first in tl.range(0, F, ROWS):
            high = tl.maximum(high, tl.abs(_centred(sums, norm_sums, m, W, first, ROWS, F, D, BLOCK_D)))
        most = tl.maximum(tl.max(tl.max(high, 1), 0), 1e-30)
    for first in tl.range(0, F, ROWS):
        S = _centred(sums, norm_sums, m, W, first, ROWS, F, D, BLOCK_D) / most  # [ROWS, BLOCK_D]
        store_rows_below(matrix + bh * F * D, first + tl.arange(0, ROWS), F, D, 0, S, D, BLOCK_D)
    tl.store(norm + bh * F + f, tl.load(norm_sums + f, mask=f < F, other=0.0) / W, mask=f < F)
    tl.store(middle + bh * D + d, m, mask=d < D)
    tl.store(total + bh, W)
    tl.store(factor + bh, tl.full((), 1.0, tl.float32) * most)


@triton.jit
def _centred(sums, norm_sums, m, W, first, ROWS: tl.constexpr, F: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows `first ..` of S, `[ROWS, BLOCK_D]`."""
    row = first + tl.arange(0, ROWS)  # [ROWS]
    z = tl.load(norm_sums + row, mask=row < F, other=0.0)  # [ROWS]
    return load_rows_below(sums, row, F, D, 0, D, BLOCK_D) / W - (z / W)[:, None] * m[None, :]


@planned
def _plan_rows(call: Call, scale: float, turned: bool) -> Plan:
    """Plan a launch of `_rows` from the queries of a call to its values, which are the output."""
    x, made, weight = call.q, torch.float32, call.weight
    tensors = x, x.dtype, made, made, made if weight is None else weight, call.v.dtype
    return fitting_plan(
        call, "linear.output", lambda launch: _plan_rows_launch(call, launch, scale, turned), tensors, ()
    )


def _plan_rows_launch(call: Call, launch: Launch, scale: float, turned: bool) -> Plan:
    B, N, H, _ = call.q.shape
    constants = {name: value for name, value in call.constants().items() if name not in ("MAP", "ROTARY")}
    blocks = math.ceil(call.v.shape[-1] / constants["BLOCK_D"])
    parts, length = cut(N, B * H * blocks, launch, call.q, least=1)
    w = (0, 0, 0) if call.weight is None else call.weight.stride()
    named = dict(
        WEIGHT=call.weight is not None, TURNED=turned, LEN=launch.length, STAGES=launch.stages, num_warps=launch.warps,
        **constants,
    )  # fmt: skip
    numbers = *unit_strides_of(call.q), *w, N, H, B * H, length, scale
    return Plan(Bound(_rows, (parts * blocks * B * H,), numbers, named), parts, (), launch)


def _rounded(matrix: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a matrix `[B, H, F, D]` as products take it, and its factor `[B, H]`: float16 holds no large numbers."""
    factor = matrix.new_ones(matrix.shape[:2])
    if dtype == torch.float16:
        factor = matrix.abs().amax((2, 3)).clamp_(min=1e-30)
    return (matrix / factor[..., None, None]).to(dtype).contiguous(), factor


def _product(
    x: Tensor, matrix: Tensor, factor: Tensor, offset: Tensor, scale: float, weight: Tensor | None = None,
    turned: bool = False,
) -> Tensor:  # fmt: skip
    """Return `w (scale factor x M + c)`, `[B, N, H, D]` in the dtype of `x`; see `_rows`."""
    o = x.new_empty((*x.shape[:3], offset.shape[-1]))
    call = Call(x, x, o, None, None, weight, None, "none", 0.0)
    plan = _plan_rows(call, scale, turned)
    plan.run(x, matrix, offset, factor, factor if weight is None else weight, o, boxed=())
    return o


def _apply(rows: Tensor, matrix: Tensor) -> Tensor:
    """Multiply `[B, H, F]` with `[B, H, F, D]`, element by element: a product of matrices could round to TF32."""
    return (rows[..., None] * matrix).sum(2)


def forward(call: Call, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the output, and what `_centre` leaves: S with its factor, k_m, v_m and W."""
    q, k, v = call.q, call.k, call.v
    (B, N, H, F), D = q.shape, v.shape[-1]
    if not B * N * H * D or not k.shape[1]:
        shapes = (B, H), (B, H, F), (B, H, D), (B, H)
        rest = (q.new_zeros(shape, dtype=torch.float32) for shape in shapes)
        return q.new_zeros((B, N, H, D)), q.new_zeros((B, H, F, D)), *rest  # type: ignore[return-value]
    middle, total = feature_sums(v, call.weight, "none")
    part, _ = state_parts(call, k, v, call.weight, None, None)
    sums, norm_sums, _ = merged(call, part, None, torch.float32, 1.0)
    matrix, factor, norm = q.new_empty(sums.shape), total.new_empty(total.shape), norm_sums.new_empty(norm_sums.shape)
    _centre[(B * H,)](
        sums, norm_sums, middle, total, matrix, factor, norm, SCALED=call.scaled, ROWS=16, F=F, BLOCK_F=block_of(F),
        D=D, BLOCK_D=block_of(D), num_warps=4,
    )  # fmt: skip
    return _product(q, matrix, factor, middle, scale), matrix, factor, norm, middle, total


def backward(
    call: Call, do: Tensor, matrix: Tensor, factor: Tensor, norm: Tensor, middle: Tensor, total: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    q, k, v = call.q, call.k, call.v
    if not q.numel() or not v.numel():
        return tuple(t.new_zeros(t.shape) for t in (q, k, v))  # type: ignore[return-value]
    sums = replace(call, q=do, k=do, v=q, weight=None)
    part, _ = state_parts(sums, do, q, None, None, None)
    gradient, shared, _ = merged(sums, part, None, torch.float32, 1.0)  # [B, H, D, F], [B, H, D]
    dq = _product(do, matrix, factor, torch.zeros_like(norm), scale, turned=True)
    # what stands for G in the products stands for it in the means too, so that its rounding cancels
    back, factor = _rounded(gradient, q.dtype)  # [B, H, D, F]
    share, wide = (factor * scale / total).contiguous(), back.float()
    less_values = -_apply(middle, wide) * share[..., None]
    less_keys = shared / total[..., None] - _apply(norm, wide.mT) * share[..., None]
    dk = _product(v, back, share, less_values, 1.0, call.weight)
    dv = _product(k, back, share, less_keys, 1.0, call.weight, turned=True)
    return dq, dk, dv
