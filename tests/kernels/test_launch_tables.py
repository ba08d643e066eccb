"""Tables of launches, the lookup, and launches that are made smaller until they fit a GPU; no GPU is needed."""

import logging
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vision_attn.grid import Grid
from vision_attn.kernels import launches
from vision_attn.kernels.backend import Implementation, LaunchError, pick, warn
from vision_attn.kernels.hedgehog.op import MOST
from vision_attn.kernels.launches import Launch, Row, Table, Target
from vision_attn.kernels.local import Window, local_attention
from vision_attn.kernels.triton import launching
from vision_attn.kernels.triton.launching import Kernel, launch_of

COMMITTED = sorted(Path(launches.__file__).parent.glob("*.json"))
RTX4090 = Target("sm_89", 101376, 128)


@pytest.fixture(autouse=True)
def _anew(monkeypatch, tmp_path):
    """Read tables anew, before and after, from an empty folder of the user's."""
    monkeypatch.setenv("VISION_ATTN_LAUNCHES", str(tmp_path))
    launching.forget()
    warn.cache_clear()
    yield
    launching.forget()


def table_of(launch, kernel="local.forward", **row):
    return Table({kernel: [Row(**{"size": 2, "channels": 256, "launch": launch, **row})]}, "a test")


@pytest.mark.parametrize("path", COMMITTED, ids=[path.stem for path in COMMITTED])
def test_a_table_is_read_as_it_was_written(path, tmp_path):
    table = Table.read(path)
    table.write(tmp_path / "again.json")
    assert Table.read(tmp_path / "again.json") == table
    assert (tmp_path / "again.json").read_text() == path.read_text()


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("channels", [16, 64, 128, 256])
def test_every_kernel_has_a_launch_for_all_channels(size, channels):
    for kernel in Table.read(COMMITTED[0]).rows:
        if kernel == "hedgehog.features" and channels > MOST:
            continue  # refused by name
        if kernel.startswith("residual.") and (size == 4 or channels > 128):
            continue  # 16 bits alone, and wider products take the last row
        found = launches.lookup(kernel, "sm_89", size, channels, 33)
        assert found.warps and found.length >= 16, kernel


@pytest.mark.parametrize("text", ["no json", "[]", "{}", '{"about": "", "kernels": {"a": [{"size": 2}]}}'])
def test_a_file_that_is_no_table_is_refused_by_name(text, tmp_path):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ValueError, match=r"bad\.json is no table of launches"):
        Table.read(tmp_path / "bad.json")


def test_tiles_are_powers_of_two(tmp_path):
    table_of(Launch((48,), (64,))).write(tmp_path / "odd.json")
    with pytest.raises(ValueError, match="powers of two"):
        Table.read(tmp_path / "odd.json")


def test_the_users_table_comes_first_and_only_for_what_it_has(tmp_path):
    committed = launches.lookup("local.forward", "sm_89", 2, 64, 9)
    keys = launches.lookup("local.keys", "sm_89", 2, 64, 9)
    mine = Launch((4, 4), (4, 4), 1)
    table_of(mine, channels=64).write(tmp_path / "sm_89.json")
    launching.forget()
    assert launches.lookup("local.forward", "sm_89", 2, 64, 9) == mine != committed
    assert launches.lookup("local.forward", "sm_90", 2, 64, 9) == committed  # another GPU
    assert launches.lookup("local.keys", "sm_89", 2, 64, 9) == keys
    assert launches.lookup("local.forward", "sm_89", 2, 128, 9) == launches.lookup("local.forward", "sm_90", 2, 128, 9)


def test_a_broken_table_of_the_users_is_left_out_with_one_warning(tmp_path, caplog):
    committed = launches.lookup("local.forward", "sm_90", 2, 64)
    (tmp_path / "sm_90.json").write_text("{")
    launching.forget()
    with caplog.at_level(logging.WARNING):
        assert [launches.lookup("local.forward", "sm_90", 2, 64, n) for n in (9, 9, 20)] == [committed] * 3
    assert len(caplog.records) == 1 and "sm_90.json is no table of launches" in caplog.text


