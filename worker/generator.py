"""Runs jobs on one engine: one call a sample, never more samples in the engine than the target.

Invariant: a job handed in comes out by exactly one of the first five callbacks of `Outlet`, or through `abandon`,
`interrupt` or `drop`; finished samples survive the fault of a sibling; no job is in the engine with more others than
its record allows; and no token is kept of a policy that the job's tag forbids.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rollpool.schemas import EngineUnavailable, Policy, Sample
from rollpool.worker.engines.protocol import (
    ChatRequest,
    Completion,
    Engine,
    RequestRefused,
    SampleRequest,
    new_rid,
)
from rollpool.worker.held import HeldJob
from rollpool.worker.samples import Ask, ask_for, can_go_on, is_piece, sample_of
from rollpool.worker.suspects import least

#: Calls of one sample on one engine before its job is given back: a lost connection is worth one more try where the
#: finished siblings are, an engine that keeps losing them is not.
TRIES_PER_SAMPLE = 3

#: Seconds between looks whether an engine that was out of reach answers again.
ASK_AGAIN_S = 0.5

#: Jobs lost in a row, without a sample in between, after which an engine that still answers counts as sick: one or two
#: may be the jobs' own doing, and each more is an attempt of an innocent job.
SICK_AFTER = 4

#: Seconds that an engine may take to hand out the tokens of what it is told to end: it does so between two steps.
INTERRUPT_S = 10.0


class Outlet(Protocol):
    """Where jobs go when the generator is done with them."""

    def finished(self, held: HeldJob) -> None:
        """Every sample is there."""

    def refused(self, held: HeldJob, error: str) -> None:
        """The engine refused the job: its own fault."""

    def lost(self, held: HeldJob, error: str) -> None:
        """The engine failed it: the infrastructure's fault."""

    def expired(self, held: HeldJob) -> None:
        """Its deadline came before its last sample."""

    def misplaced(self, held: HeldJob) -> None:
        """The engine's policy changed to one that it may not run on."""

    def broken(self, bug: BaseException) -> None:
        """Something of ours failed that cannot fail: what this host holds is not known any more."""


