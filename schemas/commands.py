"""Commands on the `control` stream, and what workers answer on `acks`.

Invariant: a command is understood from its own entry alone, so a host that reads the log from its start reaches
the present state by itself. What a command asks for is either a state, in which the newest one of its kind counts, or
something to do once, which binds only the hosts that were there.
"""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rollpool.schemas.jobs import Name
from rollpool.schemas.policies import Policy

AckState = Literal["received", "applied", "failed"]

#: States: `policy` (serve it: a checkpoint, or an adapter beside those loaded), `pause` (pull no more), `drain` (pull
#: no more, and give back what does not finish in time), `resume` (pull again), `concurrency` (samples in the engine).
#: Once: `cancel` (drop a run's jobs), `flush` (the prefix cache), `shutdown`.
CommandKind = Literal["policy", "pause", "drain", "resume", "concurrency", "cancel", "flush", "shutdown"]

#: What becomes of the work in flight over a change of weights: `drain`: it finishes first, for a while; `requeue`: it
#: goes back and starts again; `resume`: its tokens are kept, and it goes on under the new policy, or on another host.
ChangeMode = Literal["drain", "requeue", "resume"]

#: How an engine comes to a checkpoint: `auto`: without a restart where it can.
ChangeWay = Literal["auto", "restart"]


class Command(BaseModel):
    """An order to the hosts of a pool, or to some of them."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    kind: CommandKind = "policy"
    #: Names of the workers it is for; None: all, and those to come.
    workers: tuple[str, ...] | None = Field(default=None, strict=False)
    #: Of `policy`.
    policy: Policy | None = None
    #: Of `policy`; None: as each host is set.
    mode: ChangeMode | None = None
    way: ChangeWay = "auto"
    #: Of `policy`: hosts that go on serving while others change; None: three quarters of those there are.
    min_serving: int | None = Field(default=None, ge=0)
    #: Of `concurrency`: samples in the engine at most; None: as each host is set.
    concurrency: int | None = Field(default=None, ge=1)
    #: Of `cancel`: whose jobs.
    run: Name | None = None
    #: Of `drain`, seconds: what is not finished by then goes back; None: as each host is set.
    within_s: float | None = Field(default=None, ge=0.0)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.kind == "policy") != (self.policy is not None):
            raise ValueError("policy: goes with kind='policy', and with no other")
        if (self.kind == "cancel") != (self.run is not None):
            raise ValueError("run: goes with kind='cancel', and with no other")
        return self

    def is_for(self, worker: str) -> bool:
        """True when this worker is to obey."""
        return self.workers is None or worker in self.workers


class Ack(BaseModel):
    """A worker's answer to a command."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    worker: str
    #: Entry id of the command on `control`.
    command: str
    kind: CommandKind = "policy"
    #: Of the policy that it is about; None where it is about none.
    version: int | None = Field(default=None, ge=0)
    state: AckState
    #: Seconds from receipt to this answer.
    seconds: float = Field(ge=0.0)
    error: str | None = None
    #: How it was done, for people.
    detail: str = ""
