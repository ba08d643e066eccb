"""Local attention: grid tokens attend to a window of the grid, all other tokens attend to and are seen by everything.

    o_i = sum_j softmax_j(scale * q_i . k_j + bias_ij) v_j,    j in window(i) + prefix + suffix + pooled

The window is a disc (CLEAR) or a square (NATTEN): see `local_window.py`. This file holds the signature, the checks and
the definition; `portable.py` is the portable implementation, `op.py` the fused one.
"""

import torch
from torch import Tensor

from vision_attn.grid import Grid
from vision_attn.kernels.backend import Implementation, pick
from vision_attn.kernels.local.op import local_attention_triton, triton_reasons
from vision_attn.kernels.local.portable import local_attention_torch
from vision_attn.kernels.local.window import Window
from vision_attn.kernels.precision import FLOATS


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Grid,
    window: Window,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend from each grid token to a window around it and to every token outside the grid.

    Prefix and suffix tokens see everything but the pooled keys. Logits and sums are computed in float32 at least.

    Args:
        q: Queries `[B, N, H, D]`, with `N == grid.tokens`; any strides.
        k: Keys, like `q`.
        v: Values, like `q`.
        grid: Where the image tokens lie in the sequence.
        window: Disc or square, its bias and pooled keys.
        mask: Bool `[B, prefix + suffix]` (or batch 1): False hides a key outside the grid from all queries. Keys of the
            grid cannot be hidden.
        scale: Factor of the logits, `D ** -0.5` if None.
        backend: 'triton' (CUDA, fused), 'torch' (any device), 'reference' (dense, small inputs), or 'auto' for the
            fastest that can run.

    Returns:
        `[B, N, H, D]` in the dtype of `q`.

    Raises:
        TypeError: If dtypes differ or are not floating point.
        ValueError: If shapes, devices, the window and the grid do not fit each other, or a named backend cannot run
            (every reason is listed).
    """
    check_inputs(q, k, v, grid)
    check_window(q, grid, window)
    check_mask(q, grid, mask)
    reasons = triton_reasons(q, window)
    if backend == "auto" and (not q.is_cuda or (window.covers(grid) and window.bias is None)):
        reasons = [*reasons, "on a CPU it is interpreted, and a window that covers the grid is dense attention"]
    implementations = {
        "triton": Implementation(local_attention_triton, reasons),
        "torch": Implementation(local_attention_torch),
        "reference": Implementation(_reference),
    }
    run = pick("local_attention", backend, implementations)
    return run(q, k, v, grid, window, mask, q.shape[-1] ** -0.5 if scale is None else scale)


def check_inputs(q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> None:
    """Refuse q, k, v that do not agree with each other or with the grid."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 4:
            raise ValueError(f"{name} must be [B, N, H, D], got shape {tuple(t.shape)}")
        if t.shape != q.shape:
            raise ValueError(f"q, k and v must have one shape, got q {tuple(q.shape)} and {name} {tuple(t.shape)}")
        if t.dtype not in FLOATS:
            raise TypeError(f"q, k and v must be floating point, got {name} {t.dtype}")
        if t.dtype != q.dtype:
            raise TypeError(f"q, k and v must share one floating dtype, got q {q.dtype} and {name} {t.dtype}")
        if t.device != q.device:
            raise ValueError(f"q, k and v must be on one device, got q on {q.device} and {name} on {t.device}")
    if q.shape[1] != grid.tokens:
        raise ValueError(f"N = {q.shape[1]} tokens, but {grid} has {grid.tokens}")


def check_window(q: Tensor, grid: Grid, window: Window) -> None:
    """Refuse a window that does not fit the grid, or whose bias or pooled keys do not fit q."""
    window.check(grid)
    B, _, H, D = q.shape
    if window.bias is not None:
        want = (H, 2 * window.kernel[0] - 1, 2 * window.kernel[1] - 1)
        if tuple(window.bias.shape) != want:
            raise ValueError(f"bias must be [H, 2 * K_y - 1, 2 * K_x - 1] = {want}, got {tuple(window.bias.shape)}")
        if window.bias.device != q.device:
            raise ValueError(f"bias must be on the device of q, {q.device}, got {window.bias.device}")
    for name, t in zip(("pooled keys", "pooled values"), window.pooled or (), strict=False):
        if t.dim() != 4 or (t.shape[0], t.shape[2], t.shape[3]) != (B, H, D):
            raise ValueError(f"{name} must be [B, M, H, D] = [{B}, M, {H}, {D}], got {tuple(t.shape)}")
        if t.dtype != q.dtype or t.device != q.device:
            raise TypeError(f"{name} must be {q.dtype} on {q.device} like q, got {t.dtype} on {t.device}")


def check_mask(q: Tensor, grid: Grid, mask: Tensor | None) -> None:
    """Refuse a key mask of another dtype, shape or device."""
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, True where a key is seen, got {mask.dtype}")
    outside = grid.prefix + grid.suffix
    if mask.dim() != 2 or mask.shape[1] != outside or mask.shape[0] not in (1, q.shape[0]):
        raise ValueError(
            f"mask must be [B, prefix + suffix] = [{q.shape[0]}, {outside}] for {grid}, got {tuple(mask.shape)}"
        )
    if mask.device != q.device:
        raise ValueError(f"mask must be on the device of q, {q.device}, got {mask.device}")


def _reference(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, window: Window, mask: Tensor | None, scale: float
) -> Tensor:
    """The definition: a dense mask and a softmax, in float64 if q is, else float32."""
    B, N = q.shape[:2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    pooled = window.pooled or (k[:, :0], v[:, :0])
    seen = torch.ones(B, N, N + pooled[0].shape[1], dtype=torch.bool, device=q.device)
    seen[:, grid.image, grid.image] = window.allowed(grid, q.device)
    seen[:, : grid.prefix, N:] = False
    seen[:, grid.image.stop :, N:] = False
    if mask is not None:
        seen[:, :, : grid.prefix] &= mask[:, None, : grid.prefix]
        seen[:, :, grid.image.stop : N] &= mask[:, None, grid.prefix :]
    k, v = torch.cat([k, pooled[0]], 1), torch.cat([v, pooled[1]], 1)
    logits = torch.einsum("bnhd,bmhd->bhnm", q.to(dtype), k.to(dtype)) * scale
    if window.bias is not None:
        logits = logits + _dense_bias(window, grid, N, k.shape[1]).to(dtype)
    weights = logits.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhnm,bmhd->bnhd", weights, v.to(dtype)).to(q.dtype)


def _dense_bias(window: Window, grid: Grid, queries: int, keys: int) -> Tensor:
    """The bias of every pair, `[H, N, N + M]`: zero outside the grid, arbitrary where the window does not see."""
    assert window.bias is not None
    device = window.bias.device
    index = []
    for length, K, d in zip((grid.height, grid.width), window.kernel, window.steps, strict=True):
        i = torch.arange(length, device=device)
        index.append(((i - i[:, None]).div(d, rounding_mode="floor") + K - 1).clamp(0, 2 * K - 2))
    dense = window.bias[:, index[0][:, None, :, None], index[1][None, :, None, :]]
    full = dense.new_zeros(dense.shape[0], queries, keys)
    full[:, grid.image, grid.image] = dense.reshape(-1, grid.image_tokens, grid.image_tokens)
    return full
