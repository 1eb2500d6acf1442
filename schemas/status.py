"""A worker's heartbeat.

Invariant: every field is plain text in its hash, so that `redis-cli HGETALL` shows what `rollpool status` does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

WorkerState = Literal["starting", "serving", "changing", "suspended", "paused", "stopping", "broken"]


class WorkerStatus(BaseModel):
    """What one worker says of itself every few seconds."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    host: str
    pid: int
    state: WorkerState
    #: Version its engine serves; None until it serves one.
    policy: int | None = None
    #: Generation of that version.
    generation: int = 0
    #: Version of the checkpoint that it is starting, changing to or coming back to; None while it is at rest.
    heading: int | None = None
    #: Adapters it serves beside, as `RUN:VERSION,VERSION RUN:VERSION`, versions rising.
    adapters: str = ""
    #: What it fetches now, and how much of it is there.
    staging: str = ""
    #: Engine line and version, for example `0.0.1.post1`.
    engine: str = ""
    engine_url: str = ""
    max_running_requests: int = 0
    #: Concurrency target in samples.
    target: int = 0
    #: Jobs pulled and not settled, and samples of theirs in the engine.
    jobs_in_flight: int = 0
    samples_in_flight: int = 0
    #: Counters since the worker started.
    jobs_settled: int = 0
    samples_made: int = 0
    tokens_made: int = 0
    engine_restarts: int = 0
    #: Seconds the worker had backlog to serve, and the part of them with fewer than
    #: `max_running_requests` samples in flight.
    backlog_seconds: float = 0.0
    underfull_seconds: float = 0.0
    error: str = ""
    #: Server time of this heartbeat, milliseconds.
    seen_ms: int = 0

    def versions_for(self, run: str) -> tuple[int, ...]:
        """The policy versions on which it runs jobs of this run, rising; none while it serves nothing."""
        return Serving(self.name, self.state, self.policy, self.heading, _adapters_of(self.adapters)).versions_for(run)

    def fields(self) -> dict[str, str | int | float]:
        """As the fields of a Redis hash; None is the empty string."""
        return {name: "" if value is None else value for name, value in self.model_dump().items()}

    @classmethod
    def from_fields(cls, fields: dict[bytes, bytes]) -> "WorkerStatus":
        """Read a heartbeat back; fields of a newer version are ignored."""
        text: dict[str, Any] = {key.decode(): value.decode() for key, value in fields.items()}
        return cls(**{**text, "policy": text.get("policy") or None, "heading": text.get("heading") or None})


@dataclass(frozen=True, slots=True)
class Serving:
    """The part of a heartbeat by which others judge what a worker can run; anyone could have made it up."""

    name: str
    state: str
    policy: int | None = None
    heading: int | None = None
    #: Versions rising, by run.
    adapters: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def read(cls, values: Sequence[bytes | None]) -> "Serving | None":
        """From the values of `SERVING_FIELDS`; None where there is no such heartbeat."""
        name, state, policy, heading, adapters = (
            value.decode(errors="replace") if isinstance(value, bytes) else "" for value in values
        )
        if not name:
            return None
        return cls(name, state, _version(policy), _version(heading), _adapters_of(adapters))

    def versions_for(self, run: str) -> tuple[int, ...]:
        """The policy versions on which it runs jobs of this run, rising; none while it serves nothing."""
        base = () if self.policy is None else (self.policy,)
        return (*base, *self.adapters.get(run, ()))

    def will_serve(self, run: str, version: int) -> bool:
        """True when it runs jobs of this run on `version`, or is on its way there."""
        return version == self.heading or version in self.versions_for(run)


#: What `Serving` is read from.
SERVING_FIELDS = ("name", "state", "policy", "heading", "adapters")


def _version(text: str) -> int | None:
    # So short because Python refuses to read numbers of thousands of digits.
    return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else None


def _adapters_of(text: str) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for word in text.split():
        run, _, versions = word.partition(":")
        numbers = [number for number in map(_version, versions.split(",")) if number is not None]
        if run and numbers:
            found[run] = (*found.get(run, ()), *numbers)
    return found
