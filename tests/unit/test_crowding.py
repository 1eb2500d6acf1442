"""Which adapter makes room for one that is wanted, where steady load would keep its slot in use for ever."""

from rollpool.schemas import Policy
from rollpool.worker.policy.orders import Target
from rollpool.worker.policy.plan import Wanted, crowding, returning

BASE = Target(Policy(version=1, checkpoint="/base", run="t"), "1-0")


def adapter(version: int, run: str = "a") -> Target:
    policy = Policy(version=version, lora_path=f"/lora/{run}/{version}", base="/base", run=run)
    return Target(policy, f"{version + 1}-0")


def wanted(*targets: Target) -> Wanted:
    return Wanted(BASE, targets)


def test_what_is_wanted_no_more_makes_room_for_what_has_no_slot() -> None:
    old, new, other = adapter(2), adapter(3), adapter(2, "b")
    loaded = (old.policy, other.policy)
    assert crowding(loaded, wanted(new, other, old), 2, ()) == (old.policy, new)


def test_one_that_is_leaving_is_enough_for_one_that_comes() -> None:
    old, older, new = adapter(3), adapter(2), adapter(4)
    loaded = (older.policy, old.policy)
    assert crowding(loaded, wanted(new), 2, (older.policy,)) is None


def test_nothing_leaves_while_there_is_a_free_slot_or_nothing_is_missing() -> None:
    old, new = adapter(2), adapter(3)
    assert crowding((old.policy,), wanted(new, old), 2, ()) is None
    assert crowding((old.policy, new.policy), wanted(new, old), 2, ()) is None
    assert crowding((), wanted(), 2, ()) is None


def test_one_that_is_wanted_again_before_it_left_comes_back() -> None:
    old, new = adapter(2), adapter(3)
    assert returning(wanted(old), 1, (old.policy,)) == old.policy
    assert returning(wanted(new, old), 1, (old.policy,)) is None
    assert returning(wanted(new), 1, ()) is None
