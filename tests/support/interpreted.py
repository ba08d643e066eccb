"""Small tiles for Triton's interpreter, which walks programs one after another.

Tests marked `interpreter` run in a process of their own, `TRITON_INTERPRET=1 pytest -m interpreter`: Triton reads the
variable when it is imported, and torch imports it. Sizes of tiles are no matter of correctness; bf16 is silently wrong
in the interpreter, and the tuned launches are checked on a GPU: `tests/gpu/`.
"""

import importlib
import math
import os
from dataclasses import replace

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_SIZES = (2, 4)  # bytes of an element


def _module(name):
    return importlib.import_module(f"vision_attn.kernels.{name}")


def small_tiles(monkeypatch):
    """Give every launch one tile of 64 tokens, or of 8 x 16."""
    local_tiles(monkeypatch)
    linear_tiles(monkeypatch, 64)
    pair_tiles(monkeypatch, 64)
    cell_tiles(monkeypatch, 64)


def local_tiles(monkeypatch):
    """Take tiles of 8 x 16 queries and 8 x 8 keys for local attention."""
    tiles = _module("local.tiles").Tiles((8, 16), (8, 8), 1, 1)
    for name in ("forward", "backward", "key_gradients"):
        monkeypatch.setattr(_module(f"local.{name}"), "_CONFIGS", {(size, 256, math.inf): tiles for size in _SIZES})


def linear_tiles(monkeypatch, length, programs=1, boxes=False):
    """Take tiles of `length` tokens for linear attention; `boxes` where TMA can load."""
    forward, backward, mean = (_module(f"linear.{name}") for name in ("forward", "backward", "mean"))
    for plan in (forward._plan_state, forward._plan_merge, forward._plan_output):
        plan.forget()
    for plan in (backward._plan_queries, backward._plan_keys):
        plan.forget()
    launch = _module("triton.launching").Launch(length, 1, 1, programs)
    launch = replace(launch, boxes=launch if boxes else None)
    table = {(size, 256, 256): launch for size in _SIZES}
    for name in ("_STATE", "_HEAVY_STATE", "_OUTPUT", "_SCALED_OUTPUT"):
        monkeypatch.setattr(forward, name, table)
    for name in ("_QUERIES", "_KEYS"):
        monkeypatch.setattr(backward, name, table)
    monkeypatch.setattr(mean, "_MEAN", {256: launch})


def pair_tiles(monkeypatch, length):
    """Take tiles of `length` tokens for agent attention, and for the shared keys of windows."""
    launching = _module("triton.launching")
    table = {(size, 256): launching.Blocks(length, launching.Launch(length, 1, 1, 1)) for size in _SIZES}
    for module, name in (("agent.forward", "_FORWARD"), ("agent.backward", "_QUERIES"), ("triton.pairs", "_KEYS")):
        monkeypatch.setattr(_module(module), name, table)


def cell_tiles(monkeypatch, slots, features=64):
    """Take tiles of `slots` slots for window and linear-local attention, and some features at a time."""
    for module, name in (("window.forward", "_FORWARD"), ("window.backward", "_QUERIES"), ("window.backward", "_KEYS")):
        monkeypatch.setattr(_module(module), name, {(size, 256): (slots, 1) for size in _SIZES})
    table = {(size, 256): (slots, 1, 1, features) for size in _SIZES}
    monkeypatch.setattr(_module("linear_local.forward"), "_FORWARD", table)


def auto_is_triton(monkeypatch):
    """Send what would be 'auto' to Triton; return the names of the operators that ran, which fills."""
    ran, pick = [], _module("backend").pick

    def triton_for_auto(operator, name, implementations):
        if name != "auto":
            return pick(operator, name, implementations)
        ran.append(operator)
        return implementations["triton"].run

    for module in ("linear", "agent", "window"):
        monkeypatch.setattr(_module(module), "pick", triton_for_auto)
    return ran
