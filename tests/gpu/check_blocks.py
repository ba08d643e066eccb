"""Check `block_sparse_attention`'s FlexAttention on a GPU against float64, and time it beside dense attention.

    PYTHONPATH=. python tests/gpu/check_blocks.py [--out FILE.json]

Output and gradients as shares of the error budget, which is twice the error of `torch` in that dtype and a rounding;
how often FlexAttention was compiled for several choices of one shape; then milliseconds of a forward.
"""

import argparse
import json
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

from vision_attn.grid import Grid
from vision_attn.kernels.block_sparse import Blocks, block_sparse_attention

CASES = {  # grid, blocks, kept, D, whether keys outside the grid are hidden
    "even": (Grid(32, 32), 8, 2, 64, False),
    "ragged-text": (Grid(37, 50, prefix=77, suffix=3), 16, 4, 128, True),
    "small-blocks": (Grid(24, 40, prefix=5), 64, 16, 64, False),
    "fewer-tokens-than-a-square": (Grid(5, 7, prefix=2), 4, 2, 40, False),
}
TIMED = {"flux-1024": (Grid(64, 64, prefix=512), 32), "flux-2048": (Grid(128, 128, prefix=512), 128)}


def drawn(grid, count, kept, H, seed=0):
    """Return a random order, and random kept blocks with the own one among them."""
    draw = torch.Generator().manual_seed(seed)
    order = torch.rand(H, grid.image_tokens, generator=draw).argsort(1)
    wish = torch.rand(H, count, count, generator=draw) - 2 * torch.eye(count)
    return Blocks(order.cuda(), wish.argsort(2)[..., :kept].cuda())


def results(case, backend, dtype):
    """Return output and gradients of one backend on inputs that were rounded to bf16."""
    grid, count, kept, D, hidden = CASES[case]
    torch.manual_seed(0)
    q, k, v, do = torch.randn(4, 2, grid.tokens, 3, D).bfloat16().to(dtype).cuda()
    outside = grid.prefix + grid.suffix
    mask = (torch.arange(outside).expand(2, -1) % 3 > 0).cuda() if hidden else None
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    o = block_sparse_attention(*leaves, grid, drawn(grid, count, kept, 3), mask=mask, backend=backend)
    return [o, *torch.autograd.grad(o, leaves, do)]


def check(case, dtype):
    """Return the errors of output, dq, dk and dv as shares of their budgets."""
    exact = results(case, "reference", torch.float64)
    plain, ours = (results(case, backend, dtype) for backend in ("torch", "triton"))
    shares = {}
    for name, o, p, e in zip(("o", "dq", "dk", "dv"), ours, plain, exact, strict=True):
        budget = 2 * ((p - e).abs().max() + torch.finfo(dtype).eps * e.abs().max() + 1e-6)
        shares[name] = round(((o - e).abs().max() / budget).item(), 3)
    print(case, dtype, shares, flush=True)
    return shares


def milliseconds(run, times=20):
    """Return the mean time of a call on the GPU."""
    for _ in range(3):
        run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / times


def timed(name, H=24, D=128):
    """Return the milliseconds of dense attention, and of a quarter of the blocks."""
    grid, count = TIMED[name]
    q, k, v = torch.randn(3, 1, grid.tokens, H, D, device="cuda", dtype=torch.bfloat16)
    blocks = drawn(grid, count, count // 4, H)
    with torch.no_grad():
        dense = milliseconds(lambda: scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))))
        ours = milliseconds(lambda: block_sparse_attention(q, k, v, grid, blocks, backend="triton"))
    return dict(dense_ms=round(dense, 3), blocks_ms=round(ours, 3), speedup=round(dense / ours, 2))


def compiled_anew():
    """Return how often FlexAttention is compiled for ten choices of blocks of one shape."""
    grid = Grid(32, 32, prefix=7)
    q, k, v = torch.randn(3, 1, grid.tokens, 2, 64, device="cuda", dtype=torch.bfloat16)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        for seed in range(10):
            block_sparse_attention(q, k, v, grid, drawn(grid, 8, 2, 2, seed), backend="triton")
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def main():
    """Run all checks; exit with 1 if an error is above its budget or FlexAttention was compiled again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    found = {
        f"{case}-{str(dtype).removeprefix('torch.')}": check(case, dtype)
        for case in CASES for dtype in (torch.bfloat16, torch.float16, torch.float32)
    }  # fmt: skip
    graphs = compiled_anew()
    document = dict(gpu=torch.cuda.get_device_name(), torch=torch.__version__, check=found, graphs=graphs)
    document |= dict(timed={name: timed(name) for name in TIMED})
    print(json.dumps(document, indent=1))
    if out is not None:
        out.write_text(json.dumps(document, indent=1) + "\n")
    if graphs != 1 or max(max(shares.values()) for shares in found.values()) > 1:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
