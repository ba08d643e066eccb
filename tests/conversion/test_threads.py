"""Threads that share a converted model do not see each other's grid, timestep, block input or random numbers."""

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from converted_hosts import CLEAR, SIZE, converted, hosts
from host_runs import TEXT
from tiny_hosts import HOST
from torch import Tensor

from vision_attn import Clear, LinFusion, convert
from vision_attn.processors import AgentSD, Multipole, Schedule


@pytest.fixture(autouse=True)
def _quick_turns() -> Iterator[None]:
    """Let Python change threads within a layer."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def wrong(jobs: list[Callable[[], Tensor]], repeats: int = 12) -> int:
    """Count the outputs that are not those of a job by itself, with each job in a thread."""
    wanted, found = [job() for job in jobs], []
    start = threading.Barrier(len(jobs))

    def work(job: Callable[[], Tensor], want: Tensor) -> None:
        start.wait()
        for _ in range(repeats):
            try:
                same = torch.allclose(job(), want, rtol=0, atol=1e-5)
            except RuntimeError:
                same = False
            found.append(same)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(jobs, wanted, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == repeats * len(jobs)
    return found.count(False)


def job(host_id: str, model: Any, size: tuple[int, int], **changes: Any) -> Callable[[], Tensor]:
    inputs = HOST[host_id].inputs(*size, 2, TEXT) | changes

    def compute() -> Tensor:
        with torch.no_grad():
            return HOST[host_id].output(model(**inputs))

    return compute


SPECS = {
    "schedule": Schedule(((0.5, Clear(radius=2)), (1.0, Clear(radius=4)))),
    "schedule-linfusion": Schedule(((0.5, LinFusion(mid_dim=4)), (1.0, Clear(radius=2)))),
    "agent-sd": AgentSD(cell=2, max_downsample=2, random=False),
    "agent-sd-schedule": Schedule(
        ((0.4, AgentSD(random=False)), (1.0, AgentSD(cell=2, agent_ratio=0.5, random=False)))
    ),
    "multipole-held": Multipole(cell=2, near=0, pool=1, exact=1, hold=2),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_timesteps_and_sizes(spec: Any) -> None:
    model = converted("sd15-unet", spec)
    times = [torch.tensor(900), torch.tensor(100)]
    sizes = [SIZE, (8, 16)]
    assert not wrong([job("sd15-unet", model, size, timestep=t) for size, t in zip(sizes, times, strict=True)])


@hosts("flux", "sd35", "sd15-unet", "vit")
def test_grids_with_as_many_tokens(host_id: str) -> None:
    model = converted(host_id, CLEAR)
    assert not wrong([job(host_id, model, SIZE), job(host_id, model, (8, 16))])


def test_one_thread_that_stays_dense_does_not_make_another_raise() -> None:
    """The counts of a forward, by which one that rerouted nothing raises, are of one thread."""
    model = HOST["sd15-unet"].build()
    convert(model, CLEAR, min_tokens=100)
    assert not wrong([job("sd15-unet", model, SIZE), job("sd15-unet", model, (4, 4))])


def test_random_numbers_of_a_thread() -> None:
    """Each thread draws from a copy of PyTorch's generator, as a single one does."""
    spec = AgentSD(cell=2, max_downsample=2)
    torch.manual_seed(3)
    want = job("sd15-unet", converted("sd15-unet", spec), SIZE)()
    torch.manual_seed(3)
    model, outputs = converted("sd15-unet", spec), []
    compute = job("sd15-unet", model, SIZE)
    threads = [threading.Thread(target=lambda: outputs.append(compute())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [torch.equal(output, want) for output in outputs] == [True, True]
