"""Train an embedded teacher from scratch on 1593 emoji, in a few minutes on one H200.

    python examples/emoji/train.py emoji.npz runs/base --minutes 14            # stop with Ctrl-C, repeat to go on
    python examples/emoji/train.py emoji.npz runs/nano --teacher nano --minutes 3.5
    python examples/emoji/train.py emoji.npz runs/unet --teacher unet --minutes 9
    python examples/emoji/train.py emoji.npz runs/toy --teacher nano --minutes 2 --device cpu --batch 0.03

Learning rate, stages and augmentation follow the planned minutes, so give a resumed run the same number.
"""

import argparse
import copy
import io
import math
import tarfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from teachers import make_teacher
from torch import nn

from vision_attn.demo import TEACHERS  # before diffusers: it repairs torchvision

# isort: split
from diffusers import DiffusionPipeline


def load_icons(path: Path) -> tuple[list[str], torch.Tensor]:
    """Return the names and the images `[icons, 3, 256, 256]` uint8."""
    pack = np.load(path)
    files = np.split(pack["data"], np.cumsum(pack["len"])[:-1])
    images = np.stack([np.array(Image.open(io.BytesIO(file.tobytes())).convert("RGB")) for file in files])
    return [str(name) for name in pack["names"]], torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def draw(images: torch.Tensor, pixels: int, jitter: float) -> torch.Tensor:
    """Scale and move icons `[B, 3, 256, 256]` uint8 at random; return `[B, 3, pixels, pixels]` in [-1, 1]."""
    x = F.avg_pool2d(1 - images.float() / 255, 128 // pixels)  # 0 is white, which comes in from outside
    affine = torch.zeros(len(x), 2, 3, device=x.device)
    scale = torch.empty(len(x), device=x.device).uniform_(1 - 0.18 * jitter, 1 + 0.05 * jitter)
    affine[:, 0, 0] = affine[:, 1, 1] = 1 / scale
    affine[:, :, 2].uniform_(-0.1 * jitter, 0.1 * jitter)
    x = F.grid_sample(x, F.affine_grid(affine, list(x.shape), align_corners=False), align_corners=False)
    return 1 - 2 * F.avg_pool2d(x, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("icons", type=Path, help="the npz of rasterise.py")
    parser.add_argument("out", type=Path, help="folder of the checkpoint, and of the pipeline as a tar")
    parser.add_argument("--teacher", choices=TEACHERS, default="base")
    parser.add_argument("--minutes", type=float, default=14, help="length of the whole training")
    parser.add_argument("--stop-after", type=float, default=1e9, help="stop this call after this many minutes")
    parser.add_argument("--start", type=Path, help="go on from this pipeline: a third of the rate, little augmentation")
    parser.add_argument("--eager", action="store_true", help="do not compile: for runs of a minute or two")
    parser.add_argument("--save-every", type=float, default=2, help="minutes between checkpoints")
    parser.add_argument("--batch", type=float, default=1, help="factor on the batch sizes")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    device, cuda, checkpoint = args.device, args.device.startswith("cuda"), args.out / "state.pt"
    args.out.mkdir(parents=True, exist_ok=True)
    start = saved = time.time()

    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    # cuDNN attention's backward ends in an illegal memory access here (264 tokens, D=64, torch 2.11, H200)
    torch.backends.cuda.enable_cudnn_sdp(False)

    names, images = load_icons(args.icons)
    images = images.to(device)
    vocabulary = sorted({word for name in names for word in name.split("-")})
    net = make_teacher(args.teacher, vocabulary).to(device, memory_format=torch.channels_last)
    if args.start:
        for name, model in DiffusionPipeline.from_pretrained(args.start).components.items():
            if isinstance(model, nn.Module):
                getattr(net, name).load_state_dict(model.state_dict())
    rate = net.learning_rate / (3 if args.start else 1)
    ids = net.text_encoder.tokenize(names).to(device)
    ema = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    step, minutes_before = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device)
        net.load_state_dict(state["net"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        step, minutes_before = state["step"], state["minutes"]
    torch.manual_seed(step)
    print(f"{sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters, from step {step}", flush=True)

    def minutes() -> float:
        return (time.time() - start) / 60

    def progress() -> float:
        return min(1.0, (minutes_before + minutes()) / args.minutes)

    def save() -> None:
        state = {"net": net.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
        state |= {"step": step, "minutes": minutes_before + minutes()}
        torch.save(state, checkpoint.with_suffix(".part"))
        checkpoint.with_suffix(".part").replace(checkpoint)
        folder = args.out / args.teacher
        copy.deepcopy(ema).half().to(memory_format=torch.contiguous_format).pipeline().save_pretrained(folder)
        with tarfile.open(args.out / f"{args.teacher}.tar", "w") as tar:
            tar.add(folder, args.teacher)

    compiled = torch.compile(net, dynamic=False) if cuda and not args.eager else net
    until = 0.0
    for pixels, batch, part in net.stages:
        until += part
        count = max(2, round(batch * args.batch))
        while progress() < min(until, 1.0) and minutes() < args.stop_after:
            p = progress()
            chosen = torch.randint(len(names), (count,), device=device)
            words = ids[chosen] * (torch.rand(count, 1, device=device) > 0.1)  # no words: the null prompt
            inputs, target, weight = net.examples(draw(images[chosen], pixels, 0.25 if args.start else 1 - 0.75 * p))
            with torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=cuda):
                prediction = compiled(words, *inputs)
            loss = ((prediction.float() - target).square().flatten(1).mean(1) * weight).mean()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            cosine = 0.03 + 0.97 * (0.5 + 0.5 * math.cos(math.pi * p))
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1, (step + 1) / 300) * cosine
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            decay = min(0.999 if p < 0.6 else 0.9995, (1 + step) / (10 + step))
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)
            if step % 250 == 0 or not cuda:
                print(f"{pixels} px step {step} loss {loss:.4f} {minutes():.1f} min", flush=True)
            if time.time() - saved > 60 * args.save_every:
                save()
                saved = time.time()
    save()
    print(f"stopped at step {step}, {minutes_before + minutes():.2f} of {args.minutes} minutes", flush=True)


if __name__ == "__main__":
    main()
