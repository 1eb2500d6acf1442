"""Commands on the `control` stream, and what workers answer on `acks`.

Invariant: a command is understood from its own entry alone, so a host that reads the log from its start reaches
the present state by itself.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from rollpool.schemas.policies import Policy

AckState = Literal["received", "applied", "failed"]


class Command(BaseModel):
    """An order to the hosts of a pool; today there is one: serve this policy."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    kind: Literal["policy"] = "policy"
    policy: Policy


class Ack(BaseModel):
    """A worker's answer to a command."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    worker: str
    #: Entry id of the command on `control`.
    command: str
    version: int = Field(ge=0)
    state: AckState
    #: Seconds from receipt to this answer.
    seconds: float = Field(ge=0.0)
    error: str | None = None
