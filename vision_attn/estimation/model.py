"""`estimate`: what a conversion would need and save at an image size, before anything is converted."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from vision_attn.estimation.cost import check_device, least_bytes, machine_of, seconds
from vision_attn.grid import Grid
from vision_attn.hosts import Host, find_host
from vision_attn.hosts.host import heads_of, input_dim
from vision_attn.hosts.selection import Specs, Where, assign, check_specs, select, targets_of
from vision_attn.processors.base import AttnSpec, Layer
from vision_attn.processors.softmax import Softmax

_SIDES = (*range(64, 1025, 64), *range(1280, 16385, 256))  # pixels of the shorter side that `_pays_from` tries


def estimate(
    target: Any,
    spec: Specs,
    *,
    height: int,
    width: int,
    where: Where = None,
    host: Host | None = None,
    vae_scale_factor: int | None = None,
    device: str | None = None,
) -> "Estimate":
    """Estimate what `convert(target, spec)` needs and saves, without converting or running anything.

    Operations are counted. Times are estimated from rates that were measured on one H200 and one CPU core; they decide
    from which size on the conversion pays.

    Args:
        target: A diffusers pipeline, a diffusers UNet or DiT, or a timm vision transformer.
        spec: As for `convert`.
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        where: As for `convert`.
        host: As for `convert`.
        vae_scale_factor: Pixels per latent; by default the pipeline's own, 8 for a diffusers model by itself, 1 for
            timm.
        device: 'cuda' or 'cpu', for the times; by default where the model is.

    Returns:
        The estimate, which prints as a table.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the model or the device is unknown, no layer is selected, a processor does not fit its grid, or
            the image is smaller than a token or of a size that the model refuses.
    """
    check_specs(spec)
    check_device(device)
    if min(height, width) < 1:
        raise ValueError(f"height and width must be positive numbers of pixels, got {height} x {width}")
    models = list(targets_of(target, None, host).values())
    scale = vae_scale_factor
    if scale is None:
        scale = getattr(target, "vae_scale_factor", 8 if hasattr(models[0], "config") else 1)
    assert scale is not None
    rows: list[LayerEstimate] = []
    other = 0.0
    for model in models:
        _refuse_size(model, host or find_host(model), (height, width), scale)
        rows += _rows_of(model, host, spec, where, (height, width), scale, device)
        other += _other_flops(model, host or find_host(model), (height // scale, width // scale))
    return Estimate(rows, other, _pays_from(models, host, spec, where, (height, width), scale, device))


@dataclass(frozen=True)
class LayerEstimate:
    """What one layer needs for one sequence.

    Attributes:
        name: Name of the layer.
        spec: Its processor, `Softmax()` if it is not converted.
        grid: Its tokens.
        dense_flops: Operations of dense attention, without projections.
        flops: Operations that the processor needs.
        attended: Mean share of the tokens that one token attends to.
        bytes: Bytes of q, k, v and o.
        dense_seconds: Estimated time of dense attention.
        seconds: Estimated time of the processor.
    """

    name: str
    spec: AttnSpec
    grid: Grid
    dense_flops: float
    flops: float
    attended: float
    bytes: int
    dense_seconds: float
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """What a conversion would need at one size; prints as a table.

    Attributes:
        layers: All attention layers over a grid.
        other_flops: Operations of the model's linear layers in blocks that attend, and of its convolutions.
        pays_from: The (height, width) in pixels, of the given shape, from which on the conversion is faster; None if it
            never is.
    """

    layers: list[LayerEstimate]
    other_flops: float
    pays_from: tuple[int, int] | None

    @property
    def tokens(self) -> int:
        """Tokens of the longest sequence."""
        return max(row.grid.tokens for row in self.layers)

    @property
    def attention_share(self) -> float:
        """Share of attention in the operations of the dense model."""
        dense = sum(row.dense_flops for row in self.layers)
        return dense / (dense + self.other_flops)

    @property
    def converted_share(self) -> float:
        """Operations of the converted model, as a share of those of the dense one."""
        dense = sum(row.dense_flops for row in self.layers) + self.other_flops
        return (sum(row.flops for row in self.layers) + self.other_flops) / dense

    def __str__(self) -> str:
        header = ("layer", "processor", "grid", "tokens", "attended", "GFLOP dense", "GFLOP", "MB")
        cells = [header]
        cells += [
            (
                row.name,
                str(row.spec),
                f"{row.grid.height} x {row.grid.width}",
                str(row.grid.tokens),
                f"{row.attended:.1%}",
                f"{row.dense_flops / 1e9:.3g}",
                f"{row.flops / 1e9:.3g}",
                f"{row.bytes / 1e6:.3g}",
            )
            for row in self.layers
        ]
        pays = "never faster" if self.pays_from is None else "faster from {} x {} pixels on".format(*self.pays_from)
        return (
            f"{aligned(cells)}\nattention is {self.attention_share:.1%} of the model's operations; converted, the "
            f"model needs {self.converted_share:.1%} of them; the conversion is {pays}"
        )


def aligned(cells: Sequence[Sequence[str]]) -> str:
    """Return rows of equal length as text with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def _rows_of(
    model: nn.Module,
    host: Host | None,
    spec: Specs,
    where: Where,
    pixels: tuple[int, int],
    scale: int,
    device: str | None,
) -> list[LayerEstimate]:
    """Estimate each layer of one model."""
    model_host, size = host or find_host(model), (pixels[0] // scale, pixels[1] // scale)
    names = model_host.layer_names(model)
    specs = assign(spec, select(model, names, where))
    _refuse_tiny(model, model_host, names, pixels, size)
    parameter = next(model.parameters())
    machine, itemsize = machine_of(device or parameter.device.type), parameter.element_size()
    rows = []
    for name in names:
        module = model.get_submodule(name)
        layer = Layer("", *heads_of(name, module), dim=input_dim(module))
        grid, own = model_host.grid_at(model, name, *size), specs.get(name, Softmax())
        rows.append(
            LayerEstimate(
                name,
                own,
                grid,
                Softmax().flops(grid, layer),
                own.flops(grid, layer),
                own.attended(grid),
                least_bytes(grid, layer, itemsize),
                seconds(Softmax(), grid, layer, machine, itemsize),
                seconds(own, grid, layer, machine, itemsize),
            )
        )
    return rows


def _refuse_size(model: nn.Module, host: Host, pixels: tuple[int, int], scale: int) -> None:
    """Refuse an image of a size that the model refuses, unless it is smaller than a token (`_refuse_tiny`)."""
    height, width = pixels
    if min(pixels) >= scale and (why := host.refuses(model, height / scale, width / scale)):
        raise ValueError(f"a {type(model).__name__} does not take an image of {height} x {width} pixels: {why}")


def _refuse_tiny(
    model: nn.Module, host: Host, names: list[str], pixels: tuple[int, int], size: tuple[int, int]
) -> None:
    """Refuse an image that has no token in some layer."""
    for name in names:
        if min(size) < 1 or min(host.size(model, name, *size)) < 1:
            height, width = pixels
            raise ValueError(
                f"an image of {height} x {width} pixels is smaller than a token of {name}: give a larger one"
            )


def _other_flops(model: nn.Module, host: Host, size: tuple[int, int]) -> float:
    """Return twice the weights times the tokens, for linear layers in blocks that attend and for convolutions."""
    tokens = {name: host.grid_at(model, name, *size).tokens for name in host.layer_names(model)}
    blocks = {name.rpartition(".")[0]: count for name, count in tokens.items()}
    total = 0.0
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            total += 2 * module.weight.numel() * host.positions(model, name, *size)
        elif isinstance(module, nn.Linear) and "norm" not in name:
            block = next((count for block, count in blocks.items() if name.startswith(f"{block}.")), 0)
            total += 2 * module.weight.numel() * block
    return total


def _pays_from(
    models: list[nn.Module],
    host: Host | None,
    spec: Specs,
    where: Where,
    size: tuple[int, int],
    scale: int,
    device: str | None,
) -> tuple[int, int] | None:
    """Return the smallest size of the same shape that pays: try sizes from large to small until dense is faster."""
    found = None
    for short in reversed(_SIDES):
        height, width = (round(short * side / min(size) / 64) * 64 for side in size)
        try:
            rows = [
                row for model in models for row in _rows_of(model, host, spec, where, (height, width), scale, device)
            ]
        except ValueError:  # a processor does not fit
            continue
        if sum(row.seconds for row in rows) >= sum(row.dense_seconds for row in rows):
            break
        found = (height, width)
    return found
