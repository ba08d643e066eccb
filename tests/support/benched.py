"""The small cases of `bench parallel`, measured in the processes of a group."""

from unittest.mock import patch

import torch

from vision_attn._compat import ensure_torchvision

ensure_torchvision()

from vision_attn.bench.entries import parallel as entry  # noqa: E402
from vision_attn.bench.parallel import parallel_row  # noqa: E402


def rows(rank):
    """Return the row of each small case by its name."""
    device = torch.device("cpu")
    with patch("torch.accelerator.device_count", lambda: 1):
        return {case.name: parallel_row(case, device) for case in entry.cases(device)}
