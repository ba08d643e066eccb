"""Rows of tiny calls of every operator, in float64, on which derivatives are compared with finite differences."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vision_attn.grid import Grid
from vision_attn.kernels.agent import Agents, Direct, agent_attention
from vision_attn.kernels.block_sparse import Blocks, block_sparse_attention
from vision_attn.kernels.hedgehog import hedgehog
from vision_attn.kernels.linear import Features, feature_mean, injective_attention, linear_attention
from vision_attn.kernels.linear_local import linear_local_attention
from vision_attn.kernels.local import Window, local_attention
from vision_attn.kernels.multipole import Cells, multipole_attention
from vision_attn.kernels.residual import Network, add_networks
from vision_attn.kernels.window import Haloed, window_attention

B, H, D = 2, 2, 2


@dataclass(frozen=True)
class Case:
    """One row: an operator's name, the tensors that take gradients, and how it is called with them.

    Attributes:
        id: The operator, then what the call has besides q, k and v.
        shapes: Of the tensors; `+` before a name means that its values are not negative.
        call: Runs the operator on the tensors and a backend.
    """

    id: str
    shapes: dict[str, tuple[int, ...]]
    call: Callable[[tuple, str], Any]

    def __str__(self):
        return self.id


def inputs_of(case, dtype=torch.float64):
    """Return the tensors of a row, of which each takes a gradient."""
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in case.shapes.values())
    signed = zip(case.shapes, drawn, strict=True)
    return tuple((t.abs() + 0.1 if name[0] == "+" else t).to(dtype).requires_grad_() for name, t in signed)


def tokens(grid, mask, **more):
    """Shapes of q, k and v over a grid, of one sample unless a mask tells samples apart, and of further tensors."""
    return {name: (1 if mask is None else B, grid.tokens, H, D) for name in "qkv"} | more


TEXT = Grid(3, 4, prefix=2, suffix=1)
BARE = Grid(4, 3)
HIDDEN = torch.tensor([[True, False, True], [True, True, False]])


def local(id, grid, window, *, mask=None, **more):
    """A row of local attention; `more` may have the shapes of `bias`, `pooled_k` and `pooled_v`."""

    def call(t, backend):
        named = dict(zip(more, t[3:], strict=True))
        pooled = (named["pooled_k"], named["pooled_v"]) if "pooled_k" in named else None
        whole = Window(**window, bias=named.get("bias"), pooled=pooled)
        return local_attention(*t[:3], grid, whole, mask=mask, scale=0.7, backend=backend)

    return Case(f"local-{id}", tokens(grid, mask, **more), call)


def linear(id, N=4, M=5, *, rotary=False, mapped="elu", **more):
    """A row of linear attention; `more` may have the shapes of `+key_weight` and `global_query`."""
    sign = "+" if mapped == "none" else ""
    shapes = {f"{sign}q": (B, N, H, 4), f"{sign}k": (B, M, H, 4), "v": (B, M, H, D)} | more
    if rotary:
        shapes |= dict(cos=(N, 4), sin=(N, 4))

    def call(t, backend):
        named = dict(zip(shapes, t, strict=True))
        features = Features(mapped, t[-2:] if rotary else None)
        weights = dict(key_weight=named.get("+key_weight"), global_query=named.get("global_query"))
        return linear_attention(*t[:3], features=features, **weights, eps=1e-3, backend=backend)

    return Case(f"linear-{id}", shapes, call)


def agent(id, *, mask=None, seen=None, query_scale=None, **more):
    """A row of agent attention; `more` may have the shapes of biases, `direct_k` and `direct_v`."""
    shapes = dict(q=(B, 4, H, D), k=(B, 3, H, D), v=(B, 3, H, D), agents=(B, 2, H, D)) | more

    def call(t, backend):
        named = dict(zip(shapes, t, strict=True))
        agents = Agents(t[3], named.get("key_bias"), named.get("query_bias"), query_scale)
        direct = Direct(named["direct_k"], named["direct_v"], seen) if "direct_k" in named else None
        return agent_attention(*t[:3], agents, mask=mask, direct=direct, backend=backend)

    return Case(f"agent-{id}", shapes, call)


def window(id, grid, size, *, mask=None):
    """A row of window attention."""
    return Case(
        f"window-{id}",
        tokens(grid, mask),
        lambda t, backend: window_attention(*t, grid, size, mask=mask, scale=0.6, backend=backend),
    )


def linear_local(id, grid, size, *, mask=None):
    """A row of linear-local attention."""
    features = (1 if mask is None else B, grid.tokens, H, 3)

    def call(t, backend):
        q, k, v, a, b, gate = t
        pairs = (q, a), (k, b)
        return linear_local_attention(*pairs, v, grid, size, gate, mask=mask, scale=0.8, backend=backend)

    return Case(f"linear-local-{id}", tokens(grid, mask, **{"+a": features, "+b": features, "+gate": (H,)}), call)


def multipole(id, grid, fields, *, mask=None, learned=True):
    """A row of multipole attention, with learned masses and weights or without."""
    pool = fields["pool"]
    more = dict(mass=(H, 2), weights=(pool, pool)) if learned else {}

    def call(t, backend):
        cells = Cells(**fields, **dict(zip(more, t[3:], strict=True)))
        return multipole_attention(*t[:3], grid, cells, mask=mask, scale=0.5, backend=backend)

    return Case(f"multipole-{id}", tokens(grid, mask, **more), call)


def block_sparse(id, grid, count, kept, *, mask=None):
    """A row of block-sparse attention in a random order."""
    draw = torch.Generator().manual_seed(3)
    order = torch.rand(H, grid.image_tokens, generator=draw).argsort(1)
    own = 2 * torch.eye(count)
    blocks = Blocks(order, (torch.rand(H, count, count, generator=draw) - own).argsort(2)[..., :kept])

    def call(t, backend):
        return block_sparse_attention(*t, grid, blocks, mask=mask, scale=0.6, backend=backend)

    return Case(f"block-sparse-{id}", tokens(grid, mask), call)


def phi(t, backend):
    """Run the Hedgehog's features, which have no reference apart."""
    return hedgehog(*t, backend="torch" if backend == "reference" else backend)


