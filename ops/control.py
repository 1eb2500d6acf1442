"""Commands as an operator gives them: whom they are for is checked first, and what was sent can be followed.

Invariant: nothing is sent to a host that is not there; whoever is named wrongly stops the command for all.
"""

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from redis import Redis
from redis.asyncio import Redis as AsyncRedis

from rollpool.ops.inspect import read_workers
from rollpool.producer import AsyncRolloutPool
from rollpool.producer.cancel import cancel_run
from rollpool.producer.control import named, send
from rollpool.producer.server import Server
from rollpool.schemas import Command, Keys, Policy, RollpoolError, SettingsError, WorkerStatus
from rollpool.schemas.connection import runs_now
from rollpool.schemas.control_log import command_of

#: Entries of `control` looked at, the newest first, for the one that announced a policy: what was published is at its
#: end, and what was published long ago is no longer waited for.
_LOOKED_AT = 10_000


@dataclass(frozen=True, slots=True)
class Sent:
    """A command that is on the log."""

    entry: str
    command: Command

    @property
    def name(self) -> str:
        """In a few words."""
        return named(self.command)


@asynccontextmanager
async def server_of(url: str, pool: str, run: str | None = None) -> AsyncGenerator[Server, None]:
    """The pool's server, closed at the end."""
    server = Server(url, pool, run)
    try:
        yield server
    finally:
        await server.close()


def whom(client: Redis, keys: Keys, names: Sequence[str]) -> tuple[tuple[str, ...] | None, list[WorkerStatus]]:
    """Whom a command is for, None for all; and the hosts of these that are alive.

    Raises:
        SettingsError: a name is of no live host; the message lists those there are.
    """
    live = [worker for worker in read_workers(client, keys) if worker.state != "stopping"]
    if unknown := sorted(set(names) - {worker.name for worker in live}):
        known = ", ".join(worker.name for worker in live) or "none"
        raise SettingsError(f"--worker {unknown[0]}: no live host of pool {keys.pool} has this name; alive: {known}")
    if not names:
        return None, live
    return tuple(dict.fromkeys(names)), [worker for worker in live if worker.name in names]


def open_jobs(client: Redis, keys: Keys, run: str) -> int:
    """Open jobs of one run. Raises SettingsError where there is no such run."""
    runs = sorted(runs_now(client, keys))
    if run not in runs:
        raise SettingsError(f"--run {run}: pool {keys.pool} has no such run; there are: {', '.join(runs) or 'none'}")
    count: Any = client.hget(keys.run(run), "open")
    return int(count or 0)


async def order(server: Server, command: Command) -> Sent:
    """Send one command."""
    with server.doing(f"control {command.kind}"):
        return Sent(await send(server.client, server.keys, command), command)


async def cancel(server: Server, policy: int | None, workers: tuple[str, ...] | None) -> tuple[int, Sent]:
    """Settle the run's open jobs `cancelled`, those tagged with one policy or all, and have the hosts drop them."""
    cancelled = await cancel_run(server, policy)
    return cancelled, await order(server, Command(kind="cancel", run=server.run, workers=workers))


async def as_trainer(server: Server, act: Callable[[AsyncRolloutPool], Awaitable[Policy]]) -> Sent:
    """Do what a trainer does to the policies of the pool, and find the command that came of it."""
    async with AsyncRolloutPool(server.url, pool=server.keys.pool, run=server.run) as pool:
        policy = await act(pool)
    return await announced(server, policy)


async def announced(server: Server, policy: Policy) -> Sent:
    """The newest command that told the hosts of this policy. Raises RollpoolError where it is on the log no more."""
    with server.doing(f"looking for the command of policy {policy.version}"):
        sent = await _announced(server.client, server.keys, policy)
    if sent is None:
        raise RollpoolError(
            f"policy {policy.version} is published, and its command is not among the last {_LOOKED_AT:,} of pool "
            f"{server.keys.pool}: see `rollpool policies` for who serves it"
        )
    return sent


async def _announced(client: AsyncRedis, keys: Keys, policy: Policy) -> Sent | None:
    entries: Any = await client.xrevrange(keys.control, count=_LOOKED_AT)
    for entry, fields in entries:
        command = command_of(fields)
        if command is not None and command.policy is not None and _same(command.policy, policy):
            return Sent(entry.decode(), command)
    return None


def _same(one: Policy, other: Policy) -> bool:
    return (one.lineage, one.version, one.generation) == (other.lineage, other.version, other.generation)
