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
    [(64, 2.5, 4), pytest.param(128, 8.0, 1, marks=pytest.mark.slow)],
    ids=["64x64", "128x128"],
)
def test_beats_dense_attention(side, at_least, repeats):
    grid, window = Grid(side, side, prefix=77), Window(radius=8)
    q, k, v = (torch.randn(1, grid.tokens, 4, 64) for _ in range(3))
    dense = seconds(lambda: F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))), repeats)
    local = seconds(lambda: local_attention(q, k, v, grid, window), 4)
    print(f"{side}x{side}: dense {dense * 1e3:.0f} ms, local {local * 1e3:.0f} ms, {dense / local:.1f}x")
    assert dense / local >= at_least


MEMORY = """
import resource, torch
from vision_attn.grid import Grid
from vision_attn.kernels.local import Window, local_attention
grid = Grid({side}, {side})
q, k, v = (torch.randn(1, grid.tokens, 4, 64, requires_grad={grad}) for _ in range(3))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
o = local_attention(q, k, v, grid, Window(radius=8))
if {grad}:
    o.backward(q.detach())
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)
"""


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    ("side", "gib"), [(96, 0.4), pytest.param(256, 2.0, marks=pytest.mark.slow)], ids=["96x96", "256x256"]
)
def test_peak_memory_is_linear(side, gib, grad):
    """A dense mask alone would take 4.3e9 bytes at 256 x 256, and the logits of 4 heads 69e9."""
    code = MEMORY.format(side=side, grad=grad)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert float(out) < gib
