"""`vision-attn bench` end to end on a CPU: wrong candidates are left out, results are stored, names are checked."""

import gc
import json
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vision_attn.bench import entries
from vision_attn.bench.candidate import AbsentError, Candidate, Prepared
from vision_attn.bench.document import check_document, device_slug, merged, read_document
from vision_attn.bench.local.candidates import OPERATORS
from vision_attn.bench.local.problem import LOCAL, LocalProblem
from vision_attn.bench.measure import Measurement
from vision_attn.bench.run import find_entries, run_benchmarks
from vision_attn.bench.table import markdown
from vision_attn.bench.timing import Launch, Timing, interleave
from vision_attn.cli import main
from vision_attn.grid import Grid
from vision_attn.kernels.local import Window, local_attention

CPU = torch.device("cpu")
OURS = OPERATORS[0]
DISC = LocalProblem("Discs", Grid(48, 48, prefix=8), Window(radius=4), ("peer",), ("ours", "peer"), 2, 16, "float32")


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Return the folder of one quick run."""
    out = tmp_path_factory.mktemp("results")
    assert main(["bench", "kernels_local", "--device", "cpu", "--quick", "--out", str(out)]) == 0
    return out


def test_the_small_set_runs_and_says_what_it_measured(stored):
    document = read_document(stored / "kernels_local_cpu.json")
    assert document["versions"]["torch"] == torch.__version__ and document["device"].startswith("CPU")
    assert [row["case"] for row in document["rows"]] == [
        "disc-16-r4-d32-fp32", "square-16-k7-d32-fp32", "dilated-16-k5-d32-fp32"
    ]  # fmt: skip
    disc, square, dilated = ({c["name"]: c for c in row["candidates"]} for row in document["rows"])
    for name in ("forward", "backward"):
        ours, dense = disc["ours"][name], disc["SDPA"][name]
        assert dense["ratio"] == pytest.approx(dense["median_ms"] / ours["median_ms"], rel=2e-3)
        assert 0 < ours["min_ms"] <= ours["median_ms"] and ours["launch"] == "cpu" and ours["samples"] >= 2
    assert set(disc["ours"]["errors"]["twin"]) == set("oqkv")
    needed = document["rows"][0]["needed_flop"]["forward"]
    assert disc["ours"]["forward"]["needed_tflops"] == pytest.approx(
        needed / disc["ours"]["forward"]["median_ms"] / 1e9, rel=2e-3
    )
    assert disc["SDPA"]["forward"]["visited_flop"] == 4 * 32 * 2 * (16 * 16 + 32) ** 2
    assert square["cuDNN"]["forward"] is None and "CUDA only" in square["cuDNN"]["reason"]
    assert dilated["ours undilated"]["computes"] == "the same window without dilation"


def test_a_part_of_a_result_is_renewed_in_its_place(stored, tmp_path):
    path = tmp_path / "kernels_local_cpu.json"
    document = read_document(stored / path.name)
    for row in document["rows"]:
        row["date"] = "2001-01-01"
    path.write_text(json.dumps(document))
    run_benchmarks("kernels_local", tmp_path, device="cpu", quick=True, only=["square-*"], candidates=["SDPA"])
    renewed = read_document(path)["rows"]
    assert [row["case"] for row in renewed] == [row["case"] for row in document["rows"]]
    assert [row["date"] == "2001-01-01" for row in renewed] == [True, False, True]
    assert [c["name"] for c in renewed[1]["candidates"]] == ["ours", "SDPA"]
    assert "--only='square-*'" in renewed[1]["command"] or "'--only=square-*'" in renewed[1]["command"]
    document["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match="choose another --out"):
        run_benchmarks("kernels_local", tmp_path, device="cpu", quick=True, only=["square-*"])
    assert read_document(path)["versions"]["torch"] == "1.0"


def test_a_case_is_stored_once_in_the_order_of_the_entry():
    old, new = (dict(case=name, age=age) for name, age in (("b", "old"), ("b", "new")))
    rows = merged([dict(case="gone"), old, dict(case="a")], [new], ["a", "b", "c", "a", "b"])
    assert rows == [dict(case="a"), new]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kernel"], "unknown benchmark 'kernel': known are 'host', 'kernels'"),
        (["kernels", "--device", "tpu"], "device must be 'cpu' or 'cuda', got 'tpu'"),
        (["kernels", "--device", "cpu", "--only", "disk-*"], "unknown case 'disk-*': known are linear-64"),
        (["kernels", "--device", "cpu", "--candidates", "cudnn"], "unknown candidate 'cudnn': known are 'ours'"),
        (["table"], "needs a FILE"),
        (["kernels", "results.json"], "needs a FILE, and only they do"),
        (["table", str(Path(__file__))], "is not JSON"),
        (["table", str(Path(__file__).parents[2] / "docs" / "demo_sheet.jpg")], "demo_sheet.jpg is not JSON"),
    ],
)
def test_unknown_names_are_refused(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="no CUDA device is visible"):
        run_benchmarks("kernels", Path("nowhere"), device="cuda")


def test_a_folder_that_cannot_be_is_refused_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr("vision_attn.bench.run._run_entry", lambda *args: pytest.fail("it began to measure"))
    with pytest.raises(OSError, match="file"):
        run_benchmarks("kernels_local", tmp_path / "file", device="cpu", quick=True)


def test_an_entry_is_one_file(tmp_path, monkeypatch):
    (tmp_path / "kernels_new.py").write_text("TITLE = 'new'\n")
    monkeypatch.setattr(entries, "__path__", [*entries.__path__, str(tmp_path)])
    assert [entry.TITLE for entry in find_entries("kernels_new")] == ["new"]
    assert [entry.__name__.rpartition(".")[2] for entry in find_entries("kernels")][-3:] == [
        "kernels_multipole",
        "kernels_new",
        "kernels_residual",
    ]


def test_gpus_have_short_names(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert device_slug(torch.device("cuda")) == "h200" and device_slug(CPU) == "cpu"


def another(window):
    """Return a candidate that claims to be local attention over `DISC.window` and computes `window`."""
    return lambda problem, device: lambda q, k, v: local_attention(q, k, v, problem.grid, window)


def right(problem):
    return lambda q, k, v: local_attention(q, k, v, problem.grid, problem.window)


def wrong_on_long_sequences(problem, device):
    window = Window(radius=problem.window.radius + (problem.grid.tokens > 2000))
    return lambda q, k, v: local_attention(q, k, v, problem.grid, window)


def half_a_gradient(problem, device):
    return lambda q, k, v: right(problem)(q, (k + k.detach()) / 2, v)


def one_row_unwritten(problem, device):
    def run(q, k, v):
        o = right(problem)(q, k, v)
        return torch.cat([o[:, :-1], torch.full_like(o[:, -1:], torch.nan)], 1)

    return run


def float64_out(problem, device):
    return lambda q, k, v: right(problem)(q, k, v).double()


def fails(problem, device):
    raise RuntimeError("out of something\nand a second line")


def declines(problem, device):
    raise AbsentError("not today")


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        pytest.param(another(Window(radius=5)), "wrong: error above its budget (twin): o ", id="radius 5"),
        pytest.param(another(Window(kernel_size=7)), "wrong: error above its budget (twin): o ", id="a square"),
        pytest.param(wrong_on_long_sequences, "wrong: error above its budget (sampled): o ", id="long sequences"),
        pytest.param(half_a_gradient, "wrong: error above its budget (twin): k ", id="gradient"),
        pytest.param(one_row_unwritten, "wrong: error above its budget (twin): o nan", id="unwritten"),
        pytest.param(float64_out, "wrong: the output is (1, 1544, 2, 16) torch.float64", id="dtype"),
        pytest.param(fails, "cannot run: RuntimeError: out of something", id="fails"),
        pytest.param(declines, "not today", id="declines"),
    ],
)
def test_a_wrong_candidate_is_left_out_with_the_reason(prepare, reason):
    peer = Candidate("peer", LOCAL, lambda problem, device: Prepared(prepare(problem, device)))
    (found,) = Measurement(CPU, rounds=2).row(DISC, [peer])["candidates"]
    assert found["reason"].startswith(reason) and "\n" not in found["reason"]
    assert found["forward"] is None and found["backward"] is None


def test_a_right_candidate_is_timed_beside_ours_and_beside_a_wrong_one():
    peers = [
        Candidate("peer", LOCAL, lambda problem, device: Prepared(right(problem))),
        Candidate("broken", LOCAL, lambda problem, device: Prepared(fails(problem, device))),
        Candidate("another", LOCAL, lambda problem, device: Prepared(right(problem))),
    ]
    problem = replace(DISC, peers=("peer", "broken"))
    ours, found, broken = Measurement(CPU, rounds=2).row(problem, [OURS, *peers])["candidates"]
    assert ours["reason"] is None and ours["forward"] and ours["backward"]
    assert found["reason"] is None and found["forward"]["ratio"] > 0
    assert {name[0] for name in found["errors"]["sampled"]} == set("oqkv")
    assert broken["name"] == "broken" and broken["reason"] and broken["forward"] is None


def test_a_run_in_which_ours_is_wrong_fails(tmp_path, monkeypatch):
    entry = find_entries("kernels_local")[0]
    wrong = Candidate("ours", LOCAL, lambda problem, device: Prepared(another(Window(radius=2))(problem, device)))
    monkeypatch.setattr(entry, "CANDIDATES", (wrong,))
    with pytest.raises(ValueError, match="subject itself was left out: disc-16-r4-d32-fp32: wrong"):
        run_benchmarks("kernels", tmp_path, device="cpu", quick=True, only=["disc-*"])
    assert read_document(tmp_path / "kernels_local_cpu.json")["rows"][0]["candidates"][0]["reason"]


def test_candidates_take_turns():
    calls = []
    launches = {name: Launch(lambda name=name: (calls.append(name), time.sleep(0.015)), CPU) for name in "ab"}
    calls.clear()
    timings = interleave(launches, rounds=3)
    assert calls == list("aaabbbbbbaaaaaabbb")  # of three the first is not counted
    assert all(timing.samples == 6 and 15 <= timing.min_ms <= timing.median_ms for timing in timings.values())


def test_only_the_call_is_timed_and_each_has_its_setup():
    calls = []
    launch = Launch(lambda: calls.append("call"), CPU, lambda: (time.sleep(0.01), calls.append("setup")))
    assert launch.estimate_ms < 5 and calls == ["setup", "call"] * 3


class Graph:
    """Stands in for a CUDA graph, which holds addresses and no tensors."""

    capturing = False

    def capture_begin(self, pool):
        Graph.capturing = True

    def capture_end(self):
        Graph.capturing = False

    def replay(self):
        time.sleep(0.001)


class Event:
    """Stands in for a CUDA event."""

    def __init__(self, enable_timing):
        self.time = None

    def record(self):
        self.time = time.perf_counter()

    def elapsed_time(self, end):
        return (end.time - self.time) * 1e3


@pytest.fixture
def fake_cuda(monkeypatch):
    """Return what the stand-in for a GPU was told to wait, in cycles."""
    waits = []
    stand_ins = dict(
        CUDAGraph=Graph, Event=Event, synchronize=lambda: None, graph_pool_handle=lambda: (0, 0), _sleep=waits.append
    )  # fmt: skip
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return waits


def test_what_a_graph_reads_outlives_the_call(fake_cuda):
    """Replays over a block mask that was freed would visit whatever blocks its memory names by then."""
    mask = torch.zeros(1)
    alive = weakref.ref(mask)
    launch = Launch(mask.sum, torch.device("cuda"))
    del mask
    gc.collect()
    assert launch.kind == "graph" and alive() is not None
    assert launch.turn()  # how often it replays depends on the machine


def test_what_cannot_be_captured_is_launched(fake_cuda):
    def call():
        if Graph.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")

    launch = Launch(call, torch.device("cuda"), setup=lambda: None)
    assert launch.kind == "eager" and not Graph.capturing and len(launch.turn()) == 40


def test_short_calls_are_queued_while_the_gpu_waits(fake_cuda):
    for seconds, short in ((0.0, True), (0.001, False)):
        launch = Launch(lambda seconds=seconds: time.sleep(seconds), torch.device("cuda"), graph=False)
        assert not fake_cuda  # one call tells about how long it takes
        launch.turn()
        assert bool(fake_cuda) == short
        fake_cuda.clear()


def test_a_timing_is_made_of_quartiles():
    assert Timing.of([4.0, 1.0, 2.0, 3.0, 100.0], "cpu") == Timing(3.0, 1.0, 2.0, 5, "cpu")


def timed(median, ratio=None, visited=None, memory=None):
    figures = dict(median_ms=median, min_ms=median, iqr_ms=0.0, samples=9, launch="graph", ratio=ratio)
    return dict(
        **figures,
        needed_tflops=50.0,
        visited_tflops=visited,
        extra_memory=None if memory is None else dict(bytes=1, share=memory),
    )


def candidate(name, forward=None, backward=None, reason=None):
    return dict(name=name, computes="x", reason=reason, forward=forward, backward=backward)


def document():
    head = dict(schema=1, entry="kernels_x", title="Title", device="NVIDIA H200", versions=dict(torch="2", natten=None))
    row = dict(group="Discs", shape={}, date="2026-01-02", command="c", subject="ours")
    rows = [
        dict(case="a", label="64 x 64", **row, candidates=[
            candidate("ours", timed(2.0, 1.0, 600.0, 0.004), timed(6.0, 1.0)),
            candidate("dense", timed(5.0, 2.5, 700.0)),
            candidate("NATTEN", reason="not importable"),
        ]),
        dict(case="b", label="128 x 128", **row, candidates=[
            candidate("ours", timed(4.0, 1.0, 500.0, 0.0)), candidate("dense", reason="out of memory"),
            candidate("NATTEN", reason="not importable"),
        ]),
    ]  # fmt: skip
    return dict(**head, timing="Medians.", rows=rows)


def test_a_table_shows_figures_ratios_and_reasons():
    check_document(document())
    assert markdown(document()).split("\n\n")[2:] == [
        "### Discs, forward",
        "| case | ours, ms | needed | visited | memory | dense |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        "| 64 x 64 | 2.000 | 50 | 600 | 0.4% | 5.000 (2.5x, 700) |\n"
        "| 128 x 128 | 4.000 | 50 | 500 | 0.0% | - |",
        "### Discs, backward",
        "| case | ours, ms | / forward | needed |\n| --- | --- | --- | --- |\n| 64 x 64 | 6.000 | 3.0x | 50 |",
        "- NATTEN is left out: not importable\n- dense is left out at 128 x 128: out of memory\n",
    ]
    assert "NVIDIA H200, torch 2, 2026-01-02. Medians." in markdown(document())
    with pytest.raises(ValueError, match="unknown group 'Disks': known are 'Discs'"):
        markdown(document(), ["Disks"])


def test_the_command_shows_the_stored_table(stored, capsys):
    path = stored / "kernels_local_cpu.json"
    assert main(["bench", "table", str(path)]) == 0
    assert capsys.readouterr().out == markdown(read_document(path))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: d.pop("device"), "device is missing"),
        (lambda d: d.update(schema=2), "schema is 2, not 1"),
        (lambda d: d["rows"][0].pop("subject"), "rows[0].subject is missing"),
        (lambda d: d["rows"][0]["candidates"][0]["forward"].pop("iqr_ms"), "a, ours: forward.iqr_ms is missing"),
        (lambda d: d["rows"][0]["candidates"][0]["forward"].update(median_ms="2"), "forward.median_ms is str"),
        (lambda d: d["rows"][0]["candidates"][2].update(reason=None), "a, NATTEN: needs either times or a reason"),
        (lambda d: d["rows"][0]["candidates"][0].update(reason="slow"), "a, ours: needs either times or a reason"),
    ],
)
def test_another_schema_is_refused(spoil, message):
    spoilt = document()
    spoil(spoilt)
    with pytest.raises(ValueError) as error:
        check_document(spoilt)
    assert message in str(error.value)
