"""The one small protocol behind which every engine sits; the pull loop sees nothing else of an engine.

Invariant: a `Completion` that exists is whole: its ids and log-probs are of one length, every log-prob is
finite, and it ended as the engine's own sampling (or our own abort) ended it. Everything else is one of two
faults, whose budgets the host keeps apart: `EngineUnavailable` (the infrastructure's: try the job
elsewhere) and `RequestRefused` (the job's own: it would be refused anywhere).
"""

import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from rollpool.schemas.errors import EngineUnavailable, RollpoolError
from rollpool.schemas.jobs import Message, SamplingParams
from rollpool.schemas.policies import Policy
from rollpool.schemas.results import FinishReason, VersionSpan

__all__ = [
    "Adapter",
    "ChatRequest",
    "Completion",
    "Engine",
    "EngineFacts",
    "EngineKilled",
    "EngineLoad",
    "EngineOwner",
    "EngineUnavailable",
    "FinishReason",
    "Line",
    "LoraSupport",
    "OnProgress",
    "RequestRefused",
    "SampleRequest",
    "WeightsRefused",
    "aborted_in_queue",
    "new_rid",
    "probe_request",
]

#: The two lines of sglang-jax that differ in what they accept and answer.
Line = Literal["main", "0.0.1.post1"]

#: How an engine comes to an adapter: never; only those named at its launch; or while it serves.
LoraSupport = Literal["none", "launch", "runtime"]

#: Told bytes that are there and bytes in all, while a source is fetched or verified.
OnProgress = Callable[[int, int], None]


class WeightsRefused(RollpoolError):  # noqa: N818 - the words of the design
    """The engine did not take new weights or an adapter, and serves what it served before.

    Attributes:
        restart_may_help: True when the source is not known to be broken: an engine launched on it may serve it.
    """

    def __init__(self, message: str, *, restart_may_help: bool = False) -> None:
        super().__init__(message)
        self.restart_may_help = restart_may_help


class EngineKilled(EngineUnavailable):
    """The engine was ended by SIGKILL while it started: by its own hand or by somebody's, which nothing tells apart."""


class RequestRefused(RollpoolError, ValueError):  # noqa: N818 - the words of the design
    """The engine, or the client before it, refused this request: the fault is the job's, not the host's."""


def new_rid() -> str:
    """A request id that is never reused and of one fixed length.

    The engine aborts by prefix and mixes up the replies of a repeated id, so both properties matter.
    """
    return uuid.uuid4().hex


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter as an engine knows it."""

    #: Immutable: no other weights ever have it.
    name: str
    #: Directory on this host.
    path: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SampleRequest:
    """One sample to generate, tokens in."""

    #: From `new_rid`; a fresh one for every call, retries included.
    rid: str
    #: The prompt, int32 [T].
    input_ids: NDArray[np.int32]
    sampling: SamplingParams
    #: Name of an adapter the engine holds; refused by an engine that would ignore it.
    lora_path: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """One chat completion, for evaluation: text comes back, no token ids."""

    rid: str
    messages: Sequence[Message]
    sampling: SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Completion:
    """What one request produced."""

    #: int32 [G], special tokens and a matched stop token included; empty for a chat.
    output_ids: NDArray[np.int32]
    #: float32 [G], one for each id; None for a chat.
    logprobs: NDArray[np.float32] | None
    text: str
    finish_reason: FinishReason
    #: As the engine counted them.
    prompt_tokens: int
    completion_tokens: int
    #: Tokens of the prompt that were in its prefix cache; None where it does not say.
    cached_tokens: int | None = None
    #: Which versions of the engine's own weights made which tokens, where the engine tells; empty: those that it was
    #: opened with, or changed to last, made them all.
    version_spans: tuple[VersionSpan, ...] = ()


def probe_request() -> SampleRequest:
    """Asks whether an engine really generates: two tokens, so that it decodes as well as prefills."""
    sampling = SamplingParams(max_new_tokens=2, ignore_eos=True)
    return SampleRequest(rid=new_rid(), input_ids=np.ones(1, np.int32), sampling=sampling)


def aborted_in_queue() -> Completion:
    """Of a chat that was aborted before it began."""
    return Completion(
        output_ids=np.empty(0, np.int32),
        logprobs=None,
        text="",
        finish_reason="abort",
        prompt_tokens=0,
        completion_tokens=0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What a running engine is and can do; learned once, when it has answered."""

    line: Line
    version: str
    #: Requests the engine really runs at once, not what it was asked for.
    max_running_requests: int
    #: Prompt and completion together, at most: a little under the model's own, since the engine keeps some
    #: back.
    context_length: int
    #: A prompt alone, at most.
    max_prompt_tokens: int
    #: Whether a request may name an adapter, and how the engine comes to one.
    lora: LoraSupport
    #: Adapters that fit at once; 0 where there are none.
    adapter_slots: int
    #: True when `swap` changes the weights while the engine serves.
    swaps: bool
    model_path: str
    tp_size: int
    #: Changes with every engine process, and so with its weights; compare with what `identify` returns.
    identity: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLoad:
    """What the engine says of itself now; None where its line does not say."""

    running: int | None = None
    waiting: int | None = None
    free_kv_tokens: int | None = None
    #: Tokens a second in the engine's last measuring window.
    throughput: float | None = None
    #: Decode steps so far; rises while the engine moves.
    steps: int | None = None