class Generator:
    """The samples of one engine.

    Args:
        engine: generates them.
        policy: whose weights the engine has.
        decode: text of token ids, for samples that were made in pieces.
        target: samples in the engine at most.
        outlet: where jobs go.
        on_change: called when samples begin or end.
        seconds_to: from now until a time of the server in milliseconds.
        sample_timeout_s: a sample that takes longer is one that the engine forgot.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        policy: Policy,
        decode: Callable[[NDArray[np.int32]], str],
        target: int,
        outlet: Outlet,
        on_change: Callable[[], None],
        seconds_to: Callable[[int], float],
        sample_timeout_s: float,
    ) -> None:
        self._engine = engine
        self._policy = policy
        self._decode = decode
        self._target = target
        self._outlet = outlet
        self._on_change = on_change
        self._seconds_to = seconds_to
        self._sample_timeout_s = sample_timeout_s
        self._waiting: deque[tuple[HeldJob, int]] = deque()
        self._tasks: dict[asyncio.Task[None], HeldJob] = {}
        #: Ids of the requests that the engine has, by the task that waits for each.
        self._rids: dict[asyncio.Task[None], str] = {}
        self._closing = False
        #: When each of them began, in seconds of the loop; the oldest first.
        self._begun: dict[asyncio.Task[None], float] = {}
        self._watch: asyncio.TimerHandle | None = None
        self._jobs: set[HeldJob] = set()
        #: Those of which a sample was begun: what a dying engine takes along.
        self._inside: set[HeldJob] = set()
        #: How many were taken out of the engine unfinished since it last made a sample.
        self._taken_out = 0
        #: Those whose record limits their company.
        self._limited: set[HeldJob] = set()
        self._alarms: dict[HeldJob, asyncio.TimerHandle] = {}
        self._unanswered = 0
        self._lost_in_a_row = 0
        #: Set once the engine loses job after job and makes nothing, though it answers; nothing begins any more.
        self.sick = asyncio.Event()
        self.samples_made = 0
        self.tokens_made = 0

    @property
    def in_flight(self) -> int:
        """Samples in the engine."""
        return len(self._tasks)

    @property
    def waiting(self) -> int:
        """Samples held here that wait for a credit."""
        return len(self._waiting)

    @property
    def jobs(self) -> int:
        """Jobs not finished."""
        return len(self._jobs)

    @property
    def room(self) -> int:
        """Samples that could start now beyond those held; none while a job needs the others to leave."""
        if self.seats == 0:
            return 0
        return self._target - len(self._tasks) - len(self._waiting)

    @property
    def seats(self) -> int | None:
        """Jobs that may join those here; None while no job limits its company."""
        limit = least(held.record.company for held in self._limited)
        return None if limit is None else max(0, limit - len(self._jobs))

    @property
    def company(self) -> int:
        """Jobs of which an engine that dies now may have died: those in it, and those it was rid of in vain."""
        return len(self._inside) + self._taken_out

    @property
    def companies(self) -> list[int | None]:
        """For each job here, how many may be in the engine with it, itself included; None: any number."""
        return [held.record.company for held in self._jobs]

    def serve(self, policy: Policy, decode: Callable[[NDArray[np.int32]], str]) -> None:
        """The engine's weights are this policy's from now on."""
        self._policy, self._decode = policy, decode

    def retarget(self, target: int) -> None:
        """Have so many samples in the engine from now on, at most."""
        self._target = target
        self._fill()

    def submit(self, jobs: Iterable[HeldJob]) -> None:
        """Take jobs over; their samples start as credits allow, in order."""
        for held in jobs:
            if held.left:  # its lease was lost on the way here
                continue
            self._jobs.add(held)
            if held.record.company is not None:
                self._limited.add(held)
            self._waiting.extend((held, index) for index in range(held.job.n) if index not in held.samples)
            self._watch_deadline(held)
            if len(held.samples) == held.job.n:  # other hosts finished them all
                self._finish(held)
        self._fill()

    def drop(self, held: HeldJob) -> None:
        """Stop work on a job that another host has by now; its samples end in the engine too."""
        self._leave(held)
        self._fill()

    def abandon(self, *, started: bool = True, which: Callable[[HeldJob], bool] | None = None) -> list[HeldJob]:
        """Stop work and hand back the jobs: all, only those of which no sample was started, or those asked for."""
        leaving = [held for held in self._jobs if started or held not in self._inside]
        leaving = [held for held in leaving if which is None or which(held)]
        for held in leaving:
            self._leave(held)
        return leaving

    async def interrupt(self) -> list[HeldJob]:
        """Begin nothing more, stop what runs, and hand back the jobs with the tokens that the engine has made."""
        self._closing = True
        asked = {task: rid for task, rid in self._rids.items() if can_go_on(self._tasks[task].job)}
        with suppress(EngineUnavailable, TimeoutError):  # then there are no tokens to be had
            async with asyncio.timeout(INTERRUPT_S):
                await self._engine.abort(asked.values())
                if asked:
                    await asyncio.wait(asked)
        return self.abandon()

    async def drain(self) -> None:
        """Wait until every job has left, or no call is left that could make one leave."""
        while self._jobs and self._tasks:
            await asyncio.wait(self._tasks)

    def go_on(self) -> None:
        """Begin samples again after `interrupt`."""
        self._closing = False
        self._fill()

    def _fill(self) -> None:
        while self._waiting and len(self._tasks) < self._target and self._may_begin:
            held, index = self._waiting[0]
            if not held.left and not self._may_enter(held):
                break
            self._waiting.popleft()
            if held.left:
                continue
            self._inside.add(held)
            task = asyncio.create_task(self._sample(held, index))
            self._tasks[task] = held
            self._begun[task] = asyncio.get_running_loop().time()
            task.add_done_callback(self._ended)
        self._keep_watch()
        self._on_change()

    @property
    def _may_begin(self) -> bool:
        return not self._closing and not self._unanswered and not self.sick.is_set()

    def _keep_watch(self) -> None:
        """Have the oldest sample looked at when its time is over: one timer, since there are many samples."""
        if self._watch is None and self._begun:
            oldest = next(iter(self._begun.values()))
            loop = asyncio.get_running_loop()
            self._watch = loop.call_at(oldest + self._sample_timeout_s, self._look_for_forgotten)

    def _look_for_forgotten(self) -> None:
        """An engine that goes on with others while one never ends has forgotten it; another try would take as long."""
        self._watch = None
        over = asyncio.get_running_loop().time() - self._sample_timeout_s
        for task in [task for task, begun in self._begun.items() if begun <= over]:
            del self._begun[task]
            held = self._tasks[task]
            self._count_lost(held)
            reason = f"the engine did not end a sample within sample_timeout_s={self._sample_timeout_s:g} s"
            self._exit(held, self._outlet.lost, reason)
        self._fill()

    def _may_enter(self, held: HeldJob) -> bool:
        if not self._limited or held in self._inside:
            return True
        limit = least([held.record.company, *(each.record.company for each in self._limited & self._inside)])
        return limit is None or len(self._inside) < limit

    def _watch_deadline(self, held: HeldJob) -> None:
        if held.job.deadline_ms is not None:
            seconds = max(0.0, self._seconds_to(held.job.deadline_ms))
            self._alarms[held] = asyncio.get_running_loop().call_later(seconds, self._expire, held)

    def _expire(self, held: HeldJob) -> None:
        if not held.left:
            self._leave(held)
            self._outlet.expired(held)
            self._fill()

    def _ended(self, task: asyncio.Task[None]) -> None:
        held = self._tasks.pop(task)
        self._begun.pop(task, None)
        self._rids.pop(task, None)
        if task.cancelled():
            self._exit(held, self._outlet.lost, "the engine's client cancelled its call")
        elif (bug := task.exception()) is not None:
            self._outlet.broken(bug)
        self._fill()

    def _forget(self, held: HeldJob) -> None:
        held.left = True
        self._jobs.discard(held)
        self._inside.discard(held)
        self._limited.discard(held)
        if alarm := self._alarms.pop(held, None):
            alarm.cancel()

    def _finish(self, held: HeldJob) -> None:
        self._forget(held)
        self._outlet.finished(held)

    def _leave(self, held: HeldJob) -> None:
        self._taken_out += held in self._inside
        self._forget(held)
        for task, owner in self._tasks.items():
            if owner is held and task is not asyncio.current_task():
                task.cancel()

    async def _sample(self, held: HeldJob, index: int) -> None:
        version = self._policy.version if held.adapter is None else held.version
        ask = ask_for(held.prompt_ids, held.job.sampling, held.pieces.get(index), self._engine.facts.max_prompt_tokens)
        try:
            completion = await self._call(held, ask)
        except RequestRefused as error:
            self._exit(held, self._outlet.refused, str(error))
        except EngineUnavailable as error:
            self._count_lost(held)
            self._exit(held, self._outlet.lost, str(error))
        else:
            if held.adapter is not None:  # the engine tells the version of its own weights, below the adapter
                completion = replace(completion, version_spans=())
            self._keep(held, index, completion, sample_of(completion, version, ask.piece, self._decode))

    def _count_lost(self, held: HeldJob) -> None:
        self._lost_in_a_row += not held.left
        if self._lost_in_a_row >= SICK_AFTER:
            self.sick.set()

    def _exit(self, held: HeldJob, tell: Callable[[HeldJob, str], None], reason: str) -> None:
        if not held.left:
            self._leave(held)
            tell(held, reason)

    async def _call(self, held: HeldJob, ask: Ask) -> Completion:
        for tries_left in reversed(range(TRIES_PER_SAMPLE)):
            try:
                return await self._once(held, ask, new_rid())
            except EngineUnavailable:
                if self._closing:
                    raise
                await self._until_it_answers()
                if not tries_left:
                    raise
        raise AssertionError("unreachable: the last try returns or raises")

    async def _once(self, held: HeldJob, ask: Ask, rid: str) -> Completion:
        task = asyncio.current_task()
        assert task is not None
        self._rids[task] = rid
        if held.job.endpoint == "chat":
            return await self._chat(held, rid)
        return await self._engine.generate(
            SampleRequest(rid=rid, input_ids=ask.input_ids, sampling=ask.sampling, lora_path=held.adapter)
        )

    async def _until_it_answers(self) -> None:
        """Wait while the engine is out of reach, and begin nothing: if it is dead, that is the host's to notice.

        Else every job there is would be begun, lost and charged before it does.
        """
        self._unanswered += 1
        try:
            while not await self._answers():  # noqa: ASYNC110 - it is another process
                await asyncio.sleep(ASK_AGAIN_S)
        finally:
            self._unanswered -= 1
        self._fill()

    async def _answers(self) -> bool:
        try:
            await self._engine.load()
        except EngineUnavailable:
            return False
        return True

    async def _chat(self, held: HeldJob, rid: str) -> Completion:
        messages = held.job.prompt
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        if isinstance(messages, np.ndarray):
            raise RequestRefused("endpoint='chat' takes text or messages, not token ids; use endpoint='generate'")
        return await self._engine.chat(ChatRequest(rid=rid, messages=messages, sampling=held.job.sampling))

    def _keep(self, held: HeldJob, index: int, completion: Completion, sample: Sample) -> None:
        if held.left:
            return
        if not all(held.job.may_run_on(version) for version in sample.versions):
            self._leave(held)
            self._outlet.misplaced(held)
            return
        self.tokens_made += completion.completion_tokens
        if is_piece(sample):
            if len(sample.output_ids) < held.job.sampling.max_new_tokens:
                held.pieces[index] = sample
                return
            sample = sample.model_copy(update={"finish_reason": "length"})  # it was ended at its last token
        held.pieces.pop(index, None)
        held.samples[index] = sample
        self._lost_in_a_row = self._taken_out = 0
        self.samples_made += 1
        if len(held.samples) == held.job.n:
            self._finish(held)
