"""Rates are the stored ones in these tests, on a machine with a GPU too."""

import pytest

from vision_attn.estimation import rates


class NoGpu(rates.Installed):
    """A machine without a GPU."""

    def any(self) -> bool:
        return False


@pytest.fixture(autouse=True)
def _stored_rates(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the GPU of this machine be timed by the tests that need one alone."""
    if not request.node.name.endswith("needs_a_gpu"):
        monkeypatch.setattr(rates, "INSTALLED", NoGpu())
