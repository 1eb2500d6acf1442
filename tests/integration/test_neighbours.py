"""What a host hears of the others: who serves a policy to a run, and who may run a job."""

from typing import Any

import pytest
from fakes import job
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis

from rollpool.schemas import Keys, WorkerStatus
from rollpool.schemas.status import SERVING_FIELDS, Serving
from rollpool.worker.heartbeat import Neighbours


class Clock:
    """Monotonic seconds, by hand."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Others:
    """Heartbeats, and a host that listens to them."""

    def __init__(self, client: Redis, keys: Keys) -> None:
        self.server: Any = client
        self.keys = keys
        self.clock = Clock()
        self.neighbours = Neighbours(client, keys, every_s=2.0, clock=self.clock)

    async def beat(self, name: str, **fields: Any) -> None:
        status = WorkerStatus(**{"name": name, "host": "h", "pid": 1, "state": "serving", **fields})
        await self.server.hset(self.keys.worker(name), mapping=status.fields())
        self.clock.now += 2.0


@pytest.fixture
def others(redis_client: Redis, keys: Keys) -> Others:
    return Others(redis_client, keys)


async def test_a_checkpoint_is_served_to_every_run_and_an_adapter_to_its_own(others: Others) -> None:
    await others.beat("a", policy=5, adapters="lora:6,8 other:7")
    served = {run: [v for v in range(10) if await others.neighbours.anyone_serves(run, v)] for run in ("lora", "plain")}
    assert served == {"lora": [5, 6, 8], "plain": [5]}


async def test_a_host_that_starts_its_engine_on_a_version_will_serve_it(others: Others) -> None:
    await others.beat("a", state="starting", heading=5)
    assert await others.neighbours.anyone_serves("plain", 5)
    await others.beat("a", state="serving", policy=6)
    assert not await others.neighbours.anyone_serves("plain", 5)


@pytest.mark.parametrize(
    ("tag", "able"),
    [
        ({"policy_version": 5}, True),
        ({"policy_version": 7, "max_staleness": 0}, True),
        ({"policy_version": 8, "max_staleness": 0}, False),
        ({"policy_version": 6, "exact": True}, True),
        ({"policy_version": 4, "exact": True}, False),
        ({"policy_version": 7, "max_staleness": 0, "run": "plain"}, False),
    ],
    ids=str,
)
async def test_another_host_may_run_a_job_on_any_of_what_it_serves_to_its_run(
    others: Others, tag: dict[str, Any], able: bool
) -> None:
    await others.beat("a", policy=5, adapters="lora:6,7")
    asked = job().model_copy(update={"run": "lora", "max_staleness": None, **tag})
    assert await others.neighbours.anyone_else_may_run(asked, "b") is able
    assert not await others.neighbours.anyone_else_may_run(asked, "a")


async def test_a_host_by_its_name_may_run_what_it_serves(others: Others) -> None:
    await others.beat("a", policy=5)
    await others.beat("b", policy=6)
    await others.beat("c", policy=6, state="changing")
    newer = job(policy_version=6, max_staleness=0)
    assert [await others.neighbours.may_run(newer, name) for name in ("a", "b", "c", "nobody")] == [
        False,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("state", ["starting", "changing", "suspended", "paused", "stopping", "broken"])
async def test_only_a_host_that_serves_may_run_a_job(others: Others, state: str) -> None:
    await others.beat("a", policy=5, heading=5, state=state)
    assert not await others.neighbours.anyone_else_may_run(job(), "b")
    await others.beat("c", policy=5)
    assert await others.neighbours.anyone_else_may_run(job(), "b")


async def test_hosts_are_looked_at_no_more_often_than_they_beat(others: Others) -> None:
    await others.beat("a", policy=5)
    assert await others.neighbours.anyone_serves("r", 5)
    await others.server.delete(others.keys.worker("a"))
    assert await others.neighbours.anyone_serves("r", 5)
    others.clock.now += 2.0
    assert not await others.neighbours.anyone_serves("r", 5)


async def test_what_somebody_made_up_is_nobodys(others: Others) -> None:
    await others.server.set(others.keys.worker("string"), "x")
    await others.server.hset(others.keys.worker("nameless"), mapping={"policy": 5, "state": "serving"})
    await others.server.hset(
        others.keys.worker("bytes"), mapping={"name": b"\xff", "policy": b"\xff", "adapters": ":5"}
    )
    assert not await others.neighbours.anyone_serves("", 5)
    await others.beat("a", policy=5)
    assert await others.neighbours.anyone_serves("r", 5)


@given(st.lists(st.none() | st.binary(), min_size=len(SERVING_FIELDS), max_size=len(SERVING_FIELDS)))
def test_a_heartbeat_of_any_bytes_is_read(values: list[bytes | None]) -> None:
    read = Serving.read(values)
    assert (read is None) == (not values[0])
    if read is not None:
        assert all(version >= 0 for run in ("", *read.adapters) for version in read.versions_for(run))


def test_a_status_offers_what_its_heartbeat_is_read_to_offer() -> None:
    status = WorkerStatus(name="w", host="h", pid=1, state="serving", policy=5, heading=9, adapters="lora:6,8 x:7")
    read = Serving.read([str(value).encode() for value in (status.fields()[name] for name in SERVING_FIELDS)])
    assert read is not None
    for run in ("lora", "x", "plain"):
        assert status.versions_for(run) == read.versions_for(run)
    assert status.versions_for("lora") == (5, 6, 8)
    assert (read.heading, WorkerStatus.from_fields(stored(status))) == (9, status)


def stored(status: WorkerStatus) -> dict[bytes, bytes]:
    return {name.encode(): str(value).encode() for name, value in status.fields().items()}
