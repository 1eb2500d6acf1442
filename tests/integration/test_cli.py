"""The `rollpool` command, against a real server."""

import json
from typing import Any

import pytest
from redis.asyncio import Redis as AsyncRedis
from typer.testing import CliRunner

from rollpool.ops.cli.app import app
from rollpool.ops.inspect import read_status
from rollpool.producer import AsyncRolloutPool
from rollpool.schemas import Keys, WorkerStatus
from rollpool.schemas.connection import connect
from rollpool.schemas.scripts import READY, Entry, GiveBack, Record, RunOffer, delayed, exact, give_back, parked, pull

runner = CliRunner()


@pytest.fixture
async def filled(redis_url: str, redis_client: AsyncRedis, keys: Keys) -> str:
    """A pool with jobs in every place, unread results and one worker."""

    async def take(wanted: int) -> list[Entry]:
        pulled = await pull(redis_client, keys, offers=[RunOffer("math", 3, (3,))], consumer="vm-1:x", wanted=wanted)
        return pulled.entries

    async with AsyncRolloutPool(redis_url, pool="test", run="math") as pool:
        await pool.publish_policy(3, checkpoint="/models/3", check=False)
        await pool.enqueue_prompts(["a", "b", "c", "d", "e", "f", "g", "h"], policy_version=3)
        places = [READY, READY, delayed(9**15), parked(7), exact(8)]
        jobs = [
            GiveBack(entry=entry, record=Record(), place=place)
            for entry, place in zip(await take(6), places, strict=False)
        ]
        await give_back(redis_client, keys, consumer="vm-1:x", jobs=jobs)
        await take(1)  # one that waited, from then on in `retries`
        await pool.enqueue_prompts(["i"], policy_version=2, lane="high")
    status = WorkerStatus(
        name="vm-1", host="vm-1", pid=1, state="serving", policy=3, target=20, max_running_requests=16
    )
    fields: dict[Any, Any] = dict(status.fields())
    await redis_client.hset(keys.worker("vm-1"), mapping=fields)
    await redis_client.hset(keys.run("math"), mapping={"weight": 0.5, "unread": 3 * 2**20})
    return redis_url


def test_status_tells_where_the_entries_of_each_lane_are(filled: str) -> None:
    result = runner.invoke(app, ["status", "--url", filled, "--pool", "test", "--json"])
    assert result.exit_code == 0, result.output
    shown = json.loads(result.output)
    assert shown["policy"] == 3
    lanes = [
        tuple(lane[name] for name in ("lane", "backlog", "in_flight", "ready", "by_policy")) for lane in shown["lanes"]
    ]
    assert lanes == [("high", 1, 0, 0, {"2": 1}), ("default", 2, 2, 1, {"3": 3})]
    assert [shown[place] for place in ("delayed", "parked", "exact", "dead")] == [1, 1, 1, 0]
    assert shown["workers"][0]["policy"] == 3


def test_backlog_in_flight_and_waiting_are_the_open_jobs(filled: str) -> None:
    with connect(filled) as client:
        status = read_status(client, Keys("test"))
    placed = sum(lane.backlog + lane.in_flight + lane.ready for lane in status.lanes)
    assert placed + status.delayed + status.parked + status.exact == status.runs[0].open == 9


def test_status_tells_the_runs_weight_and_unread_results(filled: str) -> None:
    result = runner.invoke(app, ["status", "--url", filled, "--pool", "test", "--json"])
    (run,) = json.loads(result.output)["runs"]
    expected = {"run": "math", "weight": 0.5, "enqueued": 9, "open": 9, "outcomes": {}, "unread_bytes": 3 * 2**20}
    assert run | expected == run


def test_status_is_readable_as_tables(filled: str) -> None:
    result = runner.invoke(app, ["status", "--url", filled, "--pool", "test"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    for word in ("policy 3", "exact 1", "math", "high", "0.5", "3.0", "vm-1", "serving", "0/20 (runs 16)"):
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


def test_a_key_of_the_wrong_type_is_told_and_who_names_it(redis_url: str) -> None:
    with connect(redis_url) as client:
        client.set(Keys("test").delayed, "x")
    result = runner.invoke(app, ["status", "--url", redis_url, "--pool", "test"])
    assert result.exit_code == 1
    assert "WRONGTYPE" in result.output
    assert "`rollpool doctor` names it" in result.output
    named = runner.invoke(app, ["doctor", "--url", redis_url, "--pool", "test"])
    assert "rollpool:{test}:delayed: is a string and must be a zset" in named.output


def test_a_malformed_url_is_refused_by_name() -> None:
    result = runner.invoke(app, ["status", "--url", "nonsense"])
    assert result.exit_code == 1
    assert "nonsense" in result.output
