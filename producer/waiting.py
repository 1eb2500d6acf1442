"""Waiting until the hosts serve a policy.

Invariant: a wait ends as soon as its end is certain: enough workers serve, one of them failed to load the policy, its
lineage went back from it, or the time is over. What a worker serves of an abandoned policy counts for nothing, whatever
its number.
"""

import asyncio
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rollpool.producer.lineages import field_of, policy_for, unknown
from rollpool.producer.server import Server
from rollpool.schemas.commands import Ack
from rollpool.schemas.control_log import ack_of, command_of
from rollpool.schemas.errors import PolicyRejected, PoolTimeout
from rollpool.schemas.policies import Policy
from rollpool.schemas.status import WorkerStatus

#: Seconds between two looks at the heartbeats: a worker writes one every few seconds, and at each change of state.
POLL_S = 0.25

#: Entries of `acks` read at once, and keys looked at by one step of a scan.
_PAGE = 1000

#: 0.28 of 25 workers are 7, and not the 7.000000000000001 that floats make of it.
_ROUNDING = 1e-9

#: An entry's id on a stream; the server refuses others.
_ENTRY = re.compile(r"\d{1,19}-\d{1,19}")


@dataclass(frozen=True, slots=True)
class Enough:
    """How many workers are to serve."""

    fraction: float | None
    workers: int | None

    @classmethod
    def of(cls, fraction: float | None, workers: int | None) -> "Enough":
        """As asked for; all, where nothing is. Raises PolicyRejected where that cannot be."""
        if fraction is not None and not 0.0 < fraction <= 1.0:
            raise PolicyRejected(f"fraction: expected more than 0 and at most 1, got {fraction!r}")
        if workers is not None and workers < 1:
            raise PolicyRejected(f"workers: expected at least 1, got {workers!r}")
        return cls(1.0 if fraction is None and workers is None else fraction, workers)

    def are(self, serving: int, live: int) -> bool:
        """True when so many of those that are there are enough; one at least."""
        of_all = self.fraction is None or serving >= self.fraction * live - _ROUNDING
        return serving > 0 and of_all and serving >= (self.workers or 0)

    def __str__(self) -> str:
        of_all = [] if self.fraction is None else [f"{self.fraction:.0%} of the workers"]
        counted = [] if self.workers is None else [f"{self.workers} worker" + "s" * (self.workers > 1)]
        return " and ".join(of_all + counted)


async def wait_for_policy(
    server: Server, version: int, *, fraction: float | None, workers: int | None, timeout: float | None
) -> None:
    """Wait for the hosts; see `AsyncRolloutPool.wait_for_policy`."""
    enough = Enough.of(fraction, workers)
    policy = await policy_for(server, version)
    deadline = None if timeout is None else time.monotonic() + timeout
    acks = _Acks(server, policy)
    seen = set[str]()
    while True:
        live = await live_workers(server)
        seen.update(worker.name for worker in live)
        serving = await _serving(server, live, policy)
        if enough.are(len(serving), len(live)):
            return
        _raise_on_failure(await acks.latest(), seen, live, version)
        if deadline is not None and time.monotonic() >= deadline:
            raise PoolTimeout(_who_is_missing(server.run, live, serving, version, enough, timeout))
        await asyncio.sleep(POLL_S if deadline is None else max(0.0, min(POLL_S, deadline - time.monotonic())))


async def _serving(server: Server, live: Sequence[WorkerStatus], policy: Policy) -> list[WorkerStatus]:
    """The workers that serve the policy, or a newer one, to this run.

    Raises:
        PolicyUnknown: its lineage went back from it.
    """
    claims = [
        _Claim.of(worker, server.run, version)
        for worker in live
        if worker.state == "serving"
        for version in worker.versions_for(server.run)
        if version >= policy.version
    ]
    fields = [field_of(server, policy.lineage, policy.version), *(claim.field for claim in claims)]
    with server.doing(f"reading policy {policy.version}"):
        own, *records = await server.client.hmget(server.keys.policies, fields)
    if own is None:
        raise await unknown(server, policy.version, (policy.lineage,))
    found = {
        claim.worker.name: claim.worker
        for claim, record in zip(claims, records, strict=True)
        if (record is not None) == claim.holds_if_recorded
    }
    return list(found.values())


