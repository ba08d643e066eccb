"""`estimate`: what a conversion would need and save at an image size, before anything is converted."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import add
from typing import Any

from torch import nn

from vision_attn._checks import check_int
from vision_attn.estimation.cost import Machine, least_bytes
from vision_attn.estimation.rates import check_device, machine_of
from vision_attn.estimation.step import Attending, Denoiser, Step, device_of
from vision_attn.grid import Grid
from vision_attn.hosts import Host, find_host
from vision_attn.hosts.selection import Specs, Where, assign, check_host, check_specs, select, targets_of
from vision_attn.processors.base import AttnSpec
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

    Operations are counted. Times are estimated from rates: those of this GPU, which are measured once in at most 3
    seconds and kept in the user's cache folder; those of an H200 where there is none; those of a CPU core on a CPU. A
    step takes as long as the GPU or the host needs, whichever is longer.

    Args:
        target: A diffusers pipeline, a diffusers UNet or DiT, or a timm vision transformer.
        spec: As for `convert`.
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        where: As for `convert`.
        host: As for `convert`.
        vae_scale_factor: Pixels per latent; by default the pipeline's own, 8 for a diffusers model by itself, 1 for
            timm and transformers.
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
    check_pixels(height, width)
    denoisers, scale = read(target, host, vae_scale_factor)
    chosen = [(denoiser, specs_of(denoiser, spec, where)) for denoiser in denoisers]
    rows: list[LayerEstimate] = []
    other, steps = 0.0, []
    for denoiser, specs in chosen:
        size = input_size(denoiser, (height, width), scale)
        machine, itemsize = _machine_of(denoiser, device)
        step = denoiser.step(size, specs, machine, itemsize)
        rows += [
            _row(denoiser, name, layer, specs.get(name, Softmax()), itemsize)
            for name, layer in zip(denoiser.names, step.layers, strict=True)
        ]
        other += denoiser.other_flops(size)
        steps.append(step)
    return Estimate(rows, other, _pays_from(chosen, (height, width), scale, device), functools.reduce(add, steps))


def read(target: Any, host: Host | None, vae_scale_factor: int | None) -> tuple[list[Denoiser], int]:
    """Return the models of a target that attend over a grid, and the pixels of their input's latents.

    Args:
        target: As for `estimate`.
        host: As for `estimate`.
        vae_scale_factor: As for `estimate`.

    Raises:
        TypeError: If `target` is neither a model nor a pipeline, or another argument has the wrong type.
        ValueError: If it has no model that is known, or the pixels are less than one.
    """
    check_host(host)
    models = targets_of(target, None, host)
    scale = vae_scale_factor
    if scale is None:
        on_latents = any(cls.__name__ == "ModelMixin" for cls in type(next(iter(models.values()))).__mro__)
        scale = getattr(target, "vae_scale_factor", 8 if on_latents else 1)
    check_int("vae_scale_factor", scale, 1, "a number of pixels")
    assert scale is not None
    several = len(models) > 1
    return [Denoiser(m, host or find_host(m), name if several else "") for name, m in models.items()], scale


def check_pixels(height: Any, width: Any) -> None:
    """Refuse a size of an image that is not in whole pixels.

    Raises:
        TypeError: If a side is not an int.
        ValueError: If a side is below 1.
    """
    check_int("height", height, 1, "a number of pixels")
    check_int("width", width, 1, "a number of pixels")


def specs_of(denoiser: Denoiser, spec: Specs, where: Where = None) -> dict[str, AttnSpec]:
    """Return the spec of each layer that is selected, as `convert` does."""
    return assign(spec, select(denoiser.model, denoiser.names, where))


def break_even(model: nn.Module, host: Host, specs: Mapping[str, AttnSpec], *, graphs: bool) -> dict[str, float]:
    """Return for each converted layer the tokens of its grid from which on a step is faster, infinity for never.

    Args:
        model: The model, where it runs.
        host: How its layers and their grids are found.
        specs: The processor of each converted layer.
        graphs: Whether the model replays from CUDA graphs, so that the time of the host does not count.
    """
    denoiser = Denoiser(model, host)
    return denoiser.break_even(specs, *_machine_of(denoiser, None), graphs=graphs)


def _machine_of(denoiser: Denoiser, device: str | None) -> tuple[Machine, int]:
    """Return the rates, and the bytes of an element."""
    parameter = next(denoiser.model.parameters())
    size = max(parameter.element_size(), 2)  # weights of 8 bits compute in 16
    return machine_of(device or str(device_of(denoiser.model)), parameter.dtype), size


@dataclass(frozen=True)
class LayerEstimate:
    """What one layer needs for one sequence.

    Attributes:
        name: Name of the layer, after that of its component if several models attend.
        spec: Its processor, `Softmax()` if it is not converted.
        grid: Its tokens.
        dense_flops: Operations of dense attention, without projections.
        flops: Operations that the processor needs.
        attended: Mean share of the tokens that one token attends to.
        bytes: Bytes of q, k, v and o.
        dense_seconds: Estimated time that the device needs for dense attention.
        seconds: Estimated time that it needs for the processor.
        host_seconds: Estimated time that a conversion of the layer costs the host, where it is not the device.
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
    host_seconds: float


