"""Workers played by the scripts they run: they pull jobs and settle them, without an engine."""

from collections.abc import Callable

import numpy as np
from redis.asyncio import Redis

from rollpool.schemas import Group, Keys, Outcome, PromptJob, Sample
from rollpool.schemas.scripts import RunOffer, Settlement, pull, settle
from rollpool.schemas.wire import unpack_job


def finished(job: PromptJob, outcome: Outcome = "ok", tokens: int = 2, samples: int | None = None) -> Group:
    """What became of a job; `samples`: of so many, where not of all."""
    sample = Sample(
        output_ids=np.arange(tokens, dtype=np.int32),
        logprobs=np.full(tokens, -1.0, np.float32),
        text=f"part {job.part}",
        finish_reason="stop",
        version_spans=((job.policy_version, 0, tokens),) if tokens else (),
    )
    return Group(
        run=job.run,
        batch=job.batch,
        index=job.index,
        outcome=outcome,
        policy_version=job.policy_version,
        prompt_ids=np.array([1, 2, 3], np.int32),
        samples=(sample,) * (job.n if samples is None else samples) if outcome == "ok" else (),
        sampling=job.sampling,
        metadata=job.metadata,
        error=None if outcome == "ok" else "the engine said no",
        worker="w",
    )


async def work(
    client: Redis,
    keys: Keys,
    *,
    run: str = "r",
    most: int = 1000,
    unread_bound: int = 0,
    result: Callable[[PromptJob], Group] = finished,
) -> int:
    """Pull up to `most` jobs of a run and settle them; returns how many."""
    offers = [RunOffer(run, 0, (0,))]
    pulled = await pull(client, keys, offers=offers, consumer="w:1", wanted=most, unread_bound=unread_bound)
    jobs = [(entry, unpack_job(entry.body)) for entry in pulled.entries]
    if jobs:
        settlements = [Settlement(entry, result(job), part=job.part) for entry, job in jobs]
        await settle(client, keys, settlements)
    return len(jobs)


def failed(job: PromptJob) -> Group:
    """The engine refused it."""
    return finished(job, "failed")
