"""The attentions that are compared: names for the tables, and their specs."""

from dataclasses import dataclass

from vision_attn.processors import RALA, Agent, AttnSpec, Clear, HiLo, LinearLocal, LinFusion, Multipole, Neighborhood


@dataclass(frozen=True)
class Contender:
    """One attention.

    Args:
        name: Short and stable: a key of the JSON and a row of the tables.
        spec: The processor.
    """

    name: str
    spec: AttnSpec


def multipole(cell: int, pool: int, exact: int, near: int = 1, spread: float = 0.0) -> Contender:
    """Return a setting of multipole attention with all its sizes in its name."""
    name = f"multipole cell {cell} near {near} pool {pool} exact {exact}" + f" spread {spread:g}" * (spread > 0)
    return Contender(name, Multipole(cell=cell, near=near, pool=pool, exact=exact, spread=spread))


DISCS = tuple(Contender(f"clear r{radius}", Clear(radius=radius)) for radius in (8, 16))
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
OTHERS = (
    Contender("neighborhood k13", Neighborhood(kernel_size=13)),
    Contender("neighborhood k25", Neighborhood(kernel_size=25)),
    Contender("agent 49", Agent(num_agents=49)),
    Contender("hilo", HiLo()),
    Contender("linear local", LinearLocal()),
    Contender("linfusion", LinFusion()),
    Contender("rala", RALA()),
)
