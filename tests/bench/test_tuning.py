"""`vision-attn tune` with a timer of its own, in Triton's interpreter: what it keeps, writes and reads again."""

import math
from dataclasses import replace

import pytest
import torch

from vision_attn.bench import faults, tuned, tuning
from vision_attn.bench.faults import Faults, GpuLostError
from vision_attn.bench.tuning import Case, Setup, neighbours, only_committed, rows_of, tune
from vision_attn.cli import main
from vision_attn.kernels import launches, tapes
from vision_attn.kernels.backend import LaunchError
from vision_attn.kernels.launches import Launch, Row, Table
from vision_attn.kernels.triton import launching
from vision_attn.kernels.triton.launching import Kernel

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch, tmp_path):
    """Give the user's tables a folder of their own, and rows that are interpreted quickly."""
    monkeypatch.undo()  # the small tiles of tests that interpret
    monkeypatch.setenv("VISION_ATTN_LAUNCHES", str(tmp_path / "user"))
    monkeypatch.setattr(tuned, "_CHECKED", 4)
    monkeypatch.setattr(tuned, "_PREFIX", 2)
    monkeypatch.setattr(tuning, "OPERATORS", ("window", "local", "linear"))
    few = {"window.forward": ("window", False)}
    monkeypatch.setattr(tuning, "KERNELS", few)
    monkeypatch.setattr(tuned, "KERNELS", few)
    rows = {name: [Row(4, 32, Launch((32,), (), 4, 1)), Row(4, 64, Launch((16,), (), 4, 1))] for name in few}
    monkeypatch.setattr(tuning, "rows_of", lambda kernel, architecture: rows[kernel])
    launching.forget()
    yield
    launching.forget()


def timer_of(milliseconds, asked=None):
    """Return a timer that knows what each launch takes, and notes for what it was asked."""

    def timer(tried, calls, turns):
        if asked is not None:
            asked.append((tried, turns))
        return [milliseconds(launch) for launch in tried]

    return timer


def run(timer, out, alive=lambda device: True, **options):
    """Tune windows on the CPU; return what was found and what was said."""
    lines = []
    setup = Setup(CPU, sides=(4,), heads=1, timer=timer, alive=alive)
    return tune("window", out, wide=True, setup=setup, say=lines.append, **options), lines


@pytest.mark.interpreter
def test_the_fastest_right_launch_is_written_and_read_by_the_lookup(tmp_path):
    out = tmp_path / "user" / "interpreter.json"
    found, lines = run(timer_of(lambda launch: {16: 1.75, 32: 1.5, 64: 1.0, 128: 1.2}[launch.rows]), out)
    assert [one.launch.rows for one in found] == [64, 64]  # from 16 in two steps
    assert found[0].ratio == pytest.approx(1.5) and found[1].ratio == pytest.approx(1.75)
    assert launches.lookup("window.forward", "interpreter", 4, 32) == found[0].launch
    assert not Table.read(out).rows["window.forward"][1].launch.exact
    mean = math.exp(sum(math.log(one.ratio) for one in found) / 2)
    assert f"geometric mean {mean:.3f}x" in lines[-2] and str(out) in lines[-1]
    assert len(lines) == 4 and "window.forward 32 bits D 64: 1.750x" in lines[1]


@pytest.mark.interpreter
@pytest.mark.parametrize("gain", [1.0, 1.01])
def test_what_is_hardly_faster_is_kept_as_it_was(gain, tmp_path):
    found, lines = run(timer_of(lambda launch: 1.0 if launch.rows in (16, 32) else 1 / gain), tmp_path / "t.json")
    assert all(one.launch == one.case.row.launch and one.ratio == 1 and one.tried > 2 for one in found)
    assert "kept" in lines[0]


@pytest.mark.interpreter
def test_a_gain_that_does_not_repeat_is_dropped(tmp_path):
    asked = []

    def timer(tried, calls, turns):
        asked.append(turns)
        return [1.0, 0.5] if turns == min(tuning._TURNS) else [1.0, 1.0]

    found, _ = run(timer, tmp_path / "t.json")
    assert all(one.launch == one.case.row.launch for one in found)
    assert max(tuning._TURNS) in asked


