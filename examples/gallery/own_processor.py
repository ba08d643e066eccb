"""Add your own processor: stripes, in one file.

The program defines a processor, checks it and draws with it. In the first half of the heads a token sees its horizontal
stripe of the grid, in the others its vertical one (the idea of 'CSWin Transformer', https://arxiv.org/abs/2107.00652).
Nothing is trained or downloaded: the emoji teacher is part of the package.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vision_attn import Grid, Softmax, convert
from vision_attn.demo import load_teacher
from vision_attn.estimation.inspection import attended, picture
from vision_attn.kernels.window import window_attention
from vision_attn.processors import AttnSpec, Processor


@dataclass(frozen=True)
class Stripes(AttnSpec):
    """Stripes of the grid, `size` tokens wide. Tokens outside the grid (text) see all tokens and are seen by all."""

    size: int = 8

    def build(self, layer):
        """Return the processor of one layer."""
        return StripesAttention(self.size, layer.backend)

    def attended(self, grid):
        """Return the mean share of tokens that a token sees."""
        text = grid.tokens - grid.image_tokens
        seen = self.size * (grid.height + grid.width) / 2 + text
        return (grid.image_tokens * seen + text * grid.tokens) / grid.tokens**2


class StripesAttention(Processor):
    """Half of the heads attend in horizontal stripes, the others in vertical ones."""

    def __init__(self, size, backend):
        super().__init__()
        self.size, self.backend = size, backend

    def forward(self, q, k, v, grid, mask=None, scale=None):
        """Attend from queries to keys; q, k and v are `[B, N, H, D]`."""
        half, options = q.shape[2] // 2, dict(mask=mask, scale=scale, backend=self.backend)
        rows, columns = ([t[:, :, heads] for t in (q, k, v)] for heads in (slice(half), slice(half, None)))
        across = window_attention(*rows, grid, (self.size, grid.width), **options)
        along = window_attention(*columns, grid, (grid.height, self.size), **options)
        return torch.cat([across, along], 2)


def main(pipe=None, out=Path("own_processor"), prompts=("red apple", "rocket", "alarm clock"), steps=8):
    pipe, captions, grid = pipe or load_teacher(), {}, Grid(32, 32)
    out.mkdir(parents=True, exist_ok=True)
    seen = attended(Stripes(), grid, 9, 20)  # found by the derivative of the token's output
    assert (seen > 0).sum() == 8 * 32 + 8 * 32 - 8 * 8, "a cross: two stripes that share a cell"
    for spec in (Softmax(), Stripes()):
        conversion = convert(pipe, spec, min_tokens=256)
        noise = [torch.Generator().manual_seed(0) for _ in prompts]
        drawn = pipe(list(prompts), num_inference_steps=steps, generator=noise).images
        file = f"{type(spec).__name__.lower()}.png"
        Image.fromarray(np.concatenate([np.array(image) for image in drawn], 1)).save(out / file)
        captions[file] = f"{spec}: a token sees {conversion.layers[0].attended:.0%} of the others"
        conversion.revert()
    picture(seen, 9, 20).save(out / "keys.png")
    return captions | {"keys.png": "what the red token sees, over all heads"}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("own_processor"), help="folder for the pictures")
    main(out=parser.parse_args().out)
