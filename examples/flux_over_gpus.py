"""One large FLUX picture over several GPUs.

    torchrun --nproc-per-node 2 examples/flux_over_gpus.py --out harbour.png
    accelerate launch --num_processes 2 examples/flux_over_gpus.py --side 4096

Every process draws its slice with the same seed; rank 0 writes the picture. `--processor clear:radius=16` takes another
processor. Draw above the training size from coarse to fine for a good picture: see docs/high-resolution.md.
"""

import argparse
import os
from pathlib import Path

import torch

from vision_attn import convert
from vision_attn._compat import ensure_torchvision
from vision_attn.parallel import enable, shared_decoding
from vision_attn.processors import spec_of_text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="black-forest-labs/FLUX.1-dev")
    parser.add_argument("--prompt", default="a harbour at dawn, boats, a lighthouse")
    parser.add_argument("--side", type=int, default=8192, help="height and width in pixels")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--processor", default="multipole", help="name, fields after a colon: clear:radius=16")
    parser.add_argument("--out", type=Path, default=Path("picture.png"))
    options = parser.parse_args()
    ensure_torchvision()
    from diffusers import FluxPipeline  # noqa: PLC0415, after the stand-in for torchvision

    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl")
    pipe = FluxPipeline.from_pretrained(options.model, torch_dtype=torch.bfloat16).to("cuda")
    enable(pipe.transformer)
    convert(pipe, spec_of_text(options.processor))
    leads = torch.distributed.get_rank() == 0
    pipe.set_progress_bar_config(disable=not leads)
    with shared_decoding(pipe.vae):
        images = pipe(
            options.prompt,
            height=options.side,
            width=options.side,
            num_inference_steps=options.steps,
            generator=torch.Generator("cuda").manual_seed(0),
        ).images
    if leads:
        images[0].save(options.out)
        print(options.out)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
