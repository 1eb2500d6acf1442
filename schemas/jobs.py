"""Prompt jobs: what a trainer asks for.

Invariant: a `PromptJob` that exists is one that an engine can run; everything a user can get wrong is refused
here, by field name, before anything is sent. Models are frozen and refuse unknown fields.
"""

from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

#: Lanes, most urgent first: the order in which a host reads them.
LANES = ("high", "default", "low")
Lane = Literal["high", "default", "low"]

#: Which call of the engine runs the job; `chat` is for evaluation and returns text alone.
Endpoint = Literal["generate", "chat"]

#: A name that stands in a Redis key or a file name: runs, batches, pools, workers.
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]


class SamplingParams(BaseModel):
    """How the engine samples; the names and meanings are sglang's own.

    Log-probs of results are those of the temperature-scaled distribution before top-k, top-p and min-p.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    #: Tokens to generate at most.
    max_new_tokens: int = Field(default=128, ge=1)
    #: Fewest tokens before an end-of-sequence or stop may end the sample.
    min_new_tokens: int = Field(default=0, ge=0)
    #: 0 is greedy.
    temperature: float = Field(default=1.0, ge=0.0)
    #: Sample from the most likely tokens that together reach this probability; 1 keeps all.
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    #: Sample from so many of the most likely tokens; -1 keeps the whole vocabulary.
    top_k: int = Field(default=-1, ge=-1)
    #: Drop tokens less likely than this share of the likeliest one; refused by engines that ignore it.
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    #: Subtracted from a token's logit for each time it was generated, and once if it was at all.
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    #: A sample ends after any of these texts, or of these ids; they stay in it.
    stop: tuple[str, ...] = Field(default=(), strict=False)
    stop_token_ids: tuple[int, ...] = Field(default=(), strict=False)
    #: Go on to `max_new_tokens` whatever is generated.
    ignore_eos: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> "SamplingParams":
        if self.top_k == 0:
            raise ValueError("top_k: 0 keeps no token; use -1 for the whole vocabulary")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens: {self.min_new_tokens} is over max_new_tokens={self.max_new_tokens}")
        return self

    @property
    def filtered(self) -> bool:
        """True when the tokens were drawn from another distribution than the log-probs describe."""
        return (
            self.top_p < 1.0
            or self.top_k != -1
            or self.min_p > 0.0
            or self.frequency_penalty != 0.0
            or self.presence_penalty != 0.0
            or self.temperature == 0.0
            or self.min_new_tokens > 0
        )


#: A chat message: `{"role": "user", "content": "…"}`; further string keys go to the template untouched.
Message = dict[str, Any]


def _prompt(value: Any) -> Any:
    """Accept text, token ids (list or one-dimensional integer array) or chat messages; name what is wrong."""
    if isinstance(value, str):
        if not value:
            raise ValueError("the text is empty")
        return value
    if isinstance(value, np.ndarray):
        return _token_ids(value)
    if not isinstance(value, list | tuple):
        raise ValueError(
            f"a prompt is a string, token ids (list or numpy) or chat messages, not {type(value).__name__}"
        )
    if not value:
        raise ValueError("the prompt is an empty list")
    kinds = {_item_kind(item) for item in value}
    if kinds == {"id"}:
        return _token_ids(np.asarray(value))
    if kinds == {"message"}:
        return [_message(item) for item in value]
    raise ValueError(f"a prompt is of one kind, this list mixes or holds: {', '.join(sorted(kinds))}")


def _item_kind(item: Any) -> str:
    if isinstance(item, bool):
        return "bool"
    if isinstance(item, int | np.integer):
        return "id"
    return "message" if isinstance(item, dict) else type(item).__name__


_MAX_ID = np.iinfo(np.int32).max


def _token_ids(ids: NDArray[Any]) -> NDArray[np.int32]:
    if ids.ndim != 1 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"token ids are a non-empty one-dimensional integer array, not {ids.dtype} of shape {ids.shape}"
        )
    # Seen as unsigned, a negative id is too large as well: one pass instead of two, on the path of every job.
    unsigned = ids.view(f"u{ids.dtype.itemsize}") if ids.dtype.kind == "i" else ids
    if unsigned.max() > _MAX_ID:
        raise ValueError(f"token ids lie in 0..2^31-1, these in {ids.min()}..{ids.max()}")
    return ids.astype("<i4", copy=False)


def _message(message: dict[Any, Any]) -> Message:
    for field in ("role", "content"):
        if not isinstance(message.get(field), str) or not message[field]:
            raise ValueError(f"a chat message needs a non-empty string {field!r}: {message!r:.120}")
    return message


#: Text, token ids [T] int32, or chat messages.
Prompt = Annotated[str | NDArray[np.int32] | list[Message], BeforeValidator(_prompt)]


class PromptJob(BaseModel):
    """One prompt, `n` samples, one policy version tag: the unit that is delivered and settled."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, arbitrary_types_allowed=True)

    run: Name
    batch: Name
    #: Position of the prompt in its batch.
    index: int = Field(ge=0)
    prompt: Prompt
    #: Samples of this prompt: the group, or one part of it.
    n: int = Field(default=1, ge=1)
    #: Into how many jobs the group is split, each of `n` samples, and which of them this is.
    parts: int = Field(default=1, ge=1)
    part: int = Field(default=0, ge=0)
    #: Samples with which the group settles `ok` when the rest cannot be had; None: all `n`.
    min_samples: int | None = Field(default=None, ge=1)
    sampling: SamplingParams = SamplingParams()
    lane: Lane = "default"
    policy_version: int = Field(ge=0)
    #: The job may run on any policy from `policy_version - max_staleness` on; None: on any.
    max_staleness: int | None = Field(default=None, ge=0)
    #: The job may run on `policy_version` alone.
    exact: bool = False
    #: Server time in milliseconds after which the job settles `expired`; None: never.
    deadline_ms: int | None = Field(default=None, ge=0)
    endpoint: Endpoint = "generate"
    #: The worker that is likely to have the beginning of the prompt in its engine's cache: others leave the job to it
    #: for a moment. A wish: any host may run the job.
    host: Name | None = None
    #: The trainer's own; comes back with the group. Anything msgpack carries.
    metadata: Any = None

    @model_validator(mode="after")
    def _whole(self) -> "PromptJob":
        if self.part >= self.parts:
            raise ValueError(f"part: {self.part} of {self.parts} parts does not exist; parts count from 0")
        if self.min_samples is not None and self.min_samples > self.n:
            raise ValueError(f"min_samples: {self.min_samples} is over n={self.n}")
        if self.min_samples is not None and self.parts > 1:
            raise ValueError("min_samples: a split group is put together whole; leave out split or min_samples")
        return self

    @property
    def id(self) -> str:
        """The job's name in streams, logs and dead letters: `BATCH/INDEX`, and `#PART` where the group is split."""
        name = f"{self.batch}/{self.index}"
        return name if self.parts == 1 else f"{name}#{self.part}"

    @property
    def fewest_samples(self) -> int:
        """Samples with which it may settle `ok`."""
        return self.n if self.min_samples is None else self.min_samples

    @property
    def oldest_version(self) -> int:
        """The oldest policy version this job may run on."""
        if self.exact:
            return self.policy_version
        return 0 if self.max_staleness is None else max(0, self.policy_version - self.max_staleness)

    def may_run_on(self, version: int) -> bool:
        """True when the tag allows `version`; newer than the tag is fine unless the job is exact."""
        if self.exact:
            return version == self.policy_version
        return version >= self.oldest_version

    def preview(self) -> str:
        """The first characters of the prompt, for people who read the stream with `XRANGE`."""
        return preview_of(self.prompt)


#: Characters of a prompt shown beside the body; a line of a terminal.
PREVIEW_CHARS = 80


def preview_of(prompt: str | NDArray[np.int32] | list[Message]) -> str:
    """Plain text for `XRANGE`: text, the last message, or the first ids."""
    if isinstance(prompt, str):
        return prompt[:PREVIEW_CHARS]
    if isinstance(prompt, np.ndarray):
        return " ".join(map(str, prompt[:20].tolist()))[:PREVIEW_CHARS]
    return str(prompt[-1]["content"])[:PREVIEW_CHARS]