def test_the_nearest_architecture_serves_one_without_a_table(monkeypatch):
    near = {name: table_of(Launch((n,), (n,))) for name, n in (("sm_80", 16), ("sm_90", 32), ("sm_120", 64))}
    monkeypatch.setattr(Table, "read", lambda path: near[path.stem])
    monkeypatch.setattr(Path, "glob", lambda path, pattern: [Path(f"{name}.json") for name in near])
    wanted = {"sm_80": 16, "sm_75": 16, "sm_86": 32, "sm_89": 32, "sm_90": 32, "sm_100": 32, "sm_120": 64}
    wanted |= {"gfx942": 32, "interpreter": 32}
    for name, n in wanted.items():
        assert launches.tables(name)[0].rows["local.forward"][0].launch.rows == n, name


def test_a_call_without_a_row_says_so():
    with pytest.raises(LaunchError, match=r"no table of launches has a row of local.forward for 512 channels"):
        launches.lookup("local.forward", "sm_90", 2, 512)


def test_launches_become_smaller_down_to_16_tokens_and_no_pipeline():
    first = Launch((8, 8), (8, 8), 4, 3, boxes=Launch((8, 8), (8, 8), 4, 4))
    every = list(first.smaller())
    assert every[0] == first and all(one.boxes is None for one in every[1:])
    assert (every[1].own, every[1].walk, every[1].stages) == ((8, 8), (8, 8), 3)
    assert (every[2].walk, every[2].stages) == ((8, 8), 2)
    assert (every[3].own, every[3].walk, every[3].stages) == ((8, 8), (4, 8), 3)  # what is walked before what is owned
    assert (every[-1].own, every[-1].walk, every[-1].stages) == ((4, 4), (4, 4), 1)
    assert len(set(every)) == len(every)
    deep = [one.stages > 1 for one in every]
    assert deep == sorted(deep, reverse=True)  # without a pipeline last


@pytest.mark.parametrize(
    "launch",
    [Launch(walk=(64,), stages=2), Launch((64,)), Launch((16,), features=64)],
    ids=["walks", "owns", "features"],
)
def test_tiles_that_are_not_there_stay_so(launch):
    last = list(launch.smaller())[-1]
    assert (bool(last.own), bool(last.walk)) == (bool(launch.own), bool(launch.walk))
    assert last.length == 16 and last.features in (0, 16) and last.stages == 1


def fit(limit, needs, monkeypatch):
    """Return the launch of local attention that fits `limit`, and those that were tried."""
    monkeypatch.setattr(launches, "target_of", lambda device: Target("sm_89", limit, 128))
    tried = []

    def attempt(launch):
        tried.append(launch)
        return launch, needs(launch)

    q = torch.zeros(1, 1, 1, 128, dtype=torch.bfloat16)
    return launches.fitting("local.keys", q, attempt, channels=128), tried


def needs(launch):
    return 1024 * (launch.rows + launch.stages * launch.length)


def test_the_first_launch_that_fits_is_taken_before_anything_runs(monkeypatch):
    found, tried = fit(2**18, needs, monkeypatch)
    assert tried == [found] == [launches.lookup("local.keys", "sm_89", 2, 128)]
    found, tried = fit(2**17, needs, monkeypatch)
    assert needs(found) <= 2**17 and all(needs(one) > 2**17 for one in tried[:-1]) and len(tried) > 1


def test_a_launch_that_does_not_compile_is_passed_over(monkeypatch):
    def failing(launch):
        if launch.length > 16:
            raise LaunchError("PassManager::run failed")
        return needs(launch)

    assert fit(2**18, failing, monkeypatch)[0].length == 16


def test_where_none_fits_the_error_says_what_is_missing(monkeypatch):
    with pytest.raises(LaunchError, match=r"no launch of local.keys fits sm_89: .* takes 32768 bytes .* has 1000"):
        fit(1000, needs, monkeypatch)


def test_what_was_found_for_a_key_is_kept_even_if_nothing_was(monkeypatch):
    monkeypatch.setattr(launches, "target_of", lambda device: RTX4090)
    q, asked = torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16), []

    def of(constants, bytes_taken):
        return launch_of("window.forward", q, constants, lambda launch: asked.append(launch) or bytes_taken)

    assert of((1,), 10) == of((1,), 10) and len(asked) == 1
    of((2,), 10)
    assert len(asked) == 2
    for _ in range(2):
        with pytest.raises(LaunchError):
            of((3,), 10**6)
    count = len(asked)
    with pytest.raises(LaunchError):
        of((3,), 10**6)
    assert len(asked) == count


