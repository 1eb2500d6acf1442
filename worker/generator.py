"""Runs jobs on one engine: one call a sample, never more samples in the engine than the target.

Invariant: a job handed in comes out by exactly one of the three callbacks of `Outlet`, or through `abandon`; finished
samples survive the fault of a sibling.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np

from rollpool.schemas import EngineUnavailable, Sample, VersionSpan
from rollpool.worker.engines.protocol import (
    ChatRequest,
    Completion,
    Engine,
    RequestRefused,
    SampleRequest,
    new_rid,
)
from rollpool.worker.held import NO_IDS, HeldJob

#: Calls of one sample on one engine before its job is given back: a lost connection is worth one more try where the
#: finished siblings are, an engine that keeps losing them is not.
TRIES_PER_SAMPLE = 3

#: Seconds between looks whether an engine that was out of reach answers again.
ASK_AGAIN_S = 0.5

#: Jobs lost in a row, without a sample in between, after which an engine that still answers counts as sick: one or two
#: may be the jobs' own doing, and each more is an attempt of an innocent job.
SICK_AFTER = 4

_NO_LOGPROBS = np.empty(0, dtype=np.float32)


class Outlet(Protocol):
    """Where jobs go when the generator is done with them."""

    def finished(self, held: HeldJob) -> None:
        """Every sample is there."""

    def refused(self, held: HeldJob, error: str) -> None:
        """The engine refused the job: its own fault."""

    def lost(self, held: HeldJob, error: str) -> None:
        """The engine failed it: the infrastructure's fault."""

    def broken(self, bug: BaseException) -> None:
        """Something of ours failed that cannot fail: what this host holds is not known any more."""


class Generator:
    """The samples of one engine.

    Args:
        engine: generates them.
        version: of the policy it serves.
        target: samples in the engine at most.
        outlet: where jobs go.
        on_change: called when samples begin or end.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        version: int,
        target: int,
        outlet: Outlet,
        on_change: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._version = version
        self._target = target
        self._outlet = outlet
        self._on_change = on_change
        self._waiting: deque[tuple[HeldJob, int]] = deque()
        self._tasks: dict[asyncio.Task[None], HeldJob] = {}
        self._jobs: set[HeldJob] = set()
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
        """Samples that could start now beyond those held."""
        return self._target - len(self._tasks) - len(self._waiting)

    def submit(self, jobs: Iterable[HeldJob]) -> None:
        """Take jobs over; their samples start as credits allow, in order."""
        for held in jobs:
            if held.left:  # its lease was lost on the way here
                continue
            self._jobs.add(held)
            self._waiting.extend((held, index) for index in range(held.job.n) if index not in held.samples)
        self._fill()

    def drop(self, held: HeldJob) -> None:
        """Stop work on a job that another host has by now; its samples end in the engine too."""
        self._leave(held)
        self._fill()

    def abandon(self, *, started: bool = True) -> list[HeldJob]:
        """Stop work and hand back the jobs: all, or only those of which no sample was started."""
        busy = set(self._tasks.values())
        leaving = [held for held in self._jobs if started or (held not in busy and not held.samples)]
        for held in leaving:
            self._leave(held)
        return leaving

    async def drain(self) -> None:
        """Wait until every job has left, or no call is left that could make one leave."""
        while self._jobs and self._tasks:
            await asyncio.wait(self._tasks)

    def _fill(self) -> None:
        while self._waiting and len(self._tasks) < self._target and not self._unanswered and not self.sick.is_set():
            held, index = self._waiting.popleft()
            if held.left:
                continue
            task = asyncio.create_task(self._sample(held, index))
            self._tasks[task] = held
            task.add_done_callback(self._ended)
        self._on_change()

    def _ended(self, task: asyncio.Task[None]) -> None:
        held = self._tasks.pop(task)
        if task.cancelled():
            self._exit(held, self._outlet.lost, "the engine's client cancelled its call")
        elif (bug := task.exception()) is not None:
            self._outlet.broken(bug)
        self._fill()

    def _leave(self, held: HeldJob) -> None:
        held.left = True
        self._jobs.discard(held)
        for task, owner in self._tasks.items():
            if owner is held and task is not asyncio.current_task():
                task.cancel()

    async def _sample(self, held: HeldJob, index: int) -> None:
        try:
            completion = await self._call(held)
        except RequestRefused as error:
            self._exit(held, self._outlet.refused, str(error))
        except EngineUnavailable as error:
            self._count_lost(held)
            self._exit(held, self._outlet.lost, str(error))
        else:
            self._keep(held, index, completion)

    def _count_lost(self, held: HeldJob) -> None:
        self._lost_in_a_row += not held.left
        if self._lost_in_a_row >= SICK_AFTER:
            self.sick.set()

    def _exit(self, held: HeldJob, tell: Callable[[HeldJob, str], None], reason: str) -> None:
        if not held.left:
            self._leave(held)
            tell(held, reason)

    async def _call(self, held: HeldJob) -> Completion:
        job = held.job
        for tries_left in reversed(range(TRIES_PER_SAMPLE)):
            try:
                if job.endpoint == "chat":
                    return await self._chat(held)
                return await self._engine.generate(
                    SampleRequest(rid=new_rid(), input_ids=held.prompt_ids, sampling=job.sampling)
                )
            except EngineUnavailable:
                await self._until_it_answers()
                if not tries_left:
                    raise
        raise AssertionError("unreachable: the last try returns or raises")

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

    async def _chat(self, held: HeldJob) -> Completion:
        messages = held.job.prompt
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        if isinstance(messages, np.ndarray):
            raise RequestRefused("endpoint='chat' takes text or messages, not token ids; use endpoint='generate'")
        return await self._engine.chat(ChatRequest(rid=new_rid(), messages=messages, sampling=held.job.sampling))

    def _keep(self, held: HeldJob, index: int, completion: Completion) -> None:
        if held.left:
            return
        ids = NO_IDS if completion.logprobs is None else completion.output_ids
        # The engine and its dialect vouch for lengths and types; the span says which weights this engine held.
        held.samples[index] = Sample.model_construct(
            output_ids=ids,
            logprobs=_NO_LOGPROBS if completion.logprobs is None else completion.logprobs,
            text=completion.text,
            finish_reason=completion.finish_reason,
            version_spans=(VersionSpan(self._version, 0, len(ids)),),
        )
        self._lost_in_a_row = 0
        self.samples_made += 1
        self.tokens_made += completion.completion_tokens
        if len(held.samples) == held.job.n:
            self._jobs.discard(held)
            held.left = True
            self._outlet.finished(held)
