"""From what a user passes to what the enqueue script takes; pure, no I/O.

Invariant: a `Draft` that exists can be enqueued and run. Everything a user can get wrong is refused while it is made,
as InvalidPrompt that names the field and, where there is one, the prompt's index; so nothing of a bad batch is ever
sent. Equal batches have equal `content`, whenever they are made and wherever they wish to run.
"""

import hashlib
import itertools
import math
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, TypeAdapter, ValidationError

from rollpool.producer.affinity import Affinity, Homes, checked_affinity
from rollpool.schemas import wire
from rollpool.schemas.errors import InvalidPrompt, SchemaMismatch
from rollpool.schemas.jobs import Endpoint, Lane, Prompt, PromptJob, SamplingParams, preview_of

#: Bytes of one batch. A Redis server closes a connection whose request outgrows its query buffer, 1 GB by default;
#: half of it leaves room for a server that is set lower, and for the copies made on both sides.
MAX_BATCH_BYTES = 512 * 1024 * 1024

#: What a user may pass as a prompt: text, token ids [T], or chat messages.
PromptInput = str | Sequence[int] | NDArray[np.integer[Any]] | Sequence[Mapping[str, Any]]

_PROMPTS: TypeAdapter[list[Any]] = TypeAdapter(
    list[Prompt], config=ConfigDict(strict=True, arbitrary_types_allowed=True)
)

#: Into how many jobs a group may be split: the server puts so many parts together in one step.
MAX_SPLIT = 1000

#: Fields of a job that differ from prompt to prompt; the others are encoded once.
_OWN = ("index", "prompt", "metadata")

#: Fields of a job that its batch may be sent with or without: they are no part of the content.
_WISHES = ("host",)

#: What parameters are called where the job's field has another name.
_PARAMETERS = {"batch": "batch_id", "parts": "split"}

#: Values that come back from msgpack as they went in: not worth trying.
_PLAIN = (type(None), str, bytes, int, float, bool)


@dataclass(frozen=True, slots=True)
class Draft:
    """A batch, checked and encoded but for its deadline, which is a time of the server."""

    #: Shared fields of the jobs, `schema` first; of a split group, those of its first part.
    shared: Mapping[str, Any]
    #: What is a prompt's own, encoded, in order.
    own: Sequence[bytes]
    previews: Sequence[str]
    #: Digest of everything but the deadline and the hosts wished for: a batch made again later has others, and is still
    #: the same.
    content: str
    #: Seconds from now; None: no deadline.
    deadline_s: float | None = None
    #: Each prompt's key in `Homes`, and the host wished for; empty where no prompt has a key.
    affinity: Sequence[str | None] = ()
    hosts: Sequence[str | None] = ()

    @property
    def batch(self) -> str:
        """The batch's id."""
        return str(self.shared["batch"])

    @property
    def size(self) -> int:
        """Prompts, each a group."""
        return len(self.own)

    @property
    def parts(self) -> int:
        """Jobs of each group."""
        return int(self.shared["parts"])

    def previews_and_bodies(self, deadline_ms: int | None) -> list[str | bytes]:
        """Return the arguments of the enqueue script: preview, body, preview, body and so on, a group's parts in order.

        Args:
            deadline_ms: Server time in milliseconds, or None.
        """
        shared = {**self.shared, "deadline_ms": deadline_ms}
        hosts = self.hosts or [None] * self.size
        heads = {host: self._heads(shared | ({"host": host} if host else {})) for host in set(hosts)}
        bodies = [head + own for own, host in zip(self.own, hosts, strict=True) for head in heads[host]]
        previews = [preview for preview in self.previews for _ in range(self.parts)]
        return list(itertools.chain.from_iterable(zip(previews, bodies, strict=True)))

    def _heads(self, shared: Mapping[str, Any]) -> list[bytes]:
        return [wire.MapTemplate({**shared, "part": part}, _OWN).head for part in range(self.parts)]


