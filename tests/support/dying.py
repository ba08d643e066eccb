"""A program for torchrun whose rank 1 is killed inside a layer: `python dying.py HOST FILE` notes when in the file."""

import os
import signal
import sys
import time
from pathlib import Path

import torch.distributed as dist
from sliced_models import over
from sliced_unets import over as over_unet

from vision_attn.parallel import local, rows
from vision_attn.processors import Clear


def main(name, path):
    """Run a model over all processes."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()

    def die(*args):
        Path(path).write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == 1:
        local.Halo.wait = rows.Rows.whole = die
    if name == "flux":
        over(rank, name, (6, 8, 2, 8), Clear(radius=2), {}, dict(ulysses_degree=2))
    else:
        over_unet(rank, name, (13, 7, 1, 8), Clear(radius=2), {})


if __name__ == "__main__":
    main(*sys.argv[1:])
