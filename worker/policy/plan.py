"""From what an engine serves to what is asked of it: the next step, and nothing else. Pure.

Invariant: what needs no restart is never done by one; and following the steps one by one ends, with an engine that
serves what is wanted as far as it can.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from rollpool.schemas import Policy
from rollpool.worker.engines.protocol import EngineFacts, LoraSupport
from rollpool.worker.policy.orders import Orders, Target


@dataclass(frozen=True, slots=True)
class Setup:
    """What one engine is launched with."""

    checkpoint: Target
    #: Adapters given at launch; or the one that is merged into the checkpoint.
    adapters: tuple[Target, ...] = ()
    merged: bool = False

    @property
    def targets(self) -> tuple[Target, ...]:
        """All that it serves."""
        return (self.checkpoint, *self.adapters)


@dataclass(frozen=True, slots=True)
class Restart:
    """Start the engine anew."""

    setup: Setup


@dataclass(frozen=True, slots=True)
class Swap:
    """Change the weights of the running engine."""

    target: Target


@dataclass(frozen=True, slots=True)
class Relabel:
    """The engine has these weights; only what they are called is new."""

    target: Target


@dataclass(frozen=True, slots=True)
class Load:
    """Have the running engine load an adapter."""

    target: Target


@dataclass(frozen=True, slots=True)
class Unload:
    """Free the slot of an adapter that is wanted no more."""

    policy: Policy


Step = Restart | Swap | Relabel | Load | Unload


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a host is to serve: its newest checkpoint that it did not refuse, and adapters on it."""

    checkpoint: Target
    #: The most wanted first: the newest of each run, then those before.
    adapters: tuple[Target, ...]

    def setup(self, lora: LoraSupport, slots: int) -> Setup:
        """What to launch an engine with that has this kind of support."""
        if lora == "launch":
            return Setup(self.checkpoint, self.adapters[:slots])
        if lora == "none" and self.adapters:
            newest = max(self.adapters, key=lambda target: target.order)
            return Setup(self.checkpoint, (newest,), merged=True)
        return Setup(self.checkpoint)


def fits(adapter: Policy, checkpoint: Policy) -> bool:
    """True when the adapter belongs on this checkpoint; one without a base is of a pool that had published none."""
    if adapter.base is None:
        return checkpoint.run == INITIAL
    return adapter.base == checkpoint.checkpoint


#: The run of the policy that the host's own settings name.
INITIAL = "initial"


def wanted_adapters(orders: Orders, checkpoint: Policy, refused: Collection[str]) -> tuple[Target, ...]:
    """The adapters that belong on `checkpoint`, the most wanted first."""
    ranked: list[tuple[int, tuple[int, int], Target]] = []
    for targets in orders.adapters.values():
        usable = [each for each in targets if fits(each.policy, checkpoint) and each.command not in refused]
        for age, target in enumerate(reversed(usable)):
            milliseconds, number = target.order
            ranked.append((age, (-milliseconds, -number), target))
    return tuple(target for _, _, target in sorted(ranked, key=lambda each: each[:2]))


def next_step(
    serving: Setup,
    loaded: Collection[Policy],
    wanted: Wanted,
    facts: EngineFacts,
    *,
    busy: Collection[str],
    restart_only: Collection[str],
) -> Step | None:
    """The next step; None when there is nothing to do, or nothing can be done while adapters are in use.

    Args:
        serving: what the engine was launched with, or changed to since.
        loaded: adapters that it has.
        wanted: what it is to have.
        facts: what it can do.
        busy: names of adapters that requests use.
        restart_only: commands for checkpoints that the running engine did not take.
    """
    if not wanted.checkpoint.policy.same_source(serving.checkpoint.policy):
        way_open = wanted.checkpoint.way == "auto" and wanted.checkpoint.command not in restart_only
        if facts.swaps and way_open and not serving.merged:
            return Swap(wanted.checkpoint)
        return Restart(wanted.setup(facts.lora, facts.adapter_slots))
    if wanted.checkpoint.policy.generation != serving.checkpoint.policy.generation:
        return Relabel(wanted.checkpoint)
    if facts.lora == "runtime":
        return _by_routes(loaded, wanted.adapters[: facts.adapter_slots], facts.adapter_slots, busy)
    setup = wanted.setup(facts.lora, facts.adapter_slots)
    if setup.merged != serving.merged or _lacks(serving, setup):
        return Restart(setup)
    return None


def _lacks(serving: Setup, setup: Setup) -> bool:
    """A warm restart is worth it for an adapter that is missing, not to be rid of one."""
    there = {target.policy.adapter_name for target in serving.adapters}
    return any(target.policy.adapter_name not in there for target in _newest_of_each_run(setup.adapters))


def _newest_of_each_run(adapters: Iterable[Target]) -> list[Target]:
    newest: dict[str, Target] = {}
    for target in adapters:
        newest.setdefault(target.policy.run, target)
    return list(newest.values())


def _by_routes(
    loaded: Collection[Policy], wanted: tuple[Target, ...], slots: int, busy: Collection[str]
) -> Load | Unload | None:
    there = {policy.adapter_name for policy in loaded}
    names = {target.policy.adapter_name for target in wanted}
    missing = [target for target in wanted if target.policy.adapter_name not in there]
    if missing and len(loaded) < slots:
        return Load(missing[0])
    free = [policy for policy in loaded if policy.adapter_name not in names and policy.adapter_name not in busy]
    return Unload(free[0]) if free else None


def crowding(
    loaded: Collection[Policy], wanted: Wanted, slots: int, leaving: Collection[Policy]
) -> tuple[Policy, Target] | None:
    """An adapter that is wanted no more and keeps out one that is, and that one; None where enough are leaving.

    Under steady load there is no moment in which nobody uses it: it has to be given no further job.
    """
    first = wanted.adapters[:slots]
    there, names = {policy.adapter_name for policy in loaded}, {target.policy.adapter_name for target in first}
    missing = [target for target in first if target.policy.adapter_name not in there]
    staying = [policy for policy in loaded if policy.adapter_name not in names and policy not in leaving]
    if staying and len(missing) > slots - len(loaded) + len(leaving):
        return staying[0], missing[0]
    return None


def returning(wanted: Wanted, slots: int, leaving: Collection[Policy]) -> Policy | None:
    """One that was leaving and is wanted again."""
    names = {target.policy.adapter_name for target in wanted.adapters[:slots]}
    return next((policy for policy in leaving if policy.adapter_name in names), None)
