"""Engines and owners that do what a test says, in its own process; and jobs to give them."""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from rollpool.schemas import EngineUnavailable, Policy, PolicyRejected, PromptJob, Sample, VersionSpan
from rollpool.schemas.scripts import Entry, Record
from rollpool.schemas.wire import pack_model, pack_samples
from rollpool.worker.engines.protocol import (
    Adapter,
    ChatRequest,
    Completion,
    EngineFacts,
    EngineKilled,
    EngineLoad,
    LoraSupport,
    OnProgress,
    SampleRequest,
    WeightsRefused,
)
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
    #: Tokens that an aborted call answers with; a call that answered so is in `aborted`.
    partial: Callable[[Request], Completion] = lambda _: completion(0)
    aborted: list[Request] = field(default_factory=list)
    #: Checkpoints it was changed to, adapters it has, names it unloaded, and how often its cache was flushed.
    swapped: list[tuple[str, int]] = field(default_factory=list)
    adapters: dict[str, str] = field(default_factory=dict)
    unloaded: list[str] = field(default_factory=list)
    flushed: int = 0
    #: Sources that it does not take.
    refusals: dict[str, WeightsRefused] = field(default_factory=dict)
    #: Set to have a swap wait.
    swap_gate: asyncio.Event | None = None

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

    async def abort(self, rids: Iterable[str]) -> None:
        """Each open call among them answers with the tokens it has."""
        if self.dead is not None:
            raise self.dead
        for rid in list(rids):
            call = self.open.get(rid)
            if call is not None and not call.answer.done():
                self.aborted.append(call.request)
                call.answer.set_result(replace(self.partial(call.request), finish_reason="abort"))

    async def swap(self, checkpoint: str, version: int) -> None:
        if self.swap_gate is not None:
            await self.swap_gate.wait()
        self._take(checkpoint)
        self.swapped.append((checkpoint, version))
        self.facts = replace(self.facts, model_path=checkpoint)

    async def load_adapter(self, adapter: Adapter) -> None:
        self._take(adapter.path)
        assert len(self.adapters) < self.facts.adapter_slots, "one adapter more than there are slots"
        self.adapters[adapter.name] = adapter.path

    async def unload_adapter(self, name: str) -> None:
        users = [call for call in self.open.values() if getattr(call.request, "lora_path", None) == name]
        if users:
            raise WeightsRefused(f"{name} is in use")
        del self.adapters[name]
        self.unloaded.append(name)

    async def flush_cache(self) -> None:
        self.flushed += 1

    def _take(self, source: str) -> None:
        if self.dead is not None:
            raise self.dead
        if refusal := self.refusals.get(source):
            raise refusal

    async def load(self) -> EngineLoad | None:
        if self.dead is not None:
            raise self.dead
        return None

    async def identify(self) -> str:
        return self.facts.identity

    async def close(self) -> None: ...


def fake_engine(
    *,
    slots: int = 4,
    model_path: str = "/",
    reply: Callable[[Request], Reply] | None = None,
    lora: LoraSupport = "none",
    adapter_slots: int = 0,
    swaps: bool = False,
) -> FakeEngine:
    facts = EngineFacts(
        line="main",
        version="fake",
        max_running_requests=slots,
        max_prompt_tokens=4096,
        context_length=8192,
        lora=lora,
        adapter_slots=adapter_slots,
        swaps=swaps,
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
    opened = "at once"

    def __init__(
        self,
        *,
        slots: int = 4,
        holding: bool = False,
        faults: dict[str, str] | None = None,
        lora: LoraSupport = "none",
        adapter_slots: int = 0,
        swaps: bool = False,
    ) -> None:
        self.slots = slots
        self.holding = holding
        self.faults = faults or {}
        self.lora, self.adapter_slots, self.swaps = lora, adapter_slots, swaps
        #: Sources that cannot be used, and those that cannot be reached now, with what is said.
        self.missing: dict[str, str] = {}
        self.unreachable: dict[str, str] = {}
        #: What was staged, merged, and is to be kept.
        self.staged: list[str] = []
        self.merged: list[tuple[str, str]] = []
        self.kept: set[str] = set()
        self.launches: list[str] = []
        self.launched_adapters: list[list[str]] = []
        self.engines: list[FakeEngine] = []
        #: Set to have every engine answer so.
        self.reply: Callable[[Request], Reply] | None = None
        #: Engines that are killed as they start, from now on.
        self.killings = 0
        #: Set to have `open` wait.
        self.gate: asyncio.Event | None = None
        self.open_now = 0
        self._death: asyncio.Future[str] | None = None

    @property
    def engine(self) -> FakeEngine:
        return self.engines[-1]

    async def stage(self, policy: Policy, on_progress: OnProgress) -> str:
        self.staged.append(policy.source)
        on_progress(1, 1)
        if reason := self.missing.get(policy.source):
            raise PolicyRejected(reason)
        if reason := self.unreachable.get(policy.source):
            raise EngineUnavailable(reason)
        return policy.source

    async def merge(self, base: str, policy: Policy, adapter: str) -> str:
        self.merged.append((base, adapter))
        if reason := self.missing.get(f"{base}+{adapter}"):
            raise PolicyRejected(reason)
        return f"{base}+{adapter}"

    def keep(self, paths: Iterable[str]) -> None:
        self.kept = set(paths)

    async def open(self, checkpoint: str, *, version: int, adapters: Sequence[Adapter] = ()) -> FakeEngine:
        self.launches.append(checkpoint)
        self.launched_adapters.append([adapter.name for adapter in adapters])
        if self.gate is not None:
            await self.gate.wait()
        if self.killings:
            self.killings -= 1
            raise EngineKilled("SIGKILL")
        if reason := self.faults.get(checkpoint):
            raise EngineUnavailable(reason)
        assert self.open_now == 0, "two engines at once on one host"
        self.open_now = 1
        self._death = asyncio.get_running_loop().create_future()
        reply = self.reply or ((lambda _: None) if self.holding else lambda _: completion(first=version))
        engine = fake_engine(
            slots=self.slots,
            model_path=checkpoint,
            reply=reply,
            lora=self.lora,
            adapter_slots=self.adapter_slots,
            swaps=self.swaps,
        )
        engine.adapters = {adapter.name: adapter.path for adapter in adapters}
        self.engines.append(engine)
        return engine

    async def watch(self) -> str:
        assert self._death is not None
        return await asyncio.shield(self._death)

    def die(self, reason: str = "the scheduler died") -> None:
        assert self._death is not None
        self.engine.fail_all(EngineUnavailable(reason))
        self._death.set_result(reason)

    async def close(self) -> None:
        self.open_now = 0
