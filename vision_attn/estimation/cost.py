"""What one attention costs: seconds of a device from operations, bytes and rates, and seconds of the host."""

from dataclasses import dataclass

from vision_attn.grid import Grid
from vision_attn.processors.base import AttnSpec, Layer
from vision_attn.processors.moh import MoH
from vision_attn.processors.schedule import Schedule
from vision_attn.processors.softmax import Softmax

_TILE = 128  # queries that a unit takes at a time
_REROUTING = 3.0  # operations that it takes the host to bring a call of attention to a processor


@dataclass(frozen=True)
class Machine:
    """Rates that attention and its surroundings reach on a device, and on the host that calls it.

    Attributes:
        name: The device, for tables.
        dense: Operations per second of dense attention with 128 channels a head.
        narrow: The same with 64 channels a head.
        other: Operations per second of our kernels with 128 channels a head.
        spare: Keys that a tile holds in addition to those that a token needs.
        fill: Kernels fill up the channels of a head to a multiple of this.
        units: Multiprocessors: each computes dense attention of 128 queries at a time. 0 if that is not to be counted.
        products: Operations per second of products of tokens with weights.
        bandwidth: Bytes per second.
        launch: Seconds of the device that each operation takes at least.
        overhead: Seconds of the device that each call of other attention takes in addition.
        host: Seconds of the host for each operation of a model, Python included; 0 if the host is the device.
        source: Where the rates come from: 'measured', or whose they are instead.
    """

    name: str
    dense: float
    narrow: float
    other: float
    spare: float
    fill: int
    units: int
    products: float
    bandwidth: float
    launch: float
    overhead: float
    host: float
    source: str

    def share(self, head_dim: int) -> float:
        """Return what is left of a rate with 128 channels a head for heads of other channels."""
        filled = self.fill * -(-head_dim // self.fill)
        return head_dim / filled * (self.narrow / self.dense if filled <= 64 else 1.0)

    def waves(self, tokens: int, heads: int) -> float:
        """Return how much longer dense attention takes because some units have nothing to do in the end."""
        tiles = -(-tokens // _TILE) * heads
        return -(-tiles // self.units) * self.units / tiles if self.units else 1.0


# bf16, torch 2.11, triton 3.6: bench/results/kernels_local_h200.json, kernels_linear_h200.json. The host's rate is that
# of steps at native sizes, where the GPU waits for it.
H200 = Machine(
    "NVIDIA H200",
    dense=6.1e14,
    narrow=4.65e14,
    other=3.75e14,
    spare=300,
    fill=64,
    units=132,
    products=6.2e14,
    bandwidth=4.2e12,
    launch=2e-6,
    overhead=0.0,
    host=1e-5,
    source="stored rates of an H200",
)
# one core of the CI machine, fp32, D=64, torch 2.13
CPU = Machine(
    "a CPU core",
    dense=6e10,
    narrow=6e10,
    other=1.7e10,
    spare=0,
    fill=16,
    units=0,
    products=6e10,
    bandwidth=4e9,
    launch=1e-5,
    overhead=1e-3,
    host=0.0,
    source="stored rates of one CPU core",
)


def seconds(spec: AttnSpec, grid: Grid, layer: Layer, machine: Machine, itemsize: int) -> float:
    """Estimate the time that the device needs for one attention over one sequence.

    Args:
        spec: The processor; for a schedule it is the mean over the denoising.
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
    if isinstance(spec, MoH):
        moved = (spec.passes - spec.spec.passes) * least_bytes(grid, layer, itemsize) / machine.bandwidth
        gates = moved + (spec.calls - spec.spec.calls) * machine.launch
        return seconds(spec.spec, grid, layer, machine, itemsize) + gates
    products = spec.products(grid, layer)
    work, extra = spec.flops(grid, layer) - products, 0.0
    rate = machine.dense
    if isinstance(spec, Softmax):
        work *= machine.waves(grid.tokens, layer.num_heads)
        extra = machine.launch  # its units fill up and run empty
    else:
        if spec.attended(grid) < 1:  # sums over all tokens have no tiles of keys
            work += 4 * grid.tokens * machine.spare * layer.num_heads * layer.head_dim
        rate, extra = machine.other, machine.overhead
    work = work / (rate * machine.share(layer.head_dim)) + products / machine.products
    moved = spec.passes * least_bytes(grid, layer, itemsize) / machine.bandwidth
    # a machine computes and moves data at the same time, so the longer of the two counts
    return max(work, moved) + spec.calls * machine.launch + extra


def host_seconds(spec: AttnSpec, machine: Machine) -> float:
    """Return how much longer than dense attention a converted layer keeps the host; for a schedule, in the mean."""
    if isinstance(spec, Softmax):
        return _REROUTING * machine.host
    return (_REROUTING + spec.calls - Softmax().calls) * machine.host


def least_bytes(grid: Grid, layer: Layer, itemsize: int) -> int:
    """Return the bytes of q, k, v and o."""
    return 4 * grid.tokens * layer.num_heads * layer.head_dim * itemsize
