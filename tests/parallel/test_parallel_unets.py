"""UNets over processes, each with whole rows of the latents, equal one process: output and all gradients, float32."""

import pytest
import sliced_unets
import torch
from processes import PRELOAD, Group
from sliced import close

from vision_attn.processors import Agent, Clear, HiLo, LinearLocal, LinFusion, Multipole

SPECS = {
    "linfusion": LinFusion(),
    "clear": Clear(radius=2),
    "multipole": Multipole(cell=2, near=0, pool=1, exact=1),
    "agent": Agent(num_agents=4, biases=True, dwc=True),
    "hilo": HiLo(alpha=0.5),
    "linear-local": LinearLocal(window_size=4),
}
SIZES = {"even": (16, 6, 2, 8), "odd": (13, 7, 1, 8), "least": (9, 5, 1, 8)}
NAMES = ("sd15-unet", "sd21-unet", "sdxl-unet", "sd15-inpaint-unet")


@pytest.fixture(scope="module")
def groups(pair):
    found = {}

    def of(size):
        if size == 2:
            return pair
        if size not in found:
            found[size] = Group(size, [*PRELOAD, "sliced_unets"])
        return found[size]

    yield of
    for group in found.values():
        group.close()


def check(group, name, size, spec, **options):
    """Compare a UNet over all processes with one process; return the bytes that rank 0 received."""
    expected = sliced_unets.alone(name, size, spec, options)
    exact = options.get("dtype") == torch.float64
    most = 1e-9 if exact else 2e-5
    gradients = most * max(1.0, float(expected[1].abs().max()))  # each is a sum of many of that size
    answers = group.run("sliced_unets:over", name, size, spec, options)
    for output, grad, grads, status, _, put_back in answers:
        assert put_back
        assert set(status.values()) == {"rerouted"}
        close(output, expected[0], "output", most)
        close(grad, expected[1], "gradient of the input", gradients)
        assert grads.keys() == expected[2].keys()
        for key, value in expected[2].items():
            close(grads[key], value, key, 10 * most)
    return answers[0][4]


ROWS = [
    pytest.param(
        count, name, size, spec, marks=() if (count, name, size, spec) == (2, "sdxl-unet", "odd", "linfusion") else
        pytest.mark.slow,
    )
    for count in (2, 3, 4)
    for name in NAMES
    for size in SIZES
    for spec in SPECS
    if (count == 2 or size == "odd") and (name in ("sd15-unet", "sdxl-unet") or spec == "linfusion")
]  # fmt: skip


@pytest.mark.parametrize(("count", "name", "size", "spec"), ROWS)
def test_equal_to_one_process(groups, count, name, size, spec):
    check(groups(count), name, SIZES[size], SPECS[spec])


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    dict(layout=torch.channels_last), dict(checkpointing=True), dict(residuals=True), dict(dtype=torch.float64),
], ids=["channels-last", "checkpointing", "residuals-of-a-controlnet", "float64"])  # fmt: skip
def test_surroundings(groups, options):
    check(groups(2), "sd15-unet", (13, 7, 2, 8), Clear(radius=2), **options)


@pytest.mark.slow
def test_different_sizes_in_turn(groups):
    sizes = [SIZES["even"], SIZES["odd"], SIZES["even"]]
    found = groups(2).run("sliced_unets:in_turn", "sdxl-unet", sizes, LinFusion())
    for outputs in found:
        for size, (learning, inference) in zip(sizes, zip(outputs[::2], outputs[1::2], strict=True), strict=True):
            expected = sliced_unets.alone("sdxl-unet", size, LinFusion(), {})[0]
            close(learning, expected, str(size), 2e-5)
            close(inference, expected, str(size), 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["halo", "norm"])
def test_wrong_rows_are_caught(groups, part):
    """The comparison can fail: convolutions that see zeros for the neighbours' rows, norms over the own rows alone."""
    expected = sliced_unets.alone("sd15-unet", SIZES["odd"], LinFusion(), {})
    for answer in groups(2).run("sliced_unets:over_wrong", part, "sd15-unet", SIZES["odd"], LinFusion(), {}):
        with pytest.raises(AssertionError, match="output: "):
            close(answer[0], expected[0], "output", 2e-5)


@pytest.mark.slow
def test_compiled_blocks(groups):
    expected = sliced_unets.alone("sd15-unet", SIZES["odd"], Clear(radius=2), {})[0]
    for outputs in groups(2).run("sliced_unets:compiled", "sd15-unet", SIZES["odd"], Clear(radius=2), seconds=280):
        for output in outputs:
            close(output, expected, "output", 2e-5)


@pytest.mark.slow
def test_adapters_of_convolutions_may_come_later(groups):
    for cut, alone in groups(2).run("sliced_unets:adapted", "sd15-unet", SIZES["odd"], Clear(radius=2)):
        close(cut, alone, "output", 2e-5)


@pytest.mark.slow
def test_pairs_of_four_processes_draw_two_pictures(groups):
    sizes = [SIZES["odd"], SIZES["even"]]
    for rank, output in enumerate(groups(4).run("sliced_unets:paired", "sd15-unet", sizes, Clear(radius=2))):
        close(output, sliced_unets.alone("sd15-unet", sizes[rank // 2], Clear(radius=2), {})[0], str(rank), 2e-5)


@pytest.mark.slow
def test_what_is_refused(groups):
    for said in groups(2).run("sliced_unets:refused", "sd15-unet", SIZES["odd"], Clear(radius=2)):
        for words, message in zip(
            (
                "disable() that before",
                "slice alone",
                "ip_adapter_masks",
                "draw at least 5 rows",
                "already",
                "FreeU",
                "is not",
            ),
            said,
            strict=True,
        ):
            assert words in message


def test_a_unet_of_other_blocks_is_refused():
    from tiny_hosts import HOST

    from vision_attn.parallel import enable

    with pytest.raises(ValueError, match="a UNet2DModel cannot be cut over processes: known are FluxTrans"):
        enable(HOST["unet2d"].build())
    model = HOST["sd15-unet"].build()
    model.down_blocks[0].__class__ = type("AttnDownBlock2D", (type(model.down_blocks[0]),), {})
    with pytest.raises(ValueError, match="a UNet with a AttnDownBlock2D cannot be cut"):
        enable(model)
