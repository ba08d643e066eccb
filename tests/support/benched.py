"""The small cases of `bench parallel`, measured in the processes of a group."""

import copy
from unittest.mock import patch

import torch
import torch.distributed as dist

from vision_attn._compat import ensure_torchvision

ensure_torchvision()

from vision_attn.bench.entries import parallel as entry  # noqa: E402
from vision_attn.bench.parallel import parallel_row  # noqa: E402
from vision_attn.bench.training import training  # noqa: E402
from vision_attn.processors import Clear  # noqa: E402


def rows(rank):
    """Return the row of each small case by its name."""
    device = torch.device("cpu")
    with patch("torch.accelerator.device_count", lambda: 1):
        return {case.name: parallel_row(case, device) for case in entry.cases(device)}


def kept(rank):
    """Return the rows that a run leaves after each candidate of a distillation, and the whole one."""
    device, found = torch.device("cpu"), []
    case = next(case for case in entry.cases(device) if case.trains)
    with patch("torch.accelerator.device_count", lambda: 1):
        chosen = ("clear r16 alone", "clear r16 over")
        row = parallel_row(case, device, chosen, lambda row: found.append(copy.deepcopy(row)))
    return found, row


def learned(rank):
    """Return what each parameter learns in two steps of a distillation: alone, and over the processes."""
    device, found = torch.device("cpu"), []
    case = next(case for case in entry.cases(device) if case.trains)
    with patch("torch.accelerator.device_count", lambda: 1):
        for group in (None, dist.group.WORLD):
            torch.manual_seed(0)
            model = case.model.build(device, case.dtype)
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            arguments = case.model.arguments(case.pixels, device, case.dtype)
            with training(model, Clear(radius=2), arguments, group) as update:
                update()
                update()
                after = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
            found.append({name: t - before[name] for name, t in after.items()})
    return found
