"""`vision-attn tune` with a timer of its own, in Triton's interpreter: what it keeps, writes and reads again."""

import math

import pytest
import torch

from vision_attn.bench import tuned, tuning
from vision_attn.bench.tuning import Case, Setup, neighbours, only_committed, rows_of, tune
from vision_attn.cli import main
from vision_attn.kernels import launches
from vision_attn.kernels.launches import Launch, Row, Table
from vision_attn.kernels.triton import launching

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


def run(timer, out, **options):
    """Tune windows on the CPU; return what was found and what was said."""
    lines = []
    setup = Setup(CPU, sides=(4,), heads=1, timer=timer)
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
def test_the_check_finds_a_wrong_result():
    case = Case("window.forward", Row(4, 32, Launch((16,), (), 4, 1)))
    budget = tuning.Budget(case, CPU)
    assert budget.holds()
    budget.exact[0] = budget.exact[0] + 0.01
    assert not budget.holds()


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
        # tiles of 8 bits are their blocks, and no definition in float64 says which of its launches are right
        assert set(tuning.KERNELS) == names - {"local.bias", "local.eight_bit", "multipole.eight_bit"}
        assert all(rows_of(kernel, "sm_89") for kernel in tuning.KERNELS)
