"""FLUX.1, FLUX.2 and Qwen-Image over processes, by diffusers' own `enable_parallelism`, equal one process.

diffusers gathers unequal slices by NCCL only, so here the tokens divide by the processes; they end inside rows.
"""

import pytest
import sliced_models
import torch
from processes import PRELOAD, Group
from sliced import close
from tiny_hosts import HOST

from vision_attn.processors import Agent, AgentSD, Clear, HiLo, LinearLocal, LinFusion, MoH, Multipole, Softmax

SPECS = {
    "clear": Clear(radius=2),
    "multipole": Multipole(cell=2, near=0, pool=1, exact=1),
    "linfusion": LinFusion(mid_dim=-1),
    "agent": Agent(num_agents=9, biases=True, dwc=True),
    "hilo": HiLo(alpha=0.5),
    "linear-local": LinearLocal(window_size=4),
    "softmax": Softmax(),
}
QUICK = (("flux", "clear"), ("qwen-image-masked", "multipole"))
NAMES = ("flux", "flux2", "qwen-image", "qwen-image-masked")
ROWS = [
    pytest.param(name, spec, marks=() if (name, spec) in QUICK else pytest.mark.slow)
    for name in NAMES
    for spec in SPECS
]


def check(group, name, size, spec, options, ways, gradients=True):
    """Compare a converted model over all processes with one process; return what became of the layers."""
    expected = sliced_models.forward(HOST[name], size, spec, options, gradients)
    answers = group.run("sliced_models:over", name, size, spec, options, ways, gradients)
    for output, grad, grads, _ in answers:
        torch.testing.assert_close(output, expected[0], atol=2e-5, rtol=2e-5)
        if gradients:
            torch.testing.assert_close(grad, expected[1], atol=2e-5, rtol=2e-5)
            assert grads.keys() == expected[2].keys()
            for key, value in expected[2].items():
                close(grads[key], value, key, 2e-4)
    return answers[0][3]


@pytest.mark.parametrize(("name", "spec"), ROWS)
def test_equal_to_one_process(pair, name, spec):
    status = check(pair, name, (6, 9, 2, 8), SPECS[spec], {}, dict(ulysses_degree=2))
    assert set(status.values()) == {"rerouted"}


@pytest.mark.slow
@pytest.mark.parametrize("spec", [LinFusion(mid_dim=-1, rotate=True), AgentSD(cell=2, random=False)], ids=str)
def test_a_mixture_of_heads_has_what_the_other_processor_wants(pair, spec):
    check(pair, "flux", (6, 9, 2, 8), MoH(spec, share=0.5), {}, dict(ulysses_degree=2))


@pytest.mark.slow
@pytest.mark.parametrize("ways", [dict(ring_degree=2), dict(ulysses_degree=2, ulysses_anything=True)])
def test_every_way_of_diffusers(pair, ways):
    check(pair, "flux", (6, 9, 2, 8), Clear(radius=2), {}, ways)


def test_layers_that_stay_dense_keep_the_way_of_diffusers(pair):
    options = dict(where="transformer_blocks.*")  # the single blocks are not converted
    check(pair, "flux", (6, 8, 2, 8), Clear(radius=2), options, dict(ulysses_degree=2))
    status = check(pair, "flux", (6, 8, 2, 8), {"single*": Softmax(), "*": Clear(radius=2)}, {}, dict(ulysses_degree=2))
    assert set(status.values()) == {"rerouted"}


@pytest.mark.slow
def test_reference_images_lie_in_the_slices_too(pair):
    check(pair, "flux-kontext", (5, 9, 2, 8), Clear(radius=2), {}, dict(ulysses_degree=2))
    check(pair, "qwen-image-edit", (5, 9, 2, 8), Multipole(cell=2, near=0, pool=1, exact=1), {}, dict(ulysses_degree=2))


@pytest.mark.slow
@pytest.mark.parametrize("size", [3, 4])
def test_more_processes(size):
    group = Group(size, [*PRELOAD, "sliced_models"])
    try:
        for spec in (SPECS["clear"], SPECS["multipole"], SPECS["linfusion"]):
            check(group, "flux", (6, 8, 2, 12), spec, {}, dict(ulysses_degree=size))
    finally:
        group.close()


@pytest.mark.slow
def test_pairs_of_four_processes_draw_two_pictures():
    sizes, group = [(6, 8, 2, 8), (5, 10, 1, 12)], Group(4, [*PRELOAD, "sliced_models"])
    try:
        for name, spec in (("flux", SPECS["multipole"]), ("pixart", SPECS["clear"])):
            for rank, output in enumerate(group.run("sliced_models:paired", name, sizes, spec)):
                expected = sliced_models.forward(HOST[name], sizes[rank // 2], spec, {}, False)[0]
                torch.testing.assert_close(output, expected, atol=2e-5, rtol=2e-5)
    finally:
        group.close()


def test_a_share_that_does_not_divide_the_processes_is_refused(pair):
    for said in pair.run("sliced_models:refused", "flux", 3):
        assert said == "share=3 does not divide 2 processes"


@pytest.mark.slow
def test_a_process_that_dies_ends_all(pair):
    """gloo tells the others at once; torchrun ends the processes of a group when one has died."""
    group = Group(2, [*PRELOAD, "sliced_models"])
    try:
        group.begin("sliced_models:dies", "flux", (6, 8, 2, 8), Clear(radius=2), dict(ulysses_degree=2))
        with pytest.raises(RuntimeError, match=r"(?i)connection|closed|reset|peer"):
            group.answer(0, seconds=60)
    finally:
        group.close()
