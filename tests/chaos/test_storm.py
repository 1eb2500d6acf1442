"""A short storm keeps every promise, and a pool that breaks one is caught by the same checker."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from storm.faults import DECK
from storm.work import POISON_EVERY

RUN = Path(__file__).parent / "run_storm.py"

#: One of each kind and a few more.
FAULTS = 15


def storm(directory: Path, **knobs: Any) -> tuple[int, dict[str, Any], str]:
    """Run one; its exit status, its last line, and what it said meanwhile."""
    common = {"REAL": 0, "EVERYSEC_SECONDS": 0, "DIR": directory}
    environ = {f"CHAOS_{name}": str(value) for name, value in (common | knobs).items()}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("CHAOS_", "ROLLPOOL_"))}
    done = subprocess.run(
        [sys.executable, str(RUN)], env=inherited | environ, capture_output=True, text=True, timeout=280, check=False
    )
    try:
        return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stderr
    except (IndexError, ValueError):
        pytest.fail(f"no last line; status {done.returncode}; it said:\n{done.stderr[-4000:]}")


@pytest.mark.timeout(300)
def test_no_fault_loses_a_job_settles_it_twice_or_runs_it_on_a_wrong_policy(tmp_path: Path) -> None:
    status, line, said = storm(tmp_path, SEED=11, SECONDS=50, JOBS=1000, FAULTS=FAULTS, EVERY="2.8-3.6")
    assert (line["lost"], line["twice"], line["wrong_policy"], line["altered"]) == (0, 0, 0, 0), said[-6000:]
    assert status == 0, said[-6000:]
    assert line["enqueued"] == line["settled"] == sum(line["outcomes"].values()) >= 1000
    assert set(line["faults"]) == set(DECK)
    assert line["faults_total"] >= FAULTS
    assert set(line["poison"]) >= set(POISON_EVERY) - {"forget"}
    assert line["poison_not_dead"] == 0
    assert line["recovery_seconds"]["jobs"] > 0
    assert line["not_recovered"] == 0


#: Breaks, with what shows them soon, and what the checker must say.
BREAKS = {
    # A settlement whose reply is lost is sent again.
    "settle": ("twice", {"SECONDS": 10, "KINDS": "lose_replies", "EVERY": "0.4-0.8"}),
    "lose": ("lost", {"SECONDS": 6, "KINDS": "cut", "EVERY": "2-3"}),
    "policy": ("wrong_policy", {"SECONDS": 14, "KINDS": "policy", "EVERY": "3-4"}),
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("broken", BREAKS)
def test_a_pool_that_breaks_the_promise_is_caught(tmp_path: Path, broken: str) -> None:
    seen, knobs = BREAKS[broken]
    status, line, said = storm(
        tmp_path, SEED=12, JOBS=100, FAULTS=2, POISON=0, SETTLE_SECONDS=12, BREAK=broken, **knobs
    )
    assert line["enqueued"] >= 100, said[-6000:]
    assert line[seen] > 0, said[-6000:]
    assert status == 1
    # The break and nothing else: of the jobs that got no result, each is one that the broken script swallows.
    swallowed = [int(index) for index in re.findall(r"lost: \S+/(\d+): no result", said)]
    if broken == "lose":
        assert swallowed
        assert {index % 17 for index in swallowed} == {3}


def test_with_the_same_knobs_a_pool_that_is_whole_is_not_accused(tmp_path: Path) -> None:
    _, knobs = BREAKS["settle"]
    status, line, said = storm(tmp_path, SEED=12, JOBS=100, FAULTS=2, POISON=0, SETTLE_SECONDS=60, **knobs)
    assert status == 0, said[-6000:]
    assert line["poison"] == {}
