"""The portable implementation is light and quick on a CPU. Ratios are of processor time in one run, on one thread."""

import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F

from vision_attn.grid import Grid
from vision_attn.kernels.local import Window, local_attention


def seconds(function, repeats):
    """Return the least processor time of a call: other work on the machine does not count."""
    function()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


@pytest.mark.parametrize(
    ("side", "at_least", "repeats"),
    [(64, 2.5, 2), pytest.param(128, 8.0, 1, marks=pytest.mark.slow)],
    ids=["64x64", "128x128"],
)
def test_beats_dense_attention(side, at_least, repeats):
    grid, window = Grid(side, side, prefix=77), Window(radius=8)
    q, k, v = (torch.randn(1, grid.tokens, 2, 64) for _ in range(3))
    dense = seconds(lambda: F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))), repeats)
    local = seconds(lambda: local_attention(q, k, v, grid, window), repeats + 1)
    print(f"{side}x{side}: dense {dense * 1e3:.0f} ms, local {local * 1e3:.0f} ms, {dense / local:.1f}x")
    assert dense / local >= at_least


MEMORY = """
import resource, torch
from vision_attn.grid import Grid
from vision_attn.kernels.local import Window, local_attention

def gib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

torch.set_num_threads(1)
grid = Grid({side}, {side})
q, k, v = (torch.randn(1, grid.tokens, 4, 64, requires_grad=True) for _ in range(3))
before = gib()
o = local_attention(q, k, v, grid, Window(radius=8))
forward = gib() - before
o.backward(q.detach())
print(forward, gib() - before)
"""


@pytest.mark.parametrize(
    ("side", "most"), [(80, 0.4), pytest.param(256, 2.0, marks=pytest.mark.slow)], ids=["80x80", "256x256"]
)
def test_peak_memory_is_linear(side, most):
    """Forward, and with the backward; the logits of 4 heads alone take 0.6 GiB at 80 x 80 and 64 GiB at 256 x 256."""
    code = MEMORY.format(side=side)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    forward, both = map(float, out.split())
    assert forward <= both < most
