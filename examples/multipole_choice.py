"""Compare rules by which multipole attention chooses its exact cells, on queries and keys of real layers.

    python examples/multipole_choice.py docs/multipole_choice.json

Records q, k and v of the layers of the embedded teachers while they draw, and of DINOv2 and the terrain UNet if
`vision-attn bench quality --download` fetched them. Each rule chooses as many cells; the error is that of the
attention's output, squared, over the square of dense attention's output, in the mean over the layers.
"""

# ruff: noqa: D101, D102

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from vision_attn import convert
from vision_attn.bench.candidate import AbsentError
from vision_attn.bench.quality import dinov2, terrain
from vision_attn.bench.quality.weights import DINOV2, TERRAIN, default_folder, read_weights
from vision_attn.demo import load_teacher
from vision_attn.kernels.dense import dense_attention
from vision_attn.kernels.multipole import Cells, choose_cells, multipole_attention
from vision_attn.processors import AttnSpec, Processor

RECORDED = []


@dataclass(frozen=True)
class Recording(AttnSpec):
    """Dense attention that keeps what it is called with."""

    def build(self, layer):
        return RecordingAttention()

    def attended(self, grid):
        return 1.0


class RecordingAttention(Processor):
    def forward(self, q, k, v, grid, mask=None, scale=None):
        RECORDED.append((q[-1:].clone(), k[-1:].clone(), v[-1:].clone(), grid, scale))
        return dense_attention(q, k, v, scale=scale)


def drawn(teacher, pixels):
    pipe = load_teacher(teacher)
    pipe.set_progress_bar_config(disable=True)
    convert(pipe, Recording(), min_tokens=256)
    guided = dict(true_cfg_scale=1.0) if teacher == "base" else dict(guidance_scale=1.0)
    noise = torch.Generator().manual_seed(0)
    pipe("octopus", num_inference_steps=4, height=pixels, width=pixels, generator=noise, output_type="latent", **guided)


def seen():
    model = dinov2.build_backbone(dinov2.within(read_weights(DINOV2, default_folder()), "backbone."))
    convert(model, Recording())
    for path in dinov2.photo_files()[1:3]:
        model.forward_features(dinov2.read_photo(path, 518))


def mapped():
    model = terrain.Terrain(read_weights(TERRAIN, default_folder()))
    convert(model.unet, Recording(), host=terrain.HOST, min_tokens=terrain.MIN_TOKENS)
    for sigma in terrain.SIGMAS[:3]:
        noise = torch.randn(1, 1, terrain.SIDE, terrain.SIDE, generator=torch.Generator().manual_seed(0))
        model(sigma * noise, torch.tensor([sigma]), torch.tensor([0.5]))


SOURCES = {
    "FLUX type, 128 px": lambda: drawn("base", 128),
    "FLUX type, 256 px": lambda: drawn("base", 256),
    "UNet, 256 px": lambda: drawn("unet", 256),
    "DINOv2, 518 px": seen,
    "terrain UNet": mapped,
}


class Cut:
    """Queries and keys `[1, H, n, D]` of the grid, and the cell of each token."""

    def __init__(self, q, k, grid, cells, scale):
        self.q, self.k = (t[:, grid.image].transpose(1, 2) for t in (q, k))
        self.scale = q.shape[-1] ** -0.5 if scale is None else scale
        self.q, self.number = self.q * self.scale, cells.count(grid)
        self.cell = cell_of(grid, cells.cell)
        self.layout, self.exact = cells.layout(grid, q.device), cells.exact
        self.size = torch.bincount(self.cell, minlength=self.number).float()
        self.finest = cell_of(grid, cells.pool)

    def mean(self, t, index=None):
        index = self.cell if index is None else index
        one_hot = F.one_hot(index).float()
        return torch.einsum("bhnd,nc->bhcd", t, one_hot / one_hot.sum(0))

    def bounds(self, t, index):
        """The least and the largest of each cell and channel."""
        index = index[None, None, :, None].expand_as(t)
        empty = t.new_zeros(*t.shape[:2], self.number, t.shape[3])
        return [empty.scatter_reduce(2, index, t, kind, include_self=False) for kind in ("amin", "amax")]

    def best(self, score):
        """The indices of the cells of the largest score, beyond the neighbourhood."""
        hidden = torch.zeros(self.number, self.number + 1, dtype=torch.bool).scatter_(1, self.layout.near, True)
        return score.masked_fill(hidden[:, :-1], -math.inf).topk(self.exact, -1).indices


