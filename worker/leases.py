"""Leases: saying every few seconds which jobs this host still has, and noticing hosts that stopped saying so.

Invariants: renewal never takes a job from its new owner; after the server was out of reach nobody reclaims for one
whole lease, since every other host was cut off too; a predecessor's jobs are taken at once only when its process is
known to have ended. All on a thread and connection of their own, which a busy event loop cannot delay.
"""

import logging
import math
import re
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import psutil
from redis import Redis
from redis.exceptions import RedisError, ResponseError

from rollpool.schemas.keys import GROUP
from rollpool.schemas.scripts import Entry, reclaim, renew
from rollpool.schemas.scripts.leases import RECLAIM_AT_MOST

log = logging.getLogger(__name__)

#: Renewals a lease: three may be late or lost before a live host loses a job.
RENEWALS_PER_LEASE = 4

#: Seconds by which the start of one process, told by two others, may differ: it is counted from the machine's own
#: start, which Linux tells to the second.
START_JITTER_S = 2

_CONSUMER = re.compile(r"(?P<worker>.+):(?P<host>[^:]*)@(?P<pid>\d{1,9})-(?P<started>\d{1,12})", re.ASCII | re.DOTALL)


@dataclass(frozen=True)
class Incarnation:
    """One life of one worker: what tells it from the next worker of the same name."""

    worker: str
    host: str
    pid: int
    #: When the process started, in whole seconds since the epoch: process ids are used again.
    started: int

    @classmethod
    def current(cls, worker: str) -> "Incarnation":
        """This process."""
        process = psutil.Process()
        return cls(worker, socket.gethostname(), process.pid, int(process.create_time()))

    @classmethod
    def parse(cls, consumer: str) -> "Incarnation | None":
        """Read a consumer's name; None when it is not one of ours."""
        found = _CONSUMER.fullmatch(consumer)
        if found is None:
            return None
        return cls(found["worker"], found["host"], int(found["pid"]), int(found["started"]))

    @property
    def consumer(self) -> str:
        """Its name in the consumer group."""
        return f"{self.worker}:{self.host}@{self.pid}-{self.started}"

    def ended(self) -> bool:
        """True only when it ran on this host and its process is provably gone."""
        if self.host != socket.gethostname():
            return False
        return process_ended(self.pid, alive_at=self.started)


def process_ended(pid: int, *, alive_at: float) -> bool:
    """True only when the process of this machine that had this id at that time, in seconds since the epoch, is gone."""
    try:
        process = psutil.Process(pid)
        if process.create_time() > alive_at + START_JITTER_S:
            return True  # another one, with its id
        return process.status() == psutil.STATUS_ZOMBIE  # killed, and its parent has not looked
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False


class LeaseKeeper(threading.Thread):
    """Renews what this host holds and returns what others lost.

    Args:
        client: a blocking client that nobody else uses.
        me: this worker's incarnation.
        lease_s: after so long without renewal a job counts as lost.
        on_lost: called on this thread with entries that are not this consumer's any more: reclaimed by another host,
            or settled a moment ago.
        on_bug: called on this thread with the error that ends it.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        client: Redis,
        me: Incarnation,
        *,
        lease_s: float,
        on_lost: Callable[[list[Entry]], None],
        on_bug: Callable[[BaseException], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(name="rollpool-leases", daemon=True)
        self._client = client
        self._me = me
        self._lease_s = lease_s
        self._on_lost = on_lost
        self._on_bug = on_bug
        self._clock = clock
        self._held: dict[tuple[str, str], Entry] = {}
        self._streams: list[str] = []
        self._lock = threading.Lock()
        self._stopping = threading.Event()
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

    def watch(self, streams: Iterable[str]) -> None:
        """The jobs streams of the pool, as far as this host knows them."""
        with self._lock:
            self._streams = list(streams)

    def run(self) -> None:
        """The thread."""
        while not self._stopping.wait(self._lease_s / RENEWALS_PER_LEASE):
            try:
                self.turn()
            except RedisError as error:
                if self._heard_at is not None:
                    log.warning("leases: the server is out of reach (%s); trying again", error)
                self._heard_at = None
            except Exception as bug:  # without this thread every job would run twice: the host has to end
                self._on_bug(bug)
                return

    def turn(self) -> None:
        """One round: renew first, so that a host that was frozen does not take its own jobs for lost."""
        self._renew()
        now = self._clock()
        # Late: this host was frozen, or its client got through at last after trying for a while on its own.
        if self._heard_at is None or now - self._heard_at > self._lease_s / 2:
            self._reachable_since = now
        self._heard_at = now
        if now - self._reachable_since >= self._lease_s:
            self._reclaim()

    def stop(self) -> None:
        """End the thread."""
        self._stopping.set()
        if self.is_alive():
            self.join()

    def take_over(self) -> int:
        """Return at once what ended predecessors of this name and host held; returns how many jobs."""
        return sum(
            self._return_all(stream, idle_ms=0, prefix=consumer)
            for stream in self._known_streams()
            for consumer in self._consumers(stream)
            if self._is_ended_predecessor(consumer)
        )

    def _known_streams(self) -> list[str]:
        with self._lock:
            return list(self._streams)

    def _consumers(self, stream: str) -> list[str]:
        try:
            return [row["name"].decode(errors="replace") for row in self._client.xinfo_consumers(stream, GROUP)]
        except ResponseError:  # no such stream, or no group: nobody holds anything
            return []

    def _is_ended_predecessor(self, consumer: str) -> bool:
        before = Incarnation.parse(consumer)
        return before is not None and before != self._me and before.worker == self._me.worker and before.ended()

    def _renew(self) -> None:
        by_stream: dict[str, list[Entry]] = defaultdict(list)
        with self._lock:
            for entry in self._held.values():
                by_stream[entry.stream].append(entry)
        if not by_stream:
            self._client.ping()
        for stream, entries in by_stream.items():
            lost = set(renew(self._client, stream, consumer=self._me.consumer, entries=[e.id for e in entries]))
            self._tell_lost([entry for entry in entries if entry.id in lost])

    def _tell_lost(self, lost: list[Entry]) -> None:
        with self._lock:  # settled meanwhile: nothing was lost
            lost = [entry for entry in lost if self._held.pop((entry.stream, entry.id), None)]
        if lost:
            self._on_lost(lost)

    def _reclaim(self) -> None:
        for stream in self._known_streams():
            count = self._return_all(stream, idle_ms=int(1000 * self._lease_s))
            if count:
                log.warning("leases: returned %d jobs of lost workers to %s", count, stream)

    def _return_all(self, stream: str, *, idle_ms: int, prefix: str = "") -> int:
        total = 0
        while True:
            count = reclaim(self._client, stream, idle_ms=idle_ms, caller=self._me.consumer, prefix=prefix)
            total += count
            if count < RECLAIM_AT_MOST:
                return total
