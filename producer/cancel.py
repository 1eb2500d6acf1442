"""Ending batches from the trainer's side: what is open of them, or all of them.

Invariant: cancelling settles what is open, once, and touches nothing that has an outcome; so it may be repeated, and
races with hosts that finish the same jobs. Only a batch without open jobs is committed.
"""

from typing import Any

from rollpool.producer.server import Server
from rollpool.schemas import scripts

#: What the dropped groups say.
_WHY = "cancelled by the trainer"


#: The last index of any batch: the server stops at its own.
_LAST = 2**31


async def cancel_batch(server: Server, batch: str, first: int = 0, last: int = _LAST) -> int:
    """Settle the open jobs of one batch `cancelled`, or those from one index to another; returns how many."""
    with server.doing(f"cancel of batch {batch}"):
        return await scripts.finish(
            server.client,
            server.keys,
            run=server.run,
            batch=batch,
            outcome="cancelled",
            error=_WHY,
            first=first,
            last=last,
        )


async def commit_batch(server: Server, batch: str, *, handed: int | None, consumed_whole: bool) -> int:
    """Commit a batch; returns its open jobs (0: committed), or -1 where the server does not know it.

    What is open of a batch that was consumed whole is a repetition, made when the server had lost it: it is cancelled.
    """
    with server.doing(f"commit of batch {batch}"):
        open_jobs = await _commit(server, batch, handed)
        if open_jobs > 0 and consumed_whole:
            await cancel_batch(server, batch)
            open_jobs = await _commit(server, batch, handed)
    return open_jobs


async def _commit(server: Server, batch: str, handed: int | None) -> int:
    return await scripts.commit(server.client, server.keys, run=server.run, batch=batch, handed=handed)


async def cancel_run(server: Server, policy_version: int | None) -> int:
    """The same for all batches of the run on the server, or those tagged with one policy version."""
    with server.doing(f"cancel of run {server.run}"):
        names: list[Any] = await server.client.zrange(server.keys.open_batches(server.run), 0, -1)
        batches = [name.decode() for name in names]
        async with server.client.pipeline(transaction=False) as pipe:
            for batch in batches:
                pipe.hget(server.keys.batch(server.run, batch), "policy")
            policies: list[Any] = await pipe.execute() if batches else []
    cancelled = 0
    for batch, policy in zip(batches, policies, strict=True):
        if policy and policy_version in (None, int(policy)):
            cancelled += await cancel_batch(server, batch)
    return cancelled
