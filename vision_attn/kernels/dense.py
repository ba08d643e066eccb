"""Dense attention over `[B, N, H, D]` tensors, and the tokens outside a grid, which attend to everything.

PyTorch's fused attention has first derivatives only. Here plain PyTorch gives the others.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_attn.grid import Grid
from vision_attn.kernels.backend import autocasts, exporting, plain_gradients, transformed


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Attend from each query to every key.

        o = softmax(scale * q k^T + mask) v

    Args:
        q: Queries `[B, N, H, D]`.
        k: Keys `[B, M, H, D]`.
        v: Values `[B, M, H, D]`.
        mask: Broadcasts to `[B, H, N, M]`. Bool: False hides a key. Else a bias, in the dtype of `q`.
        scale: Factor of the logits, `D ** -0.5` if None.

    Returns:
        `[B, N, H, D]`.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if transformed() or (exporting() and torch.onnx.is_in_onnx_export()):  # ONNX takes the strides of the fused one
        return _plain(q, k, v, mask, scale).transpose(1, 2)
    learned = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, mask))
    traced = torch.compiler.is_compiling() or torch._C._get_tracing_state()  # which gives no second derivatives
    if not learned or traced:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)
    second = _Second(scale)
    q, k, v, mask = _Inputs.apply(second, q, k, v, mask)
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    o.register_hook(second.note)
    return o.transpose(1, 2)


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast as autocast does for `scaled_dot_product_attention`."""
    device = tensors[0].device.type
    if not autocasts(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def _plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attend over `[B, H, N, D]` tensors in plain PyTorch, in float32 at least."""
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = (q.to(wide) * scale) @ k.to(wide).mT
    if mask is not None:
        logits = logits + mask if mask.dtype != torch.bool else logits.masked_fill(~mask, -torch.inf)
    return (logits.softmax(-1) @ v.to(wide)).to(q.dtype)


class _Second:
    """What one call of fused attention needs for second derivatives.

    Attributes:
        scale: Factor of the logits.
        do: The gradient of its output, during a backward that is to be differentiated.
    """

    def __init__(self, scale: float) -> None:
        self.scale = scale
        self.do: Tensor | None = None

    def note(self, do: Tensor) -> None:
        """Keep the gradient of the output for `_Inputs`, if gradients of gradients are wanted."""
        self.do = do if torch.is_grad_enabled() else None


class _Inputs(torch.autograd.Function):
    """Pass q, k, v and mask on; in a backward that is to be differentiated, give them gradients in plain PyTorch."""

    @staticmethod
    def forward(ctx: Any, second: _Second, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        """Keep the tensors, which fused attention keeps too."""
        ctx.set_materialize_grads(False)
        ctx.second = second
        ctx.save_for_backward(*tensors)
        same = [None if t is None else t.view_as(t) for t in tensors]
        fixed = [
            s for s, t in zip(same, tensors, strict=True) if s is not None and t is not None and not t.requires_grad
        ]
        ctx.mark_non_differentiable(*fixed)
        return tuple(same)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Replace the gradients of fused attention if they are to be differentiated."""
        do, ctx.second.do = ctx.second.do, None
        if do is None:
            return None, *grads
        return None, *plain_gradients(_plain, (*ctx.saved_tensors, ctx.second.scale), do)[:-1]


def biased_attention(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, allowed: Tensor, bias: Tensor, *, scale: float | None = None
) -> Tensor:
    """Attend with a bias for each pair of tokens, and from the grid's tokens to some of the grid alone.

    Args:
        q: Queries `[B, N, H, D]`, with `N == grid.tokens`.
        k: Keys, like `q`.
        v: Values, like `q`.
        grid: Where the image tokens lie in the sequence.
        allowed: Bool `[height * width, height * width]`, True where a query (row) of the grid sees a key.
        bias: Added to the scaled logits; broadcasts to `[B, H, N, N]`.
        scale: Factor of the logits, `D ** -0.5` if None.

    Returns:
        `[B, N, H, D]` in the dtype of `q`.
    """
    hidden = torch.zeros(grid.tokens, grid.tokens, dtype=torch.bool, device=q.device)
    hidden[grid.image, grid.image] = ~allowed
    return dense_attention(q, k, v, mask=bias.to(q.dtype).masked_fill(hidden, -torch.inf), scale=scale)


def full_mask(mask: Tensor | None, grid: Grid, extra: int = 0) -> Tensor | None:
    """Widen a mask of the keys outside the grid to the whole sequence, for `dense_attention`.

    Args:
        mask: Bool `[B, prefix + suffix]` or None.
        grid: Where the image tokens lie.
        extra: Number of keys after the sequence; all are seen.

    Returns:
        Bool `[B, 1, 1, N + extra]`, or None for None.
    """
    if mask is None:
        return None
    whole = around(mask, mask.new_ones(mask.shape[0], grid.image_tokens), grid)
    return torch.cat([whole, mask.new_ones(mask.shape[0], extra)], 1)[:, None, None]


def outside(t: Tensor, grid: Grid) -> Tensor:
    """Return the tokens outside the grid, prefix then suffix: `[B, N, ...]` to `[B, prefix + suffix, ...]`."""
    return torch.cat([t[:, : grid.prefix], t[:, grid.image.stop :]], 1)


def around(rest: Tensor, image: Tensor, grid: Grid) -> Tensor:
    """Put the tokens outside the grid before and after those of an image: undoes `outside`."""
    return torch.cat([rest[:, : grid.prefix], image, rest[:, grid.prefix :]], 1)


def with_dense_rows(
    o: Tensor, q: Tensor, k: Tensor, v: Tensor, grid: Grid, *, mask: Tensor | None, scale: float | None
) -> Tensor:
    """Complete the grid's output by the tokens outside the grid, each of which attends to every token.

    Args:
        o: Output of the grid's tokens `[B, height * width, H, D]`.
        q: Queries of all tokens `[B, N, H, D]`.
        k: Keys of all tokens, like `q`.
        v: Values of all tokens, like `q`.
        grid: Where the image tokens lie.
        mask: Bool `[B, prefix + suffix]`, False for padding keys, or None.
        scale: Factor of the logits, `D ** -0.5` if None.

    Returns:
        `[B, N, H, D]`.
    """
    if not grid.prefix + grid.suffix:
        return o
    return around(dense_attention(outside(q, grid), k, v, mask=full_mask(mask, grid), scale=scale), o, grid)
