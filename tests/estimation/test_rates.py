"""The measured rates of a GPU: probes on a clock that needs none, the store, and what holds if nothing can be timed."""

import json
import logging
import math
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vision_attn import Clear, convert, estimate
from vision_attn.estimation import rates
from vision_attn.estimation.cost import CPU, H200, Machine
from vision_attn.estimation.rates import BUSY, Key, Probe, busy, machine_of, measure, probes, read_rates, write_rates
from vision_attn.kernels.linear import linear_attention  # noqa: F401, registered before modes are entered

KEY = Key("NVIDIA A100", "12080", "2.11.0", "3.6.0", "0.1.0", "bfloat16")
A100 = replace(
    H200, name="NVIDIA A100", dense=2.1e14, narrow=1.8e14, other=1.5e14, products=2.5e14, bandwidth=1.5e12, host=9e-6,
    source="measured",
)  # fmt: skip


class Virtual:
    """The clock of a machine that is not there: a call takes what its rates say, and the first one some seconds."""

    def __init__(self, machine: Machine, first_s: float = 0.0, broken: tuple[str, ...] = ()) -> None:
        self.machine, self.first_s, self.broken, self.time = machine, first_s, broken, 100.0
        self.timed: list[str] = []

    def now(self) -> float:
        return self.time

    def device(self, probe: Probe) -> float:
        self.timed.append(probe.rate)
        self.time += self.first_s
        if probe.rate in self.broken:
            raise RuntimeError(f"no kernel of {probe.rate}")
        rate = getattr(self.machine, probe.rate)
        return probe.work * rate if probe.rate == "host" else probe.work / rate

    host = device


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store of this test's own."""
    monkeypatch.setenv("VISION_ATTN_RATES", str(tmp_path / "rates"))
    return tmp_path / "rates"


class OneGpu(rates.Installed):
    """A machine with one virtual GPU."""

    def __init__(self, clock: Virtual, recording: bool = False) -> None:
        self.clock, self.recording = clock, recording

    def any(self) -> bool:
        return True

    def gpu(self, number: int | None) -> torch.device:
        if number not in (None, 0):
            raise RuntimeError(f"CUDA error: invalid device ordinal {number}")
        return torch.device("cuda", 0)

    def name(self, gpu: torch.device) -> str:
        return self.clock.machine.name

    def records(self) -> bool:
        return self.recording

    def measured(self, gpu: torch.device, dtype: torch.dtype) -> Machine:
        return measure(self.clock.machine.name, probes(torch.device("cpu"), dtype), self.clock)


