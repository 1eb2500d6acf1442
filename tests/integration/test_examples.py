"""The examples run as a reader would run them, against a pool of real workers with simulated engines."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rollpool.ops.doctor import examine
from rollpool.ops.local.hosts import LocalHosts
from rollpool.ops.local.run import wait_until_served
from rollpool.ops.local.server import LocalServer
from rollpool.ops.local.tiny_model import tiny_tokenizer
from rollpool.ops.sim import make_sim_model, sim_engine
from rollpool.producer import RolloutPool
from rollpool.schemas import Keys
from rollpool.schemas.connection import connect

pytestmark = pytest.mark.timeout(240)

EXAMPLES = Path(__file__).parents[2] / "examples"
POOL = "examples"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a pool whose two hosts serve policy 1."""
    directory = tmp_path_factory.mktemp("pool")
    model = make_sim_model(directory / "model", signature=5)
    tiny_tokenizer().save(str(model / "tokenizer.json"))  # the examples send text, and read it
    with (
        LocalServer() as server,
        LocalHosts(server.url, POOL, directory / "logs", sim_engine(step_ms=5.0), {"heartbeat_s": 0.2}) as hosts,
        RolloutPool(server.url, pool=POOL) as pool,
    ):
        pool.publish_policy(1, checkpoint=str(model))
        for name in ("one", "two"):
            hosts.start(name)
        wait_until_served(pool, hosts, 1)
        yield server.url


def output_of(example: str, url: str, directory: Path) -> str:
    bare = {name: value for name, value in os.environ.items() if not name.startswith("ROLLPOOL_")}
    done = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / example],
        env=bare | {"ROLLPOOL_URL": url, "ROLLPOOL_POOL": POOL},
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    with connect(url) as client:
        report = examine(client, Keys(POOL), quiescent=True)
    assert report.healthy, [str(finding) for finding in report.findings]
    return done.stdout


def test_ten_lines_train_on_every_step(url: str, tmp_path: Path) -> None:
    said = output_of("ten_lines.py", url, tmp_path)
    assert re.findall(r"^(\d) \(32, 64\)", said, re.MULTILINE) == ["0", "1", "2"]


def test_the_async_trainer_trains_to_its_end_and_leaves_no_checkpoint(url: str, tmp_path: Path) -> None:
    said = output_of("async_trainer.py", url, tmp_path)
    assert re.findall(r"^step (\d): 32 rows", said, re.MULTILINE) == list("012345")
    assert list(tmp_path.iterdir()) == []


def test_the_evaluation_has_a_mark_for_every_question_beside_training(url: str, tmp_path: Path) -> None:
    said = output_of("evaluation.py", url, tmp_path)
    assert re.search(r"^policy 1: [\d.]+% of 16 questions right$", said, re.MULTILINE), said
    assert "training went on beside it: 256 samples" in said
    assert "not answered" not in said


def test_the_tool_conversations_take_all_their_turns(url: str, tmp_path: Path) -> None:
    said = output_of("tools.py", url, tmp_path)
    talks = re.split(r"^conversation-\d: ", said, flags=re.MULTILINE)[1:]
    assert len(talks) == 6
    for talk in talks:
        turns = re.findall(r"^  (one|two): \d+ of (\d+) prompt tokens", talk, re.MULTILINE)
        prompts = [int(prompt) for _, prompt in turns]
        assert len(prompts) == 4
        assert prompts == sorted(set(prompts)), "each turn's prompt goes on from the one before"
