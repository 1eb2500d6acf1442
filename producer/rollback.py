"""Going back to an earlier policy.

Invariant: a lineage goes back in one step on the server, and what that leaves to do is found there by the next call; so
going back may be repeated, by whoever and from any point.
"""

from rollpool.producer.abandoned import settle_abandoned
from rollpool.producer.lineages import Lineage, fits, lineage_of, live_versions, named, read_lineage, recorded, unknown
from rollpool.producer.publish import PUBLISH_LEASE_S, Publisher, refuse
from rollpool.producer.server import Server
from rollpool.schemas import scripts
from rollpool.schemas.commands import Command
from rollpool.schemas.errors import PolicyRejected, RollpoolError
from rollpool.schemas.policies import CHECKPOINTS, Policy

#: Times that others may change the lineage between a look at it and the call before we give up.
_TRIES = 20


async def roll_back(publisher: Publisher, version: int | None) -> Policy:
    """Go back; see `AsyncRolloutPool.rollback_policy`."""
    server = publisher.server
    name = await lineage_of(server)
    for _ in range(_TRIES):
        lineage = await read_lineage(server, name)
        if version is None or version != lineage.current:
            publisher.check_known(lineage)
        target = await _target(server, lineage, version)
        if target.version != lineage.current:
            _check_base(target, lineage)
            target = target.model_copy(update={"generation": lineage.generation + 1})
            if not await _sent(server, target, lineage):
                continue
            lineage = await read_lineage(server, name)
        publisher.learn(name, target.generation)
        await settle_abandoned(server, name, lineage.pending)
        return target
    raise RollpoolError(
        f"rollback_policy: others publish to pool {server.keys.pool!r} all along; look at current_policy, and repeat it"
    )


async def _sent(server: Server, policy: Policy, lineage: Lineage) -> bool:
    """False where the lineage is no more as it was read."""
    assert lineage.current is not None, "a policy of it was found"
    with server.doing(f"rollback_policy({policy.version})"):
        answer = await scripts.roll_back(
            server.client,
            server.keys,
            Command(policy=policy),
            run=server.run,
            generation=lineage.generation,
            current=lineage.current,
            lease_ms=PUBLISH_LEASE_S * 1000,
        )
    if answer.answer == "held":
        refuse(server, answer, policy.model_copy(update={"run": server.run}))
    return answer.answer == "new"


async def _target(server: Server, lineage: Lineage, version: int | None) -> Policy:
    """The policy to go back to."""
    if version is None:
        version = await _before(server, lineage)
    policy = await recorded(server, lineage.name, version)
    if policy is None or lineage.current is None:
        raise await unknown(server, version, (lineage.name,))
    return policy


async def _before(server: Server, lineage: Lineage) -> int:
    """The live version before the current one."""
    versions = await live_versions(server, lineage.name)
    before = [each for each in versions if lineage.current is not None and each < lineage.current]
    if not before:
        raise PolicyRejected(
            f"rollback_policy: {named(lineage.name)} of pool {server.keys.pool!r} have no version before "
            f"{lineage.current}; publish another one instead"
        )
    return before[-1]


def _check_base(policy: Policy, lineage: Lineage) -> None:
    if lineage.name != CHECKPOINTS and not fits(policy, lineage.checkpoint):
        assert lineage.checkpoint is not None, "else it would fit"
        raise PolicyRejected(
            f"policy {policy.version} is an adapter for {policy.base!r}, and the current checkpoint is policy "
            f"{lineage.checkpoint.version}, {lineage.checkpoint.source!r}: hosts would not serve it. Publish a new one"
        )