@pytest.mark.interpreter
def test_a_wrong_launch_is_never_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning.Budget, "holds", lambda self: False)
    asked = []
    run(timer_of(lambda launch: 1.0, asked), tmp_path / "t.json")
    assert not asked


@pytest.mark.interpreter
@pytest.mark.parametrize("factor", [0.7, math.nan])
def test_a_launch_that_is_wrong_at_the_timed_size_alone_is_never_timed(factor, tmp_path, monkeypatch):
    problem, asked = tuning.problem, []

    def wrong(case, *args):
        call, rows = problem(case, *args), launches.lookup(case.kernel, "interpreter", 4, case.row.channels).rows
        return lambda: call() * (factor if rows == 64 else 1.0)

    monkeypatch.setattr(tuning, "problem", wrong)
    run(timer_of(lambda launch: 1.0, asked), tmp_path / "t.json")
    tried = {launch.rows for pair, _ in asked for launch in pair}
    assert tried == {16, 32}


@pytest.mark.interpreter
def test_the_check_finds_a_wrong_result():
    case = Case("window.forward", Row(4, 32, Launch((16,), (), 4, 1)))
    budget = tuning.Budget(case, CPU)
    assert budget.holds()
    budget.exact[0] = budget.exact[0] + 0.01
    assert not budget.holds()


