"""Agent attention over processes: agents are sums over all queries, and gather from each process's keys in parts."""

from typing import Any

import torch
from torch import Tensor

from vision_attn.kernels.agent import Agents, Direct, read_agents
from vision_attn.kernels.agent.parts import dense_part, dense_part_gradients
from vision_attn.kernels.image import averages
from vision_attn.parallel.outside import Outside, merge_parts, packed, unpacked
from vision_attn.parallel.ranks import Ranks
from vision_attn.parallel.sums import Total, own_image
from vision_attn.parallel.transfers import gather


def pool_agents_over(q: Tensor, ranks: Ranks, agent_grid: tuple[int, int]) -> Total:
    """Begin to pool the agents `[B, rows, columns, H, D]` from the queries of the own slice `[B, tokens, H, D]`."""
    grid = ranks.grid
    first, stop = ranks.rows()
    image = own_image(ranks.own_image(q), 1, ranks)  # [B, rows, width, H, D]
    wide = torch.promote_types(q.dtype, torch.float32)
    rows, columns = (
        averages(length, count).to(q.device, wide)
        for length, count in zip((grid.height, grid.width), agent_grid, strict=True)
    )
    part = torch.einsum("ry,byxhd,cx->brchd", rows[:, first:stop], image.to(wide), columns)
    return Total(part, ranks, "agents")


def attend_through_over(
    q: Tensor, k: Tensor, v: Tensor, agents: Agents, ranks: Ranks, outside: Outside, *, scale: float, backend: str
) -> Tensor:  # fmt: skip
    """Attend through agents as `attend_through` does over the whole sequence, from the tokens of the own slice.

    Args:
        q: Queries of the own slice `[B, tokens, H, D]`.
        k: Keys, like `q`.
        v: Values, like `q`.
        agents: The agents, the same on all processes; their biases are those of the own keys `[H, A, tokens]` and of
            the own queries of the grid.
        ranks: Who holds what.
        outside: The tokens outside the grid, which are under way.
        scale: Factor of the logits.
        backend: How the operators run.

    Returns:
        `[B, tokens, H, D]`.
    """
    hidden = outside.own_mask()
    gathered: Tensor = _Gathered.apply(agents.tokens, k, v, agents.key_bias, hidden, scale, ranks)
    outside.wait()
    direct = Direct(outside.k, outside.v, outside.mask) if outside.count else None
    o = read_agents(ranks.own_image(q), gathered, agents, direct=direct, scale=scale, backend=backend)
    return ranks.together(outside.rows(), o)


class _Gathered(torch.autograd.Function):
    """What the agents gather from the keys of all processes: each attends its own keys, and the parts are merged."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, hidden: Tensor | None, scale: float,
        ranks: Ranks,
    ) -> Tensor:  # fmt: skip
        B, A, H, D = a.shape
        rows = gather(packed(*dense_part(a, k, v, hidden, scale, bias)), [A] * ranks.size, ranks, "agents' values")
        o, lse = merge_parts(*unpacked(rows.wait().unflatten(0, (ranks.size, A)), (B, H, D), a.dtype), a.dtype)
        ctx.save_for_backward(a, k, v, bias, o, lse)
        ctx.about = hidden, scale, ranks
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Any, ...]:
        a, k, v, bias, o, lse = ctx.saved_tensors
        hidden, scale, ranks = ctx.about
        do = Total(do, ranks, "agents' gradients").wait()
        dq, dk, dv, d_bias = dense_part_gradients(do, o, lse, a, k, v, hidden, scale, bias)
        return dq, dk, dv, d_bias, None, None, None
