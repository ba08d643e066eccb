"""The linear family at 4K to 1M tokens: LinFusion, RALA, InLine, agent, HiLo and Halo beside the papers' formulas."""

from typing import Any

import torch

from vision_attn.bench.linear import CANDIDATES, LinearProblem
from vision_attn.bench.measure import Measurement

__all__ = ["CANDIDATES", "TITLE", "cases", "row"]

TITLE = (
    "Linear, RALA, InLine, agent, HiLo and Halo attention, the whole operator on `[B, N, H, D]` tensors. `copy` moves "
    "the bytes of the floor (q, k, v and o once; RALA reads q twice; backward: seven tensors) in the same run: its "
    "ratio is our share of copy bandwidth. `eager` and `compiled` are the papers' formulas"
)
_PEERS = ("copy", "eager", "compiled", "fbi_la")
_SIDES = (64, 128, 256, 512, 1024)
_QUICK = ("linear-64-h10-d64", "linear-256-h10-d64", "rala-256-h10-d64", "agent-256-a49-h10-d64", "hilo-256-h10-d64")


def cases(device: torch.device, quick: bool = False) -> list[LinearProblem]:
    """Return the cases for a device; a CPU gets small ones in float32."""
    if device.type == "cpu":
        return _on_cpu(quick)
    every = [*_linear(), *_rala(), *_inline(), *_agent(), *_hilo(), *_halo()]
    return [case for case in every if not quick or case.name in _QUICK]


def row(case: LinearProblem, measurement: Measurement) -> dict[str, Any]:
    """Measure one case; see `Measurement.row`."""
    return measurement.row(case, CANDIDATES)


def _linear() -> list[LinearProblem]:
    small = [LinearProblem("Linear", "linear", side, _PEERS, ("ours", "copy", "compiled")) for side in _SIDES]
    wide: dict[str, Any] = dict(heads=24, head_dim=128)
    large = [
        LinearProblem("Linear", "linear", side, _PEERS, ("ours", "copy", "compiled"), **wide) for side in (64, 256)
    ]
    half = LinearProblem("Linear", "linear", 256, ("copy",), ("ours", "copy"), dtype="float16")
    full = LinearProblem("Linear", "linear", 256, ("copy",), ("ours", "copy"), dtype="float32")
    return [*small, *large, half, full]


def _rala() -> list[LinearProblem]:
    return [LinearProblem("RALA", "rala", side, _PEERS, ("ours", "compiled")) for side in _SIDES[:4]]


def _inline() -> list[LinearProblem]:
    both = ("ours", "copy", "compiled")
    every = [LinearProblem("InLine", "inline", side, _PEERS[:3], both) for side in _SIDES[:4]]
    return [*every, LinearProblem("InLine", "inline", 256, _PEERS[:3], both, heads=24, head_dim=128)]


def _agent() -> list[LinearProblem]:
    sizes = [(side, agents) for agents in (49, 256) for side in (64, 256)]
    both = ("ours", "compiled")
    every = [LinearProblem("Agent", "agent", side, _PEERS, both, agents=agents) for side, agents in sizes]
    return [*every, LinearProblem("Agent", "agent", 256, _PEERS, both, heads=24, head_dim=128, agents=49)]


def _hilo() -> list[LinearProblem]:
    peers = ("copy", "eager", "SDPA")
    return [LinearProblem("HiLo", "hilo", side, peers) for side in (64, 128, 256)]


def _halo() -> list[LinearProblem]:
    peers, both = ("copy", "eager", "SDPA"), ("ours", "eager")
    every = [LinearProblem("Halo", "halo", side, peers, both) for side in (64, 128, 256)]
    return [*every, LinearProblem("Halo", "halo", 128, peers, both, heads=24, head_dim=128)]


def _on_cpu(quick: bool) -> list[LinearProblem]:
    small: dict[str, Any] = dict(heads=2, head_dim=32, dtype="float32")
    side, both = 16 if quick else 64, ("ours", "copy", "eager")
    peers = ("copy", "eager", "compiled")
    return [
        LinearProblem("Linear", "linear", side, peers, both, **small),
        LinearProblem("RALA", "rala", side, peers, both, **small),
        LinearProblem("InLine", "inline", side, peers, both, **small),
        LinearProblem("Agent", "agent", side, peers, both, agents=16, **small),
        LinearProblem("HiLo", "hilo", side, ("copy", "eager", "SDPA"), **small),
        LinearProblem("Halo", "halo", side, ("copy", "eager", "SDPA"), **small),
    ]