@pytest.mark.interpreter
@pytest.mark.parametrize("operator", ["local", "multipole"])
def test_launches_of_8_bits_are_checked_against_that_of_the_table(operator, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(tuned, "_CHECKED", 10)
    monkeypatch.setattr(tuned, "_PREFIX", 2)
    own = Launch((8, 8), (8, 8), 4, 3, registers=168)
    case = Case(f"{operator}.eight_bit", Row(4, 64, own))
    with only_committed():
        budget = tuned.Budget(case, CPU)
        with tuning.trying(case, Launch((8, 8), (8, 8), 8, 2), "interpreter"):
            assert budget.holds()
            budget.exact[0] = budget.exact[0] * 1.001
            assert not budget.holds()
        with (
            tuning.trying(case, Launch((8, 8), (4, 8), 4, 3), "interpreter"),
            pytest.raises(LaunchError, match="block"),
        ):
            budget.holds()
    assert Launch((8, 8), (8, 8), 4, 3) in neighbours(own)


@pytest.mark.interpreter
def test_rows_of_8_bits_are_left_out_where_a_gpu_has_none(monkeypatch, tmp_path):
    asked, able = [], launches.target_of
    rows = {name: (name.replace(".", "_"), False) for name in ("local.eight_bit", "multipole.eight_bit")}
    monkeypatch.setattr(tuning, "_tune_all", lambda cases, *rest: asked.append(len(cases)) or [])
    for module in (tuning, tuned):
        monkeypatch.setattr(module, "KERNELS", rows)
    monkeypatch.setattr(tuning, "OPERATORS", ("local", "multipole"))
    monkeypatch.setattr(tuning, "rows_of", lambda kernel, architecture: [Row(2, 128, Launch((8, 8), (8, 8)))])
    for architecture in ("sm_89", "sm_80"):
        monkeypatch.setattr(
            launches, "target_of", lambda device, name=architecture: replace(able(device), architecture=name)
        )
        tune(None, tmp_path / "t.json", setup=Setup(CPU), say=lambda line: None)
    assert asked == [2, 0]


@pytest.mark.interpreter
def test_time_that_is_up_leaves_the_other_rows_as_they_were(tmp_path):
    found, lines = run(timer_of(lambda launch: 1.0), tmp_path / "t.json", minutes=0)
    assert found == [] and "0 of 2 rows" in lines[0]
    assert [row.launch.rows for row in Table.read(tmp_path / "t.json").rows["window.forward"]] == [32, 16]


@pytest.mark.interpreter
def test_other_kernels_of_the_file_stay(tmp_path):
    out = tmp_path / "t.json"
    mine = [Row(2, 64, Launch((8, 8), (4, 8), 2, 2))]
    Table({"local.forward": mine}, "mine").write(out)
    run(timer_of(lambda launch: 1.0), out, minutes=0)
    assert Table.read(out).rows["local.forward"] == mine


@pytest.mark.interpreter
def test_each_launch_is_timed_by_calls_that_launch_it(monkeypatch, tmp_path):
    """A call of inference repeats recorded launches: here those of another launch must not be repeated."""
    monkeypatch.setattr(tapes, "DEVICES", ("cpu",))
    launched, launch_kernel = [], Kernel.run

    def seen(self, *args, **named):
        launched.append(named["ROWS"])
        return launch_kernel(self, *args, **named)

    def thrice(case, *args):
        call, rows = problem(case, *args), launches.lookup(case.kernel, "interpreter", 4, case.row.channels).rows

        def calls():
            launched.clear()
            made = [call() for _ in range(3)]  # the second one is recorded
            assert launched == [rows] * 3
            compared.append(rows)
            return made[-1]

        return calls

    compared, problem = [], tuning.problem
    monkeypatch.setattr(Kernel, "run", seen)
    monkeypatch.setattr(tuning, "problem", thrice)
    run(timer_of(lambda launch: 1.0), tmp_path / "t.json")
    assert len(set(compared)) > 2


class Lost:
    """A GPU that a launch of some rows ends the work on, for a window's row of some channels."""

    def __init__(self, monkeypatch, rows, channels):
        self.alive, holds = True, tuning.Budget.holds

        def lost(budget):
            case = budget.case
            if case.row.channels == channels and launches.lookup(case.kernel, "interpreter", 4, channels).rows == rows:
                self.alive = False
            if not self.alive:
                raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")
            return holds(budget)

        monkeypatch.setattr(tuning.Budget, "holds", lost)


def by_rows(launch):
    """Milliseconds of a launch: one more tile is better."""
    return 100 / launch.rows


@pytest.mark.interpreter
def test_a_launch_that_ends_the_work_on_the_gpu_is_named_kept_and_then_left_out(monkeypatch, tmp_path):
    out, gpu = tmp_path / "user" / "interpreter.json", Lost(monkeypatch, rows=32, channels=64)
    with pytest.raises(
        GpuLostError, match=r"window.forward 32 bits D 64: 32 4 warps 1 stages .* illegal memory"
    ) as lost:
        run(timer_of(by_rows), out, alive=lambda device: gpu.alive)
    assert str(out) in str(lost.value) and "the 1 rows before it" in str(lost.value) and "\n" not in str(lost.value)
    # the row before it is in the table, the row itself as it was
    assert [row.launch.rows for row in Table.read(out).rows["window.forward"]] == [128, 16]
    kept = Faults(tmp_path / "user" / "interpreter.faults")
    assert ("window.forward 32 bits D 64", Launch((32,), (), 4, 1)) in kept
    assert ("window.forward 32 bits D 32", Launch((32,), (), 4, 1)) not in kept
    gpu.alive = True
    found, _ = run(timer_of(by_rows), out, alive=lambda device: gpu.alive)
    # it begins where the other ended, and 32 is between the launch of that row and better ones
    assert gpu.alive and [(one.case.row.channels, one.launch.rows) for one in found] == [(64, 16), (32, 128)]
    assert [row.channels for row in Table.read(out).rows["window.forward"]] == [32, 64]


@pytest.mark.interpreter
def test_an_error_that_the_gpu_survives_is_no_fault(monkeypatch, tmp_path):
    Lost(monkeypatch, rows=32, channels=64)
    found, _ = run(timer_of(lambda launch: 1.0), tmp_path / "t.json")
    assert len(found) == 2 and not (tmp_path / "user" / "interpreter.faults").exists()


@pytest.mark.interpreter
def test_a_row_whose_own_launch_is_at_fault_is_left_out(tmp_path):
    Faults(tmp_path / "user" / "interpreter.faults").add("window.forward 32 bits D 32", Launch((32,), (), 4, 1), "why")
    found, lines = run(timer_of(lambda launch: 1.0), tmp_path / "t.json")
    assert [one.case.row.channels for one in found] == [64]
    assert "window.forward 32 bits D 32: left out" in lines[0] and "interpreter.faults" in lines[0]


def test_a_launch_at_fault_counts_for_the_versions_that_compiled_it(monkeypatch, tmp_path):
    launch = Launch((64,), (32,), 4, 2, boxes=Launch(walk=(64,)))
    Faults(tmp_path / "sm_90.faults").add("local.keys", launch, "why")
    assert ("local.keys", launch) in Faults(tmp_path / "sm_90.faults")
    assert ("local.keys", Launch((64,), (32,), 4, 2)) not in Faults(tmp_path / "sm_90.faults")
    monkeypatch.setattr(faults, "_versions", lambda: "torch 9")
    assert ("local.keys", launch) not in Faults(tmp_path / "sm_90.faults")


def test_the_command_ends_with_a_message_where_the_gpu_is_lost(monkeypatch):
    def lost(*args, **options):
        raise GpuLostError("local.keys 16 bits D 64", Launch((64,), (32,), 4, 2), "CUDA error")

    monkeypatch.setattr(tuning, "tune", lost)
    with pytest.raises(SystemExit, match=r"vision-attn: local.keys 16 bits D 64: 64 by 32 4 warps 2 stages ended"):
        main(["tune"])


@pytest.mark.interpreter
def test_the_table_is_written_after_each_row(tmp_path):
    out, there = tmp_path / "t.json", []
    setup = Setup(CPU, sides=(4,), heads=1, timer=timer_of(lambda launch: 1.0))
    tune("window", out, wide=True, setup=setup, say=lambda line: there.append(out.is_file()))
    assert there == [False, True, True, True]


@pytest.mark.interpreter
def test_rows_that_are_not_reached_keep_what_was_found_before(tmp_path):
    out = tmp_path / "t.json"
    before = [Row(4, 32, Launch((128,))), Row(4, 64, Launch((64,)))]
    Table({"window.forward": before}).write(out)
    run(timer_of(by_rows), out, minutes=0)
    assert Table.read(out).rows["window.forward"] == before


@pytest.mark.interpreter
def test_several_operators_are_tuned(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(tuning, "_tune_all", lambda cases, *rest: asked.extend(cases) or [])
    for module in (tuning, tuned):
        monkeypatch.setattr(module, "KERNELS", {name: ("window", False) for name in ("window.a", "local.b", "agent.c")})
    monkeypatch.setattr(tuning, "rows_of", lambda kernel, architecture: [Row(4, 32, Launch((32,)))])
    tune("window, local", tmp_path / "t.json", wide=True, setup=Setup(CPU), say=lambda line: None)
    assert [case.kernel for case in asked] == ["window.a", "local.b"]
    with pytest.raises(ValueError, match="one of window, local, linear, got 'all'"):
        tune("window,all")
    for minutes in (-1, float("nan")):
        with pytest.raises(ValueError, match="--minutes must be"):
            tune("window", minutes=minutes)


def test_neighbours_differ_in_one_setting_and_stay_in_bounds():
    for launch in (Launch((8, 8), (8, 8), 4, 3), Launch(walk=(64,), programs=2), Launch((64,), features=64)):
        for one in neighbours(launch):
            changed = [name for name in launch.__dataclass_fields__ if getattr(one, name) != getattr(launch, name)]
            assert len(changed) == 1, (launch, one)
            assert 1 <= one.stages <= 4 and 1 <= one.warps <= 8 and 16 <= one.length <= 128


def test_launches_of_tma_have_neighbours_of_their_own():
    launch = Launch(walk=(64,), warps=4, stages=2, boxes=Launch(walk=(64,), warps=4, stages=3))
    found = neighbours(launch)
    assert any(one.boxes is None for one in found)
    assert any(one.boxes and one.boxes.stages == 4 and one.stages == 2 for one in found)


def test_an_unknown_operator_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="one of window, local, linear, got 'loca'"):
        tune("loca")


def test_without_a_gpu_the_command_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["tune", "--operator", "local"]) == 2
    assert "launches are tuned on a GPU" in capsys.readouterr().err


def test_the_kernels_are_those_of_the_table(monkeypatch):
    monkeypatch.undo()
    with only_committed():
        names = {name for table in launches.tables("sm_90")[:1] for name in table.rows}
        assert set(tuning.KERNELS) == names - {"local.bias"}
        assert all(rows_of(kernel, "sm_89") for kernel in tuning.KERNELS)
