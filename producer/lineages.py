"""What the server has of a run's policies: records, the current one, and the generation of their lineage.

Invariant: this only reads; whether what was read belongs together, and still holds, the scripts that change a lineage
look again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from rollpool.producer.server import Server
from rollpool.schemas.errors import PolicyUnknown
from rollpool.schemas.policies import CHECKPOINTS, Policy
from rollpool.schemas.scripts import Pending, pending_of

#: Looks at a lineage that changes between the parts of a look; then it is taken as it is.
_LOOKS = 20


@dataclass(frozen=True, slots=True)
class Lineage:
    """Policies whose versions follow one another, as they were when this was read."""

    name: str
    #: Version of the newest; None before the first.
    current: int | None
    generation: int
    #: The newest; None before the first.
    policy: Policy | None
    #: The current checkpoint of the pool; None before the first.
    checkpoint: Policy | None
    #: What going back left to do.
    pending: tuple[Pending, ...]


async def read_lineage(server: Server, name: str) -> Lineage:
    """The checkpoints of the pool, or the adapters of this server's run."""
    with server.doing(f"reading the policies of run {server.run}"):
        for _ in range(_LOOKS):
            lineage = await _look(server, name)
            # Its record is gone when the lineage went back between the two looks.
            if (lineage.current is None) == (lineage.policy is None):
                break
    return lineage


async def _look(server: Server, name: str) -> Lineage:
    keys = server.keys
    async with server.client.pipeline(transaction=False) as pipe:
        pipe.get(keys.policy)
        pipe.get(keys.run_policy(server.run))
        pipe.hgetall(keys.generations)
        versions = await pipe.execute()
    checkpoint, adapter = (None if version is None else int(version) for version in versions[:2])
    current = checkpoint if name == CHECKPOINTS else adapter
    return Lineage(
        name=name,
        current=current,
        generation=int(versions[2].get(name.encode(), 0)),
        policy=await _record(server, name, current),
        checkpoint=await _record(server, CHECKPOINTS, checkpoint),
        pending=tuple(pending_of(name, versions[2])),
    )


async def lineage_of(server: Server) -> str:
    """The lineage that the run publishes to: its adapters once there are any, until then the checkpoints."""
    with server.doing(f"reading the policies of run {server.run}"):
        has_adapters = await server.client.exists(server.keys.run_policy(server.run))
    return f"lora:{server.run}" if has_adapters else CHECKPOINTS


def field_of(server: Server, lineage: str, version: int) -> str:
    """Where a live policy is recorded in the hash of policies."""
    return str(version) if lineage == CHECKPOINTS else f"{server.run}:{version}"


async def recorded(server: Server, lineage: str, version: int) -> Policy | None:
    """The live policy of a lineage under a version, if any."""
    with server.doing(f"reading policy {version}"):
        return await _record(server, lineage, version)


async def live_versions(server: Server, lineage: str) -> list[int]:
    """The versions of a lineage that it did not go back from, rising."""
    prefix = field_of(server, lineage, 0)[:-1]
    with server.doing(f"reading the policies of run {server.run}"):
        fields: Any = await server.client.hkeys(server.keys.policies)
    names = [field.decode(errors="replace") for field in fields]
    versions = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    return sorted(int(version) for version in versions if version.isascii() and version.isdigit())


async def policy_for(server: Server, version: int) -> Policy:
    """The live policy that a version means to this run: its adapter, else a checkpoint.

    Raises:
        PolicyUnknown: nobody published it, or its lineage went back from it.
    """
    lineages = (f"lora:{server.run}", CHECKPOINTS)
    for lineage in lineages:
        policy = await recorded(server, lineage, version)
        if policy is not None:
            return policy
    raise await unknown(server, version, lineages)


async def unknown(server: Server, version: int, lineages: Sequence[str]) -> PolicyUnknown:
    """The error for a version that is not live in these lineages."""
    fields = {field_of(server, lineage, version) for lineage in lineages}
    with server.doing(f"reading policy {version}"):
        names: Any = await server.client.hkeys(server.keys.policies)
    if any(name.decode(errors="replace").partition("@")[0] in fields for name in names):
        return PolicyUnknown(
            f"policy {version} was abandoned in pool {server.keys.pool!r}: its lineage went back to an earlier "
            "version. Its number may be published anew"
        )
    where = " and ".join(named(lineage) for lineage in lineages)
    return PolicyUnknown(
        f"policy {version} was never published in pool {server.keys.pool!r}, among {where}; publish_policy first"
    )


def named(lineage: str) -> str:
    """A lineage in messages."""
    return "the checkpoints" if lineage == CHECKPOINTS else f"the adapters of run {lineage.partition(':')[2]}"


async def current_policy(server: Server) -> Policy | None:
    """The policy that the run is served by once all hosts are there; None before the first."""
    adapters = await read_lineage(server, f"lora:{server.run}")
    if adapters.policy is not None and fits(adapters.policy, adapters.checkpoint):
        return adapters.policy
    return (await read_lineage(server, CHECKPOINTS)).policy


def fits(adapter: Policy, checkpoint: Policy | None) -> bool:
    """True when the adapter belongs on the current checkpoint: only then hosts serve it."""
    return checkpoint is None or adapter.base == checkpoint.checkpoint


async def _record(server: Server, lineage: str, version: int | None) -> Policy | None:
    if version is None:
        return None
    record: Any = await server.client.hget(server.keys.policies, field_of(server, lineage, version))
    return None if record is None else read_record(record)


def read_record(record: bytes | str) -> Policy | None:
    """A policy as it is recorded; None for what is none, as somebody made it by hand."""
    try:
        return Policy.model_validate_json(record)
    except ValidationError:
        return None
