"""How many operations the host calls for one attention: `AttnSpec.calls` beside those that are counted."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vision_attn import (
    RALA,
    Agent,
    AgentSD,
    Clear,
    Halo,
    HiLo,
    InLine,
    LinearLocal,
    LinFusion,
    MoH,
    Multipole,
    Neighborhood,
    SuperToken,
)
from vision_attn.grid import Grid
from vision_attn.kernels import tapes
from vision_attn.processors import AttnSpec, Layer, Moment

SPECS = {
    "clear": Clear(8),
    "clear-pool": Clear(4, pool=4),
    "neighborhood": Neighborhood(7),
    "multipole": Multipole(cell=4, pool=2),
    "multipole-far": Multipole(cell=4, pool=2, exact=0),
    "linfusion": LinFusion(mid_dim=-1),
    "linfusion-hedgehog": LinFusion(mid_dim=-1, feature_map="hedgehog"),
    "linear-local": LinearLocal(),
    "agent": Agent(),
    "agent-biases": Agent(biases=True, dwc=True),
    "agent-sd": AgentSD(random=False),
    "halo": Halo(),
    "hilo": HiLo(),
    "inline": InLine(),
    "inline-plain": InLine(0),
    "rala": RALA(),
    "rala-plain": RALA(0),
    "moh": MoH(Clear(8)),
    "super-token": SuperToken(),
    "super-token-twice": SuperToken(iterations=2),
}


class Counted(TorchDispatchMode):
    """Counts operations that compute, and those that only look at memory in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.computing = self.looking = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = func._schema
        looks = any(r.alias_info is not None for r in schema.returns) or "empty" in schema.name
        if func.namespace == "aten":
            self.looking += looks
            self.computing += not looks
        return func(*args, **(kwargs or {}))


def called(spec: AttnSpec, monkeypatch: pytest.MonkeyPatch) -> float:
    """Count a call: a kernel of Triton as two operations, a view as a third of one."""
    from triton.runtime.interpreter import GridExecutor

    launched = [0]

    def launch(*args: Any, **kwargs: Any) -> None:
        launched[0] += 1

    monkeypatch.setattr(GridExecutor, "__call__", launch)
    grid, heads, channels = Grid(16, 16), 10, 16
    q, k, v = torch.zeros(3, 1, grid.tokens, heads, channels)
    processor = spec.build(Layer("", heads, channels, "triton", dim=heads * channels))
    moment = Moment(0.0, grid.tokens, torch.zeros(1, grid.tokens, heads * channels))
    more = (moment,) if processor.wants else ()
    with torch.no_grad():
        processor(q, k, v, grid, None, None, *more)
        launched[0] = 0
        with Counted() as counted:
            processor(q, k, v, grid, None, None, *more)
    return 2 * launched[0] + counted.computing + counted.looking / 3


@pytest.mark.interpreter
@pytest.mark.parametrize("name", SPECS)
def test_the_calls_of_a_processor_are_about_those_that_are_counted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0.6 < SPECS[name].calls / called(SPECS[name], monkeypatch) < 1.7


@pytest.mark.interpreter
def test_the_networks_of_linfusion_are_as_many_launches_as_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import GridExecutor

    launched: list[Any] = []
    monkeypatch.setattr(GridExecutor, "__call__", lambda *args, **kwargs: launched.append(args))
    monkeypatch.setattr(tapes, "DEVICES", ("cpu",))
    processor = LinFusion().build(Layer("", 10, 16, "triton", dim=160)).half()
    with torch.no_grad():
        for _ in range(4):
            launched.clear()
            assert processor.add_residuals(torch.zeros(1, 256, 160).half(), ["q", "k"])
    assert LinFusion().calls - LinFusion(mid_dim=-1).calls == 2 * len(launched)


def test_what_is_learned_beside_attention_is_counted_too() -> None:
    assert LinFusion().calls == LinFusion(mid_dim=-1).calls + 4  # two launches, of both networks at once
    assert LinFusion().calls < LinFusion(feature_map="hedgehog").calls
