"""The attentions that are compared: names for the tables, their specs, and those that were distilled."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vision_attn.adapters.adapter import read_adapter
from vision_attn.conversion.conversion import Conversion, convert, load
from vision_attn.hosts import Host
from vision_attn.kernels.eight_bits import PRECISIONS
from vision_attn.processors import (
    RALA,
    Agent,
    AttnSpec,
    Clear,
    Halo,
    HiLo,
    InLine,
    LinearLocal,
    LinFusion,
    MoH,
    Multipole,
    Neighborhood,
    Paro,
    SuperToken,
)


@dataclass(frozen=True)
class Contender:
    """One attention.

    Args:
        name: Short and stable: a key of the JSON and a row of the tables.
        spec: The processor.
        adapter: Folder of trained weights for it; None for an untrained conversion.
        calibrated: Whether it looks on while the dense model draws other pictures, before it is measured: PARO.
    """

    name: str
    spec: AttnSpec
    adapter: Path | None = None
    calibrated: bool = False

    def put_into(self, target: Any, *, host: Host | None = None, min_tokens: int = 0) -> Conversion:
        """Convert a model; an adapter decides itself which layers keep their attention."""
        if self.adapter is None:
            return convert(target, self.spec, host=host, min_tokens=min_tokens)
        return load(target, self.adapter, host=host)


DISTILLED = " distilled"


def folder_of(name: str) -> str:
    """Return the name of a contender as a folder has it."""
    return name.replace(" ", "_")


def distilled(adapters: Path | None, model: str) -> tuple[Contender, ...]:
    """Return the contenders that were distilled for a model: one for each adapter in `adapters/model`.

    Args:
        adapters: The folder; None for none.
        model: Name of the folder inside.
    """
    folders = sorted(path.parent for path in adapters.glob(f"{model}/*/config.json")) if adapters else []
    specs = [next(iter(read_adapter(folder)[0].layers.values())) for folder in folders]
    return tuple(
        Contender(folder.name.replace("_", " ") + DISTILLED, spec, folder)
        for folder, spec in zip(folders, specs, strict=True)
    )


def multipole(cell: int, pool: int, exact: int, near: int = 1, spread: float = 0.0) -> Contender:
    """Return a setting of multipole attention with all its sizes in its name."""
    name = f"multipole cell {cell} near {near} pool {pool} exact {exact}" + f" spread {spread:g}" * (spread > 0)
    return Contender(name, Multipole(cell=cell, near=near, pool=pool, exact=exact, spread=spread))


DISCS = tuple(Contender(f"clear r{radius}", Clear(radius=radius)) for radius in (8, 16))
EIGHT_BITS = (
    *(
        Contender(f"clear r{radius} {precision}", Clear(radius=radius, precision=precision))
        for radius in (8, 16) for precision in PRECISIONS
    ),
    *(Contender(f"multipole {precision}", Multipole(precision=precision)) for precision in PRECISIONS),
)  # fmt: skip
POOLED = (
    Contender("clear r16 pool 4", Clear(radius=16, pool=4)),
    Contender("clear r16 pool 4 counted", Clear(radius=16, pool=4, counted=True)),
)
# (cell, near, pool), and how many exact cells each of them is measured with
_SETTINGS = {
    (4, 1, 4): (0, 8, 16),
    (4, 1, 2): (0, 8, 16),
    (8, 1, 8): (0, 4),
    (8, 1, 4): (0, 2, 4, 8),
    (8, 1, 2): (0, 4, 8),
    (4, 0, 4): (16, 24),
    (8, 0, 8): (8,),
    (8, 0, 4): (4, 8, 12),
    (8, 0, 2): (8,),
}
MULTIPOLES = tuple(
    multipole(cell, pool, exact, near) for (cell, near, pool), counts in _SETTINGS.items() for exact in counts
)
SPREAD = (
    multipole(8, 4, 4, spread=0.5),
    multipole(8, 4, 2, spread=0.5),
    multipole(8, 4, 8, 0, spread=0.5),
    multipole(4, 4, 8, spread=0.5),
    multipole(4, 4, 16, spread=0.5),
)
_SPEC = Multipole()
DEFAULT = multipole(_SPEC.cell, _SPEC.pool, _SPEC.exact, _SPEC.near, _SPEC.spread)
# One curve a processor, from few keys to many.
CURVES = {
    "Multipole, cells of 8": (
        multipole(8, 4, 0), multipole(8, 4, 2, spread=0.5), DEFAULT, multipole(8, 4, 8, spread=0.5),
    ),
    "Multipole, cells of 4": (
        multipole(4, 4, 0), multipole(4, 4, 8, spread=0.5), multipole(4, 4, 16, spread=0.5),
    ),
    "CLEAR": tuple(Contender(f"clear r{radius}", Clear(radius=radius)) for radius in (4, 8, 16, 24)),
    "Neighborhood": tuple(Contender(f"neighborhood k{k}", Neighborhood(kernel_size=k)) for k in (7, 13, 25, 31)),
    "Agent": tuple(Contender(f"agent {count}", Agent(num_agents=count)) for count in (16, 49, 144, 256)),
    "HiLo": (
        Contender("hilo alpha 0.5", HiLo(alpha=0.5)), Contender("hilo", HiLo()),
        Contender("hilo window 4", HiLo(window_size=4)),
    ),
    "LinearLocal": (
        Contender("linear local", LinearLocal()), Contender("linear local window 16", LinearLocal(window_size=16)),
    ),
    "LinFusion": (
        Contender("linfusion", LinFusion()),
        Contender("linfusion hedgehog", LinFusion(mid_dim=-1, feature_map="hedgehog")),
    ),
    "RALA": (Contender("rala", RALA()),),
    "Halo": tuple(Contender(f"halo b{b} h{h}", Halo(block=b, halo=h)) for b, h in ((4, 2), (8, 3), (8, 8), (16, 8))),
    "InLine": (Contender("inline", InLine()),),
    "SuperToken": tuple(Contender(f"super token {size}", SuperToken(size)) for size in (2, 4, 8)),
    "MoH": (Contender("moh", MoH()),),
}  # fmt: skip
# without a calibration it keeps near blocks
BLOCKS = tuple(
    Contender(f"paro {density:g}{name}", Paro(density=density), calibrated=not name)
    for density in (0.25, 0.5, 0.68) for name in ("", " uncalibrated")
)  # fmt: skip
EVERY = tuple(contender for curve in CURVES.values() for contender in curve)