@dataclass(frozen=True, slots=True)
class _Claim:
    """That a worker serves a version; whether that is of an abandoned policy, a field of the hash of policies tells."""

    worker: WorkerStatus
    field: str
    holds_if_recorded: bool

    @classmethod
    def of(cls, worker: WorkerStatus, run: str, version: int) -> "_Claim":
        if version == worker.policy:
            # The one that the host's settings name was never published, and never abandoned.
            return cls(worker, f"{version}@{worker.generation}", holds_if_recorded=False)
        return cls(worker, f"{run}:{version}", holds_if_recorded=True)


def _raise_on_failure(latest: dict[str, Ack], seen: set[str], workers: Sequence[WorkerStatus], version: int) -> None:
    """A failure counts of a worker that was alive during this wait: one long gone says nothing of the others.

    Nor does one that can serve nothing at all, unless none can.
    """
    broken = {worker.name for worker in workers if worker.state == "broken"}
    for name, ack in sorted(latest.items()):
        if ack.state == "failed" and name in seen and (name not in broken or len(broken) == len(workers)):
            raise PolicyRejected(
                f"policy {version} could not be applied by worker {name}: {ack.error or 'no error given'}. Mend its "
                "source and publish it as a new version, or mend the host; a host that served before still does"
            )


def _who_is_missing(
    run: str,
    live: Sequence[WorkerStatus],
    serving: Sequence[WorkerStatus],
    version: int,
    enough: Enough,
    timeout: float | None,
) -> str:
    head = f"policy {version} is not served by {enough} after {timeout:g} s"
    if not live:
        return f"{head}: there is no live worker; start `rq worker` on a host"
    done = {worker.name for worker in serving}
    missing = sorted((worker for worker in live if worker.name not in done), key=lambda worker: worker.name)
    names = ", ".join(_shown(run, worker) for worker in missing) or "nobody, there are no more"
    return f"{head}: {len(done)} of {len(live)} do; not yet: {names}. Wait again, or see `rollpool status`"


def _shown(run: str, worker: WorkerStatus) -> str:
    versions = ", ".join(map(str, worker.versions_for(run))) or "none"
    staging = f", fetching {worker.staging}" if worker.staging else ""
    return f"{worker.name} ({worker.state}, policy {versions}{staging})"


async def live_workers(server: Server) -> list[WorkerStatus]:
    """Workers with a heartbeat that mean to stay: one that is stopping will never serve what comes next."""
    with server.doing("reading heartbeats"):
        keys = {key async for key in server.client.scan_iter(match=server.keys.worker("*"), count=_PAGE)}
        async with server.client.pipeline(transaction=False) as pipe:
            for key in sorted(keys):
                pipe.hgetall(key)
            replies = await pipe.execute() if keys else []
    workers = [WorkerStatus.from_fields(fields) for fields in replies if fields]
    return [worker for worker in workers if worker.state != "stopping"]


class _Acks:
    """The latest answer of each worker to one policy, read once and then followed."""

    def __init__(self, server: Server, policy: Policy) -> None:
        self._server = server
        self._policy = policy
        self._cursor = "0-0"
        self._latest: dict[str, Ack] = {}
        #: Whether a command is for this policy: another run, or another generation, has the same numbers.
        self._ours: dict[str, bool] = {}

    async def latest(self) -> dict[str, Ack]:
        """By worker; a worker that tried again replaces its failure."""
        while entries := await self._page():
            for entry_id, fields in entries:
                self._cursor = entry_id.decode()
                ack = ack_of(fields)
                if ack is not None and ack.version == self._policy.version and await self._is_ours(ack.command):
                    self._latest[ack.worker] = ack
        return self._latest

    async def _is_ours(self, entry: str) -> bool:
        if entry not in self._ours:
            self._ours[entry] = _is_for(await self._command(entry), self._policy)
        return self._ours[entry]

    async def _command(self, entry: str) -> Policy | None:
        if not _ENTRY.fullmatch(entry):
            return None
        with self._server.doing(f"reading command {entry}"):
            found: Any = await self._server.client.xrange(self._server.keys.control, min=entry, max=entry)
        command = command_of(found[0][1]) if found else None
        return command.policy if command else None

    async def _page(self) -> list[tuple[bytes, dict[bytes, bytes]]]:
        with self._server.doing("reading acks"):
            entries: Any = await self._server.client.xrange(self._server.keys.acks, min=f"({self._cursor}", count=_PAGE)
        return list(entries)


def _is_for(told: Policy | None, policy: Policy) -> bool:
    return told is not None and (told.lineage, told.version, told.generation) == (
        policy.lineage,
        policy.version,
        policy.generation,
    )
