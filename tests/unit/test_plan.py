"""The next step to what is wanted: never more than is needed, and following the steps ends."""

from dataclasses import replace

import pytest
from fakes import fake_engine
from hypothesis import given
from hypothesis import strategies as st

from rollpool.schemas import Command, Policy
from rollpool.worker.engines.protocol import EngineFacts, LoraSupport
from rollpool.worker.policy.orders import Orders, Target
from rollpool.worker.policy.plan import (
    INITIAL,
    Load,
    Relabel,
    Restart,
    Setup,
    Step,
    Swap,
    Unload,
    Wanted,
    next_step,
    wanted_adapters,
)

BASE = "/base"


def checkpoint(version: int = 1, *, source: str = BASE, generation: int = 0, way: str = "auto") -> Target:
    policy = Policy(version=version, checkpoint=source, run="a", generation=generation)
    return Target(policy, f"{version + 100 * generation}-0", way=way)  # type: ignore[arg-type]


def adapter(version: int, *, run: str = "a", base: str | None = BASE, generation: int = 0) -> Target:
    policy = Policy(version=version, lora_path=f"/lora/{run}/{version}", base=base, run=run, generation=generation)
    return Target(policy, f"{1000 + version}-{generation}")


def facts(lora: LoraSupport = "none", slots: int = 0, *, swaps: bool = False) -> EngineFacts:
    return fake_engine(lora=lora, adapter_slots=slots, swaps=swaps).facts


def step(
    serving: Setup, wanted: Wanted, engine: EngineFacts, loaded: tuple[Policy, ...] = (), **more: object
) -> Step | None:
    given: dict[str, object] = {"busy": (), "restart_only": (), **more}
    return next_step(serving, loaded, wanted, engine, **given)  # type: ignore[arg-type]


def test_nothing_is_done_for_what_is_served() -> None:
    assert step(Setup(checkpoint()), Wanted(checkpoint(), ()), facts()) is None


def test_another_checkpoint_is_swapped_in_where_the_engine_can_and_nobody_forbids_it() -> None:
    served, new = Setup(checkpoint(1)), Wanted(checkpoint(2, source="/two"), ())
    assert step(served, new, facts(swaps=True)) == Swap(new.checkpoint)
    assert step(served, new, facts()) == Restart(Setup(new.checkpoint))
    assert step(served, new, facts(swaps=True), restart_only={new.checkpoint.command}) == Restart(Setup(new.checkpoint))
    forced = Wanted(checkpoint(2, source="/two", way="restart"), ())
    assert step(served, forced, facts(swaps=True)) == Restart(Setup(forced.checkpoint))


def test_the_same_weights_in_a_new_generation_are_only_called_so() -> None:
    again = checkpoint(1, generation=1)
    assert step(Setup(checkpoint(1)), Wanted(again, ()), facts(swaps=True)) == Relabel(again)


def test_an_engine_that_loads_adapters_is_asked_to_while_it_serves() -> None:
    one, two = adapter(2), adapter(3)
    wanted, served = Wanted(checkpoint(), (two, one)), Setup(checkpoint())
    assert step(served, wanted, facts("runtime", 4)) == Load(two)
    assert step(served, wanted, facts("runtime", 4), (two.policy,)) == Load(one)
    assert step(served, wanted, facts("runtime", 4), (two.policy, one.policy)) is None


def test_an_adapter_leaves_only_when_nobody_uses_it() -> None:
    old, new = adapter(2), adapter(3)
    wanted, served, engine = Wanted(checkpoint(), (new,)), Setup(checkpoint()), facts("runtime", 1)
    assert step(served, wanted, engine, (old.policy,), busy={old.policy.adapter_name}) is None
    assert step(served, wanted, engine, (old.policy,)) == Unload(old.policy)
    assert step(served, wanted, engine) == Load(new)


def test_a_ring_of_adapters_is_started_anew_for_a_new_one_and_not_to_be_rid_of_one() -> None:
    one, two, three = adapter(2), adapter(3), adapter(4)
    engine = facts("launch", 2)
    served = Setup(checkpoint(), (two, one))
    assert step(served, Wanted(checkpoint(), (two,)), engine) is None
    assert step(served, Wanted(checkpoint(), (three, two, one)), engine) == Restart(Setup(checkpoint(), (three, two)))


