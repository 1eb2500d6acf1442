"""Pulls jobs as credits allow, and judges each before it may run.

Invariant: what is pulled is leased before anything else happens to it, and is then handed on: to the generator, or
to the settler with an outcome or a place to wait. Credits never wait for a job that may not run here.
"""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence

from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from rollpool.schemas import GROUP, Group, Keys, SamplingParams
from rollpool.schemas.connection import runs_of
from rollpool.schemas.jobs import LANES
from rollpool.schemas.scripts import Entry, pull
from rollpool.worker.clock import ServerClock
from rollpool.worker.credits import MeanN, jobs_wanted
from rollpool.worker.generator import Generator
from rollpool.worker.held import NO_IDS, HeldJob
from rollpool.worker.settler import Settler
from rollpool.worker.tokenizer import PromptEncoder, PromptRefused, needs_thread
from rollpool.worker.triage import Bury, Expire, Fail, Park, Passed, Run, Verdict, triage

log = logging.getLogger(__name__)

#: Milliseconds an idle host blocks on the streams before it looks for new runs, parked and delayed jobs.
BLOCK_MS = 1000

#: Seconds between looks when the pool has no run yet, or the server is out of reach.
LOOK_AGAIN_S = 0.25

#: Finished jobs whose settlement may be unconfirmed before a host pulls no more: bounds its memory while the server
#: is slow or away.
UNSETTLED_LIMIT = 1024


