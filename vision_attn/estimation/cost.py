"""When a processor pays: times of its attention and of dense attention, from operations, bytes and measured rates."""

import functools
from dataclasses import dataclass

from vision_attn.grid import Grid
from vision_attn.processors.base import AttnSpec, Layer
from vision_attn.processors.schedule import Schedule
from vision_attn.processors.softmax import Softmax

_SIDES = (*range(4, 64, 4), *range(64, 257, 16), *range(288, 1025, 32))


@dataclass(frozen=True)
class Machine:
    """Rates that attention reaches on a kind of device.

    Attributes:
        dense: Operations per second of dense attention.
        other: Needed operations per second of other attention, whose tiles also compute operations nobody needs.
        bandwidth: Bytes per second.
        overhead: Seconds that each call of other attention takes in addition.
    """

    dense: float
    other: float
    bandwidth: float
    overhead: float


MACHINES = {
    # H200, bf16, D=128, torch 2.11, triton 3.6: bench/results/kernels_local_h200.json
    "cuda": Machine(dense=6.1e14, other=3.2e14, bandwidth=4.2e12, overhead=2e-5),
    # one core of the CI machine, fp32, D=64, torch 2.13
    "cpu": Machine(dense=6e10, other=1.7e10, bandwidth=4e9, overhead=1e-3),
}


def machine_of(device: str) -> Machine:
    """Return the rates of a kind of device; those of a GPU if its own were not measured."""
    return MACHINES.get(device.partition(":")[0], MACHINES["cuda"])


def check_device(device: str | None) -> None:
    """Refuse the name of a device whose rates are not known.

    Raises:
        ValueError: If it is neither 'cuda' nor 'cpu', with or without a number.
    """
    if device is not None and device.partition(":")[0] not in MACHINES:
        raise ValueError(f"device must be {' or '.join(map(repr, MACHINES))}, whose rates are known, got {device!r}")


def seconds(spec: AttnSpec, grid: Grid, layer: Layer, machine: Machine, itemsize: int) -> float:
    """Estimate the time of one attention over one sequence; for a schedule, the mean over the denoising.

    Args:
        spec: The processor.
        grid: The sequence.
        layer: The layer; its name is not used.
        machine: The rates.
        itemsize: Bytes of one element of q.

    Returns:
        Seconds.

    Raises:
        ValueError: If the spec does not fit the grid.
    """
    if isinstance(spec, Schedule):
        return sum(share * seconds(stage, grid, layer, machine, itemsize) for share, stage in spec.shares)
    dense = isinstance(spec, Softmax)
    work = spec.flops(grid, layer) / (machine.dense if dense else machine.other)
    moved = spec.passes * least_bytes(grid, layer, itemsize) / machine.bandwidth
    # a machine computes and moves data at the same time, so the longer of the two counts
    return max(work, moved) + (0 if dense else machine.overhead)


def least_bytes(grid: Grid, layer: Layer, itemsize: int) -> int:
    """Return the bytes of q, k, v and o."""
    return 4 * grid.tokens * layer.num_heads * layer.head_dim * itemsize


@functools.cache
def break_even(spec: AttnSpec, layer: Layer, outside: int, device: str, itemsize: int) -> int | None:
    """Return the number of grid tokens from which on a processor is faster than dense attention, on square grids.

    Args:
        spec: The processor.
        layer: The layer. Give it no name, so that equal layers are worked out once.
        outside: Tokens outside the grid.
        device: Kind of device, 'cuda' or 'cpu'.
        itemsize: Bytes of one element of q.

    Returns:
        Tokens of the grid; None if the processor is never faster, up to 1024 x 1024.
    """
    machine, found = machine_of(device), None
    for side in reversed(_SIDES):
        grid = Grid(side, side, prefix=outside)
        try:
            ours = seconds(spec, grid, layer, machine, itemsize)
        except ValueError:  # the spec does not fit this grid
            continue
        if ours >= seconds(Softmax(), grid, layer, machine, itemsize):
            break
        found = side * side
    return found
