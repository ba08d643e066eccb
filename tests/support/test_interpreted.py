"""Triton's interpreter, quickened, patches the language once a launch, and leaves it as it was."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl  # noqa: E402


@triton.jit
def doubled(x):
    return tl.sum(x, 0) * 2


@triton.jit
def add_doubled(x, out, COUNT: tl.constexpr):
    rows = tl.arange(0, COUNT)
    tl.store(out + rows, doubled(tl.load(x + rows)) + rows)


@pytest.mark.interpreter
def test_a_launch_and_what_it_calls_patch_the_language_once(monkeypatch):
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    patched, patch = [], interpreter._patch_builtin
    monkeypatch.setattr(interpreter, "_patch_builtin", lambda pkg, *more: patched.append(pkg) or patch(pkg, *more))
    x, out = torch.arange(8), torch.zeros(8, dtype=torch.int64)
    for launch in (1, 2):
        add_doubled[(1,)](x, out, 8)
        assert out.tolist() == [56 + i for i in range(8)]
        assert patched.count(tl) == launch
        assert is_builtin(tl.load) and is_builtin(tl.tensor.__add__)
