"""Checks on GPUs that whole models over processes compute what one GPU computes: FLUX and a UNet, eager and in graphs.

    torchrun --nproc-per-node 2 tests/gpu/check_parallel_models.py --out parallel_models.json

The error of each output is put beside that of one GPU in the same dtype, both against one GPU in float64; and the two
must be near each other.
"""

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support"))

from tiny_hosts import HOST

import vision_attn
from vision_attn.parallel import enable
from vision_attn.processors import Clear, LinFusion, Multipole

SIZES = {"flux": (12, 16, 1, 8), "sdxl-unet": (24, 12, 2, 8), "sd15-unet": (22, 10, 1, 8)}
ROWS = [
    ("flux", Clear(radius=3)),
    ("flux", Multipole(cell=4, near=0, pool=2, exact=1)),
    ("flux", LinFusion()),
    ("sdxl-unet", LinFusion()),
    ("sdxl-unet", Clear(radius=3)),
    ("sd15-unet", Multipole(cell=4, near=0, pool=2, exact=0)),
]


def moved(value, device, dtype):
    """Return an input on a device; numbers that are no ids in a dtype."""
    if isinstance(value, dict):
        return {name: moved(part, device, dtype) for name, part in value.items()}
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)


def output(name, spec, device, dtype, over, graphs):
    """Return the output of the fourth forward, and how many bytes its graphs hold."""
    torch.manual_seed(0)
    case = HOST[name]
    model, inputs = case.build().to(device, dtype), moved(case.inputs(*SIZES[name]), device, dtype)
    conversion = vision_attn.convert(model, spec)
    count = patch("torch.accelerator.device_count", lambda: 1) if device.type == "cpu" else contextlib.nullcontext()
    with count:
        enabled = enable(model) if over else None
    with torch.no_grad(), conversion.graphs() if graphs else contextlib.nullcontext() as held:
        for _ in range(4):  # eager, recorded, and replays
            found = model(**inputs, return_dict=False)[0]
        memory = held.memory if graphs else 0
        found = found.double().clone()
    if enabled is not None:
        assert set(conversion.status.values()) == {"rerouted"}, conversion.status
        enabled.disable()
    return found, memory


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)  # memory that nobody has written to holds NaN
    rows = []
    for name, spec in ROWS:
        exact, _ = output(name, spec, device, torch.float64, False, False)
        for dtype in (torch.float32, torch.bfloat16):
            for graphs in (False, True) if device.type == "cuda" else (False,):
                row = dict(model=name, spec=str(spec), dtype=str(dtype), graphs=graphs)
                try:
                    alone = output(name, spec, device, dtype, False, False)[0]
                    found, row["graph_bytes"] = output(name, spec, device, dtype, True, graphs)
                    largest = exact.abs().max()
                    error, own, apart = (
                        float((a - b).abs().max() / largest)
                        for a, b in ((found, exact), (alone, exact), (found, alone))
                    )
                    row |= dict(error=error, alone=own, apart=apart)
                    row["holds"] = error <= 2.5 * own + 2e-5 and apart <= (5e-5 if dtype == torch.float32 else 5e-2)
                except Exception as error:
                    row |= dict(holds=False, reason=f"{type(error).__name__}: {error}"[:600])
                rows.append(row)
                if dist.get_rank() == 0:
                    errors = " ".join(f"{key} {row[key]:.1e}" for key in ("error", "alone", "apart") if key in row)
                    about = f"{errors} {row.get('reason', '')}"
                    held = f"graphs of {row.get('graph_bytes', 0) >> 10} KiB" if graphs else "eager"
                    print("ok  " if row["holds"] else "FAIL", name, spec, row["dtype"], held, about, flush=True)
    if dist.get_rank() == 0 and options.out:
        options.out.write_text(json.dumps(rows, indent=1))
    dist.destroy_process_group()
    return 0 if all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