class Engine(Protocol):
    """An engine on this host, whatever runs it."""

    @property
    def facts(self) -> EngineFacts:
        """What the engine is; while this object lives only `swap` changes it: the model's path and the identity."""
        ...

    async def generate(self, request: SampleRequest) -> Completion:
        """Generate one sample; cancelling the call ends it in the engine too.

        Raises:
            RequestRefused: the request itself is at fault.
            EngineUnavailable: the engine is; nothing is known of the request.
        """
        ...

    async def chat(self, request: ChatRequest) -> Completion:
        """Answer one chat, rendered by the engine; text alone."""
        ...

    async def abort(self, rids: Iterable[str]) -> None:
        """End these requests; returns once their calls have ended, with what they have and finish reason `abort`."""
        ...

    async def load(self) -> EngineLoad | None:
        """What the engine runs now; None when it cannot say."""
        ...

    async def swap(self, checkpoint: str, version: int) -> None:
        """Serve the weights of a local checkpoint from now on; requests in flight go on under them.

        The prefix cache is flushed, and completions say in their spans where the change was.

        Raises:
            WeightsRefused: it does not take them, and serves what it served before.
            EngineUnavailable: nothing is known of the engine any more.
        """
        ...

    async def load_adapter(self, adapter: Adapter) -> None:
        """Have an adapter ready for requests that name it. Raises as `swap`; harmless to repeat."""
        ...

    async def unload_adapter(self, name: str) -> None:
        """Free the slot of an adapter that no request names any more. Raises as `swap`."""
        ...

    async def flush_cache(self) -> None:
        """Forget all cached prefixes. Raises WeightsRefused while requests keep it from doing so."""
        ...

    async def identify(self) -> str:
        """The identity of what answers now: differs from `facts.identity` once the engine was replaced."""
        ...

    async def close(self) -> None:
        """Let go of the engine's connections; the engine itself goes on."""
        ...


class EngineOwner(Protocol):
    """Who owns the engine of a host: the worker that launched it, or somebody else at a URL."""

    @property
    def controls_weights(self) -> bool:
        """True when `open` serves the checkpoint it is given."""
        ...

    @property
    def url(self) -> str:
        """Where the engine answers; empty while there is none."""
        ...

    async def stage(self, policy: Policy, on_progress: OnProgress) -> str:
        """Have a policy's own files on this host, whole and verified, while the engine goes on serving.

        Returns:
            The local directory, or what `open` is to be given for it.

        Raises:
            PolicyRejected: the source is outside the allowed roots, is not whole, or does not fit.
            EngineUnavailable: it cannot be reached now; another try may help.
        """
        ...

    async def merge(self, base: str, policy: Policy, adapter: str) -> str:
        """Merge a staged adapter into a staged base, as a checkpoint for engines without LoRA; its directory.

        Raises:
            PolicyRejected: the adapter does not fit the base, or cannot be merged exactly.
        """
        ...

    def keep(self, paths: Iterable[str]) -> None:
        """The staged directories that are in use; others may make room for what is staged next."""
        ...

    async def open(self, checkpoint: str, *, version: int, adapters: Sequence[Adapter] = ()) -> Engine:
        """Have an engine that really generates, with these adapters where it takes them at launch only.

        Raises:
            EngineUnavailable: it does not start.
        """
        ...

    @property
    def opened(self) -> str:
        """How the engine was opened, for people: seconds, and what its JIT cache missed."""
        ...

    async def watch(self) -> str:
        """Return the reason once the engine is dead or another."""
        ...

    async def close(self) -> None:
        """Let go of the engine; harmless to repeat."""
        ...
