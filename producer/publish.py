"""Publishing policies, and waiting until the hosts serve them.

Invariant: a version names one source for ever, so publishing may be repeated; a wait ends as soon as its end is
certain: enough workers serve, one of them failed to load the policy, or the time is over.
"""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from rollpool.producer.server import Server
from rollpool.schemas import scripts
from rollpool.schemas.commands import Ack
from rollpool.schemas.errors import PolicyRejected, PolicyUnknown, PoolTimeout
from rollpool.schemas.policies import Policy
from rollpool.schemas.status import WorkerStatus
from rollpool.schemas.wire import first_error

#: Seconds between two looks at the heartbeats: a worker writes one every few seconds, and at each change of state.
POLL_S = 0.25

#: Entries of `acks` read at once, and keys looked at by one step of a scan.
_PAGE = 1000

#: 0.28 of 25 workers are 7, and not the 7.000000000000001 that floats make of it.
_ROUNDING = 1e-9


async def publish_policy(server: Server, version: int, checkpoint: str) -> Policy:
    """Publish a policy of this server's run; see `AsyncRolloutPool.publish_policy`."""
    try:
        policy = Policy(version=version, checkpoint=checkpoint, run=server.run)
    except ValidationError as error:
        raise PolicyRejected(f"policy {version!r} from {checkpoint!r}: {first_error(error)}") from None
    with server.doing(f"publish_policy({version})"):
        answer, current = await scripts.publish(server.client, server.keys, policy)
    if answer == "other":
        known = await get_policy(server, version)
        raise PolicyRejected(
            f"policy {version} already names {known.checkpoint if known else 'another source'!r}, so it cannot name "
            f"{checkpoint!r}; publish under a new version"
        )
    if answer == "taken":
        raise PolicyRejected(
            f"checkpoint {checkpoint!r} is that of policy {current} already: give each version a path of its own, that "
            "is never written to again, since a result can name only the version, not what lay there at the time"
        )
    if answer == "old":
        raise PolicyRejected(
            f"policy {version} is older than the current policy {current}; versions rise: publish {current + 1} or "
            "later"
        )
    return policy


async def get_policy(server: Server, version: int) -> Policy | None:
    """The policy published under `version`, if any."""
    with server.doing(f"reading policy {version}"):
        record = await server.client.hget(server.keys.policies, str(version))
    return None if record is None else Policy.model_validate_json(record)


async def current_policy(server: Server) -> Policy | None:
    """The policy published last, if any."""
    with server.doing("current_policy"):
        version = await server.client.get(server.keys.policy)
    return None if version is None else await get_policy(server, int(version))


async def wait_for_policy(server: Server, version: int, fraction: float, timeout: float | None) -> None:
    """Wait for the hosts; see `AsyncRolloutPool.wait_for_policy`."""
    if not 0.0 < fraction <= 1.0:
        raise PolicyRejected(f"fraction: expected more than 0 and at most 1, got {fraction!r}")
    if await get_policy(server, version) is None:
        raise PolicyUnknown(f"policy {version} was never published in pool {server.keys.pool!r}; publish_policy first")
    deadline = None if timeout is None else time.monotonic() + timeout
    acks = _Acks(server, version)
    seen = set[str]()
    while True:
        workers = await live_workers(server)
        seen.update(worker.name for worker in workers)
        serving = [worker for worker in workers if _serves(worker, version)]
        if serving and len(serving) >= fraction * len(workers) - _ROUNDING:
            return
        _raise_on_failure(await acks.latest(), seen, workers, version)
        if deadline is not None and time.monotonic() >= deadline:
            raise PoolTimeout(_who_is_missing(workers, version, fraction, timeout))
        await asyncio.sleep(POLL_S if deadline is None else max(0.0, min(POLL_S, deadline - time.monotonic())))


def _serves(worker: WorkerStatus, version: int) -> bool:
    return worker.state == "serving" and worker.policy is not None and worker.policy >= version


def _raise_on_failure(latest: dict[str, Ack], seen: set[str], workers: Sequence[WorkerStatus], version: int) -> None:
    """A failure counts of a worker that was alive during this wait: one long gone says nothing of the others.

    Nor does one that can serve nothing at all, unless none can.
    """
    broken = {worker.name for worker in workers if worker.state == "broken"}
    for name, ack in sorted(latest.items()):
        if ack.state == "failed" and name in seen and (name not in broken or len(broken) == len(workers)):
            raise PolicyRejected(
                f"policy {version} could not be applied by worker {name}: {ack.error or 'no error given'}. Mend the "
                "checkpoint and publish it as a new version, or mend the host; a host that served before still does"
            )


def _who_is_missing(workers: Sequence[WorkerStatus], version: int, fraction: float, timeout: float | None) -> str:
    head = f"policy {version} is not served by {fraction:.0%} of the workers after {timeout:g} s"
    if not workers:
        return f"{head}: there is no live worker; start `rq worker` on a host"
    missing = [worker for worker in workers if not _serves(worker, version)]
    names = ", ".join(
        f"{worker.name} ({worker.state}, policy {'none' if worker.policy is None else worker.policy})"
        for worker in sorted(missing, key=lambda worker: worker.name)
    )
    done = len(workers) - len(missing)
    return f"{head}: {done} of {len(workers)} do; not yet: {names}. Wait again, or see `rollpool status`"


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

    def __init__(self, server: Server, version: int) -> None:
        self._server = server
        self._version = str(version).encode()
        self._cursor = "0-0"
        self._latest: dict[str, Ack] = {}

    async def latest(self) -> dict[str, Ack]:
        """By worker; a worker that tried again replaces its failure."""
        while entries := await self._page():
            for entry_id, fields in entries:
                self._cursor = entry_id.decode()
                if fields.get(b"version") == self._version:
                    ack = _ack(fields)
                    self._latest[ack.worker] = ack
        return self._latest

    async def _page(self) -> list[tuple[bytes, dict[bytes, bytes]]]:
        with self._server.doing("reading acks"):
            entries: Any = await self._server.client.xrange(self._server.keys.acks, min=f"({self._cursor}", count=_PAGE)
        return list(entries)


def _ack(fields: dict[bytes, bytes]) -> Ack:
    """An entry of `acks` is plain text, for people."""
    text: dict[str, Any] = {name.decode(): value.decode() for name, value in fields.items()}
    return Ack.model_validate({**text, "error": text.get("error") or None}, strict=False)
