"""Checks on GPUs that processors over processes compute what one GPU computes: outputs and all gradients.

    torchrun --nproc-per-node 2 tests/gpu/check_parallel.py --out parallel.json

The error of each result is put beside that of one GPU, both against float64 where one GPU can compute that.
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from vision_attn.grid import Grid
from vision_attn.parallel.processors import attend
from vision_attn.parallel.ranks import Cut
from vision_attn.processors import (
    RALA,
    Agent,
    Clear,
    Halo,
    HiLo,
    InLine,
    Layer,
    LinearLocal,
    LinFusion,
    Multipole,
    Neighborhood,
)

HEADS, DIM = 4, 64
SPECS = [
    Clear(radius=16), Clear(radius=8, pool=4), Neighborhood(kernel_size=13), Multipole(), Multipole(exact=0),
    LinFusion(mid_dim=-1), RALA(), LinearLocal(), Agent(num_agents=64), HiLo(alpha=0.5), Halo(), InLine(),
]  # fmt: skip
GRIDS = [Grid(64, 64, prefix=77), Grid(52, 76, prefix=64, suffix=32)]  # slices end with rows of cells, and do not


def results(spec, grid, dtype, ranks):
    """Return output and gradients of the whole sequence, computed over all processes or, without ranks, here."""
    torch.manual_seed(1)
    device = torch.device("cuda")
    processor = spec.build(Layer("layer", HEADS, DIM, dim=HEADS * DIM)).to(device)
    for parameter in processor.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    draw = torch.Generator().manual_seed(2)
    whole = torch.randn(4, 1, grid.tokens, HEADS, DIM, generator=draw)
    if isinstance(spec, Multipole):  # some cells stand out, so that no rounding decides which are exact
        count = math.ceil(grid.height / spec.cell) * math.ceil(grid.width / spec.cell)
        token = torch.arange(grid.image_tokens)
        cell = token // grid.width // spec.cell * math.ceil(grid.width / spec.cell) + token % grid.width // spec.cell
        height = torch.rand(count, HEADS, 1, generator=draw)[cell]  # one of its own for each cell and head
        whole[:2, 0, grid.image, :, :8] += torch.stack([torch.ones_like(height), 4 * height])
    whole = [t.to(device, dtype) for t in whole]
    processor.to(dtype if dtype != torch.float64 else torch.float64)
    q, k, v, w = whole if ranks is None else [ranks.slice(t).contiguous() for t in whole]
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    with torch.no_grad():  # inference may run other code
        plain = processor(q, k, v, grid) if ranks is None else attend(processor, q, k, v, ranks)
    o = processor(q, k, v, grid) if ranks is None else attend(processor, q, k, v, ranks)
    (o * w).sum().backward()
    parameters = [p.grad if p.grad is not None else torch.zeros_like(p) for p in processor.parameters()]
    found = [plain, o.detach(), q.grad, k.grad, v.grad]
    if ranks is not None:
        found = [gathered(t, ranks) for t in found]
        for grad in parameters:
            dist.all_reduce(grad)
    return [t.double() for t in (*found, *parameters)]


def gathered(t, ranks):
    """Return a tensor of the whole sequence from the slices of all processes."""
    most = max(ranks.tokens_of(rank) for rank in range(ranks.size))
    padded = torch.nn.functional.pad(t.contiguous(), (0, 0, 0, 0, 0, most - t.shape[1]))
    parts = [torch.empty_like(padded) for _ in range(ranks.size)]
    dist.all_gather(parts, padded)
    return ranks.whole(torch.cat([p[:, : ranks.tokens_of(r)] for r, p in enumerate(parts)], 1))


def shares(found, exact):
    """Return the largest error of each tensor as a share of its largest value."""
    return [float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in zip(found, exact, strict=True)]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="", help="parts of the names of processors, with commas between them")
    options = parser.parse_args()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl")
    cut, rows = Cut.over(dist.group.WORLD), []
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)  # memory that nobody has written to holds NaN
    for spec in (spec for spec in SPECS if any(part in str(spec) for part in options.only.split(","))):
        for grid in GRIDS:
            if isinstance(spec, Clear) and (grid.height % spec.pool or grid.width % spec.pool):
                continue
            for dtype in (torch.float32, torch.bfloat16):
                row = dict(spec=str(spec), grid=str(grid), dtype=str(dtype))
                try:
                    alone = results(spec, grid, dtype, None)
                    over = results(spec, grid, dtype, cut.of(grid))
                    exact = alone if dtype == torch.float32 else results(spec, grid, torch.float32, None)
                    errors, own = (shares(found, exact) for found in (over, alone))
                    if dtype == torch.float32:
                        row["holds"] = max(errors) < 5e-5
                    else:
                        row["holds"] = all(e <= 2.5 * o + 2e-2 for e, o in zip(errors, own, strict=True))
                    row |= dict(errors=errors, alone=own)
                except Exception as error:
                    row |= dict(holds=False, error=f"{type(error).__name__}: {error}"[:600])
                rows.append(row)
                if cut.rank == 0:
                    worst = f"{max(row['errors']):.1e}" if "errors" in row else row["error"]
                    print("ok  " if row["holds"] else "FAIL", row["spec"], row["grid"], row["dtype"], worst, flush=True)
    if cut.rank == 0 and options.out:
        options.out.write_text(json.dumps(rows, indent=1))
    dist.destroy_process_group()
    return 0 if all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
