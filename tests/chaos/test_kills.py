"""SIGKILL in the middle of a run, on real workers and real engines: every group still arrives, once."""

from collections import Counter
from typing import Any

import pytest
from real_pool import POOL, WORKERS, RealPool, wait_for

from rollpool.ops.inspect import read_status
from rollpool.producer import SamplingParams
from rollpool.schemas import Keys
from rollpool.schemas.connection import connect

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

VICTIM = WORKERS[0]
GROUPS, SAMPLES = 24, 4


@pytest.mark.parametrize("kill", ["worker", "engine", "scheduler"])
def test_every_group_arrives_once_when_it_is_killed(real_pool: RealPool, kill: str) -> None:
    trainer = real_pool.trainer
    version = trainer.current_policy()
    assert version is not None
    restarts = (real_pool.status(VICTIM) or pytest.fail("the victim is not listed")).engine_restarts
    batch = trainer.enqueue_prompts(
        [f"{number} + 1 =" for number in range(GROUPS)],
        policy_version=version.version,
        n=SAMPLES,
        sampling=SamplingParams(max_new_tokens=24, ignore_eos=True),
    )
    real_pool.until_busy(VICTIM)
    engine = real_pool.engine_processes(VICTIM)
    match kill:
        case "worker":
            real_pool.kill_worker(VICTIM)
        case "engine":
            engine[0].kill()
        case "scheduler":
            next(process for process in engine[1:] if "scheduler" in " ".join(process.cmdline())).kill()
    groups = list(batch.collect(timeout=300))
    assert sorted(group.index for group in groups) == list(range(GROUPS)), batch.report()
    assert all(len(group.samples) == SAMPLES for group in groups)
    assert max(settled(real_pool, batch.id).values()) == 1
    batch.commit()
    assert real_pool.logprob_error(groups) < 0.05
    # Whatever was killed, its engine's processes are gone, and the host comes back under the same name at once.
    wait_for(lambda: not any(process.is_running() for process in engine))
    if kill == "worker":
        real_pool.hosts.start(VICTIM)
    else:
        wait_for(lambda: (status := real_pool.status(VICTIM)) is not None and status.engine_restarts > restarts)
    real_pool.until_serving(version.version)
    assert_nothing_open(real_pool)


def settled(real_pool: RealPool, batch: str) -> Counter[bytes]:
    """Results of each job, counted on the stream itself."""
    with connect(real_pool.url) as client:
        reply: Any = client.xrange(Keys(POOL).results("tests", batch))
    return Counter(fields[b"job"] for _, fields in reply)


def assert_nothing_open(real_pool: RealPool) -> None:
    with connect(real_pool.url) as client:
        status = read_status(client, Keys(POOL))
    (run,) = status.runs
    assert run.open == 0
    assert run.enqueued == sum(run.outcomes.values())
    assert not status.lanes
    assert status.parked == status.delayed == 0
