"""A conversation whose host is killed in the middle of a turn goes on elsewhere: real workers, simulated engines."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from waiting import until_blocking

from rollpool.ops.doctor import examine
from rollpool.ops.inspect import read_workers
from rollpool.ops.local.hosts import LocalHosts
from rollpool.ops.local.run import wait_until_served
from rollpool.ops.local.server import LocalServer
from rollpool.ops.sim import made_by, make_sim_model, sim_engine
from rollpool.producer import Group, RolloutPool, SamplingParams
from rollpool.schemas import Keys
from rollpool.schemas.connection import connect

pytestmark = pytest.mark.timeout(240)

POOL, SIGNATURE = "talks", 77
KEYS = Keys(POOL)
SAMPLING = SamplingParams(max_new_tokens=20, ignore_eos=True)  # 0.4 s a turn


@pytest.fixture
def server() -> Iterator[LocalServer]:
    with LocalServer() as running:
        yield running


class Talk:
    """A conversation: each turn's prompt is everything said before."""

    def __init__(self, pool: RolloutPool) -> None:
        self.pool = pool
        self.said = np.array([5], np.int32)
        self.turns: list[Group] = []

    def turn(self) -> Group:
        name = f"turn-{len(self.turns)}"
        batch = self.pool.enqueue_prompts(
            [self.said], policy_version=1, sampling=SAMPLING, batch_id=name, affinity="talk"
        )
        [group] = batch.collect(timeout=120)
        batch.commit()
        assert made_by(SIGNATURE, group.prompt_ids, group.samples[0].output_ids)
        self.said = np.concatenate([self.said, group.samples[0].output_ids])
        self.turns.append(group)
        return group


def kill(worker: psutil.Process) -> None:
    """As a machine that loses its power: the worker, and all it started."""
    for process in [worker, *worker.children(recursive=True)]:
        process.send_signal(signal.SIGKILL)


def test_a_conversation_goes_on_when_its_host_is_killed(server: LocalServer, tmp_path: Path) -> None:
    model = make_sim_model(tmp_path / "model", signature=SIGNATURE)
    engine = sim_engine(max_running_requests=4, step_ms=20.0)
    settings = {"lease_s": 1, "heartbeat_s": 0.2, "drain_s": 1}
    with (
        LocalHosts(server.url, POOL, tmp_path / "logs", engine, settings) as hosts,
        RolloutPool(server.url, pool=POOL, run="tests") as pool,
        connect(server.url) as client,
    ):
        pool.publish_policy(1, checkpoint=str(model))
        for name in ("one", "two"):
            hosts.start(name)
        wait_until_served(pool, hosts, 1)
        until_blocking(
            lambda: sum(worker.state == "serving" for worker in read_workers(client, KEYS)) == 2, "both are listed"
        )
        talk = Talk(pool)
        home = talk.turn().worker
        at_home = [talk.turn().worker for _ in range(5)]
        assert at_home.count(home) >= 4, at_home

        long = SamplingParams(max_new_tokens=150, ignore_eos=True)  # three seconds: it is cut
        cut = pool.enqueue_prompts([talk.said], policy_version=1, sampling=long, batch_id="cut", affinity="talk")
        last = talk.turns[-1].worker
        until_blocking(
            lambda: any(worker.jobs_in_flight for worker in read_workers(client, KEYS) if worker.name == last),
            "the turn is being made",
        )
        kill(psutil.Process(hosts.workers[last].pid))
        [group] = cut.collect(timeout=120)
        assert group.worker != last
        entries: Any = client.xrange(KEYS.results("tests", "cut"))
        assert len(entries) == 1
        cut.commit()
        others = [talk.turn().worker for _ in range(4)]
        assert last not in others
        report = examine(client, KEYS)
        assert report.healthy, [str(finding) for finding in report.findings]
