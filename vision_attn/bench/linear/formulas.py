"""The papers' formulas in plain PyTorch, in any precision: peers of the operators, and what these are checked against.

They share no code with the operators. All take and return `[B, N, H, D]`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_attn.grid import Grid


def linfusion(q: Tensor, k: Tensor, v: Tensor, eps: float = 1e-4) -> Tensor:
    """LinFusion as its authors write it, https://github.com/Huage001/LinFusion."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return _linear(F.elu(q) + 1, F.elu(k) + 1, v, eps)


def rala(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """RALA's sums as its authors write them, without gate, rotation and convolution, https://github.com/qhfan/RALA."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    phi_q, phi_k = F.elu(q) + 1, F.elu(k) + 1
    logits = q.shape[-1] ** -0.5 * phi_q.mean(2, keepdim=True) @ phi_k.transpose(2, 3)
    return _linear(phi_q, phi_k * (k.shape[2] * logits.softmax(-1)).transpose(2, 3), v, 1e-6)


def _linear(phi_q: Tensor, phi_k: Tensor, v: Tensor, eps: float) -> Tensor:
    share = v.shape[2] ** -0.5
    normaliser = phi_q @ phi_k.mean(2, keepdim=True).transpose(2, 3) + eps
    return (phi_q @ ((phi_k * share).transpose(2, 3) @ (v * share)) / normaliser).transpose(1, 2)


def agent(q: Tensor, k: Tensor, v: Tensor, agents: Tensor) -> Tensor:
    """Agent attention as its authors write it, without biases, https://github.com/LeapLabTHU/Agent-Attention."""
    q, k, v, agents = (t.transpose(1, 2) for t in (q, k, v, agents))
    scale = q.shape[-1] ** -0.5
    gathered = ((agents * scale) @ k.transpose(2, 3)).softmax(-1) @ v
    return (((q * scale) @ agents.transpose(2, 3)).softmax(-1) @ gathered).transpose(1, 2)


def dense_rows(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    """Softmax attention of some queries, head by head."""
    return torch.cat([_dense(q[:, rows, h : h + 1], k[:, :, h : h + 1], v[:, :, h : h + 1]) for h in _heads(q)], 2)


def _dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v)


def _heads(q: Tensor) -> range:
    return range(q.shape[2])


def hilo_rows(q: Tensor, k: Tensor, v: Tensor, grid: Grid, rows: Tensor) -> Tensor:
    """HiLo with windows of 2 x 2 and alpha 0.5, of some queries: the first heads in windows, the last over means."""
    high = q.shape[2] // 2
    y, x = rows // grid.width // 2 * 2, rows % grid.width // 2 * 2
    places = torch.stack([(y + i) * grid.width + x + j for i in (0, 1) for j in (0, 1)], 1)  # [rows, 4]
    near, seen = (t[:, places.flatten(), :high].unflatten(1, (-1, 4)) for t in (k, v))
    logits = torch.einsum("bqhd,bqkhd->bqhk", q[:, rows, :high], near) * q.shape[-1] ** -0.5
    o = torch.einsum("bqhk,bqkhd->bqhd", logits.softmax(-1), seen)
    means = (t[:, :, high:].unflatten(1, (grid.height // 2, 2, grid.width // 2, 2)).mean((2, 4)) for t in (k, v))
    keys, values = (t.flatten(1, 2) for t in means)
    return torch.cat([o, dense_rows(q[:, :, high:], keys, values, rows)], 2)
