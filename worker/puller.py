"""Pulls jobs as credits allow, and judges each before it may run.

Invariant: what is pulled is leased before anything else happens to it, and is then handed on: to the generator, or
to the settler with an outcome or a place to wait. Credits never wait for a job that may not run here.
"""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from rollpool.schemas import GROUP, Group, Keys, Outcome, SamplingParams
from rollpool.schemas.connection import runs_of
from rollpool.schemas.scripts import Entry, exact, parked, passed, pull, renew_async
from rollpool.worker.clock import ServerClock
from rollpool.worker.credits import MeanN, jobs_wanted
from rollpool.worker.generator import Generator
from rollpool.worker.heartbeat import Neighbours
from rollpool.worker.held import NO_IDS, HeldJob
from rollpool.worker.policy.offer import Offer
from rollpool.worker.settler import Settler
from rollpool.worker.suspects import admitted
from rollpool.worker.tokenizer import PromptEncoder, PromptRefused, needs_thread
from rollpool.worker.triage import Avoid, Budgets, Bury, Expire, Fail, Park, Pass, Passed, Run, Verdict, triage

log = logging.getLogger(__name__)

#: Milliseconds an idle host blocks on the streams before it looks for new runs, parked and delayed jobs.
BLOCK_MS = 1000

#: Seconds for which a host leaves what it lost twice to the others, before it looks again whether there are any: each
#: of them looks once meanwhile, wherever it is in its block. A time to wait, in the place of this, was in step with the
#: looks of the same host: it met the job again and again, ahead of the others. A job that wishes for another host waits
#: for that one as long.
LEAVE_S = 2 * BLOCK_MS / 1000

#: Milliseconds a host blocks while jobs come that wish for a host: what another passes on to it wakes nobody, and this
#: is how long such a job may lie there. A turn of a conversation takes seconds.
WISHED_BLOCK_MS = 100

#: Seconds since the last such job after which there is no conversation to wait for: tools of minutes are rare, and the
#: next turn finds the host in its block of a second at worst.
WISHED_S = 60.0

#: Seconds between looks when the pool has no run yet, or the server is out of reach.
LOOK_AGAIN_S = 0.25

#: Finished jobs whose settlement may be unconfirmed before a host pulls no more: bounds its memory while the server
#: is slow or away.
UNSETTLED_LIMIT = 1024


