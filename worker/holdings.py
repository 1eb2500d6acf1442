"""Every job in this host's hands, from pull to the server's confirmation.

Invariant: a job that is pulled is counted and leased here until the server has confirmed what became of it, or another
host has it; however its engine fares, it leaves by the settler.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Sequence

from redis.asyncio import Redis
from redis.exceptions import RedisError

from rollpool.schemas import Keys
from rollpool.schemas.connection import connect
from rollpool.schemas.scripts import PART, READY, Entry, Place, Record, Settled, delayed
from rollpool.worker.clock import ServerClock
from rollpool.worker.held import HeldJob
from rollpool.worker.incarnation import Incarnation
from rollpool.worker.leases import RENEWALS_PER_LEASE, LeaseKeeper
from rollpool.worker.settler import Settler
from rollpool.worker.suspects import after_death, after_loss, backoff_ms, history_line

log = logging.getLogger(__name__)

#: Seconds between tries to hear what was ended elsewhere, while the server is out of reach; renewals tell it too.
LISTEN_AGAIN_S = 1.0


class Holdings:
    """What one host holds; the generator's outlet.

    Args:
        url: of the pool's server, for the lease keeper's own connection.
        client: the host's client.
        keys: of the pool.
        me: this worker's incarnation.
        lease_s: after so long without renewal a job counts as lost.
        server_clock: times that other hosts read.
        on_change: a job came to its end.
        on_gone: a job is another host's by now, or was settled elsewhere; its samples are of no use.
        on_bug: what this host holds is not known any more.
    """

    def __init__(
        self,
        url: str,
        client: Redis,
        keys: Keys,
        me: Incarnation,
        *,
        lease_s: float,
        server_clock: ServerClock,
        on_change: Callable[[], None],
        on_gone: Callable[[HeldJob], None],
        on_bug: Callable[[BaseException], None],
    ) -> None:
        self._client = client
        self._keys = keys
        self._worker = me.worker
        self._server_clock = server_clock
        self._on_change = on_change
        self._on_gone = on_gone
        self._on_bug = on_bug
        self._held: dict[tuple[str, str], HeldJob] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        # A renewal that hangs must fail, and be tried again, well within its lease.
        timeout_s = max(1.0, lease_s / RENEWALS_PER_LEASE)
        self._lease_client = connect(url, timeout_s=timeout_s, retries=1, slot_key=keys.runs)
        self._leases = LeaseKeeper(
            self._lease_client, keys, me, lease_s=lease_s, on_lost=self._tell_lost, on_bug=self._tell_bug
        )
        self.settler = Settler(client, keys, consumer=me.consumer, on_done=self._done, on_settled=self._count)
        #: Jobs this host settled as other than failed, and as failed.
        self.settled = 0
        self.failed = 0

    def __len__(self) -> int:
        return len(self._held)

    async def start(self) -> None:
        """Return what an ended predecessor of this name on this host had, then keep leases."""
        self._loop = asyncio.get_running_loop()
        count = await asyncio.to_thread(self._leases.take_over)
        if count:
            log.info("returned %d jobs that this worker held before it was restarted", count)
        self._leases.start()

    async def stop(self) -> None:
        """Keep leases no longer: what is still held, other hosts take over when its lease ends."""
        await asyncio.to_thread(self._leases.stop)
        self._lease_client.close()

    async def listen(self) -> None:
        """Hear of batches of which jobs were ended elsewhere, and stop work on those at once; until cancelled."""
        while True:
            try:
                await self._listen_once()
            except RedisError as error:
                log.warning("listening for cancelled jobs: %s; trying again", error)
                await asyncio.sleep(LISTEN_AGAIN_S)

    async def _listen_once(self) -> None:
        async with self._client.pubsub(ignore_subscribe_messages=True) as channel:
            await channel.subscribe(self._keys.ended)
            while True:
                message = await channel.get_message(timeout=LISTEN_AGAIN_S)
                if message is not None and self._has_any_of(message["data"].decode(errors="replace")):
                    self._leases.look_again()

    def _has_any_of(self, batch: str) -> bool:
        return any(f"{held.job.run}:{held.job.batch}" == batch for held in self._held.values())

    @property
    def adapters(self) -> set[str]:
        """Names of the adapters that jobs here run on."""
        return {held.adapter for held in self._held.values() if held.adapter is not None and not held.left}

    def holds_any_of(self, run: str) -> bool:
        """True while a job of this run is here."""
        return any(held.job.run == run for held in self._held.values())

    def look_again(self) -> None:
        """Ask the server which jobs are still open."""
        self._leases.look_again()

    def hold(self, jobs: Sequence[HeldJob]) -> None:
        """Jobs that were pulled."""
        self._held.update({(held.entry.stream, held.entry.id): held for held in jobs})
        self._leases.hold([held.entry for held in jobs])

    def return_all(self, jobs: Sequence[HeldJob]) -> None:
        """Give jobs back to their lanes: a planned move, which costs them nothing."""
        for held in jobs:
            self.settler.give_back(held)

    def return_from_dead(self, jobs: Sequence[HeldJob], reason: str, *, company: int) -> None:
        """Give back what was in an engine that died, of `company` suspects in all; who was its only one is charged."""
        line = self._line(f"its engine died with {company} jobs in it", reason)
        for held in jobs:
            record = after_death(held.record, company=company, worker=self._worker, line=line)
            # The first time at once: another host may have room. Later ones apart from each other.
            self.settler.give_back(held, self._later(record) if record.losses > 1 else READY, record=record)

    # What the generator tells.

    def finished(self, held: HeldJob) -> None:
        """Every sample is there."""
        self.settler.settle(held, held.group("ok", worker=self._worker, now=time.monotonic()))

    def refused(self, held: HeldJob, error: str) -> None:
        """The job is at fault, and would be on every host."""
        group = held.group("failed", worker=self._worker, now=time.monotonic(), error=error)
        self.settler.settle(held, group, dead=error)

    def lost(self, held: HeldJob, error: str) -> None:
        """The engine failed it; later, so that a dying engine does not burn its attempts."""
        log.warning("job %s goes back: %s", held.job.id, error)
        record = after_loss(held.record, worker=self._worker, line=self._line("lost", error))
        self.settler.give_back(held, self._later(record), record=record)

    def expired(self, held: HeldJob) -> None:
        """Its deadline came; what is there is a group, where the trainer said that so much is enough."""
        if held.enough:
            self.finished(held)
            return
        error = f"its deadline came when {len(held.samples)} of {held.job.n} samples were there"
        group = held.group("expired", worker=self._worker, now=time.monotonic(), error=error)
        self.settler.settle(held, group)

    def _later(self, record: Record) -> Place:
        return delayed(self._server_clock.now_ms() + backoff_ms(record.losses, random.random()))

    def _line(self, what: str, why: str) -> str:
        return history_line(self._server_clock.now_ms() / 1000, f"{self._worker}: {what}: {why}")

    def misplaced(self, held: HeldJob) -> None:
        """The policy changed under it: for another host, or to be judged anew; it costs the job nothing."""
        self.settler.give_back(held)

    def broken(self, bug: BaseException) -> None:
        """A bug."""
        self._on_bug(bug)

    # What the settler and the lease keeper tell.

    def _done(self, entry: Entry) -> None:
        self._held.pop((entry.stream, entry.id), None)
        self._leases.release(entry)
        self._on_change()

    def _count(self, replies: Sequence[Settled]) -> None:
        for reply in replies:
            self.settled += reply.now and reply.outcome not in ("failed", PART)
            self.failed += reply.now and reply.outcome == "failed"

    def _tell_lost(self, entries: list[Entry]) -> None:
        """On the lease keeper's thread."""
        assert self._loop is not None, "start first"
        self._loop.call_soon_threadsafe(self._lost, entries)

    def _tell_bug(self, bug: BaseException) -> None:
        """On the lease keeper's thread."""
        assert self._loop is not None, "start first"
        self._loop.call_soon_threadsafe(self._on_bug, bug)

    def _lost(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            held = self._held.get((entry.stream, entry.id))
            if held is None or held.left:
                continue  # on its way to the server: the scripts know whose it is
            log.warning("job %s is another host's by now, or was settled elsewhere; dropping it here", held.job.id)
            del self._held[entry.stream, entry.id]
            self._on_gone(held)
