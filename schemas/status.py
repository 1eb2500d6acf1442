"""A worker's heartbeat.

Invariant: every field is plain text in its hash, so that `redis-cli HGETALL` shows what `rollpool status` does.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

WorkerState = Literal["starting", "serving", "changing", "suspended", "stopping", "broken"]


class WorkerStatus(BaseModel):
    """What one worker says of itself every few seconds."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    host: str
    pid: int
    state: WorkerState
    #: Version its engine serves; None until it serves one.
    policy: int | None = None
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

    def fields(self) -> dict[str, str | int | float]:
        """As the fields of a Redis hash; None is the empty string."""
        return {name: "" if value is None else value for name, value in self.model_dump().items()}

    @classmethod
    def from_fields(cls, fields: dict[bytes, bytes]) -> "WorkerStatus":
        """Read a heartbeat back; fields of a newer version are ignored."""
        text: dict[str, Any] = {key.decode(): value.decode() for key, value in fields.items()}
        return cls(**{**text, "policy": text.get("policy") or None})
