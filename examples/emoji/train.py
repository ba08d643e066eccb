"""Train the embedded teacher from nothing: flow matching on 1593 emoji, about a quarter of an hour on one H200.

    python examples/emoji/train.py emoji.npz runs/base --minutes 14            # stop with Ctrl-C, repeat to go on
    python examples/emoji/train.py emoji.npz runs/nano --size nano --minutes 3.5
    python examples/emoji/train.py emoji.npz runs/toy --size nano --minutes 2 --device cpu --batch 0.03

Learning rate, stages and augmentation follow the planned minutes, so a resumed run must be given the same plan.
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
from torch import nn

from vision_attn.demo import EmojiPipeline, PixelVAE, WordEncoder  # before diffusers: it repairs torchvision

# isort: split
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

NATIVE = 32  # tokens a side at 128 px, the one size that the teacher is trained for
STAGES = ((64, 512, 0.3), (128, 192, 0.7))  # pixels a side, batch, part of the time
SIZES = {"base": {"heads": 4, "single": 5, "lr": 1e-3}, "nano": {"heads": 2, "single": 4, "lr": 2e-3}}


class Teacher(nn.Module):
    """The two learned parts of the pipeline as one module, to be compiled as one graph."""

    def __init__(self, vocabulary: list[str], heads: int, single: int) -> None:
        super().__init__()
        self.text_encoder = WordEncoder(vocabulary)
        self.transformer = FluxTransformer2DModel(
            in_channels=48,
            num_layers=1,
            num_single_layers=single,
            num_attention_heads=heads,
            attention_head_dim=64,
            joint_attention_dim=64,
            pooled_projection_dim=64,
            axes_dims_rope=(16, 24, 24),
            guidance_embeds=False,
        )

    def forward(self, tokens, sigma, ids, img_ids, txt_ids):
        """Predict the velocity of noisy tokens `[B, N, 48]` at noise levels `[B]`, for word ids `[B, 8]`."""
        sequence, pooled = self.text_encoder(ids)
        return self.transformer(
            hidden_states=tokens,
            timestep=sigma,
            encoder_hidden_states=sequence,
            pooled_projections=pooled,
            img_ids=img_ids,
            txt_ids=txt_ids,
            return_dict=False,
        )[0]

    def pipeline(self) -> EmojiPipeline:
        """Return the diffusers pipeline around these modules."""
        flow = FlowMatchEulerDiscreteScheduler(shift=shift(NATIVE))
        return EmojiPipeline(flow, PixelVAE(), self.text_encoder, self.transformer)


def load_icons(path: Path) -> tuple[list[str], torch.Tensor]:
    """Return the names and the images `[icons, 3, 256, 256]` uint8."""
    pack = np.load(path)
    files = np.split(pack["data"], np.cumsum(pack["len"])[:-1])
    images = np.stack([np.array(Image.open(io.BytesIO(file.tobytes())).convert("RGB")) for file in files])
    return [str(name) for name in pack["names"]], torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def shift(side: int) -> float:
    """Move the noise levels up with the square root of the number of tokens: 3 at 32 x 32."""
    return 1.5 * math.sqrt(side * side / 256)


def positions(side: int, device: str) -> torch.Tensor:
    """Return FLUX's image ids for `side` x `side` tokens, spread over the native coordinates.

    A model that sees a small image at the coordinates of a large one's corner learns to draw crops.
    """
    axis = (torch.arange(side, device=device) + 0.5) * NATIVE / side - 0.5
    rows, columns = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1)


def draw(images: torch.Tensor, pixels: int, jitter: float) -> torch.Tensor:
    """Scale and move icons `[B, 3, 256, 256]` uint8 at random; returns `[B, 3, pixels, pixels]` in [-1, 1]."""
    x = F.avg_pool2d(1 - images.float() / 255, 128 // pixels)  # ink: 0 is the white that comes in from outside
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
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--minutes", type=float, default=14, help="planned length of the whole training")
    parser.add_argument("--stop-after", type=float, default=1e9, help="minutes after which this call ends")
    parser.add_argument("--save-every", type=float, default=2, help="minutes between checkpoints")
    parser.add_argument("--batch", type=float, default=1, help="factor on the batch sizes")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    device, cuda, checkpoint = args.device, args.device.startswith("cuda"), args.out / "state.pt"
    args.out.mkdir(parents=True, exist_ok=True)
    start = saved = time.time()

    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True
    # cuDNN attention's backward ends in an illegal memory access here (264 tokens, D=64, torch 2.11, H200)
    torch.backends.cuda.enable_cudnn_sdp(False)

    names, images = load_icons(args.icons)
    images = images.to(device)
    size = SIZES[args.size]
    vocabulary = sorted({word for name in names for word in name.split("-")})
    net = Teacher(vocabulary, size["heads"], size["single"]).to(device)
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
        folder = args.out / args.size
        copy.deepcopy(ema).half().pipeline().save_pretrained(folder)
        with tarfile.open(args.out / f"{args.size}.tar", "w") as tar:
            tar.add(folder, args.size)

    compiled = torch.compile(net, dynamic=False) if cuda else net
    txt_ids = torch.zeros(8, 3, device=device)
    vae, until = PixelVAE(), 0.0
    for pixels, batch, part in STAGES:
        until += part
        side, count = pixels // 4, max(2, round(batch * args.batch))
        img_ids = positions(side, device)
        while progress() < min(until, 1.0) and minutes() < args.stop_after:
            p = progress()
            chosen = torch.randint(len(names), (count,), device=device)
            x = vae.encode(draw(images[chosen], pixels, jitter=1 - 0.75 * p)).latent_dist.mode()
            x = (x - vae.config.shift_factor) * vae.config.scaling_factor
            x = EmojiPipeline._pack_latents(x, count, 12, pixels // 2, pixels // 2)
            noise = torch.randn_like(x)
            u = torch.sigmoid(torch.randn(count, device=device))
            sigma = shift(side) * u / (1 + (shift(side) - 1) * u)
            words = ids[chosen] * (torch.rand(count, 1, device=device) > 0.1)  # no words: the null prompt
            with torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=cuda):
                velocity = compiled(torch.lerp(x, noise, sigma[:, None, None]), sigma, words, img_ids, txt_ids)
            loss = (velocity.float() - (noise - x)).square().mean()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            cosine = 0.03 + 0.97 * (0.5 + 0.5 * math.cos(math.pi * p))
            for group in optimizer.param_groups:
                group["lr"] = size["lr"] * min(1, (step + 1) / 300) * cosine
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
