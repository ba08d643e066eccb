"""Fidelity of predictions: a pretrained diffusion UNet that draws height maps, untouched but for its attention.

The weights are those of adaptive-terrain-diffusion: OpenAI's UNet at 128 x 128 with EDM's preconditioning and a class
embedding of the terrain's difficulty. 28 of its layers attend, nine of them at 32 x 32.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vision_attn.bench.quality.contenders import Contender
from vision_attn.bench.quality.fidelity import Bound, keys_met
from vision_attn.bench.quality.weights import (
    TERRAIN,
    Graph,
    Sources,
    Weights,
    describe,
    fetch,
    read_weights,
    run_onnx,
)
from vision_attn.grid import Grid
from vision_attn.hosts import Host

SIGMAS = (80.0, 5.0, 0.5, 0.05)
SIDE, LEVELS, LAYERS = 128, 5, 4  # pixels; levels of the UNet and residual blocks in each
MIN_TOKENS = 1024  # the layers at 32 x 32
_DATA, _LEAST = 0.5, 0.002  # EDM's sigma_data and sigma_min
_HIGHEST, _FINE = 22.16864013671875, 0.1  # metres: the range of heights, and below which they are linear


@dataclass(frozen=True)
class TerrainCase:
    """The UNet at its own size.

    Args:
        contenders: Who takes part.
        samples: How many noisy maps of each noise level.
        drawn: How many maps are drawn.
        bounds: What must hold.
        sources: Where the weights are.
    """

    contenders: tuple[Contender, ...]
    samples: int = 4
    drawn: int = 16
    bounds: tuple[Bound, ...] = ()
    sources: Sources = field(default_factory=Sources)

    @property
    def name(self) -> str:
        """One size, one name."""
        return "terrain"

    @property
    def label(self) -> str:
        """As in '128 px'."""
        return f"{SIDE} px"

    @property
    def group(self) -> str:
        """The table."""
        return "Terrain UNet"

    def shape(self) -> dict[str, Any]:
        """Return what defines the case, for the JSON."""
        about = describe(TERRAIN, self.sources.files)
        counts = dict(sigmas=list(SIGMAS), samples=self.samples, drawn=self.drawn, min_tokens=MIN_TOKENS)
        return dict(**about, pixels=SIDE, **counts, dtype="float32")

    def reference(self, device: torch.device) -> "Predictions":
        """Run the dense model."""
        return Predictions(self, device)


class Predictions:
    """The UNet with its dense predictions of noise of each level, and the maps that it draws in one step from noise.

    Args:
        case: How many samples.
        device: Where.
    """

    def __init__(self, case: TerrainCase, device: torch.device) -> None:
        self.model = Terrain(read_weights(TERRAIN, case.sources.files)).to(device)
        draw = torch.Generator().manual_seed(0)
        noise = torch.randn(len(SIGMAS), case.samples, 1, SIDE, SIDE, generator=draw).to(device)
        self.difficulty = torch.linspace(0.1, 1, case.samples).to(device)
        self.inputs = [sigma * each for sigma, each in zip(SIGMAS, noise, strict=True)]
        self.noise = torch.randn(case.drawn, 1, SIDE, SIDE, generator=draw).to(device)
        self.dense = [self._predict(x, sigma, self.difficulty) for sigma, x in zip(SIGMAS, self.inputs, strict=True)]
        self.maps = self._draw()

    def _predict(self, x: Tensor, sigma: float, difficulty: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model(x, x.new_full((len(x),), sigma), difficulty)

    def _draw(self) -> Tensor:
        """Draw maps in one step from the highest noise, as the package does."""
        difficulty = torch.linspace(0, 1, len(self.noise)).to(self.noise)
        return self._predict(SIGMAS[0] * self.noise, SIGMAS[0], difficulty)

    def measure(self, contender: Contender) -> dict[str, float]:
        """Compare the converted model with the dense one.

        Returns:
            `sigma_S` for each noise level S: the root mean square of the prediction's error over that of the dense
            prediction, in the mean over samples; `psnr_db` of drawn maps, whose values are in [-1, 1]; `metres`, the
            root mean square error of their heights; `keys`, how many keys a token of the grid meets, in the mean.
        """
        conversion = contender.put_into(self.model.unet, host=HOST, min_tokens=MIN_TOKENS)
        try:
            found = {}
            for sigma, x, dense in zip(SIGMAS, self.inputs, self.dense, strict=True):
                error = (self._predict(x, sigma, self.difficulty) - dense).square().mean((1, 2, 3)).sqrt()
                found[f"sigma_{sigma:g}"] = (error / dense.square().mean((1, 2, 3)).sqrt()).mean().item()
            maps = self._draw()
            keys = keys_met(conversion)
        finally:
            conversion.revert()
        error = (maps - self.maps).square().mean((1, 2, 3)).clamp(min=4e-10)
        heights = (height_of(maps) - height_of(self.maps)).square().mean((1, 2, 3)).sqrt()
        psnr = (-10 * (error / 4).log10()).mean().item()
        return found | dict(psnr_db=psnr, metres=heights.mean().item(), keys=keys)


def height_of(maps: Tensor) -> Tensor:
    """Return heights in metres of maps in [-1, 1]: the package stores asinh(height / 0.1), scaled."""
    most = math.asinh(_HIGHEST / _FINE)
    return _FINE * ((maps + 1) / 2 * most).sinh()


def _blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    names = ("AttnDownBlock2D", "UNetMidBlock2D", "AttnUpBlock2D")
    return [(name, module) for name, module in model.named_modules() if type(module).__name__ in names]


def _grid(module: nn.Module, inputs: Mapping[str, Any]) -> Grid:
    return Grid(*inputs["hidden_states"].shape[-2:])


HOST = Host(layers=("attentions.[0-9]",), parts=_blocks, probe=_grid)


class Terrain(nn.Module):
    """A `diffusers.UNet2DModel` in EDM's preconditioning.

    Args:
        weights: Its tensors; None for random ones.
    """

    def __init__(self, weights: Weights | None) -> None:
        super().__init__()
        from vision_attn._compat import ensure_torchvision  # noqa: PLC0415

        ensure_torchvision()
        from diffusers import UNet2DModel  # noqa: PLC0415, optional

        attends, plain = LEVELS - 2, 2
        self.unet: Any = UNet2DModel(
            sample_size=SIDE, in_channels=1, out_channels=1, layers_per_block=LAYERS,
            block_out_channels=(32, 32, 64, 96, 128), attention_head_dim=32,
            down_block_types=("ResnetDownsampleBlock2D",) * plain + ("AttnDownBlock2D",) * attends,
            up_block_types=("AttnUpBlock2D",) * attends + ("ResnetUpsampleBlock2D",) * plain,
            resnet_time_scale_shift="scale_shift", downsample_type="resnet", upsample_type="resnet",
            norm_num_groups=32, attn_norm_num_groups=32, norm_eps=1e-5, class_embed_type="identity",
            flip_sin_to_cos=True, freq_shift=0,
        )  # fmt: skip
        self.label = nn.Sequential(nn.Linear(1, 128), nn.SiLU(), nn.Linear(128, 128))
        if weights is not None:
            self.load_state_dict(weights)
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor, sigma: Tensor, difficulty: Tensor) -> Tensor:
        """Return the denoised maps `[B, 1, 128, 128]` in [-1, 1].

        Args:
            x: Noisy maps.
            sigma: Noise levels `[B]`.
            difficulty: In [0, 1], `[B]`.
        """
        above, total = sigma - _LEAST, (sigma**2 + _DATA**2).sqrt()
        keep, scale = _DATA**2 / (above**2 + _DATA**2), above * _DATA / total
        class_labels = self.label(difficulty[:, None])
        time = 250 * sigma.log()
        f = self.unet(_spread(1 / total) * x, time, class_labels=class_labels).sample
        return (_spread(scale) * f + _spread(keep) * x).clamp(-1, 1)


def _spread(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def fetch_weights(sources: Sources) -> Path:
    """Download the weights (39 MB); see `fetch`."""
    return fetch(TERRAIN, sources.files, weights_of, difference)


def weights_of(graph: Graph) -> Weights:
    """Return the state dict of `Terrain`."""
    named = openai_weights(graph)
    label = {name: t for name, t in named.items() if name.startswith("label_emb.")}
    unet = unet_weights({name: t for name, t in named.items() if name not in label})
    return {f"unet.{name}": t for name, t in unet.items()} | {
        f"label.{name.removeprefix('label_emb.')}": t for name, t in label.items()
    }


def openai_weights(graph: Graph) -> Weights:
    """Return the state dict under OpenAI's names. Norms lost theirs: the convolution that reads one tells its place."""
    readers: dict[str, list[Any]] = {}
    for node in graph.nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found = {name: t for name, t in graph.tensors.items() if name.startswith("network.")}

    def reader(node: Any, kind: str) -> Any:
        return next(n for n in readers[node.output[0]] if n.op_type == kind)

    for node in graph.nodes:
        if node.op_type != "InstanceNormalization":
            continue
        product = reader(reader(node, "Reshape"), "Mul")
        total = reader(product, "Add")
        place = _norm_of(_first_convolution(total.output[0], readers))
        for kind, step in (("weight", product), ("bias", total)):
            values = next(graph.tensors[name] for name in step.input if name in graph.tensors)
            found[place + kind] = values.reshape(-1)
    return {name.removeprefix("network."): t for name, t in found.items()}


