"""Local attention at FLUX's shapes: discs with text, squares without, dilation, backward, other dtypes and heads."""

from typing import Any

import torch

from vision_attn.bench.local.candidates import OPERATORS
from vision_attn.bench.local.fa4 import FA4
from vision_attn.bench.local.flex import FLEX
from vision_attn.bench.local.problem import LocalProblem
from vision_attn.bench.measure import Measurement
from vision_attn.grid import Grid
from vision_attn.kernels.local import Window

TITLE = (
    "Local attention, the whole operator on `[B, N, H, D]` tensors: discs (CLEAR) with text tokens, squares (NATTEN) "
    "without. cuDNN, flash, SDPA and xformers compute dense attention; Flex tiles and Flex FLASH permute tokens inside "
    "the timing, FA4 tiles outside of it; int8 and fp8 quantise inside of it"
)
CANDIDATES = (*OPERATORS, *FLEX, *FA4)
_DISCS = "Discs"
_SQUARES = "Squares"
_ROUNDED = ("int8", "fp8")  # at one radius, as Flex
_DISC_PEERS = ("cuDNN", "flash", "Flex raster", "Flex tiles", "Flex FLASH", "FA4 tiles", "xformers")
_SLOW = ("flash",)  # two and a half seconds a call at a grid of 512, and slower than cuDNN everywhere
_SQUARE_PEERS = ("cuDNN", "NATTEN")
_QUICK = ("disc-64-r8", "disc-64-r16", "square-64-k13", "dilated-64-k7")


def cases(device: torch.device, quick: bool = False) -> list[LocalProblem]:
    """Return the cases for a device; a CPU gets small ones in float32."""
    if device.type == "cpu":
        return _on_cpu(quick)
    every = [*_discs(), *_precisions(), *_squares(), *_dilated()]
    return [case for case in every if not quick or case.name in _QUICK]


def row(case: LocalProblem, measurement: Measurement) -> dict[str, Any]:
    """Measure one case; see `Measurement.row`."""
    return measurement.row(case, CANDIDATES)


def _discs() -> list[LocalProblem]:
    problems = []
    for side, radius in [*((g, r) for g in (64, 128, 256) for r in (8, 16, 32)), (512, 16)]:
        backward: tuple[str, ...] = ("ours", "cuDNN", "FA4 tiles") if side <= 128 else ("ours",)
        if (side, radius) == (128, 16):
            backward += ("Flex raster",)
        peers = [peer for peer in _DISC_PEERS if side < 512 or peer not in _SLOW]
        # FlexAttention compiles for seconds in each case, and one radius shows what tiles change
        peers = [peer for peer in peers if radius == 16 or peer not in ("Flex tiles", "Flex FLASH")]
        peers += _ROUNDED if radius == 16 else ()
        grid, window = Grid(side, side, prefix=512), Window(radius=radius)
        problems.append(LocalProblem(_DISCS, grid, window, tuple(peers), backward))
    return problems


def _precisions() -> list[LocalProblem]:
    window, peers = Window(radius=16), ("cuDNN",)
    grids = [Grid(side, side, prefix=512) for side in (128, 256)]
    kinds: list[dict[str, Any]] = [dict(dtype="float16"), dict(head_dim=64), dict(head_dim=64, dtype="float16")]
    return [
        LocalProblem("Other dtypes and heads", grid, window, peers, ("ours",), **k) for k in kinds for grid in grids
    ]


def _squares() -> list[LocalProblem]:
    sizes = [(side, K) for side in (64, 128, 256) for K in (7, 13, 33, 65) if side > K]
    return [
        LocalProblem(
            f"{_SQUARES}, D {D}", Grid(side, side), Window(kernel_size=K), _SQUARE_PEERS,
            ("ours", "NATTEN") if (side, D) == (128, 128) and K < 65 else (), head_dim=D,
        )
        for D in (128, 64) for side, K in sizes
    ]  # fmt: skip


def _dilated() -> list[LocalProblem]:
    peers = ("ours undilated", *_SQUARE_PEERS)
    return [
        LocalProblem("Dilation", Grid(side, side), Window(kernel_size=K, dilation=2), peers)
        for side, K in ((64, 7), (128, 7), (128, 13))
    ]


def _on_cpu(quick: bool) -> list[LocalProblem]:
    small: dict[str, Any] = dict(heads=2, head_dim=32, dtype="float32")
    side = 16 if quick else 64
    both, peers = ("ours", "SDPA"), ("SDPA", *_ROUNDED)
    return [
        LocalProblem(_DISCS, Grid(side, side, prefix=32), Window(radius=4), peers, both, **small),
        LocalProblem(_SQUARES, Grid(side, side), Window(kernel_size=7), (*peers, "NATTEN", "cuDNN"), **small),
        LocalProblem("Dilation", Grid(side, side), Window(kernel_size=5, dilation=2), ("ours undilated",), **small),
    ]
