"""Looks for what others lost, and for what nobody will come back to.

Invariant: hosts take turns at it, so that many of them cost the server no more than few; whatever is found goes back to
its lane or gets its outcome by a script that may be repeated.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence

from redis import Redis
from redis.exceptions import ResponseError

from rollpool.schemas.connection import runs_now
from rollpool.schemas.keys import GROUP, Keys
from rollpool.schemas.scripts import expire, reclaim, sweep
from rollpool.schemas.scripts.leases import RECLAIM_AT_MOST
from rollpool.schemas.status import SERVING_FIELDS, Serving
from rollpool.worker.incarnation import Incarnation
from rollpool.worker.suspects import history_line

log = logging.getLogger(__name__)

#: Looks for lost jobs a lease, of all hosts together, at most: with four of its own a lease, a host that lives finds
#: what a dead one had within 1.375 leases.
SWEEPS_PER_LEASE = 8

#: Seconds between looks for runs that ended, when nothing more urgent asks for one.
TIDY_S = 60.0

#: Heartbeats looked at by one step of a scan.
_PAGE = 1000


class Sweeper:
    """One host's part in it; on a blocking client, for a thread of its own.

    Args:
        client: nobody else's.
        keys: of the pool.
        me: this worker's incarnation.
        lease_s: after so long without renewal a job counts as lost.
        wall_clock: seconds since the epoch, for people.
    """

    def __init__(
        self,
        client: Redis,
        keys: Keys,
        me: Incarnation,
        *,
        lease_s: float,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._client = client
        self._keys = keys
        self._me = me
        self._lease_s = lease_s
        self._wall_clock = wall_clock
        self._tidied_at = -math.inf

    def is_my_turn(self) -> bool:
        """True for one host at a time; one that dies with the turn delays the others by an eighth of a lease."""
        lease_ms = max(1, int(1000 * self._lease_s / SWEEPS_PER_LEASE))
        return bool(self._client.set(self._keys.sweep, self._me.consumer, nx=True, px=lease_ms))

    def sweep(self, now: float) -> None:
        """Return what was not renewed for a lease, and end what nobody will; `now` in monotonic seconds."""
        runs = runs_now(self._client, self._keys)
        for stream in self._keys.streams(runs):
            count = self._return_all(stream, idle_ms=int(1000 * self._lease_s), why="its worker's lease ended")
            if count:
                log.warning("leases: returned %d jobs of lost workers to %s", count, stream)
        if now - self._tidied_at >= TIDY_S or self._any_exact(runs):
            self._tidied_at = now
            self._tidy()

    def expire(self) -> None:
        """End the jobs whose deadline is over, wherever they are."""
        if count := expire(self._client, self._keys):
            log.info("%d jobs expired: their deadline was over", count)

    def take_over(self) -> int:
        """Return at once what ended predecessors of this name and host held; returns how many jobs."""
        return sum(
            self._return_all(stream, idle_ms=0, prefix=consumer, why="its worker ended and was restarted")
            for stream in self._streams()
            for consumer in self._consumers(stream)
            if self._is_ended_predecessor(consumer)
        )

    def _any_exact(self, runs: Sequence[str]) -> bool:
        return bool(runs) and bool(self._client.exists(*map(self._keys.exact, runs)))

    def _tidy(self) -> None:
        hosts = self._hosts()
        # A checkpoint that a host is on its way to counts too: the only host on a version may be restarting its engine.
        served = {version for host in hosts for version in (host.policy, host.heading) if version is not None}
        adapters = {(run, version) for host in hosts for run, versions in host.adapters.items() for version in versions}
        swept = sweep(self._client, self._keys, served=served, adapters=adapters)
        if swept.ended:
            log.info("%d exact jobs are stale: no host serves their policy any more", swept.ended)

    def _streams(self) -> list[str]:
        """Asked anew each time: a host with its hands full pulls nothing, and hears of no new run by itself."""
        return self._keys.streams(runs_now(self._client, self._keys))

    def _consumers(self, stream: str) -> list[str]:
        try:
            return [row["name"].decode(errors="replace") for row in self._client.xinfo_consumers(stream, GROUP)]
        except ResponseError:  # no such stream, or no group: nobody holds anything
            return []

    def _is_ended_predecessor(self, consumer: str) -> bool:
        before = Incarnation.parse(consumer)
        return before is not None and before != self._me and before.worker == self._me.worker and before.ended()

    def _return_all(self, stream: str, *, idle_ms: int, why: str, prefix: str = "") -> int:
        total = 0
        while True:
            count = reclaim(
                self._client,
                self._keys,
                stream,
                idle_ms=idle_ms,
                caller=self._me.consumer,
                prefix=prefix,
                reason=history_line(self._wall_clock(), why),
            )
            total += count
            if count < RECLAIM_AT_MOST:
                return total

    def _hosts(self) -> list[Serving]:
        """The listed hosts; what somebody made up is none."""
        keys = list(self._client.scan_iter(match=self._keys.worker("*"), count=_PAGE))
        with self._client.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.hmget(key, SERVING_FIELDS)
            found = pipe.execute(raise_on_error=False)
        hosts = (Serving.read(values) for values in found if isinstance(values, list))
        return [host for host in hosts if host is not None]
