"""Results: what a job's settlement says.

Invariant: every token of a sample is covered by exactly one version span, and has one log-prob where log-probs
were asked for; so a result always says which policy made which token.
"""

from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rollpool.schemas.arrays import Float32Array, Int32Array
from rollpool.schemas.jobs import SamplingParams

#: The five ways a job can end.
Outcome = Literal["ok", "failed", "stale", "expired", "cancelled"]
OUTCOMES: tuple[Outcome, ...] = ("ok", "failed", "stale", "expired", "cancelled")

FinishReason = Literal["stop", "length", "abort"]


class VersionSpan(NamedTuple):
    """Tokens `start:end` of a sample were made by policy `version`."""

    version: int
    start: int
    end: int


class Sample(BaseModel):
    """One completion of a prompt."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, arbitrary_types_allowed=True)

    #: [G], special and stop tokens included; empty for `endpoint="chat"`, which returns text alone.
    output_ids: Int32Array
    #: [G] natural-log probabilities of the temperature-scaled distribution; empty for `endpoint="chat"`.
    logprobs: Float32Array
    text: str
    finish_reason: FinishReason
    version_spans: tuple[VersionSpan, ...] = Field(strict=False)
    #: Tokens of the prompt that the engine had in its prefix cache when it began; None: it did not say, as for a chat.
    cached_tokens: int | None = None

    @model_validator(mode="after")
    def _every_token_is_covered(self) -> "Sample":
        if len(self.logprobs) != len(self.output_ids):
            raise ValueError(f"{len(self.output_ids)} tokens but {len(self.logprobs)} log-probs")
        end = 0
        for span in self.version_spans:
            if span.start != end or span.end < span.start:
                raise ValueError(f"version spans are not contiguous: {self.version_spans}")
            end = span.end
        if end != len(self.output_ids):
            raise ValueError(f"version spans end at {end}, the sample at {len(self.output_ids)}")
        return self

    @property
    def versions(self) -> tuple[int, ...]:
        """The policy versions that made this sample, oldest first."""
        return tuple(span.version for span in self.version_spans)


class Group(BaseModel):
    """All samples of one prompt, or why there are none."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, arbitrary_types_allowed=True)

    run: str
    batch: str
    index: int
    outcome: Outcome
    #: The tag the job was enqueued with.
    policy_version: int
    #: [P], as the engine was sent them; empty when the job never reached an engine, or for `endpoint="chat"`.
    prompt_ids: Int32Array
    samples: tuple[Sample, ...] = Field(strict=False)
    sampling: SamplingParams
    metadata: Any = None
    #: Why the outcome is not `ok`.
    error: str | None = None
    #: The worker that settled it; empty when the server did.
    worker: str = ""
    #: Seconds from pull to settlement on that worker.
    seconds: float = 0.0

    @property
    def id(self) -> str:
        """The job's name."""
        return f"{self.batch}/{self.index}"

    @property
    def filtered(self) -> bool:
        """True when filtering made the behaviour policy differ from the one the log-probs describe."""
        return self.sampling.filtered

    @property
    def tokens(self) -> int:
        """Generated tokens of all samples."""
        return sum(len(sample.output_ids) for sample in self.samples)
