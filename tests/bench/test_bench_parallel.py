"""`vision-attn bench parallel` in two processes on a CPU: every small case runs, and more processes are predicted."""

import json

import pytest
from processes import PRELOAD, Group

from vision_attn.bench.entries import parallel as entry


@pytest.fixture(scope="module")
def pair():
    group = Group(2, [*PRELOAD, "benched"])
    yield group
    group.close()


@pytest.mark.slow
def test_every_small_case_runs(pair):
    for name, row in pair.run("benched:rows", seconds=280)[0].items():
        reasons = {c["name"]: c["reason"] for c in row["candidates"] if c["reason"]}
        assert all(way == "stock ring" and "return_lse" in why for way, why in reasons.items()), reasons  # on a CPU
        over = [c["forward"] for c in row["candidates"] if c["name"].endswith(entry.OVER)]
        assert over and all(0 < f["efficiency"] == pytest.approx(f["speedup"] / 2) for f in over)
        if not name.startswith("flux-train"):
            assert all(f["moved"]["bytes"] > 0 for f in over)
            assert [p["processes"] for p in row["predicted"]] == [4, 8]
        json.dumps(row)
