"""Engines and owners that do what a test says, in its own process; and jobs to give them."""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rollpool.schemas import EngineUnavailable, PromptJob, Sample, VersionSpan
from rollpool.schemas.scripts import Entry, Record
from rollpool.schemas.wire import pack_model, pack_samples
from rollpool.worker.engines.protocol import ChatRequest, Completion, EngineFacts, EngineLoad, SampleRequest
from rollpool.worker.held import HeldJob

Request = SampleRequest | ChatRequest

#: What an engine answers: a completion, an error to raise, or None to let the call wait.
Reply = Completion | Exception | None


def completion(tokens: int = 2, *, first: int = 0) -> Completion:
    return Completion(
        output_ids=np.arange(first, first + tokens, dtype=np.int32),
        logprobs=np.full(tokens, -0.5, np.float32),
        text="x" * tokens,
        finish_reason="length",
        prompt_tokens=1,
        completion_tokens=tokens,
    )


def job(index: int = 0, **fields: Any) -> PromptJob:
    given = {"run": "r", "batch": "b", "index": index, "prompt": [1, 2], "policy_version": 0, **fields}
    return PromptJob.model_validate(given)


def entry_of(job: PromptJob, *, id: str = "1-1", **fields: bytes) -> Entry:
    plain = {b"job": job.id.encode(), b"run": job.run.encode(), b"body": pack_model(job)}
    stream = f"rollpool:{{test}}:jobs:{job.run}:{job.lane}"
    return Entry(stream, id, plain | {name.encode(): value for name, value in fields.items()})


def sample(tokens: int = 1, *, text: str = "x", version: int = 0) -> Sample:
    # Not validated, as the generator makes them: an engine's text may be what no sample is allowed to hold.
    return Sample.model_construct(
        output_ids=np.arange(tokens, dtype=np.int32),
        logprobs=np.full(tokens, -0.5, np.float32),
        text=text,
        finish_reason="stop",
        version_spans=(VersionSpan(version, 0, tokens),),
    )


def held_job(
    index: int = 0, *, record: Record | None = None, done: Mapping[int, Sample] | None = None, **fields: Any
) -> HeldJob:
    """As pulled and tokenized; an engine knows whose sample it makes by the first id, the job's index.

    Args:
        index: of the job in its batch.
        record: what delivery has cost it.
        done: samples that other hosts finished.
        fields: of the job.
    """
    made = job(index, **fields)
    carried = {name: str(value).encode() for name, value in (record or Record()).fields().items()}
    if done:
        carried["done"] = pack_samples(done)
    held = HeldJob.of(entry_of(made, id=f"{index + 1}-1", **carried), made, 0.0)
    held.prompt_ids = np.array([index, 2], np.int32)
    return held


@dataclass(eq=False)
class Call:
    """One call of an engine that a test has to answer."""

    request: Request
    answer: "asyncio.Future[Completion]"
    cancelled: bool = False


@dataclass(eq=False)
class FakeEngine:
    """Answers as `reply` says; where that says None, when the test sets the call's answer."""

    facts: EngineFacts
    reply: Callable[[Request], Reply] = lambda _: None
    calls: list[Call] = field(default_factory=list)
    #: Calls that wait for the test.
    open: dict[str, Call] = field(default_factory=dict)
    most_open: int = 0
    dead: Exception | None = None

    async def generate(self, request: SampleRequest) -> Completion:
        return await self._call(request)

    async def chat(self, request: ChatRequest) -> Completion:
        return await self._call(request)

    async def _call(self, request: Request) -> Completion:
        call = Call(request, asyncio.get_running_loop().create_future())
        self.calls.append(call)
        self.open[request.rid] = call
        self.most_open = max(self.most_open, len(self.open))
        try:
            match self.reply(request):
                case Completion() as done:
                    await asyncio.sleep(0)
                    return done
                case Exception() as error:
                    raise error
            return await call.answer
        except asyncio.CancelledError:
            call.cancelled = True
            raise
        finally:
            del self.open[request.rid]

    def fail_all(self, error: Exception) -> None:
        """Every open call, and every later one, raises: the engine is gone."""
        self.dead = error
        self.reply = lambda _: error
        for call in list(self.open.values()):
            if not call.answer.done():
                call.answer.set_exception(error)

    async def abort(self, rids: Iterable[str]) -> None: ...

    async def load(self) -> EngineLoad | None:
        if self.dead is not None:
            raise self.dead
        return None

    async def identify(self) -> str:
        return self.facts.identity

    async def close(self) -> None: ...


def fake_engine(
    *, slots: int = 4, model_path: str = "/", reply: Callable[[Request], Reply] | None = None
) -> FakeEngine:
    facts = EngineFacts(
        line="main",
        version="fake",
        max_running_requests=slots,
        max_prompt_tokens=4096,
        context_length=8192,
        lora=False,
        model_path=model_path,
        tp_size=1,
        identity="fake",
    )
    return FakeEngine(facts, reply or (lambda _: None))


class FakeOwner:
    """Opens an engine that answers at once with tokens that tell its checkpoint, `/policy/VERSION`.

    Args:
        slots: of each engine.
        holding: engines let their calls wait for the test.
        faults: checkpoints that do not start, with what is said then.
    """

    controls_weights = True
    url = "http://fake"

    def __init__(self, *, slots: int = 4, holding: bool = False, faults: dict[str, str] | None = None) -> None:
        self.slots = slots
        self.holding = holding
        self.faults = faults or {}
        #: Checkpoints that `check` sees are not there, with what it says.
        self.missing: dict[str, str] = {}
        self.opened: list[str] = []
        self.engines: list[FakeEngine] = []
        #: Set to have every engine answer so.
        self.reply: Callable[[Request], Reply] | None = None
        #: Set to have `open` wait.
        self.gate: asyncio.Event | None = None
        self.open_now = 0
        self._death: asyncio.Future[str] | None = None

    @property
    def engine(self) -> FakeEngine:
        return self.engines[-1]

    async def check(self, checkpoint: str) -> None:
        if reason := self.missing.get(checkpoint):
            raise EngineUnavailable(reason)

    async def open(self, checkpoint: str) -> FakeEngine:
        self.opened.append(checkpoint)
        if self.gate is not None:
            await self.gate.wait()
        if reason := self.faults.get(checkpoint):
            raise EngineUnavailable(reason)
        assert self.open_now == 0, "two engines at once on one host"
        self.open_now = 1
        first = int(checkpoint.rpartition("/")[2])
        self._death = asyncio.get_running_loop().create_future()
        reply = self.reply or ((lambda _: None) if self.holding else lambda _: completion(first=first))
        self.engines.append(fake_engine(slots=self.slots, model_path=checkpoint, reply=reply))
        return self.engine

    async def watch(self) -> str:
        assert self._death is not None
        return await asyncio.shield(self._death)

    def die(self, reason: str = "the scheduler died") -> None:
        assert self._death is not None
        self.engine.fail_all(EngineUnavailable(reason))
        self._death.set_result(reason)

    async def close(self) -> None:
        self.open_now = 0