def residual(t, backend):
    """Run two residual networks, which have no reference apart."""
    x, *weights = t
    networks = Network(*weights[:6], slope=0.3), Network(*weights[6:], slope=0.3)
    return torch.cat(add_networks(x, networks, backend="torch" if backend == "reference" else backend), -1)


def network(C, mid, name):
    """Shapes of a network's tensors."""
    return {
        f"weight_{name}": (mid, C),
        f"bias_{name}": (mid,),
        f"norm_weight_{name}": (mid,),
        f"norm_bias_{name}": (mid,),
        f"last_weight_{name}": (C, mid),
        f"last_bias_{name}": (C,),
    }


def injective(t, backend):
    """Run injective linear attention, with weights if there are any."""
    return injective_attention(*t[:3], key_weight=t[3] if len(t) > 3 else None, scale=0.7, backend=backend)


def mean(t, backend):
    """Run the mean of features, weighed if there are weights."""
    return feature_mean(t[0], weight=t[1] if len(t) > 1 else None, backend=backend)


POOLED = dict(pooled_k=(B, 2, H, D), pooled_v=(B, 2, H, D))
PAIR = dict(pooled_k=(1, 2, H, D), pooled_v=(1, 2, H, D))
BIASES = dict(key_bias=(H, 2, 3), query_bias=(H, 4, 2))
DIRECT = dict(direct_k=(B, 2, H, D), direct_v=(B, 2, H, D))
CASES = [
    local("disc", BARE, dict(radius=1.5)),
    local("disc-text-mask-pooled", TEXT, dict(radius=2), mask=HIDDEN, **POOLED),
    local("disc-counted-cells", Grid(2, 4, prefix=1), dict(radius=1.5, cell=2), **PAIR),
    local("square-bias", BARE, dict(kernel_size=(3, 2)), bias=(H, 5, 3)),
    local("dilated-text-bias-pooled", Grid(4, 5, prefix=1), dict(kernel_size=2, dilation=2), bias=(H, 3, 3), **PAIR),
    local("covering-text-mask", TEXT, dict(radius=9), mask=HIDDEN),
    linear("elu"),
    linear("relu-weights", mapped="relu", **{"+key_weight": (B, 5, H)}),
    linear("features", mapped="none"),
    linear("rotary-global", M=4, rotary=True, **{"+key_weight": (B, 4, 1), "global_query": (B, H, 4)}),
    Case("mean-plain", dict(q=(B, 4, H, D)), mean),
    Case("mean-weighed", {"q": (B, 4, H, D), "+weight": (B, 4, H)}, mean),
    Case("injective-plain", dict(q=(B, 4, H, 3), k=(B, 5, H, 3), v=(B, 5, H, D)), injective),
    Case("injective-weights", {"q": (B, 4, H, D), "k": (B, 5, H, D), "v": (B, 5, H, D), "+w": (B, 5, 1)}, injective),
    agent("plain"),
    agent("biases-mask", mask=HIDDEN, **BIASES),
    agent("biases-direct-mask", mask=HIDDEN, seen=HIDDEN[:, :2], query_scale=0.4, **BIASES, **DIRECT),
    window("even", Grid(4, 4), 2),
    window("cut", Grid(3, 4), (2, 3)),
    window("cut-text-mask", TEXT, 2, mask=HIDDEN),
    window("halo", BARE, Haloed((2, 1), 1)),
    window("halo-text-mask", TEXT, Haloed(2, (0, 1)), mask=HIDDEN),
    block_sparse("even", Grid(4, 3), 4, 2),
    block_sparse("cut-text-mask", TEXT, 5, 2, mask=HIDDEN),
    linear_local("even", Grid(4, 4), 2),
    linear_local("cut-text-mask", TEXT, 2, mask=HIDDEN),
    linear_local("one-cell", Grid(2, 3, prefix=1), 4),
    Case("hedgehog", dict(x=(B, 4, H, D), weight=(H, D, D)), phi),
    Case("residual", dict(x=(B, 2, 3), **network(3, 4, "q"), **network(3, 4, "k")), residual),
    multipole("pooled", Grid(4, 6), dict(cell=2, near=0, pool=2, exact=1)),
    multipole("cut-text-mask", Grid(1, 7, prefix=2, suffix=1), dict(cell=2, near=0, pool=1, exact=1), mask=HIDDEN),
    multipole("group-unlearned", Grid(6, 4), dict(cell=2, near=0, pool=2, exact=1, group=2, spread=0.5), learned=False),
    multipole("covering-text", TEXT, dict(cell=4, pool=2)),
]


# Rows whose Triton kernels have a backward; a cell of less than 3 x 3 tokens is too small for multipole's
TRITON = [
    case
    for case in CASES
    if str(case)
    in ("local-disc", "linear-elu", "injective-plain", "mean-plain", "agent-plain", "window-even", "window-halo")
]
TRITON.append(multipole("cells-of-3", Grid(6, 6), dict(cell=3, near=0, pool=3, exact=1)))
