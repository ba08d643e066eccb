"""A tiny Stable Diffusion UNet with the authors' training-free agent patch, recorded from their code."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from golden_case import GOLDEN, TOLERANCE, tensors

from vision_attn import convert
from vision_attn.grid import Grid
from vision_attn.processors import AgentSD
from vision_attn.processors.token_merging import Matching

CASES = sorted(path.parent.name for path in (GOLDEN / "agentsd").glob("*/meta.json"))


def read(name):
    folder = GOLDEN / "agentsd" / name
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").eval()
    return json.loads((folder / "meta.json").read_text()), tensors(f"agentsd/{name}/io.safetensors"), unet


def spec_of(patch, meta):
    return AgentSD(
        cell=patch["sx"] if patch["sx"] == patch["sy"] else (patch["sy"], patch["sx"]),
        ratio=patch["ratio"],
        agent_ratio=patch["agent_ratio"],
        k_scale=meta["k_scale2"],
        shortcut=meta["k_shortcut"],
        max_downsample=patch.get("max_downsample", 1),
        random=patch.get("use_rand", True),
    )


@pytest.mark.parametrize("name", CASES)
def test_the_patched_model_equals_the_authors(name):
    meta, io, unet = read(name)
    stock = {k: v.clone() for k, v in unet.state_dict().items()}
    for patch_name, patch in meta["patches"].items():
        for g in range(len(meta["grids"])):
            inputs = [io[f"g{g}.{key}"] for key in ("sample", "timestep", "encoder_hidden_states")]
            conversion = convert(unet, spec_of(patch, meta))
            torch.manual_seed(meta["seed"] + 7)
            with torch.no_grad():
                out = unet(*inputs, return_dict=False)[0]
                conversion.revert()
                torch.testing.assert_close(out, io[f"g{g}.{patch_name}.out"], **TOLERANCE)
                torch.testing.assert_close(unet(*inputs, return_dict=False)[0], io[f"g{g}.baseline_out"], **TOLERANCE)
    assert all(torch.equal(v, stock[k]) for k, v in unet.state_dict().items())


def test_the_schedule_follows_the_timestep():
    _, io, unet = read(CASES[0])
    sample, _, text = (io[f"g0.{key}"] for key in ("sample", "timestep", "encoder_hidden_states"))
    schedule = AgentSD.schedule()

    def run(spec, timestep):
        conversion = convert(unet, spec)
        torch.manual_seed(0)
        with torch.no_grad():
            out = unet(sample, torch.tensor(timestep), text).sample
        conversion.revert()
        return out

    early, late = (spec for _, spec in schedule.stages)
    for timestep, stage in ((981, early), (601, early), (600, late), (1, late)):  # of 50 steps of DDIM the 20th is 601
        assert torch.equal(run(schedule, timestep), run(stage, timestep))
    assert not torch.equal(run(early, 601), run(late, 601))


@pytest.mark.parametrize("cell", [(2, 3), (3, 1)])
def test_cells_that_are_not_square(cell):
    """Each cell keeps one random token, and a merged token gets the value of the one that it was merged into."""
    grid = Grid(6, 6)
    tokens = torch.nn.functional.normalize(torch.randn(2, 36, 8), dim=-1)
    matching = Matching.of(tokens, grid, cell, torch.Generator().manual_seed(1))
    rows, columns = matching.kept // 6 // cell[0], matching.kept % 6 // cell[1]
    assert set(zip(rows.tolist(), columns.tolist(), strict=True)) == {
        (y, x) for y in range(6 // cell[0]) for x in range(6 // cell[1])
    }
    t = tokens[:, :, None]
    assert torch.equal(matching.unmerge(matching.merge(t, 0), 0), t)
