"""A host frozen past its lease (a paused VM, SIGSTOP) wakes and does no harm: real workers, simulated engines."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from redis import Redis
from waiting import until_blocking

from rollpool.ops.doctor import examine
from rollpool.ops.inspect import read_workers
from rollpool.ops.local.hosts import LocalHosts
from rollpool.ops.local.run import wait_until_served
from rollpool.ops.local.server import LocalServer
from rollpool.ops.sim import made_by, make_sim_model, sim_engine
from rollpool.producer import RolloutPool, SamplingParams
from rollpool.schemas import GROUP, Keys
from rollpool.schemas.connection import connect

pytestmark = pytest.mark.timeout(240)

POOL, RUN, SIGNATURE = "frozen", "tests", 77
KEYS = Keys(POOL)


@pytest.fixture
def server() -> Iterator[LocalServer]:
    with LocalServer() as running:
        yield running


def held_by(client: Redis, worker: str) -> int:
    """Entries in the hands of a worker."""
    count = 0
    for stream in KEYS.streams([RUN]):
        if client.exists(stream):
            consumers: Any = client.xinfo_consumers(stream, GROUP)
            count += sum(row["pending"] for row in consumers if row["name"].startswith(f"{worker}:".encode()))
    return count


def test_a_host_that_was_frozen_past_its_lease_settles_nothing_twice(server: LocalServer, tmp_path: Path) -> None:
    model = make_sim_model(tmp_path / "model", signature=SIGNATURE)
    engine = sim_engine(max_running_requests=4, step_ms=20.0)
    settings = {"lease_s": 1, "heartbeat_s": 0.2, "drain_s": 1}
    with (
        LocalHosts(server.url, POOL, tmp_path / "logs", engine, settings) as hosts,
        RolloutPool(server.url, pool=POOL, run=RUN) as pool,
        connect(server.url) as client,
    ):
        pool.publish_policy(1, checkpoint=str(model))
        for name in ("frozen", "other"):
            hosts.start(name)
        wait_until_served(pool, hosts, 1)
        sampling = SamplingParams(max_new_tokens=100, ignore_eos=True)  # two seconds a sample
        batch = pool.enqueue_prompts([[index] for index in range(1, 31)], policy_version=1, sampling=sampling)
        until_blocking(lambda: held_by(client, "frozen") >= 4, "the victim has its hands full")
        victims = [psutil.Process(hosts.workers["frozen"].pid)]
        victims += victims[0].children(recursive=True)
        for victim in victims:
            victim.send_signal(signal.SIGSTOP)
        until_blocking(lambda: held_by(client, "frozen") == 0, "the others take what it had")
        for victim in victims:
            victim.send_signal(signal.SIGCONT)
        groups = list(batch.collect(timeout=120))
        assert sorted(group.index for group in groups) == list(range(30))
        assert all(made_by(SIGNATURE, group.prompt_ids, group.samples[0].output_ids) for group in groups)
        entries: Any = client.xrange(KEYS.results(RUN, batch.id))
        assert len({fields[b"job"] for _, fields in entries}) == len(entries) == 30
        # It goes on as a member of the pool.
        more = pool.enqueue_prompts([[index] for index in range(1, 41)], policy_version=1, sampling=sampling)
        until_blocking(lambda: held_by(client, "frozen") > 0, "the one that was frozen works again")
        assert len(list(more.collect(timeout=120))) == 40
        assert {worker.state for worker in read_workers(client, KEYS)} == {"serving"}
        assert examine(client, KEYS).healthy