def cell_of(grid, side):
    y, x = torch.arange(grid.height) // side, torch.arange(grid.width) // side
    return (y[:, None] * math.ceil(grid.width / side) + x).flatten()


def between(share, finest=False):
    """Between the mean key and the bounds of the tokens, or of the finest means."""

    def rule(cut):
        q, keys, index = cut.mean(cut.q), cut.k, cut.cell
        if finest:
            keys = cut.mean(cut.k, cut.finest)
            index = torch.zeros(keys.shape[2], dtype=torch.long).scatter_(0, cut.finest, cut.cell)
        low, high = cut.bounds(keys, index)
        bound = q.clamp(min=0) @ high.mT + q.clamp(max=0) @ low.mT
        return cut.best(torch.lerp(q @ cut.mean(cut.k).mT, bound, share) + cut.size.log())

    return rule


def all_queries(cut):
    weight = cut.q @ cut.mean(cut.k).mT + cut.size.log()
    hidden = torch.zeros(cut.number, cut.number + 1, dtype=torch.bool).scatter_(1, cut.layout.near, True)[:, :-1]
    weight = weight.masked_fill(hidden[cut.cell], -math.inf).softmax(-1).nan_to_num()
    return cut.best(cut.mean(weight))


def log_sum(cut):
    logits = cut.mean(cut.q) @ cut.k.mT
    top = logits.amax(-1, keepdim=True)
    return cut.best((cut.mean((logits - top).exp().mT).mT * cut.size).log())


def second_order(cut):
    logits = (cut.mean(cut.q) @ cut.k.mT).mT
    mean = cut.mean(logits)
    return cut.best((mean + (cut.mean(logits.square()) - mean.square()) / 2).mT + cut.size.log())


def deviation(cut):
    q, k = cut.mean(cut.q), cut.mean(cut.k)
    spread = (cut.mean(cut.k.square()) - k.square()).clamp(min=0).sqrt()
    return cut.best(q @ k.mT + q.abs() @ spread.mT + cut.size.log())


def true_mass(cut):
    parts = [(cut.q[:, h] @ cut.k[:, h].mT).softmax(-1)[:, None] for h in range(cut.q.shape[1])]
    mass = [cut.mean(cut.mean(part).mT).mT * cut.size for part in parts]
    return cut.best(torch.cat(mass, 1))


RULES = {
    "mean query, mean key (`spread=0`)": None,
    "all queries, mean key": all_queries,
    "mean query, sum over all keys of exp": log_sum,
    "mean query, mean key and half the variance of its logits": second_order,
    "mean key and one standard deviation": deviation,
    "best key within the bounds (Quest, `spread=1`)": between(1.0),
    "halfway to the bounds (`spread=0.5`)": between(0.5),
    "halfway to the bounds of the finest means": between(0.5, finest=True),
    "the attention's true mass (dense, an oracle)": true_mass,
}


def main(out, layers, fields):
    cells, rows = Cells(**fields), []
    for name, source in SOURCES.items():
        RECORDED.clear()
        try:
            with torch.no_grad():
                source()
        except AbsentError as reason:
            print(f"{name}: {reason}", file=sys.stderr)
            continue
        kept = [r for r in RECORDED if r[3].image_tokens >= 1000]
        kept = kept[:: max(1, len(kept) // layers)][:layers]
        for rule, choose in RULES.items():
            errors = []
            for q, k, v, grid, scale in kept:
                dense = dense_attention(q, k, v, scale=scale)[:, grid.image]
                found = (
                    choose(Cut(q, k, grid, cells, scale)) if choose else choose_cells(q, k, grid, cells, scale=scale)
                )
                o = multipole_attention(q, k, v, grid, Cells(**fields, chosen=found), scale=scale)[:, grid.image]
                errors.append(((o - dense).square().sum() / dense.square().sum()).item())
            rows.append(dict(source=name, rule=rule, layers=len(kept), error=sum(errors) / len(errors)))
            print(f"{name}: {rule}: {rows[-1]['error']:.3g}", flush=True)
    about = dict(command=" ".join(["python", *sys.argv]), torch=torch.__version__, cells=fields)
    out.write_text(json.dumps(about | dict(rows=rows), indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=9, help="how many layers of each model")
    parser.add_argument("--cells", type=json.loads, default='{"cell": 8, "near": 1, "pool": 4, "exact": 4}')
    options = parser.parse_args()
    main(options.out, options.layers, options.cells)
