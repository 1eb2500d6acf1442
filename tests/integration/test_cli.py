"""The `rollpool` command, against a real server."""

import json

import pytest
from typer.testing import CliRunner

from rollpool.ops.cli.app import app
from rollpool.producer import RolloutPool
from rollpool.schemas import Keys, WorkerStatus
from rollpool.schemas.connection import connect

runner = CliRunner()


@pytest.fixture
def filled(redis_url: str) -> str:
    """A pool with a backlog in two lanes and one worker."""
    with RolloutPool(redis_url, pool="test", run="math") as pool:
        pool.publish_policy(3, checkpoint="/models/3")
        pool.enqueue_prompts(["a", "b", "c"], policy_version=3)
        pool.enqueue_prompts(["d"], policy_version=2, lane="high")
    status = WorkerStatus(
        name="vm-1", host="vm-1", pid=1, state="serving", policy=3, target=20, max_running_requests=16
    )
    with connect(redis_url) as client:
        client.hset(Keys("test").worker("vm-1"), mapping=status.fields())
        client.xreadgroup("workers", "vm-1:x", {Keys("test").jobs("math", "default"): ">"}, count=1)
    return redis_url


def test_status_tells_backlog_by_lane_and_policy_and_what_is_in_flight(filled: str) -> None:
    result = runner.invoke(app, ["status", "--url", filled, "--pool", "test", "--json"])
    assert result.exit_code == 0, result.output
    shown = json.loads(result.output)
    assert shown["policy"] == 3
    assert [(lane["lane"], lane["backlog"], lane["in_flight"], lane["by_policy"]) for lane in shown["lanes"]] == [
        ("high", 1, 0, {"2": 1}),
        ("default", 2, 1, {"3": 3}),
    ]
    assert shown["runs"][0] | {"run": "math", "enqueued": 4, "open": 4} == shown["runs"][0]
    assert shown["workers"][0]["policy"] == 3


def test_status_is_readable_as_tables(filled: str) -> None:
    result = runner.invoke(app, ["status", "--url", filled, "--pool", "test"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    for word in ("policy 3", "math", "high", "vm-1", "serving", "0/20 (runs 16)"):
        assert word in result.output


def test_status_of_an_empty_pool_is_no_error(redis_url: str) -> None:
    result = runner.invoke(app, ["status", "--url", redis_url, "--pool", "nobody"])
    assert result.exit_code == 0, result.output
    assert "none published" in result.output


def test_a_server_out_of_reach_is_one_line_that_says_what_to_do() -> None:
    result = runner.invoke(app, ["status", "--url", "redis://127.0.0.1:1/0"])
    assert result.exit_code == 1
    assert "cannot be reached" in result.output
    assert "ROLLPOOL_URL" in result.output
    assert "Traceback" not in result.output


def test_a_malformed_url_is_refused_by_name() -> None:
    result = runner.invoke(app, ["status", "--url", "nonsense"])
    assert result.exit_code == 1
    assert "nonsense" in result.output