class Puller:
    """The pulling side of one host, for as long as it serves one policy version."""

    def __init__(
        self,
        *,
        client: Redis,
        reader: Redis,
        keys: Keys,
        consumer: str,
        version: int,
        max_attempts: int,
        encoder: PromptEncoder,
        generator: Generator,
        settler: Settler,
        server_clock: ServerClock,
        hold: Callable[[Sequence[HeldJob]], None],
        know_streams: Callable[[Sequence[str]], None],
        anyone_serves: Callable[[int], Awaitable[bool]],
        paused: Callable[[], bool],
        on_backlog: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._reader = reader
        self._keys = keys
        self._consumer = consumer
        self._version = version
        self._max_attempts = max_attempts
        self._encoder = encoder
        self._generator = generator
        self._settler = settler
        self._server_clock = server_clock
        self._hold = hold
        self._know_streams = know_streams
        self._anyone_serves = anyone_serves
        self._paused = paused
        self._on_backlog = on_backlog
        self._clock = clock
        self._worker = consumer.rpartition(":")[0]
        self._mean_n = MeanN()
        self._runs: list[str] = []
        self._runs_at = -math.inf
        self._turn = 0
        self._stopping = False
        self._changed = asyncio.Event()
        #: True while jobs wait that this host could run, as far as the last pull showed.
        self.backlog = False
        #: Monotonic seconds since which the pool had nothing for this host; None while it has, while it may not be
        #: asked, and before it was.
        self.idle_since: float | None = None

    def nudge(self) -> None:
        """Credits or settlements changed."""
        self._changed.set()

    def stop(self) -> None:
        """Pull no more; `run` returns within one block."""
        self._stopping = True
        self._changed.set()

    async def run(self) -> None:
        """Pull until `stop`."""
        while not self._stopping:
            try:
                await self._turn_once()
            except RedisError as error:
                self._show_backlog(False)
                log.warning("pulling: %s; trying again", error)
                await asyncio.sleep(LOOK_AGAIN_S)

    async def _turn_once(self) -> None:
        self._changed.clear()
        wanted = jobs_wanted(self._generator.room, self._mean_n.value, self._settler.unconfirmed, UNSETTLED_LIMIT)
        if wanted == 0 or self._paused():
            self.idle_since = None
            await self._wait_for_change()
            return
        if not self._runs or self._clock() - self._runs_at >= BLOCK_MS / 1000:
            await self._find_runs()  # also while there is work: another run must not wait for the end of this one
        streams = self._reading_order()
        entries = await pull(
            self._client,
            self._keys,
            streams=streams,
            consumer=self._consumer,
            wanted=wanted,
            version=self._version,
        )
        self._show_backlog(len(entries) == wanted)
        if not entries:
            if self.idle_since is None and not self._generator.jobs and not self._settler.unconfirmed:
                self.idle_since = self._clock()
            entries = await self._wait_for_jobs(streams)
        if entries:
            self.idle_since = None
            await self._take(entries)

    def _show_backlog(self, backlog: bool) -> None:
        if backlog != self.backlog:
            self.backlog = backlog
            self._on_backlog()

    async def _wait_for_change(self) -> None:
        try:
            await asyncio.wait_for(self._changed.wait(), timeout=BLOCK_MS / 1000)
        except TimeoutError:  # a pause ends without a change here
            return

    def _reading_order(self) -> list[str]:
        """Lanes by urgency; within a lane each run comes first in its turn."""
        self._turn += 1
        first = self._turn % len(self._runs) if self._runs else 0
        runs = self._runs[first:] + self._runs[:first]
        return [self._keys.jobs(run, lane) for lane in LANES for run in runs]

    async def _wait_for_jobs(self, streams: list[str]) -> list[Entry]:
        """Block until there is one; on one entry a stream, since the next pull takes the rest in order."""
        if not streams:
            await asyncio.sleep(LOOK_AGAIN_S)
            return []
        try:
            reply = await self._reader.xreadgroup(
                GROUP, self._consumer, dict.fromkeys(streams, ">"), count=1, block=BLOCK_MS
            )
        except ResponseError as error:
            if not any(word in str(error) for word in ("NOGROUP", "UNBLOCKED")):
                raise
            return []  # the stream vanished (FLUSHALL); the next pull begins it again
        return Entry.from_streams(reply)

    async def _find_runs(self) -> None:
        self._runs = await runs_of(self._client, self._keys)
        self._runs_at = self._clock()
        self._know_streams([stream for run in self._runs for stream in self._keys.lanes(run)])

    async def _take(self, entries: Sequence[Entry]) -> None:
        now = self._clock()
        running: list[HeldJob] = []
        held_jobs: list[tuple[HeldJob, Verdict]] = []
        for entry in entries:
            verdict = triage(
                entry,
                version=self._version,
                now_ms=self._server_clock.now_ms(),
                max_attempts=self._max_attempts,
            )
            if isinstance(verdict, Bury):
                self._bury(entry, verdict.error)
                continue
            self._mean_n.add(verdict.job.n)
            held = HeldJob(entry, verdict.job, now)
            if isinstance(verdict, Run):
                running.append(held)
            held_jobs.append((held, verdict))
        self._hold([held for held, _ in held_jobs])
        for held, verdict in held_jobs:
            if not isinstance(verdict, Run):
                await self._turn_away(held, verdict)
        await self._start(running)

    async def _turn_away(self, held: HeldJob, verdict: Verdict) -> None:
        match verdict:
            case Park(version=version):
                self._settler.give_back(held, parked_for=version)
            case Expire():
                self._settler.settle(held, self._dropped(held, "expired", "its deadline was over when it was pulled"))
            case Fail(error=error):
                self._settler.settle(held, self._dropped(held, "failed", error), dead=error)
            case Passed(job=job) if await self._may_be_served(job.policy_version):
                # For one of those; a second's delay keeps it from coming straight back here.
                self._settler.give_back(held, delayed_until_ms=self._server_clock.now_ms() + BLOCK_MS)
            case Passed(job=job):
                reason = f"exact job for policy {job.policy_version}: no host serves it, this one is on {self._version}"
                self._settler.settle(held, self._dropped(held, "stale", reason))

    async def _may_be_served(self, version: int) -> bool:
        try:
            return await self._anyone_serves(version)
        except RedisError as error:  # not known, and what was pulled with it must not wait for the answer
            log.warning("looking for hosts on policy %d: %s", version, error)
            return True

    def _dropped(self, held: HeldJob, outcome: str, error: str) -> Group:
        return held.group(outcome, worker=self._worker, now=self._clock(), error=error)  # type: ignore[arg-type]

    def _bury(self, entry: Entry, error: str) -> None:
        """Dead-letter what is not a job; where its plain fields name an open one, the trainer learns that it failed."""
        log.error("entry %s of %s is not a job: %s", entry.id, entry.stream, error)
        batch, _, index = entry.fields.get(b"job", b"").decode(errors="replace").rpartition("/")
        group = Group.model_construct(
            run=entry.fields.get(b"run", b"").decode(errors="replace"),
            batch=batch,
            # Nine digits: Python refuses to read numbers of thousands, which anyone could add by hand.
            index=int(index) if index.isascii() and index.isdigit() and len(index) < 10 else -1,
            outcome="failed",
            policy_version=0,
            prompt_ids=NO_IDS,
            samples=(),
            sampling=SamplingParams(),
            metadata=None,
            error=error,
            worker=self._worker,
            seconds=0.0,
        )
        self._settler.settle_entry(entry, group, dead=error)

    async def _start(self, running: list[HeldJob]) -> None:
        if self._stopping or self._paused():  # what a read brought that had begun before is for hosts that go on
            for held in running:
                self._settler.give_back(held)
            return
        if any(needs_thread(held.job) for held in running):
            refusals = await asyncio.to_thread(self._encode, running)
        else:
            refusals = self._encode(running)
        for held, error in refusals:
            self._settler.settle(held, self._dropped(held, "failed", error), dead=error)
        refused = {held for held, _ in refusals}
        self._generator.submit(held for held in running if held not in refused)

    def _encode(self, running: Sequence[HeldJob]) -> list[tuple[HeldJob, str]]:
        refusals = []
        for held in running:
            if held.job.endpoint == "chat":
                continue  # the engine renders it
            try:
                held.prompt_ids = self._encoder.encode(held.job.prompt)
            except PromptRefused as error:
                refusals.append((held, str(error)))
        return refusals
