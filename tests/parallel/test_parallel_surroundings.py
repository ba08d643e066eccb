"""What stands around a model over processes: models without a plan, compiled blocks, FSDP, the decoder."""

import pytest
import sliced_models
import torch
from processes import PRELOAD, Group
from tiny_hosts import HOST

import vision_attn
from vision_attn.parallel import enable
from vision_attn.processors import Clear, LinFusion, Multipole

SPECS = {"clear": Clear(radius=2), "multipole": Multipole(cell=2, near=0, pool=1, exact=1), "linfusion": LinFusion()}


@pytest.fixture(scope="module")
def pair():
    group = Group(2, [*PRELOAD, "sliced_models"])
    yield group
    group.close()


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", ["sd3", "pixart"])
def test_models_without_a_plan(pair, name, spec):
    size = (6, 5, 2, 8)
    expected = sliced_models.forward(HOST[name], size, SPECS[spec], {}, True)
    for output, _, grads, status, refused in pair.run("sliced_models:enabled", name, size, SPECS[spec], True):
        assert set(status.values()) == {"rerouted"}
        assert "disable() that before the revert" in refused[0] and "slice alone" in refused[1]
        torch.testing.assert_close(output, expected[0], atol=2e-5, rtol=2e-5)
        for key, value in expected[2].items():
            if "transformer_blocks" in key:  # what lies outside of them is computed by each process
                torch.testing.assert_close(
                    grads[key], value, atol=2e-4, rtol=2e-4, msg=lambda m, key=key: f"{key}: {m}"
                )


def test_layers_of_a_cut_model_must_not_stay_dense(pair):
    for refused in pair.run("sliced_models:dense", "pixart", (6, 5, 2, 8)):
        assert "would attend to this process's slice alone" in refused


def test_enable_says_what_it_cannot_cut():
    model = HOST["pixart"].build()
    with pytest.raises(ValueError, match="convert every self-attention"):
        enable(model)
    vision_attn.convert(model, Clear(radius=2), where="*.0.*")
    with pytest.raises(ValueError, match="convert every self-attention"):
        enable(model)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [5, 16, 37, 64])
def test_processes_decode_together(pair, rows):
    for together, alone in pair.run("sliced_models:decoded", rows):
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS)
def test_compiled_blocks(pair, spec):
    for before, first, second in pair.run("sliced_models:compiled", "flux", (6, 8, 1, 8), SPECS[spec], seconds=280):
        torch.testing.assert_close(first, before, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(second, before, atol=2e-5, rtol=2e-5)


@pytest.mark.slow
def test_sharded_weights(pair):
    """FSDP takes the mean over the processes, where one process has the sum."""
    size, spec = (6, 8, 2, 8), Clear(radius=2)
    expected = sliced_models.forward(HOST["flux"], size, spec, {}, True)
    for output, grads in pair.run("sliced_models:sharded", "flux", size, spec):
        torch.testing.assert_close(output, expected[0], atol=2e-5, rtol=2e-5)
        assert grads
        for key, value in grads.items():
            torch.testing.assert_close(2 * value, expected[2][key], atol=2e-4, rtol=2e-4)