class Puller:
    """The pulling side of one engine."""

    def __init__(
        self,
        *,
        client: Redis,
        reader: Redis,
        keys: Keys,
        consumer: str,
        offer: Offer,
        budgets: Budgets,
        unread_bound: int,
        encoder: PromptEncoder,
        generator: Generator,
        settler: Settler,
        server_clock: ServerClock,
        hold: Callable[[Sequence[HeldJob]], None],
        neighbours: Neighbours,
        paused: Callable[[], bool],
        on_backlog: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._reader = reader
        self._keys = keys
        self._consumer = consumer
        self._offer = offer
        self._budgets = budgets
        self._unread_bound = unread_bound
        self._encoder = encoder
        self._generator = generator
        self._settler = settler
        self._server_clock = server_clock
        self._hold = hold
        self._neighbours = neighbours
        self._paused = paused
        self._on_backlog = on_backlog
        self._clock = clock
        self._worker = consumer.rpartition(":")[0]
        self._mean_n = MeanN()
        self._runs: list[str] = []
        self._runs_at = -math.inf
        self._stopping = False
        self._leaves_until = -math.inf
        self._wished_at = -math.inf
        self._changed = asyncio.Event()
        #: True while jobs wait that this host could run, as far as the last pull showed.
        self.backlog = False
        #: Monotonic seconds since which the pool had nothing for this host; None while it has, while it may not be
        #: asked, and before it was.
        self.idle_since: float | None = None

    def serve(self, offer: Offer, encoder: PromptEncoder | None = None) -> None:
        """Pull for these policies from now on, with another tokenizer where they have one."""
        self._offer, self._encoder = offer, encoder or self._encoder
        self.nudge()

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
        wanted = self._wanted()
        if wanted == 0 or self._paused():
            self.idle_since = None
            await self._wait_for_change()
            return
        if not self._runs or self._clock() - self._runs_at >= BLOCK_MS / 1000:
            await self._find_runs()  # also while there is work: another run must not wait for the end of this one
        pulled = await pull(
            self._client,
            self._keys,
            offers=[self._offer.for_run(run) for run in self._runs],
            consumer=self._consumer,
            wanted=wanted,
            unread_bound=self._unread_bound,
            leave=self._worker if self._clock() < self._leaves_until else "",
        )
        entries = pulled.entries
        self._show_backlog(len(entries) >= wanted)
        if not entries:
            if self.idle_since is None and not self._generator.jobs and not self._settler.unconfirmed:
                self.idle_since = self._clock()
            open_runs = [run for run in self._runs if run not in pulled.full]
            entries = await self._wait_for_jobs([run for run in open_runs if self._offer.policies(run)])
        if entries:
            self.idle_since = None
            await self._take(entries)

    def _wanted(self) -> int:
        wanted = jobs_wanted(self._generator.room, self._mean_n.value, self._settler.unconfirmed, UNSETTLED_LIMIT)
        seats = self._generator.seats
        return wanted if seats is None else min(wanted, seats)

    def _show_backlog(self, backlog: bool) -> None:
        if backlog != self.backlog:
            self.backlog = backlog
            self._on_backlog()

    async def _wait_for_change(self) -> None:
        try:
            await asyncio.wait_for(self._changed.wait(), timeout=BLOCK_MS / 1000)
        except TimeoutError:  # a pause ends without a change here
            return

    async def _wait_for_jobs(self, runs: Sequence[str]) -> list[Entry]:
        """Block until there is one; on one entry a stream, since the next pull takes the rest in order."""
        streams = [stream for run in runs for stream in self._keys.lanes(run)]
        if not streams:
            await asyncio.sleep(LOOK_AGAIN_S)
            return []
        try:
            reply = await self._reader.xreadgroup(
                GROUP, self._consumer, dict.fromkeys(streams, ">"), count=1, block=self._block_ms()
            )
        except ResponseError as error:
            if not any(word in str(error) for word in ("NOGROUP", "UNBLOCKED")):
                raise
            await self._make_groups(streams)
            return []
        return await self._still_open(Entry.from_streams(reply))

    def _block_ms(self) -> int:
        wished = self._clock() - self._wished_at < WISHED_S
        return min(BLOCK_MS, WISHED_BLOCK_MS) if wished else BLOCK_MS

    async def _make_groups(self, streams: Sequence[str]) -> None:
        """Begin again at its first entry what was never a stream, or vanished (FLUSHALL)."""
        async with self._client.pipeline(transaction=False) as pipe:
            for stream in streams:
                pipe.xgroup_create(stream, GROUP, id="0", mkstream=True)
            await pipe.execute(raise_on_error=False)  # most are there already

    async def _still_open(self, entries: Sequence[Entry]) -> list[Entry]:
        """Without those whose job was cancelled as the read began; a pull looks by itself."""
        kept = []
        for entry in entries:
            lost = await renew_async(self._client, self._keys, entry.stream, consumer=self._consumer, entries=[entry])
            if entry.id not in lost:
                kept.append(entry)
        return kept

    async def _find_runs(self) -> None:
        self._runs = await runs_of(self._client, self._keys)
        self._runs_at = self._clock()

    async def _take(self, entries: Sequence[Entry]) -> None:
        now = self._clock()
        running: list[HeldJob] = []
        held_jobs: list[tuple[HeldJob, Verdict]] = []
        for entry in entries:
            verdict = triage(
                entry,
                worker=self._worker,
                offer=self._offer,
                now_ms=self._server_clock.now_ms(),
                budgets=self._budgets,
            )
            if isinstance(verdict, Bury):
                self._bury(entry, verdict.error)
                continue
            self._mean_n.add(verdict.job.n)
            held = self._held(entry, verdict, now)
            held_jobs.append((held, verdict))
        self._hold([held for held, _ in held_jobs])
        for held, verdict in held_jobs:
            if isinstance(verdict, Run) or await self._must_run_here(verdict):
                running.append(held)
            else:
                await self._turn_away(held, verdict)
        await self._start(running)

    def _held(self, entry: Entry, verdict: Run | Avoid | Pass | Park | Passed | Expire | Fail, now: float) -> HeldJob:
        if not isinstance(verdict, Run | Avoid | Pass):
            return HeldJob.of(entry, verdict.job, now)
        policy = verdict.policy
        held = HeldJob.of(entry, verdict.job, now, generation=policy.generation)
        held.adapter, held.version = self._offer.adapter_of(policy), policy.version
        if verdict.job.host is not None:
            self._wished_at = now
            if verdict.job.host == self._worker:  # whoever has it next need not ask here again
                held.record = replace(held.record, passed=self._worker)
        return held

    async def _must_run_here(self, verdict: Verdict) -> bool:
        match verdict:
            case Avoid(job=job):
                return not await self._ask(self._neighbours.anyone_else_may_run(job, self._worker))
            case Pass(job=job, host=host):
                return not await self._ask(self._neighbours.may_run(job, host), unknown=False)
        return False

    async def _turn_away(self, held: HeldJob, verdict: Verdict) -> None:
        match verdict:
            case Park(version=version):
                self._settler.give_back(held, parked(version))
            case Avoid():
                self._settler.give_back(held)
                self._leaves_until = self._clock() + LEAVE_S
            case Pass(host=host):
                until = self._server_clock.now_ms() + int(1000 * LEAVE_S)
                self._settler.give_back(held, passed(until), record=replace(held.record, passed=host))
            case Expire() | Fail() if held.enough:
                await self._settle_with_what_is_there(held)
            case Expire():
                self._settler.settle(held, self._dropped(held, "expired", "its deadline was over when it was pulled"))
            case Fail(error=error):
                self._settler.settle(held, self._dropped(held, "failed", error), dead=error)
            case Passed(job=job) if await self._ask(self._neighbours.anyone_serves(job.run, job.policy_version)):
                self._settler.give_back(held, exact(job.policy_version))
            case Passed(job=job):
                here = self._offer.newest(job.run)
                reason = f"exact job for policy {job.policy_version}: no host serves it, this one is on {here}"
                self._settler.settle(held, self._dropped(held, "stale", reason))

    async def _settle_with_what_is_there(self, held: HeldJob) -> None:
        """Other hosts made enough of it; the trainer needs the prompt's ids as well."""
        refusals = await self._encoded([held])
        for _, error in refusals:
            self._settler.settle(held, self._dropped(held, "failed", error), dead=error)
        if not refusals:
            self._settler.settle(held, self._dropped(held, "ok", None))

    async def _ask(self, question: Awaitable[bool], *, unknown: bool = True) -> bool:
        try:
            return await question
        except RedisError as error:  # not known, and what was pulled with it must not wait for the answer
            log.warning("looking at the other hosts: %s", error)
            return unknown

    def _dropped(self, held: HeldJob, outcome: Outcome, error: str | None) -> Group:
        return held.group(outcome, worker=self._worker, now=self._clock(), error=error)

    def _bury(self, entry: Entry, error: str) -> None:
        """Dead-letter what is not a job; where its plain fields name an open one, the trainer learns that it failed."""
        log.error("entry %s of %s is not a job: %s", entry.id, entry.stream, error)
        batch, _, index = entry.job.partition("#")[0].rpartition("/")
        group = Group.model_construct(
            run=entry.run,
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
            taken = 0
        else:  # a suspect runs in small company, or alone: what came with it is for others too
            taken = admitted(self._generator.companies, [held.record.company for held in running])
        for held in running[taken:]:
            self._settler.give_back(held)
        running = running[:taken]
        refusals = await self._encoded(running)
        for held, error in refusals:
            self._settler.settle(held, self._dropped(held, "failed", error), dead=error)
        refused = {held for held, _ in refusals}
        left = [held for held in running if held not in refused]
        # The offer may have changed while prompts were encoded, and an adapter be on its way out of the engine.
        names = {policy.adapter_name for policy in self._offer.loaded}
        gone = {held for held in left if held.adapter is not None and held.adapter not in names}
        for held in gone:
            self._settler.give_back(held)
        self._generator.submit(held for held in left if held not in gone)

    async def _encoded(self, running: Sequence[HeldJob]) -> list[tuple[HeldJob, str]]:
        if any(needs_thread(held.job) for held in running):
            return await asyncio.to_thread(self._encode, running)
        return self._encode(running)

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