@dataclass(frozen=True)
class Estimate:
    """What a conversion would need at one size; prints as a table.

    Attributes:
        layers: All attention layers over a grid.
        other_flops: Operations of the model's linear layers in blocks that attend, and of its convolutions.
        pays_from: The (height, width) in pixels, of the given shape, from which on the conversion is faster; None if it
            never is.
        step: Estimated seconds of a step, of the device and of the host.
    """

    layers: list[LayerEstimate]
    other_flops: float
    pays_from: tuple[int, int] | None
    step: Step

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


def _row(denoiser: Denoiser, name: str, layer: Attending, spec: AttnSpec, itemsize: int) -> LayerEstimate:
    """Return what one layer needs, which its model knows as `name`."""
    grid, about = layer.grid, denoiser.layers[name]
    return LayerEstimate(
        layer.name,
        spec,
        grid,
        Softmax().flops(grid, about),
        spec.flops(grid, about),
        spec.attended(grid),
        least_bytes(grid, about, itemsize),
        layer.dense,
        layer.converted,
        layer.host,
    )


def input_size(denoiser: Denoiser, pixels: tuple[int, int], scale: int) -> tuple[int, int]:
    """Return the size of a model's input for an image.

    Raises:
        ValueError: If the model refuses an image of this size, or some layer has no token.
    """
    model, host, (height, width) = denoiser.model, denoiser.host, pixels
    if min(pixels) >= scale and (why := host.refuses(model, height / scale, width / scale)):
        raise ValueError(f"a {type(model).__name__} does not take an image of {height} x {width} pixels: {why}")
    size = height // scale, width // scale
    for name in denoiser.names:
        if min(size) < 1 or min(host.size(model, name, *size)) < 1:
            raise ValueError(
                f"an image of {height} x {width} pixels is smaller than a token of {name}: give a larger one"
            )
    return size


def _pays_from(
    chosen: Sequence[tuple[Denoiser, dict[str, AttnSpec]]], size: tuple[int, int], scale: int, device: str | None
) -> tuple[int, int] | None:
    """Return the smallest size of the same shape that pays: try sizes from large to small until dense is faster."""
    found, rates = None, [_machine_of(denoiser, device) for denoiser, _ in chosen]
    for short in reversed(_SIDES):
        height, width = (round(short * side / min(size) / 64) * 64 for side in size)
        try:
            step = functools.reduce(
                add,
                (
                    denoiser.step(input_size(denoiser, (height, width), scale), specs, *rate)
                    for (denoiser, specs), rate in zip(chosen, rates, strict=True)
                ),
            )
        except ValueError:  # a processor or the model does not fit
            continue
        if step.seconds(step.names) >= step.seconds():
            break
        found = (height, width)
    return found