def test_an_engine_without_adapters_gets_the_newest_merged() -> None:
    mine, other = adapter(2), adapter(3, run="b")
    served = Setup(checkpoint())
    merged = Setup(checkpoint(), (other,), merged=True)
    assert step(served, Wanted(checkpoint(), (mine, other)), facts()) == Restart(merged)
    assert step(merged, Wanted(checkpoint(), (mine, other)), facts()) is None
    assert step(merged, Wanted(checkpoint(), ()), facts()) == Restart(Setup(checkpoint()))
    new = Wanted(checkpoint(2, source="/two"), ())
    assert step(merged, new, facts(swaps=True)) == Restart(Setup(new.checkpoint))


@pytest.mark.parametrize(
    ("base", "run", "source", "belongs"),
    [(BASE, "a", BASE, True), ("/other", "a", BASE, False), (None, INITIAL, BASE, True), (None, "a", BASE, False)],
)
def test_an_adapter_is_wanted_only_on_its_base(base: str | None, run: str, source: str, belongs: bool) -> None:
    orders = Orders().follow("5-0", Command(policy=adapter(2, base=base).policy))
    served = Policy(version=0, checkpoint=source, run=run)
    assert bool(wanted_adapters(orders, served, ())) == belongs
    assert not wanted_adapters(orders, served, {"5-0"})


def test_the_newest_adapter_of_each_run_comes_before_all_older_ones() -> None:
    orders = Orders()
    for entry, target in (("1-0", adapter(2)), ("2-0", adapter(3)), ("3-0", adapter(7, run="b")), ("4-0", adapter(4))):
        orders = orders.follow(entry, Command(policy=target.policy))
    order = [(each.policy.run, each.policy.version) for each in wanted_adapters(orders, checkpoint().policy, ())]
    assert order == [("a", 4), ("b", 7), ("a", 3), ("a", 2)]


runs = st.sampled_from(["a", "b", "c"])
targets = st.one_of(
    st.builds(
        lambda version, source: checkpoint(version, source=source), st.integers(1, 4), st.sampled_from([BASE, "/two"])
    ),
    st.builds(lambda version, run: adapter(version + 10, run=run), st.integers(0, 9), runs),
)


@given(
    st.lists(targets, max_size=12),
    st.sampled_from(["none", "launch", "runtime"]),
    st.integers(1, 3),
    st.booleans(),
)
def test_following_the_steps_ends_at_what_is_wanted(
    published: list[Target], lora: LoraSupport, slots: int, swaps: bool
) -> None:
    orders = Orders().follow("0-1", Command(policy=checkpoint().policy))
    for number, target in enumerate(published):
        orders = orders.follow(f"{number + 1}-0", Command(policy=target.policy))
    engine = facts(lora, 0 if lora == "none" else slots, swaps=swaps)
    serving, loaded = Setup(checkpoint(0, source="/zero")), list[Policy]()
    assert orders.target is not None
    wanted = Wanted(orders.target, wanted_adapters(orders, orders.target.policy, ()))
    for _ in range(40):
        match step(serving, wanted, engine, tuple(loaded)):
            case None:
                break
            case Restart(setup=setup):
                serving, loaded = setup, []
            case Swap(target=target) | Relabel(target=target):
                serving, loaded = replace(serving, checkpoint=target), []
            case Load(target=target):
                loaded.append(target.policy)
                assert len(loaded) <= slots
            case Unload(policy=policy):
                loaded.remove(policy)
    else:
        raise AssertionError("it never ends")
    assert serving.checkpoint.policy == wanted.checkpoint.policy
    newest = {target.policy.adapter_name for target in wanted.adapters[: engine.adapter_slots]}
    if lora == "runtime":
        assert {policy.adapter_name for policy in loaded} == newest
    assert serving.merged == (lora == "none" and bool(wanted.adapters))
