"""One seed, deterministic kernels, no network, torchvision's stand-in, and Triton's interpreter, for all tests."""

import gc
import importlib.util
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers share two cores
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products on a GPU

import pytest
import torch
from interpreted import INTERPRETED, quicken, small_tiles
from readable_ids import pytest_collection_modifyitems, pytest_make_parametrize_id  # noqa: F401

from vision_attn._compat import ensure_torchvision

ensure_torchvision()
torch.set_num_threads(1)
if INTERPRETED:
    quicken()


def pytest_ignore_collect(collection_path, config):
    """Import no file without such rows where only the interpreter's are asked for."""
    asked = config.option.markexpr
    if "interpreter" in asked and "not interpreter" not in asked and collection_path.match("test_*.py"):
        return True if "interpreter" not in collection_path.read_text() else None
    return None


def pytest_runtest_setup(item):
    """Skip the interpreter's rows where kernels would not be interpreted: Triton decides that at its import."""
    if item.get_closest_marker("interpreter"):
        if importlib.util.find_spec("triton") is None:
            pytest.skip("Triton is not installed")
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("run by `make test`, in a process with TRITON_INTERPRET=1")


@pytest.fixture(autouse=True)
def _repeatable():
    """Seed every test alike; unwritten memory is NaN."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_collection_finish():
    """Spare every later search for garbage what the imports have made, which takes half a second."""
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _compiled_anew():
    """What one file compiled has no part in how another one's calls are traced; what it imported is no garbage."""
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _few_programs(request, monkeypatch):
    """Launch kernels with few programs where they are interpreted."""
    if INTERPRETED and "interpreter" in request.keywords:
        small_tiles(monkeypatch)
