"""Every processor computes the same when hooks offload its weights, which they load when a module is called."""

from itertools import product

import pytest
import torch
from covering import quick
from host_runs import FROM_A_FILE, run
from offloads import OFFLOADS
from processor_table import PROCESSORS
from tiny_hosts import HOST, noise
from torch import nn

from vision_attn import Conversion, LinFusion, Schedule, convert

SIZE = (16, 16)
SPECS = PROCESSORS | {"schedule": Schedule(((0.1, PROCESSORS["rala"]), (1.0, LinFusion(mid_dim=4))))}
ROWS = list(product(("flux", "sd15-unet"), SPECS, OFFLOADS, ("before", "after")))


def change(model: nn.Module) -> None:
    """Change the parameters of a conversion, wherever they lie."""
    with torch.no_grad():
        for i, parameter in enumerate(Conversion.of(model).parameters()):
            parameter.add_(0.1 * noise(*parameter.shape, seed=i))


@pytest.mark.parametrize(
    "host_id, name, offload, when",
    quick(
        ROWS,
        (lambda host_id, name, offload, when: name if offload == "sequential" and when == "after" else "any", 1),
        (lambda host_id, name, offload, when: (host_id, offload, when), 1),
    ),
)
def test_offloaded(host_id: str, name: str, offload: str, when: str) -> None:
    torch.manual_seed(0)
    plain, model = HOST[host_id].build(), HOST[host_id].build()
    convert(plain, SPECS[name])
    change(plain)
    want = run(HOST[host_id], plain, *SIZE)
    torch.manual_seed(0)
    if when == "before":
        OFFLOADS[offload](model)
    convert(model, SPECS[name])
    change(model)
    if when == "after":
        OFFLOADS[offload](model)
    for _ in range(2):
        torch.testing.assert_close(run(HOST[host_id], model, *SIZE), want, **FROM_A_FILE)
