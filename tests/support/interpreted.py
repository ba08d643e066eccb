"""Small tiles for Triton's interpreter, which walks programs one after another.

Tests marked `interpreter` run in a process of their own, `TRITON_INTERPRET=1 pytest -m interpreter`: Triton reads the
variable when it is imported, and torch imports it. Sizes of tiles are no matter of correctness; bf16 is silently wrong
in the interpreter, and the tuned launches are checked on a GPU: `tests/gpu/`.
"""

import importlib
import inspect
import os
from dataclasses import replace
from functools import cache

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def quicken():
    """Leave out what takes half of the interpreter's time and changes nothing.

    For each operation on integers it computes whether they overflow, and throws that away without `debug`. For each
    device function that a kernel calls it patches the language again, which the launch has patched, and searches
    modules for what to patch. For each dtype it builds the table of NumPy's anew.
    """
    from triton import language
    from triton.language import core
    from triton.runtime import interpreter

    builder, find, patch = interpreter.interpreter_builder, interpreter._get_np_dtype, interpreter._patch_lang
    assert not builder.options.debug
    builder.options = replace(builder.options, sanitize_overflow=False)

    @cache
    def builtins_of(pkg):
        return [name for name, member in inspect.getmembers(pkg) if core.is_builtin(member)]

    def patch_builtin(pkg, builder, scope):
        for name in builtins_of(pkg):
            if core.is_builtin(member := getattr(pkg, name)):  # it is not where another scope has patched it
                interpreter._patch_attr(pkg, name, member, builder, scope)

    @cache
    def languages_of(fn):
        return [value for value in fn.__globals__.values() if value is language or value is core]

    def patch_once(fn):
        first = any(core.is_builtin(f) for f in (core.tensor.__add__, *(tl.load for tl in languages_of(fn))))
        return patch(fn) if first else interpreter._LangPatchScope()

    found = {}

    def dtype_of(dtype):
        element = dtype.element_ty if isinstance(dtype, core.block_type) else dtype
        if element.name not in found:
            found[element.name] = find(element)
        return found[element.name]

    interpreter._patch_builtin, interpreter._patch_lang, interpreter._get_np_dtype = patch_builtin, patch_once, dtype_of


def _module(name):
    return importlib.import_module(f"vision_attn.kernels.{name}")


def take(monkeypatch, **taken):
    """Take a launch for each named kernel instead of the tables'; `linear__state` is 'linear.state'."""
    launches, launching = _module("launches"), _module("triton.launching")
    tables, sizes = launches.tables, (2, 4)
    rows = {
        name.replace("__", "."): [launches.Row(size, 1024, launch) for size in sizes] for name, launch in taken.items()
    }
    monkeypatch.setattr(launches, "tables", lambda architecture: (launches.Table(rows), *tables(architecture)))
    launching.forget()


def small_tiles(monkeypatch):
    """Give every launch one tile of 64 tokens, or of 8 x 16."""
    local_tiles(monkeypatch)
    linear_tiles(monkeypatch, 64)
    pair_tiles(monkeypatch, 64)
    cell_tiles(monkeypatch, 64)


def local_tiles(monkeypatch):
    """Take tiles of 8 x 16 queries and 8 x 8 keys for local attention."""
    queries, keys = (8, 16), (8, 8)
    launch = _module("launches").Launch
    of_queries, of_keys = launch(queries, keys, 1), launch(keys, queries, 1)
    take(monkeypatch, local__forward=of_queries, local__queries=of_queries, local__keys=of_keys)


def linear_tiles(monkeypatch, length, programs=1, boxes=False):
    """Take tiles of `length` tokens for linear attention; `boxes` where TMA can load."""
    launch = _module("launches").Launch(walk=(length,), warps=1, programs=programs, features=128)
    launch = replace(launch, boxes=launch if boxes else None)
    names = ["state", "heavy_state", "output", "scaled_output", "queries", "keys", "mean"]
    names += [f"wide_{name}" for name in ("output", "queries", "keys")]
    take(monkeypatch, **{f"linear__{name}": launch for name in names})


def pair_tiles(monkeypatch, length):
    """Take tiles of `length` tokens for agent attention, and for the shared keys of windows."""
    launch = _module("launches").Launch((length,), (length,), 1)
    take(monkeypatch, agent__forward=launch, agent__queries=launch, pairs__keys=launch)


def cell_tiles(monkeypatch, slots, features=64):
    """Take tiles of `slots` slots for window and linear-local attention, and some features at a time."""
    launch = _module("launches").Launch((slots,), warps=1, features=features)
    names = [
        f"{operator}__{kernel}" for operator in ("window", "linear_local") for kernel in ("forward", "queries", "keys")
    ]
    take(monkeypatch, **dict.fromkeys(names, launch))


def shifted_boxes(monkeypatch):
    """Let the interpreter fetch boxes that begin before or after the start of their tensor."""
    shifted = _module("triton.rows").Shifted
    # what the interpreter asks of a tensor, to copy one that is on a GPU
    for name in ("untyped_storage", "storage_offset", "size", "stride"):
        monkeypatch.setattr(shifted, name, lambda self, name=name: getattr(self.tensor, name)(), raising=False)
    for name in ("new_empty", "set_"):
        monkeypatch.setattr(shifted, name, lambda self, *args, **kwargs: self, raising=False)


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
