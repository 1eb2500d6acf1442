"""A pool whose host is this process, with a stand-in for its engine: what the pool does when its host ends."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from fakes import FakeOwner
from waiting import until_blocking

from rollpool.ops.in_process import LocalPool, _HostThread
from rollpool.schemas import EngineUnavailable
from rollpool.worker.host import Host
from rollpool.worker.settings import WorkerSettings

POOL = "here"


class BugError(Exception):
    """A fault of ours."""


@pytest.fixture
def host(redis_url: str) -> Host:
    settings = WorkerSettings(heartbeat_s=0.2, drain_s=0, engine={"model_path": "/policy/0"})
    return Host(redis_url, POOL, "in-process", settings, FakeOwner(holding=True))


@pytest.fixture
def pool(redis_url: str, host: Host) -> Iterator[LocalPool]:
    with ExitStack() as stack:
        thread = stack.enter_context(_HostThread(host))
        thread.until_serving(30)
        pool = LocalPool(thread, stack.pop_all(), redis_url, pool=POOL, run="r")
    with pool:
        yield pool


def test_nobody_collects_for_ever_from_a_host_that_ended_and_everybody_is_told_why(pool: LocalPool, host: Host) -> None:
    batch = pool.enqueue_prompts([[1, 2], [3, 4]], policy_version=0)
    until_blocking(lambda: host.busy, "jobs are in the engine")
    thread = pool._host
    assert thread._loop is not None
    thread._loop.call_soon_threadsafe(host.fail, BugError("a fault of ours"))
    assert list(batch.collect(timeout=60)) == []
    assert [group.outcome for group in batch.dropped] == ["cancelled", "cancelled"]
    until_blocking(lambda: not thread._thread.is_alive(), "the host has ended")
    for ask in (
        lambda: pool.enqueue_prompts([[5]], policy_version=0),
        lambda: pool.publish_policy(1, checkpoint="/policy/1", check=False),
        lambda: pool.wait_for_policy(1),
    ):
        with pytest.raises(EngineUnavailable, match="a fault of ours"):
            ask()


def test_a_closed_pool_leaves_no_thread(pool: LocalPool) -> None:
    thread = pool._host._thread
    pool.close()
    pool.close()
    assert not thread.is_alive()