def draft(
    prompts: Sequence[PromptInput],
    *,
    run: str,
    policy_version: int,
    n: int = 1,
    split: int = 1,
    min_samples: int | None = None,
    sampling: SamplingParams | Mapping[str, Any] | None = None,
    max_staleness: int | None = None,
    exact: bool = False,
    lane: Lane = "default",
    batch_id: str | None = None,
    metadata: Sequence[Any] | None = None,
    deadline: float | None = None,
    endpoint: Endpoint = "generate",
    logprobs: bool = True,
    affinity: Affinity = None,
    homes: Homes | None = None,
) -> Draft:
    """Check and encode a batch. Raises InvalidPrompt; parameters are those of `enqueue_prompts`.

    `homes` knows which host each key of `affinity` wishes for.
    """
    checked = _checked_prompts(prompts)
    keys = checked_affinity(affinity, len(checked))
    _check_endpoint(checked, endpoint, logprobs)
    first = _first_job(
        run=run,
        batch=uuid.uuid4().hex if batch_id is None else batch_id,
        index=0,
        prompt=checked[0],
        n=_plain_int(n),
        parts=_plain_int(split),
        min_samples=_plain_int(min_samples),
        sampling=_checked_sampling(sampling),
        lane=lane,
        policy_version=_plain_int(policy_version),
        max_staleness=_plain_int(max_staleness),
        exact=exact,
        endpoint=endpoint,
    )
    shared = {"schema": wire.SCHEMA} | {name: value for name, value in first if name not in (*_OWN, *_WISHES)}
    shared["n"] = _samples_of_a_part(first)
    if keys and first.parts > 1:
        raise InvalidPrompt("affinity: a split group is for several hosts at once; leave out split or affinity")
    own, content = _encoded(shared, checked, _checked_metadata(metadata, len(checked)))
    return Draft(
        shared,
        own,
        [preview_of(prompt) for prompt in checked],
        content,
        _checked_deadline(deadline),
        affinity=keys,
        hosts=[homes.of(key) if key and homes is not None else None for key in keys],
    )


def _checked_prompts(prompts: Iterable[Any]) -> list[Any]:
    """Text, token ids [T] int32, or chat messages: all of one kind."""
    if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Iterable):
        raise InvalidPrompt(f"prompts: expected a list of prompts, not one {type(prompts).__name__}; wrap it in a list")
    listed = list(prompts)
    if not listed:
        raise InvalidPrompt("prompts: the list is empty; there is nothing to enqueue")
    if set(map(type, listed)) == {str} and all(listed):
        return listed
    try:
        checked = _PROMPTS.validate_python(list(map(_as_array, listed)))
    except ValidationError as error:
        where, what = _first(error)
        raise InvalidPrompt(f"prompts[{where[0]}]: {what}") from None
    kinds = list(map(type, checked))
    for index, kind in enumerate(kinds):
        if kind is not kinds[0]:
            raise InvalidPrompt(
                f"prompts[{index}]: {_KINDS[kind]}, but prompts[0] is {_KINDS[kinds[0]]}; a batch holds prompts of one "
                "kind: enqueue the two kinds apart"
            )
    return checked


def _as_array(prompt: Any) -> Any:
    """A list of plain integers becomes an array before it is judged: judging it item by item is most of the cost."""
    return np.asarray(prompt) if type(prompt) is list and set(map(type, prompt)) == {int} else prompt


_KINDS: dict[type[Any], str] = {str: "text", np.ndarray: "token ids", list: "chat messages"}


def _check_endpoint(prompts: list[Any], endpoint: Endpoint, logprobs: bool) -> None:
    if endpoint != "chat":
        return
    if logprobs:
        raise InvalidPrompt(
            'logprobs: endpoint="chat" returns text alone, no token ids and no log-probs; pass logprobs=False, or use '
            'endpoint="generate", which renders chat messages too'
        )
    if isinstance(prompts[0], np.ndarray):
        raise InvalidPrompt('prompts[0]: endpoint="chat" takes chat messages or text, not token ids')


def _checked_sampling(sampling: SamplingParams | Mapping[str, Any] | None) -> SamplingParams:
    if sampling is None:
        return SamplingParams()
    if not isinstance(sampling, SamplingParams | Mapping):
        raise InvalidPrompt(f"sampling: expected SamplingParams or a mapping, not {type(sampling).__name__}")
    try:
        # A SamplingParams too: model_construct and model_copy make unchecked ones.
        return SamplingParams.model_validate(dict(sampling))
    except ValidationError as error:
        where, what = _first(error)
        known = f"; known: {', '.join(SamplingParams.model_fields)}" if "Extra inputs" in what else ""
        raise InvalidPrompt(f"{'.'.join(['sampling', *map(str, where)])}: {what}{known}") from None


