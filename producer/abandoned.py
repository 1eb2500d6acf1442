"""What was asked of abandoned policies and is still open settles `stale`.

Invariant: what is to be done stands on the server until it is done, so whoever died in the middle is succeeded by the
next call; it may be done twice, and touches nothing that was enqueued after its lineage went back.
"""

from collections.abc import Sequence
from typing import Any

from rollpool.producer.server import Server
from rollpool.schemas import scripts
from rollpool.schemas.policies import CHECKPOINTS
from rollpool.schemas.scripts import Pending

#: The last index of any batch: the server stops at its own.
_LAST = 2**31


async def settle_abandoned(server: Server, lineage: str, pending: Sequence[Pending]) -> int:
    """Settle what is open of abandoned versions, in bounded steps; returns how many jobs."""
    ended = 0
    for each in pending:
        with server.doing(f"ending what was asked of abandoned policies ({each.field})"):
            for run in await _runs(server, lineage):
                for batch, tag in await _batches(server, run, each):
                    ended += await scripts.finish(
                        server.client,
                        server.keys,
                        run=run,
                        batch=batch,
                        outcome="stale",
                        error=f"policy {tag} was abandoned: its lineage went back to policy {each.target}",
                        first=0,
                        last=_LAST,
                    )
            await scripts.settled_pending(server.client, server.keys, each)
    return ended


async def _runs(server: Server, lineage: str) -> list[str]:
    """The runs that ask for versions of a lineage; those with adapters ask for theirs."""
    if lineage != CHECKPOINTS:
        return [lineage.partition(":")[2]]
    members: Any = await server.client.smembers(server.keys.runs)
    runs = sorted(name.decode() for name in members)
    async with server.client.pipeline(transaction=False) as pipe:
        for run in runs:
            pipe.exists(server.keys.run_policy(run))
        have_adapters = await pipe.execute() if runs else []
    return [run for run, has in zip(runs, have_adapters, strict=True) if not has]


async def _batches(server: Server, run: str, pending: Pending) -> list[tuple[str, int]]:
    """Batches with open jobs that were enqueued before, for a version that was abandoned; each with its tag."""
    names: Any = await server.client.zrangebyscore(server.keys.open_batches(run), "-inf", pending.until_ms)
    batches = [name.decode() for name in names]
    async with server.client.pipeline(transaction=False) as pipe:
        for batch in batches:
            pipe.hmget(server.keys.batch(run, batch), "policy", "open")
        facts = await pipe.execute() if batches else []
    tagged = [
        (batch, int(tag)) for batch, (tag, jobs) in zip(batches, facts, strict=True) if tag and int(jobs or 0) > 0
    ]
    return [(batch, tag) for batch, tag in tagged if pending.target < tag <= pending.last]
