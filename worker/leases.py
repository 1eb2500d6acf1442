"""Leases: saying every few seconds which jobs this host still has, and noticing hosts that stopped saying so.

Invariants: renewal never takes a job from its new owner; after the server was out of reach nobody reclaims for one
whole lease, since every other host was cut off too; the hosts take turns at looking for what others lost, so that many
of them cost the server no more than few; a predecessor's jobs are taken at once only when its process is known to have
ended. All on a thread and connection of their own, which a busy event loop cannot delay.
"""

import logging
import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable

from redis import Redis
from redis.exceptions import RedisError

from rollpool.schemas.keys import Keys
from rollpool.schemas.scripts import Entry, renew
from rollpool.worker.incarnation import Incarnation
from rollpool.worker.sweeper import Sweeper

log = logging.getLogger(__name__)

#: Renewals a lease: three may be late or lost before a live host loses a job.
RENEWALS_PER_LEASE = 4


class LeaseKeeper(threading.Thread):
    """Renews what this host holds and returns what others lost.

    Args:
        client: a blocking client that nobody else uses.
        keys: of the pool.
        me: this worker's incarnation.
        lease_s: after so long without renewal a job counts as lost.
        on_lost: called on this thread with entries that are not this consumer's any more: reclaimed by another host,
            or settled a moment ago, here or elsewhere.
        on_bug: called on this thread with the error that ends it.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        client: Redis,
        keys: Keys,
        me: Incarnation,
        *,
        lease_s: float,
        on_lost: Callable[[list[Entry]], None],
        on_bug: Callable[[BaseException], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(name="rollpool-leases", daemon=True)
        self._client = client
        self._keys = keys
        self._me = me
        self._lease_s = lease_s
        self._on_lost = on_lost
        self._on_bug = on_bug
        self._clock = clock
        self._held: dict[tuple[str, str], Entry] = {}
        self._lock = threading.Lock()
        self._stopping = False
        self._wake = threading.Event()
        self._turn_due = 0.0
        self._sweeper = Sweeper(client, keys, me, lease_s=lease_s)
        self._reachable_since = -math.inf
        self._heard_at: float | None = None

    def hold(self, entries: Iterable[Entry]) -> None:
        """Keep these from now on."""
        with self._lock:
            self._held.update({(entry.stream, entry.id): entry for entry in entries})

    def release(self, entry: Entry) -> None:
        """Let go of one that was settled, given back or lost."""
        with self._lock:
            self._held.pop((entry.stream, entry.id), None)

    def look_again(self) -> None:
        """Renew now: jobs of this host may have been settled elsewhere."""
        self._wake.set()

    def run(self) -> None:
        """The thread."""
        self._turn_due = self._clock() + self._lease_s / RENEWALS_PER_LEASE
        while True:
            self._wake.wait(max(0.0, self._turn_due - self._clock()))
            self._wake.clear()
            if self._stopping:
                return
            try:
                self._turn_or_look()
            except RedisError as error:
                if self._heard_at is not None:
                    log.warning("leases: the server is out of reach (%s); trying again", error)
                self._heard_at = None
            except Exception as bug:  # without this thread every job would run twice: the host has to end
                self._on_bug(bug)
                return

    def _turn_or_look(self) -> None:
        """A whole round when it is due; when woken before, only what it was woken for."""
        if self._clock() < self._turn_due:
            self._renew()
            return
        self._turn_due = self._clock() + self._lease_s / RENEWALS_PER_LEASE
        self.turn()

    def turn(self) -> None:
        """One round: renew first, so that a host that was frozen does not take its own jobs for lost."""
        self._renew()
        now = self._clock()
        # Late: this host was frozen, or its client got through at last after trying for a while on its own.
        if self._heard_at is None or now - self._heard_at > self._lease_s / 2:
            self._reachable_since = now
        self._heard_at = now
        self._sweeper.expire()
        if now - self._reachable_since >= self._lease_s and self._sweeper.is_my_turn():
            self._sweeper.sweep(now)

    def stop(self) -> None:
        """End the thread."""
        self._stopping = True
        self._wake.set()
        if self.is_alive():
            self.join()

    def take_over(self) -> int:
        """Return at once what ended predecessors of this name and host held; returns how many jobs."""
        return self._sweeper.take_over()

    def _renew(self) -> None:
        by_stream: dict[str, list[Entry]] = defaultdict(list)
        with self._lock:
            for entry in self._held.values():
                by_stream[entry.stream].append(entry)
        if not by_stream:
            self._client.ping()
        for stream, entries in by_stream.items():
            lost = renew(self._client, self._keys, stream, consumer=self._me.consumer, entries=entries)
            self._tell_lost([entry for entry in entries if entry.id in lost])

    def _tell_lost(self, lost: list[Entry]) -> None:
        with self._lock:  # settled meanwhile: nothing was lost
            lost = [entry for entry in lost if self._held.pop((entry.stream, entry.id), None)]
        if lost:
            self._on_lost(lost)
