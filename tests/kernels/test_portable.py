"""Operators where there is neither Triton nor float64, as on Apple's GPUs; and what other GPUs are told."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vision_attn import RALA, Agent, Clear, Halo, HiLo, InLine, LinearLocal, LinFusion, Multipole, Neighborhood
from vision_attn.grid import Grid
from vision_attn.kernels.triton import launching
from vision_attn.processors.base import Layer

SPECS = {
    "disc": Clear(radius=2.5),
    "square": Neighborhood(kernel_size=3),
    "dilated": Neighborhood(kernel_size=3, dilation=2),
    "multipole": Multipole(),
    "multipole-means": Multipole(exact=0, pool=2),
    "window": HiLo(alpha=0.5, window_size=2),
    "halo": Halo(block=4, halo=3),
    "inline": InLine(),
    "agent": Agent(num_agents=4),
    "linear": LinFusion(),
    "hedgehog": LinFusion(feature_map="hedgehog"),
    "rala": RALA(),
    "linear-local": LinearLocal(),
}


class NoFloat64(TorchDispatchMode):
    """Refuses tensors of float64, as MPS does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.dtype == torch.float64:
                raise TypeError(f"Cannot convert a MPS Tensor to float64 dtype: {func}")
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", SPECS)
def test_no_processor_makes_float64(name, dtype):
    grid = Grid(16, 24, prefix=0 if name == "linear-local" else 3)
    with NoFloat64():
        processor = SPECS[name].build(Layer("", 2, 16, dim=32)).to(dtype)
        q, k, v = (torch.randn(1, grid.tokens, 2, 16, dtype=dtype, requires_grad=True) for _ in range(3))
        o = processor(q, k, v, grid)
        o = o[0] if isinstance(o, tuple) else o
        o.sum().backward()
    assert o.dtype == dtype and q.grad is not None


def test_the_mode_finds_float64():
    with NoFloat64(), pytest.raises(TypeError, match="float64"):
        torch.ones(2).double()


WITHOUT_TRITON = """
import importlib.abc, sys
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("triton", "pytorch_triton_xpu", "pytorch_triton_rocm"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "triton" else real(name, *a)
import torch
from vision_attn import Clear, Multipole
from vision_attn.grid import Grid
from vision_attn.kernels.local import Window, local_attention
from vision_attn.processors.base import Layer
grid = Grid(16, 16, prefix=2)
q, k, v = torch.randn(3, 1, grid.tokens, 2, 16, requires_grad=True)
for spec in (Clear(radius=3), Multipole()):
    spec.build(Layer("", 2, 16))(q, k, v, grid).sum().backward()
try:
    local_attention(q, k, v, grid, Window(radius=3), backend="triton")
except ValueError as error:
    print(error)
print("triton" in sys.modules)
"""


def test_without_triton_everything_runs_and_triton_by_name_says_what_is_missing():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    message, loaded = done.stdout.splitlines()
    assert "triton is not installed" in message and loaded == "False"


@pytest.mark.parametrize("device", ["mps:0", "xpu:0", "cpu"])
def test_triton_by_name_says_on_which_device_it_does_not_run(device, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q = SimpleNamespace(is_cuda=False, device=device, dtype=torch.float32, shape=(1, 4, 1, 16))
    reasons = launching.triton_reasons(q)
    assert f"q is on {device}, not on cuda" in reasons


@pytest.mark.parametrize(("system", "package"), [("Windows", "triton-windows"), ("Linux", "triton")])
def test_what_to_install_depends_on_the_system(system, package, monkeypatch):
    monkeypatch.setattr(launching, "_HAS_TRITON", False)
    monkeypatch.setattr(launching.platform, "system", lambda: system)
    q = SimpleNamespace(is_cuda=True, device="cuda:0", dtype=torch.float32, shape=(1, 4, 1, 16))
    assert f"triton is not installed (pip install {package})" in launching.triton_reasons(q)
