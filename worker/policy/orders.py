"""What the control log asks of one host, folded into a present state. Pure.

Invariant: folding the log from its start, entry by entry, gives the same state as following it live; what a later
command makes void is in the state no more.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from rollpool.schemas import CHECKPOINTS, ChangeMode, ChangeWay, Command, Policy

#: Commands for checkpoints that are remembered: a host whose newest policy does not start looks so far back for one
#: that may. As many adapters of a run are.
KEPT = 16


@dataclass(frozen=True, slots=True)
class Target:
    """A policy to serve, and the command that said so."""

    policy: Policy
    #: Its entry on `control`; empty for the model of the host's own settings.
    command: str
    #: As in the command.
    mode: ChangeMode | None = None
    way: ChangeWay = "auto"
    min_serving: int | None = None

    @property
    def order(self) -> tuple[int, int]:
        """Of two targets the later one has the greater."""
        milliseconds, _, number = self.command.partition("-")
        return (int(milliseconds), int(number or 0)) if self.command else (0, 0)


@dataclass(frozen=True, slots=True)
class Standing:
    """A command that is in force until another one of its kind, or its opposite, comes."""

    command: str = ""
    what: Literal["pull", "pause", "drain"] = "pull"
    within_s: float | None = None


@dataclass(frozen=True, slots=True)
class Limit:
    """Samples in the engine at most; None: as the host is set."""

    command: str = ""
    samples: int | None = None


@dataclass(frozen=True, slots=True)
class Orders:
    """The present state."""

    #: The last checkpoints asked for, versions rising.
    checkpoints: tuple[Target, ...] = ()
    #: The adapters asked for of each run, versions rising.
    adapters: Mapping[str, tuple[Target, ...]] = field(default_factory=dict)
    standing: Standing = Standing()
    limit: Limit = Limit()

    @property
    def target(self) -> Target | None:
        """The newest checkpoint; None until one was published."""
        return self.checkpoints[-1] if self.checkpoints else None

    @property
    def commands(self) -> frozenset[str]:
        """Those that the state is made of and that are to be answered."""
        newest = [self.target] if self.target else []
        targets = [*newest, *(target for targets in self.adapters.values() for target in targets)]
        return frozenset([target.command for target in targets] + [self.standing.command, self.limit.command]) - {""}

    def follow(self, entry: str, command: Command) -> "Orders":
        """The state after one command more; those that are done once leave it as it is."""
        match command.kind:
            case "policy":
                assert command.policy is not None, "the model checks it"
                target = Target(command.policy, entry, command.mode, command.way, command.min_serving)
                return self._with_target(target)
            case "resume":
                return replace(self, standing=Standing(entry))
            case "pause" | "drain":
                return replace(self, standing=Standing(entry, command.kind, command.within_s))
            case "concurrency":
                return replace(self, limit=Limit(entry, command.concurrency))
            case _:
                return self

    def _with_target(self, target: Target) -> "Orders":
        if target.policy.lineage == CHECKPOINTS:
            return replace(self, checkpoints=_continued(self.checkpoints, target))
        run = target.policy.run
        return replace(self, adapters={**self.adapters, run: _continued(self.adapters.get(run, ()), target)})


def _continued(targets: tuple[Target, ...], target: Target) -> tuple[Target, ...]:
    """A lineage that went back to an earlier version has abandoned those from there on."""
    before = [each for each in targets if each.policy.version < target.policy.version]
    return (*before, target)[-KEPT:]
