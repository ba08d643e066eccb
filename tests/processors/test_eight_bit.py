"""CLEAR, neighborhoods and multipoles in 8 bits on a host: near their own output, saved, loaded, and for inference."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from eight_bit_cases import PRECISIONS, nearness
from host_runs import distance, run
from tiny_host_case import build
from tiny_hosts import HOST

from vision_attn import Clear, Grid, MoH, Multipole, Neighborhood, Schedule, convert, load
from vision_attn.estimation.inspection import attended
from vision_attn.kernels.local import Window
from vision_attn.kernels.multipole import Cells
from vision_attn.parallel.local import local_attention_over
from vision_attn.parallel.multipole import multipole_attention_over
from vision_attn.parallel.ranks import Ranks
from vision_attn.processors import AttnSpec, Layer, from_config, spec_of_text, to_config

SMALL = dict(cell=4, near=0, pool=2, exact=1)
SPECS = {
    "clear-int8": (Clear(radius=2, precision="int8"), Clear(radius=2)),
    "neighborhood-fp8": (Neighborhood(kernel_size=3, precision="fp8"), Neighborhood(kernel_size=3)),
    "multipole-int8": (Multipole(**SMALL, precision="int8"), Multipole(**SMALL)),
}
HOST_ID, SIZE = "flux", (6, 8)


@pytest.mark.parametrize("name", SPECS)
def test_a_host_draws_nearly_the_same_and_loads_what_was_saved(name: str, tmp_path: Path) -> None:
    case, (rounded, plain) = HOST[HOST_ID], SPECS[name]
    model, other = case.build(), case.build()
    conversion = convert(model, rounded)
    convert(other, plain)
    ours, want = (run(case, m, *SIZE) for m in (model, other))
    assert 1e-5 < distance(ours, want) < 0.05
    conversion.save(tmp_path)
    again = case.build()
    load(again, tmp_path)
    torch.testing.assert_close(run(case, again, *SIZE), ours, rtol=0, atol=1e-3)  # near ties may round otherwise
    assert f"precision={rounded.precision!r}" in str(rounded)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["clear-int8", "multipole-int8"])
def test_training_is_refused_by_name(name: str) -> None:
    case = HOST[HOST_ID]
    model = case.build()
    convert(model, SPECS[name][0])
    with pytest.raises(ValueError, match=r"precision='int8' has no gradient.* train with precision=None"):
        model(**case.inputs(*SIZE, 1, 7))


def test_fields_are_checked() -> None:
    makers: tuple[Any, ...] = (Clear, Neighborhood, Multipole)
    for make in makers:
        with pytest.raises(ValueError, match=r"precision must be None .*, got 'bf16'"):
            make(precision="bf16")
    with pytest.raises(ValueError, match=r"precision='fp8' is for CLEAR without pooled keys: give pool=1"):
        Clear(radius=4, pool=2, precision="fp8")
    assert spec_of_text("clear:radius=8,precision=int8") == Clear(radius=8, precision="int8")
    for spec, plain in SPECS.values():
        assert from_config(to_config(spec)) == spec != plain
        assert spec.calls > plain.calls and spec.passes > plain.passes
        assert spec.attended(Grid(8, 9)) == plain.attended(Grid(8, 9))


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(MoH(Clear(radius=3, precision="int8")), id="moh"),
        pytest.param(Schedule(((0.5, Clear(precision="fp8")), (1.0, Clear()))), id="schedule"),
        pytest.param(Schedule(((0.5, Multipole(precision="fp8")), (1.0, Multipole()))), id="schedule-multipole"),
    ],
)
def test_other_specs_hold_it(spec: AttnSpec) -> None:
    assert from_config(to_config(spec)) == spec


@pytest.mark.parametrize("name", ["clear-int8", "multipole-int8"])
def test_a_mixture_of_heads_runs_it(name: str) -> None:
    grid = Grid(5, 6)
    q, k, v = torch.randn(3, 1, 30, 4, 16)
    layer = Layer("", 4, 16, dim=64)
    with torch.no_grad():
        ours, want = (MoH(spec).build(layer)(q, k, v, grid) for spec in SPECS[name])
    assert 1e-5 < distance(ours, want) < 0.1


def test_the_picture_is_that_of_the_window() -> None:
    for spec, plain in SPECS.values():
        assert torch.equal(attended(spec, Grid(8, 9), 2, 7), attended(plain, Grid(8, 9), 2, 7))


def test_relative_positions_are_refused() -> None:
    model = build(
        timm.create_model, "beit_base_patch16_224", img_size=(48, 40), patch_size=8, embed_dim=48, depth=2,
        num_heads=3, num_classes=10,
    )  # fmt: skip
    convert(model, Clear(radius=2, precision="int8"))
    with torch.no_grad(), pytest.raises(ValueError, match=r"relative positions .* no place for: use precision=None"):
        model(torch.randn(1, 3, 48, 40))


def test_several_processes_are_refused() -> None:
    ranks = Ranks(Grid(4, 5), "", 0, (0, 0, 0), (0, 10, 20), (0, 0, 0))
    q, k, v = torch.randn(3, 1, 10, 2, 16)
    with pytest.raises(ValueError, match=r"precision='int8' runs on one process: use precision=None over several"):
        local_attention_over(q, k, v, ranks, Window(radius=2, precision="int8"), mask=None, scale=None, backend="torch")
    with pytest.raises(ValueError, match=r"precision='fp8' runs on one process: use precision=None over several"):
        multipole_attention_over(q, k, v, ranks, Cells(precision="fp8"), mask=None, scale=None, backend="torch")


def test_what_was_trained_loads_with_a_precision(tmp_path: Path) -> None:
    case, (rounded, plain) = HOST[HOST_ID], SPECS["multipole-int8"]
    model, again = case.build(), case.build()
    conversion = convert(model, plain)
    for name, parameter in model.named_parameters():
        if name.endswith("mass"):
            torch.nn.init.normal_(parameter)
    conversion.save(tmp_path)
    load(again, tmp_path, spec=rounded)
    assert 1e-5 < distance(run(case, again, *SIZE), run(case, model, *SIZE)) < 0.05


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        pytest.param(name, one, id=f"{name}-{one}", marks=() if (name, one) == ("unet", "int8") else pytest.mark.slow)
        for name in ("base", "unet") for one in PRECISIONS
    ],
)  # fmt: skip
def test_a_teachers_layers_and_pictures_are_near(name: str, precision: str) -> None:
    """The rounding of 8 bits on real activations; `tests/gpu/check_multipole.py` runs more steps by the kernels."""
    steps, prompts = (1, ("octopus",)) if name == "unet" else (2, ("octopus",))
    found = nearness(name, Multipole(), Multipole(precision=precision), steps=steps, prompts=prompts)
    assert found["calls"] == dict(base=24, unet=7)[name]
    assert dict(int8=0.9995, fp8=0.997)[precision] <= found["least"] < 1
    assert 30 < found["psnr_db"] < 70
