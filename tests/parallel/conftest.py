"""Two processes that the tests of whole models share: each takes seconds to import what these need."""

import pytest
from processes import PRELOAD, Group


@pytest.fixture(scope="session")
def pair():
    group = Group(2, [*PRELOAD, "sliced_models", "sliced_unets", "sliced_highres", "sliced_page"])
    yield group
    group.close()
