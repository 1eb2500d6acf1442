"""The control log, folded: what is in force, and nothing that a later command made void."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollpool.schemas import Command, Policy
from rollpool.worker.policy.orders import KEPT, Orders


def checkpoint(version: int, *, generation: int = 0) -> Command:
    return Command(policy=Policy(version=version, checkpoint=f"/c/{version}", run="a", generation=generation))


def adapter(version: int, run: str = "a", *, generation: int = 0) -> Command:
    return Command(policy=Policy(version=version, lora_path=f"/l/{version}", run=run, generation=generation))


def folded(*commands: Command) -> Orders:
    orders = Orders()
    for number, command in enumerate(commands):
        orders = orders.follow(f"{number + 1}-0", command)
    return orders


def versions(orders: Orders, run: str | None = None) -> list[int]:
    targets = orders.checkpoints if run is None else orders.adapters.get(run, ())
    return [target.policy.version for target in targets]


def test_the_newest_checkpoint_is_the_target_and_the_ones_before_are_remembered() -> None:
    orders = folded(checkpoint(1), checkpoint(2), checkpoint(5))
    assert orders.target is not None
    assert orders.target.policy.version == 5
    assert orders.target.command == "3-0"
    assert versions(orders) == [1, 2, 5]


def test_going_back_forgets_what_was_abandoned() -> None:
    orders = folded(checkpoint(1), checkpoint(2), checkpoint(3), checkpoint(2, generation=1))
    assert versions(orders) == [1, 2]
    assert orders.target is not None
    assert orders.target.policy.generation == 1


def test_each_run_has_its_adapters_and_none_of_another() -> None:
    orders = folded(adapter(1), adapter(2), adapter(9, "b"), adapter(3), adapter(2, generation=1))
    assert versions(orders, "a") == [1, 2]
    assert versions(orders, "b") == [9]
    assert orders.target is None


def test_a_checkpoint_leaves_the_adapters_in_the_log() -> None:
    assert versions(folded(adapter(1), checkpoint(7)), "a") == [1]


@pytest.mark.parametrize("kind", ["cancel", "flush", "shutdown"])
def test_what_is_done_once_leaves_no_trace(kind: str) -> None:
    command = Command.model_validate({"kind": kind, "run": "a" if kind == "cancel" else None})
    assert folded(command) == Orders()


def test_a_pause_lasts_until_it_is_ended() -> None:
    assert folded(Command(kind="pause")).standing.what == "pause"
    assert folded(Command(kind="pause"), Command(kind="drain", within_s=3.0)).standing.within_s == 3.0
    ended = folded(Command(kind="drain"), Command(kind="resume"))
    assert (ended.standing.what, ended.standing.command) == ("pull", "2-0")


def test_the_last_limit_counts() -> None:
    assert folded(Command(kind="concurrency", concurrency=4), Command(kind="concurrency")).limit.samples is None
    assert folded(Command(kind="concurrency"), Command(kind="concurrency", concurrency=4)).limit.samples == 4


commands = st.one_of(
    st.builds(checkpoint, st.integers(0, 30)),
    st.builds(adapter, st.integers(0, 30), st.sampled_from("ab")),
    st.sampled_from([Command(kind="pause"), Command(kind="resume"), Command(kind="drain"), Command(kind="flush")]),
    st.builds(lambda samples: Command(kind="concurrency", concurrency=samples), st.integers(1, 9)),
)


@given(st.lists(commands, max_size=60))
def test_the_state_is_bounded_in_order_and_made_of_commands_that_are_in_force(log: list[Command]) -> None:
    orders = folded(*log)
    for targets in (orders.checkpoints, *orders.adapters.values()):
        assert len(targets) <= KEPT
        numbers = [target.policy.version for target in targets]
        assert numbers == sorted(set(numbers))
    entries = {f"{number + 1}-0": command for number, command in enumerate(log)}
    assert all(entries[entry].kind != "flush" for entry in orders.commands)
    for kind in ("policy", "concurrency"):
        last = [entry for entry, command in entries.items() if command.kind == kind]
        assert not last or last[-1] in orders.commands
