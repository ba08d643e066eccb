"""A call of attention that looks like an earlier one repeats its launches at once; whatever else decides is looked at.

Without a GPU Triton's interpreter stands in for it.
"""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from host_runs import TEXT
from tiny_hosts import HOST, noise
from torch import Tensor

from vision_attn import Clear, LinFusion, Multipole, convert
from vision_attn.conversion import answers
from vision_attn.conversion.state import LAYER
from vision_attn.kernels import tapes
from vision_attn.processors.base import CHILD

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [] if DEVICE == "cuda" else [pytest.mark.interpreter]
SIZE, OTHER = (8, 8), (8, 4)
SPECS = {"clear": Clear(radius=1), "multipole": Multipole(cell=4, pool=2, near=0, exact=1), "linfusion": LinFusion()}


@pytest.fixture(autouse=True)
def devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tapes, "DEVICES", (DEVICE,))
    monkeypatch.setattr(answers, "DEVICES", (DEVICE,))


@pytest.fixture
def placed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls in which the grid was looked for."""
    found: list[Any] = []
    own = answers.Answers._grid_of

    def listening(self: Any, *args: Any) -> Any:
        found.append(args)
        return own(self, *args)

    monkeypatch.setattr(answers.Answers, "_grid_of", listening)
    return found


class Run:
    """A converted host, and its forwards."""

    def __init__(self, host_id: str, spec: Any) -> None:
        self.host = HOST[host_id]
        self.model: Any = self.host.build().to(DEVICE)
        self.conversion = convert(self.model, spec, backend="triton")
        with torch.no_grad():
            for n, parameter in enumerate(self.conversion.parameters()):
                parameter.add_(0.1 * noise(*parameter.shape, seed=n).to(DEVICE))

    def __call__(self, size: tuple[int, int] = SIZE, seed: float = 0.0, **changes: Any) -> Tensor:
        inputs = self.host.inputs(*size, 1, TEXT) | changes
        moved = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        for name in ("sample", "hidden_states"):
            if name in moved:
                moved[name] = moved[name] + seed
        with torch.no_grad():
            return self.host.output(self.model(**moved)).clone()

    def warm(self, count: int = 2) -> "Run":
        for n in range(count):
            self(seed=float(n))
        return self

    @property
    def layers(self) -> list[Any]:
        return [m for m in self.model.modules() if LAYER in vars(m)]

    def slowly(self, *args: Any, **changes: Any) -> Tensor:
        known = tapes.DEVICES
        tapes.DEVICES = ()
        try:
            return self(*args, **changes)
        finally:
            tapes.DEVICES = known


ROWS = [("sd15-unet", "clear"), ("flux", "clear"), ("flux", "multipole"), ("sd15-unet", "linfusion")]


@pytest.mark.parametrize(
    ("host_id", "name"),
    [pytest.param(*row, id="-".join(row), marks=[] if row is ROWS[0] else [pytest.mark.slow]) for row in ROWS],
)
def test_repeats_equal_what_is_computed_anew(host_id: str, name: str, placed: list[Any]) -> None:
    run = Run(host_id, SPECS[name]).warm()
    before = dict(run.conversion.status)
    for seed in (5.0, 6.0):
        placed.clear()
        got = run(seed=seed)
        assert not placed
        assert dict(run.conversion.status) == before and set(before.values()) == {"rerouted"}
        assert torch.equal(got, run.slowly(seed=seed))


def _hook(run: Run) -> Any:
    return [m._modules[CHILD].register_forward_hook(lambda *a: None) for m in run.layers]


def _plan_anew(run: Run) -> None:
    tapes.record_anew()


def _replace(run: Run) -> None:
    for module in run.layers:
        processor = module._modules[CHILD]
        for name, parameter in list(processor.named_parameters(recurse=False)):
            setattr(processor, name, torch.nn.Parameter(parameter.detach() + 0.5))


def _train(run: Run) -> None:
    run.model.train()


CHANGES: dict[str, Callable[[Run], Any]] = {
    "hooks": _hook, "launches": _plan_anew, "parameters": _replace, "training": _train,
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_processor_is_asked_again(change: str, placed: list[Any]) -> None:
    run = Run("sd15-unet", SPECS["multipole" if change == "parameters" else "clear"]).warm()
    before = run()
    placed.clear()
    CHANGES[change](run)
    got = run()
    assert placed
    assert torch.equal(got, before) == (change != "parameters")
    assert torch.equal(got, run.slowly())


def _sizes(run: Run) -> Tensor:
    return run(OTHER)


def _autocast(run: Run) -> Tensor:
    with torch.autocast(DEVICE, torch.float16):
        return run()


def _thread(run: Run) -> Tensor:
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(run()))
    thread.start()
    thread.join()
    return found[0]


CALLS = {"size": _sizes, "autocast": _autocast, "thread": _thread}


@pytest.mark.parametrize("kind", CALLS)
def test_another_kind_of_call_is_looked_at(kind: str, placed: list[Any]) -> None:
    run = Run("sd15-unet", SPECS["clear"]).warm()
    want = run.slowly(OTHER if kind == "size" else SIZE)
    placed.clear()
    got = CALLS[kind](run)
    assert placed
    tolerance = 2e-2 if kind == "autocast" else 0
    torch.testing.assert_close(got.float(), want, rtol=tolerance, atol=tolerance)


def test_tensors_that_autocast_casts_have_no_look(monkeypatch: pytest.MonkeyPatch) -> None:
    run, looks, own = Run("sd15-unet", SPECS["clear"]), list[Any](), answers.look_of

    def listening(*args: Any) -> Any:
        looks.append(own(*args))
        return looks[-1]

    monkeypatch.setattr(answers, "look_of", listening)
    run()
    assert looks and None not in looks
    looks.clear()
    with torch.autocast(DEVICE, torch.float16):
        run()
    assert looks and set(looks) == {None}


def test_a_bypassed_model_is_the_hosts_own(placed: list[Any]) -> None:
    run = Run("sd15-unet", SPECS["clear"]).warm()
    converted = run()
    own = HOST["sd15-unet"].build().to(DEVICE)
    with run.conversion.bypassed():
        bypassed = run()
    inputs = HOST["sd15-unet"].inputs(*SIZE, 1, TEXT)
    moved = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    with torch.no_grad():
        assert torch.equal(bypassed, HOST["sd15-unet"].output(own(**moved)))
    assert not torch.equal(bypassed, converted) and torch.equal(run(), converted)


def test_gradients_are_those_without_repeats() -> None:
    run = Run("sd15-unet", SPECS["clear"]).warm()
    inputs = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in run.host.inputs(*SIZE, 1, TEXT).items()}

    def gradient() -> Tensor:
        sample = inputs["sample"].clone().requires_grad_()
        run.host.output(run.model(**inputs | {"sample": sample})).square().sum().backward()
        assert sample.grad is not None
        return sample.grad

    first = gradient()
    run.warm()
    assert first.abs().sum() > 0 and torch.equal(gradient(), first)


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    yield
    tapes.record_anew()