def _first_convolution(name: str, readers: Mapping[str, list[Any]]) -> str:
    """Return the name of the weight of the first convolution that reads a tensor, directly or not."""
    waiting = [name]
    while True:
        for node in readers[waiting.pop(0)]:
            if node.op_type == "Conv":
                return node.input[1]
            waiting += list(node.output)


def _norm_of(weight: str) -> str:
    """Return the name of the norm before a convolution, up to the last dot."""
    for convolution, norm in (
        ("in_layers.2", "in_layers.0"), ("out_layers.3", "out_layers.0"), ("qkv", "norm"), ("out.2", "out.0")
    ):  # fmt: skip
        weight = weight.replace(convolution, norm)
    return weight.removesuffix("weight")


def unet_weights(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of diffusers' UNet.

    Raises:
        ValueError: If a weight has no place.
    """
    left, found = dict(named), {}

    def move(source: str, target: str) -> None:
        for kind in ("weight", "bias"):
            if f"{source}.{kind}" in left:
                found[f"{target}.{kind}"] = left.pop(f"{source}.{kind}")

    def move_block(source: str, target: str) -> None:
        for theirs, ours in _RESIDUAL.items():
            move(f"{source}.{theirs}", f"{target}.{ours}")

    def move_attention(source: str, target: str) -> None:
        for kind in ("weight", "bias"):
            qkv = left.pop(f"{source}.qkv.{kind}").flatten(1 if kind == "weight" else 0)
            for name, part in zip("qkv", qkv.chunk(3), strict=True):
                found[f"{target}.to_{name}.{kind}"] = part
            found[f"{target}.to_out.0.{kind}"] = left.pop(f"{source}.proj_out.{kind}").flatten(
                1 if kind == "weight" else 0
            )
        move(f"{source}.norm", f"{target}.group_norm")

    for theirs, ours in _ENDS.items():
        move(theirs, ours)
    number = 1
    for level in range(LEVELS):
        for layer in range(LAYERS):
            move_block(f"input_blocks.{number}.0", f"down_blocks.{level}.resnets.{layer}")
            if level > 1:
                move_attention(f"input_blocks.{number}.1", f"down_blocks.{level}.attentions.{layer}")
            number += 1
        if level < LEVELS - 1:
            move_block(f"input_blocks.{number}.0", f"down_blocks.{level}.downsamplers.0")
            number += 1
    move_block("middle_block.0", "mid_block.resnets.0")
    move_attention("middle_block.1", "mid_block.attentions.0")
    move_block("middle_block.2", "mid_block.resnets.1")
    for level in range(LEVELS):
        for layer in range(LAYERS + 1):
            source, attends = f"output_blocks.{(LAYERS + 1) * level + layer}", level < LEVELS - 2
            move_block(f"{source}.0", f"up_blocks.{level}.resnets.{layer}")
            if attends:
                move_attention(f"{source}.1", f"up_blocks.{level}.attentions.{layer}")
            if layer == LAYERS and level < LEVELS - 1:
                move_block(f"{source}.{1 + attends}", f"up_blocks.{level}.upsamplers.0")
    if left:
        raise ValueError(f"weights without a place in the UNet: {', '.join(left)}")
    return found


_RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


def difference(weights: Weights, onnx: Path) -> float:
    """Return the largest difference of our predictions to those of onnxruntime, on noise at all noise levels.

    Args:
        weights: What `weights_of` returns.
        onnx: The file that they are from.
    """
    sigma, draw = torch.tensor(SIGMAS), torch.Generator().manual_seed(0)
    x = torch.randn(len(SIGMAS), 1, SIDE, SIDE, generator=draw) * _spread(sigma)
    difficulty = torch.linspace(0.1, 1, len(SIGMAS))
    with torch.no_grad():
        ours = Terrain(weights)(x, sigma, difficulty)
    return (ours - run_onnx(onnx, dict(noisy=x, sigma=sigma, difficulty=difficulty))).abs().max().item()