def _first_job(**fields: Any) -> PromptJob:
    """What the jobs share is checked once, on the first of them."""
    try:
        return PromptJob(**fields)
    except ValidationError as error:
        where, what = _first(error)
        if not where:  # what the model says of several fields together begins with their names
            raise InvalidPrompt(what) from None
        name = str(where[0])
        raise InvalidPrompt(f"{_PARAMETERS.get(name, name)}: {what}, got {fields.get(name)!r:.80}") from None


def _samples_of_a_part(job: PromptJob) -> int:
    if job.parts > MAX_SPLIT:
        raise InvalidPrompt(f"split: {job.parts} parts are over the limit of {MAX_SPLIT}; give each part more samples")
    if job.n % job.parts:
        raise InvalidPrompt(
            f"split: {job.n} samples do not divide into {job.parts} equal parts; choose a divisor of n={job.n}"
        )
    return job.n // job.parts


def _plain_int(value: Any) -> Any:
    """Numpy's integers count as integers; everything else is left to the model to judge."""
    return int(value) if isinstance(value, np.integer) else value


def _checked_deadline(deadline: float | None) -> float | None:
    if deadline is None:
        return None
    if isinstance(deadline, bool) or not isinstance(deadline, int | float) or not 0 < deadline < math.inf:
        raise InvalidPrompt(f"deadline: expected seconds from now, more than 0, got {deadline!r}")
    return float(deadline)


def _checked_metadata(metadata: Sequence[Any] | None, size: int) -> list[Any]:
    if metadata is None:
        return [None] * size
    if isinstance(metadata, str | bytes | Mapping) or not isinstance(metadata, Iterable):
        raise InvalidPrompt(f"metadata: expected a list with one entry a prompt, not {type(metadata).__name__}")
    listed = list(metadata)
    if len(listed) != size:
        raise InvalidPrompt(f"metadata: {len(listed)} entries for {size} prompts; give one for each")
    return listed


def _encoded(shared: Mapping[str, Any], prompts: list[Any], metadata: list[Any]) -> tuple[list[bytes], str]:
    """Each job's own part, and the digest of the whole batch."""
    template = wire.MapTemplate({**shared, "deadline_ms": None}, _OWN)
    digest = hashlib.sha256(template.head)
    encoded, total = list[bytes](), 0
    for index, (prompt, extra) in enumerate(zip(prompts, metadata, strict=True)):
        try:
            own = template.own((index, prompt, extra))
            if type(prompt) is list or type(extra) not in _PLAIN:
                _check_comes_back(prompt, extra)
        except (TypeError, ValueError, OverflowError, RecursionError, SchemaMismatch) as error:
            raise _not_carried(index, prompt, error) from None
        digest.update(own)
        total += (len(own) + len(template.head)) * shared["parts"]
        encoded.append(own)
    if total > MAX_BATCH_BYTES:
        raise InvalidPrompt(
            f"prompts: the batch is {total / 2**20:.0f} MiB, over the limit of {MAX_BATCH_BYTES / 2**20:.0f} MiB; "
            "enqueue it as several batches"
        )
    return encoded, digest.hexdigest()


def _check_comes_back(*values: Any) -> None:
    """What cannot be decoded (a map with integer keys, say) must fail here and not on a host."""
    for value in values:
        wire.unpack(wire.pack(value))


def _not_carried(index: int, prompt: Any, error: Exception) -> InvalidPrompt:
    try:
        _check_comes_back(prompt)
    except (TypeError, ValueError, OverflowError, RecursionError, SchemaMismatch):
        return InvalidPrompt(f"prompts[{index}]: {error}")
    return InvalidPrompt(f"metadata[{index}]: {error}; metadata is what msgpack carries, with string keys")


def _first(error: ValidationError) -> tuple[tuple[int | str, ...], str]:
    """Where and what of the first thing pydantic found."""
    found = error.errors(include_url=False, include_input=False, include_context=False)[0]
    return found["loc"], found["msg"].removeprefix("Value error, ")
