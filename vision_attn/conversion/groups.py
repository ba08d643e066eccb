"""Grouped queries: several heads of queries share one head of keys and values."""

from collections.abc import Callable

from torch import Tensor

from vision_attn.processors.base import Processor

Run = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def grouped(processor: Processor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, run: Run) -> Tensor:
    """Attend with fewer heads of keys than of queries.

    Where a processor computes all heads alike, a group becomes a sample of its own, whose heads see the shared keys as
    a view. Others get keys and values that are repeated.

    Args:
        processor: What attends.
        q: Queries `[B, N, H, D]`.
        k: Keys `[B, N, G, D]`, where G divides H.
        v: Values, like `k`.
        mask: Bool `[B or 1, prefix + suffix]`, or None.
        run: Attends with as many heads of keys as of queries.

    Returns:
        `[B, N, H, D]`.
    """
    B, _, H, _ = q.shape
    G = k.shape[2]
    if not processor.heads_alike:
        k, v = (t.repeat_interleave(H // G, 2) for t in (k, v))
        return run(q, k, v, mask)
    q = q.unflatten(2, (G, -1)).transpose(1, 2).flatten(0, 1)  # [B * G, N, H / G, D]
    k, v = (t.transpose(1, 2).flatten(0, 1).unsqueeze(2).expand(-1, -1, H // G, -1) for t in (k, v))
    mask = None if mask is None else mask.expand(B, -1).repeat_interleave(G, 0)
    return run(q, k, v, mask).unflatten(0, (B, G)).transpose(1, 2).flatten(2, 3)