@pytest.fixture
def gpu(store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Let a virtual GPU be the one of this machine, and this process know nothing of it yet."""

    def use(clock: Virtual, **options: bool) -> None:
        rates._slot.cache_clear()
        monkeypatch.setattr(rates, "INSTALLED", OneGpu(clock, **options))

    yield use
    rates._slot.cache_clear()


def test_every_rate_of_a_machine_is_found() -> None:
    clock = Virtual(A100)
    found = measure("NVIDIA A100", probes(torch.device("cpu"), torch.bfloat16), clock)
    assert {name: pytest.approx(value) for name, value in asdict(A100).items()} == asdict(found)
    assert clock.timed[:2] == ["dense", "host"] and len(set(clock.timed)) == 6
    assert clock.timed[6:] == ["dense"]  # is it as fast as before?


@pytest.mark.parametrize("first_s", [0.2, 0.7, 2.0])
def test_probes_end_in_time(first_s: float) -> None:
    """What there is no time for is scaled from an H200's by the rate of dense attention."""
    clock = Virtual(A100, first_s)
    found = measure("NVIDIA A100", probes(torch.device("cpu"), torch.bfloat16), clock)
    assert clock.time - 100 < rates.MOST_S + first_s - 0.1 and found.dense == pytest.approx(A100.dense)
    assert (found.source == BUSY) == (first_s > 0.5)  # it may be another the next time
    left_out = {"other", "narrow", "products", "bandwidth"} - set(clock.timed)
    assert bool(left_out) == (first_s > 0.5)
    for rate in left_out:
        assert getattr(found, rate) == pytest.approx(getattr(H200, rate) * A100.dense / H200.dense)


def test_on_a_slow_host_nothing_is_compiled() -> None:
    clock = Virtual(replace(A100, host=4e-5), first_s=0.1)
    assert measure("", probes(torch.device("cpu"), torch.bfloat16), clock).source == "measured"
    assert "other" not in clock.timed and len(clock.timed) == 6


class Shared(Virtual):
    """A machine that others use: one call of dense attention takes as long as `slower` calls."""

    def __init__(self, machine: Machine, turn: int, slower: float) -> None:
        super().__init__(machine)
        self.turn, self.slower = turn, slower

    def device(self, probe: Probe) -> float:
        slow = probe.rate == "dense" and self.timed.count("dense") == self.turn
        return super().device(probe) * (self.slower if slow else 1)

    host = Virtual.device


@pytest.mark.parametrize("turn", [0, 1])
def test_rates_of_a_busy_gpu_hold_for_this_process_alone(
    turn: int, gpu: Any, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gpu(Shared(A100, turn, 3.0))
    found = machine_of("cuda")
    assert found.source == BUSY and found.dense == pytest.approx(A100.dense) and machine_of("cuda") is found
    assert not store.exists() and "NVIDIA A100 or its host is busy: rates are not stored" in caplog.text
    gpu(Shared(A100, turn, 1.1))  # the next process
    assert machine_of("cuda").source == "measured" and len(list(store.iterdir())) == 1


def test_a_host_that_loads_for_long_does_not_hide_the_rates() -> None:
    """Dense attention is the first that is timed, so that nothing else can use up the time."""

    class Loading(Virtual):
        def host(self, probe: Probe) -> float:
            self.time += 60
            return super().device(probe)

    clock = Loading(A100)
    found = measure("NVIDIA A100", probes(torch.device("cpu"), torch.bfloat16), clock)
    assert found.dense == pytest.approx(A100.dense) and found.source == BUSY and clock.timed == ["dense", "host"]


def test_one_probe_that_fails_leaves_the_others(caplog: pytest.LogCaptureFixture) -> None:
    found = measure("NVIDIA A100", probes(torch.device("cpu"), torch.bfloat16), Virtual(A100, broken=("other",)))
    assert found.other == pytest.approx(H200.other * A100.dense / H200.dense) and found.narrow == A100.narrow
    assert "NVIDIA A100: 'other' could not be timed: RuntimeError: no kernel of other" in caplog.text
    with pytest.raises(RuntimeError, match="dense attention could not be timed"):
        measure("", probes(torch.device("cpu"), torch.bfloat16), Virtual(A100, broken=("dense", "narrow")))


@pytest.mark.parametrize("nothing", [0.0, math.inf, math.nan, -1.0], ids=str)
def test_a_time_that_cannot_be_is_no_rate(nothing: float) -> None:
    class Odd(Virtual):
        def device(self, probe: Probe) -> float:
            return nothing if probe.rate == "bandwidth" else super().device(probe)

    found = measure("", probes(torch.device("cpu"), torch.bfloat16), Odd(A100))
    assert found.bandwidth == pytest.approx(H200.bandwidth * A100.dense / H200.dense)


class Wall(rates.GpuClock):
    """Times on a CPU."""

    def __init__(self) -> None:
        pass

    def _burst(self, call: Callable[[], object], count: int) -> float:
        begin = self.now()
        for _ in range(count):
            call()
        return (self.now() - begin) / count

    def host(self, probe: Probe) -> float:
        return self.device(probe)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_probes_run_and_leave_the_program_alone(dtype: torch.dtype) -> None:
    before = torch.get_rng_state()
    found = measure("this CPU", probes(torch.device("cpu"), dtype, side=8, heads=1), Wall(), most_s=60)
    assert torch.equal(torch.get_rng_state(), before) and torch.is_grad_enabled()
    assert found.source in ("measured", BUSY) and 1e6 < found.dense < 1e13 and 1e-7 < found.host < 1e-2


def test_a_gpu_is_timed_once_and_then_read(gpu: Any, store: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    first = Virtual(A100)
    gpu(first)
    assert machine_of("cuda") == machine_of("cuda:0") == machine_of("cuda", torch.uint8)
    assert len(first.timed) == 7 and len(list(store.iterdir())) == 1
    assert "timing NVIDIA A100 once, in about 3 s" in caplog.text
    second = Virtual(A100)
    gpu(second)  # as in another process
    assert machine_of("cuda").dense == pytest.approx(A100.dense) and not second.timed
    assert machine_of("cuda", torch.float32).dense == pytest.approx(A100.dense) and len(second.timed) == 7
    assert len(list(store.iterdir())) == 2  # each dtype has rates of its own


def test_without_a_gpu_the_stored_rates_decide(store: Path) -> None:
    assert machine_of("cuda") == machine_of("cuda:1") == machine_of("meta") == H200
    assert machine_of("cpu") == CPU and not store.exists()


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "{",
        '{"key": 1}',
        "[]",
        "binary \\udcff",
        "a field is missing",
        "a rate is text",
        "a rate is nan",
        "another GPU's",
    ],
)
def test_a_store_that_cannot_be_read_is_measured_anew(
    wrong: str, gpu: Any, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Virtual(A100)
    gpu(clock)
    machine_of("cuda")
    (path,) = store.iterdir()
    good = json.loads(path.read_text())
    rate = good["machine"]["dense"]
    if wrong.startswith("binary"):
        path.write_bytes(b"\\xff\\xfe\\x00")
    elif wrong == "a field is missing":
        del good["machine"]["dense"]
        path.write_text(json.dumps(good))
    elif wrong.startswith("a rate is"):
        good["machine"]["dense"] = "fast" if "text" in wrong else math.nan
        path.write_text(json.dumps(good))
    elif wrong == "another GPU's":
        path.write_text(json.dumps(good | dict(key=good["key"] | dict(gpu="another"))))
    else:
        path.write_text(wrong)
    again = Virtual(replace(A100, dense=3e14))
    gpu(again)
    assert machine_of("cuda").dense == pytest.approx(3e14) != rate and len(again.timed) == 7
    assert f"{path} cannot be used, so this GPU is timed anew" in caplog.text
    assert json.loads(path.read_text())["machine"]["dense"] == pytest.approx(3e14)


def test_a_gpu_that_cannot_be_timed_has_the_stored_rates(
    gpu: Any, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Virtual(A100, broken=("dense", "narrow"))
    gpu(clock)
    assert machine_of("cuda") == machine_of("cuda") == H200
    assert clock.timed.count("dense") == 1 and not store.exists()  # it is not tried again in this process
    assert "NVIDIA A100 could not be timed, so the stored rates of an H200 decide: RuntimeError: dense" in caplog.text


def test_rates_that_cannot_be_stored_are_used_all_the_same(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VISION_ATTN_RATES", str(tmp_path / "file" / "rates"))
    gpu(Virtual(A100))
    assert machine_of("cuda").dense == pytest.approx(A100.dense)
    assert "the rates of this GPU could not be stored in" in caplog.text


def test_the_store_lies_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("VISION_ATTN_RATES", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert rates.folder() == tmp_path / "vision_attn" / "rates"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert rates.folder() == tmp_path / ".cache" / "vision_attn" / "rates"
    assert "/" not in replace(KEY, gpu="a/b c: d").path.name


def _write_many(number: int) -> None:
    for turn in range(40):
        write_rates(KEY, replace(A100, dense=1e14 + number * 1000 + turn))


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_writers_at_once_leave_a_whole_store(kind: str, store: Path) -> None:
    """A reader finds the file of one of the writers at every moment."""
    write_rates(KEY, A100)
    make: Any = threading.Thread if kind == "threads" else multiprocessing.get_context("fork").Process
    workers = [make(target=_write_many, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    found = []
    while any(worker.is_alive() for worker in workers):
        found.append(read_rates(KEY))
    for worker in workers:
        worker.join()
    assert None not in found and read_rates(KEY) is not None
    assert [path.name for path in store.iterdir()] == [KEY.path.name]  # no half-written file is left


def test_threads_time_a_gpu_once(gpu: Any) -> None:
    class Slow(Virtual):
        def device(self, probe: Probe) -> float:
            threading.Event().wait(0.01)
            return super().device(probe)

        host = device

    clock, found = Slow(A100), []
    gpu(clock)
    threads = [threading.Thread(target=lambda: found.append(machine_of("cuda"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(clock.timed) == 7 and len(found) == 4 and len(set(found)) == 1


def test_nothing_is_timed_while_a_graph_is_recorded_or_a_model_is_traced(gpu: Any, store: Path) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    clock = Virtual(A100)
    gpu(clock, recording=True)
    assert machine_of("cuda") == H200 and "recorded" in str(busy())
    gpu(clock)
    with FakeTensorMode():
        assert machine_of("cuda") == H200 and "mode" in str(busy())
    seen: list[Any] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append((machine_of("cuda"), busy()))
        return x + 1

    torch.func.vmap(look)(torch.zeros(2))
    torch.jit.trace(look, torch.zeros(2), check_trace=False)
    assert seen == [(H200, "a mode or a transform of PyTorch is active"), (H200, "a model is traced")]
    assert not clock.timed and not store.exists()
    assert busy() is None and machine_of("cuda").dense == pytest.approx(A100.dense)  # now it can be


def test_what_is_compiled_is_not_timed(gpu: Any) -> None:
    clock = Virtual(A100)
    gpu(clock)

    def scaled(x: torch.Tensor) -> torch.Tensor:
        return x * machine_of("cuda").launch

    compiled = torch.compile(scaled, backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), H200.launch)) and not clock.timed
    torch._dynamo.reset()


def test_a_gpu_that_cannot_be_used_has_the_stored_rates(gpu: Any, caplog: pytest.LogCaptureFixture) -> None:
    gpu(Virtual(A100))
    assert machine_of("cuda:7") == H200
    assert "the stored rates of an H200 decide: CUDA error: invalid device ordinal 7" in caplog.text


def test_the_measured_rates_decide(gpu: Any) -> None:
    """A GPU whose dense attention is very fast, or whose host is very slow, leaves more to the model."""
    from tiny_hosts import HOST

    model = HOST["flux"].build()
    found = []
    for machine in (A100, replace(A100, name="fast", dense=3e15, narrow=3e15), replace(A100, name="slow", host=1e-3)):
        gpu(Virtual(machine))
        found.append(estimate(model, Clear(4), height=512, width=512, device="cuda").pays_from)
    usual, fast, slow = found
    assert usual is not None and (fast is None or fast > usual) and (slow is None or slow > usual)
    conversion = convert(model, Clear(4), only_if_faster=True)  # on a CPU: the GPU has no part in it
    assert "not run yet" in set(conversion.status.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_real_gpu_is_timed_in_three_seconds_needs_a_gpu(
    store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is begun after 3 seconds; where others use the GPU, a call may take longer."""
    caplog.set_level(logging.INFO)
    begun: list[float] = []

    def noted(time_one: Any) -> Any:
        def call(clock: Any, probe: Probe) -> float:
            begun.append(time.perf_counter())
            found: float = time_one(clock, probe)
            return found

        return call

    for name in ("device", "host"):
        monkeypatch.setattr(rates.GpuClock, name, noted(getattr(rates.GpuClock, name)))
    rates._slot.cache_clear()
    torch.zeros(1, device="cuda").item()
    begin = time.perf_counter()
    found = machine_of("cuda")
    assert found.source in ("measured", BUSY) and found.name == torch.cuda.get_device_name(), caplog.text
    assert max(begun) - begin < rates.MOST_S, caplog.text
    assert len(list(store.iterdir() if store.exists() else ())) == (found.source == "measured"), caplog.text
    write_rates(Key.of(found.name, torch.bfloat16), found)
    rates._slot.cache_clear()
    begun.clear()
    assert machine_of("cuda") == found and not begun  # it is read
    rates._slot.cache_clear()
    for path in store.iterdir():
        path.unlink()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        assert machine_of("cuda") == H200  # nothing is timed while a graph is recorded
    assert not list(store.iterdir())
    rates._slot.cache_clear()
