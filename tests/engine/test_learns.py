"""The example learns, through a real engine: what a pool is for, in few enough steps for every change to be tested."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]

#: Standard errors of the held-out mean reward by which it must have risen.
ERRORS = 3


def test_grpo_learns_from_what_the_pool_brings_and_its_ratios_are_one_at_staleness_0(tmp_path: Path) -> None:
    picture = tmp_path / "reward.png"
    command = [sys.executable, "-m", "examples.grpo_tiny", "--short", "--staleness", "0", "--plot", str(picture)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=840)
    assert done.returncode == 0, done.stdout + done.stderr
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    learned = said["checkpoint"]
    error = (learned["start_error"] ** 2 + learned["end_error"] ** 2) ** 0.5
    assert learned["end"] - learned["start"] > ERRORS * error, said
    assert said["ratio_max_error"] < 0.05, said
    assert learned["oldest"] == 0, said
    assert picture.read_bytes().startswith(b"\x89PNG")