def implementations(error):
    def triton(x):
        raise LaunchError(error)

    return {"triton": Implementation(triton), "torch": Implementation(lambda x: x + 1)}


def test_auto_runs_the_portable_backend_with_one_warning_where_no_launch_fits(caplog):
    with caplog.at_level(logging.WARNING):
        assert [pick("op", "auto", implementations("none fits"))(1) for _ in range(3)] == [2, 2, 2]
    assert [record.getMessage() for record in caplog.records] == ["op runs without Triton: none fits"]


def test_triton_by_name_is_an_error_where_no_launch_fits():
    with pytest.raises(LaunchError, match="none fits"):
        pick("op", "triton", implementations("none fits"))(1)


class OutOfResources(Exception):  # noqa: N818, the name is what counts
    """As Triton's."""


def test_tritons_error_of_resources_never_comes_through():
    def launch(*args, **named):
        raise OutOfResources("shared memory")

    kernel = Kernel(SimpleNamespace(__getitem__=None))
    kernel.function = type("Function", (), {"__getitem__": lambda self, grid: launch, "__name__": "f"})()
    with pytest.raises(LaunchError, match="shared memory"):
        kernel[(1,)](torch.zeros(1))


def test_the_target_comes_from_the_devices_properties(monkeypatch):
    driver = pytest.importorskip("triton.runtime.driver", reason="Triton is not installed").driver
    about = SimpleNamespace(
        major=8, minor=9, shared_memory_per_block=49152, multi_processor_count=128, gcnArchName="gfx942:sramecc+"
    )
    shared = {7: 101376, 1: 65536}
    utils = SimpleNamespace(get_device_properties=lambda index: {"max_shared_mem": shared[index]})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 7)
    monkeypatch.setattr(driver, "_active", SimpleNamespace(utils=utils))
    try:
        assert launches.target_of(torch.device("cuda", 7)) == launches.target_of(torch.device("cuda")) == RTX4090
        monkeypatch.setattr(torch.version, "hip", "6.4")
        assert launches.target_of(torch.device("cuda", 1)) == Target("gfx942", 65536, 128)
        assert launches.target_of(torch.device("cpu")) == launches.INTERPRETER
    finally:
        launches.target_of.cache_clear()


@pytest.mark.interpreter
def test_an_operator_runs_with_the_launch_that_fits(monkeypatch):
    launch, taken = Launch((8, 8), (8, 8), 4, 3), []
    monkeypatch.setattr(launches, "tables", lambda architecture: [table_of(launch, size=4, columns=math.inf)])
    monkeypatch.setattr(launches, "target_of", lambda device: Target("sm_89", 2**16, 4))

    def shared(self, *args, **named):
        if self.name == "local.queries._forward":
            taken.append((named["TALL"] * named["WIDE"], named["KEY_TALL"] * named["KEY_WIDE"], named["num_stages"]))
            return 1024 * (taken[-1][0] + taken[-1][1])
        return 0

    monkeypatch.setattr(Kernel, "needs", shared)
    q, k, v = torch.randn(3, 1, 12 * 9 + 5, 2, 32)
    grid, window = Grid(12, 9, prefix=5), Window(radius=3)
    o = local_attention(q, k, v, grid, window, backend="triton")
    assert taken[0] == (64, 64, 3) and (32, 32, 3) in taken and sum(taken[-1][:2]) <= 64
    torch.testing.assert_close(o, local_attention(q, k, v, grid, window, backend="reference"), atol=1e-5, rtol=1e-4)
    monkeypatch.setattr(launches, "target_of", lambda device: Target("sm_89", 1024, 4))
    launching.forget()
    with pytest.raises(LaunchError, match=r"no launch of local\.forward fits sm_89"):
        local_attention(q, k, v, grid, window, backend="triton")
    monkeypatch.setattr("vision_attn.kernels.local.triton_reasons", lambda *args, **named: [])
    again = local_attention(q, k, v, grid, window, backend="auto")
    torch.testing.assert_close(again, o, atol=1e-5, rtol=1e-4)
