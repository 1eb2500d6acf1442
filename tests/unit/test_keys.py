"""Key names: one hash slot for a pool, no two keys alike, no name that could leave its place."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.crc import key_slot

from rollpool.schemas import LANES, Keys, SettingsError
from rollpool.schemas.jobs import NAME_PATTERN

names = st.from_regex(NAME_PATTERN, fullmatch=True)


def every_key(keys: Keys, run: str, batch: str, worker: str) -> list[str]:
    return [
        *keys.lanes(run),
        *(keys.parked, keys.delayed, keys.runs, keys.dead, keys.control, keys.acks, keys.policies, keys.policy),
        *(keys.batch(run, batch), keys.open_batches(run), keys.results(run, batch), keys.run(run)),
        *(keys.rollout, keys.worker(worker)),
    ]


def test_no_key_is_left_out_of_these_tests() -> None:
    methods = {name for name in vars(Keys) if not name.startswith("_")} - {"pool"}
    spelled = set(every_key.__code__.co_names) | {"jobs", "batch_prefix"}  # lanes are jobs; the prefix is tested below
    assert methods <= spelled


@given(pool=names, run=names, batch=names, worker=names)
def test_all_keys_of_a_pool_share_one_cluster_slot(pool: str, run: str, batch: str, worker: str) -> None:
    keys = every_key(Keys(pool), run, batch, worker)
    assert {key_slot(key.encode()) for key in keys} == {key_slot(pool.encode())}


@given(names, names, names)
def test_no_two_keys_of_a_pool_are_alike(run: str, batch: str, worker: str) -> None:
    keys = every_key(Keys("p"), run, batch, worker)
    assert len(set(keys)) == len(keys)


@given(one=st.tuples(names, names), other=st.tuples(names, names))
def test_batches_of_different_names_have_different_keys(one: tuple[str, str], other: tuple[str, str]) -> None:
    keys = Keys("p")
    assert (keys.batch(*one) == keys.batch(*other)) == (one == other)


def test_two_pools_share_no_key() -> None:
    one, other = (set(every_key(Keys(pool), "r", "b", "w")) for pool in ("a", "b"))
    assert not one & other


def test_lanes_are_read_most_urgent_first() -> None:
    keys = Keys("p")
    assert keys.lanes("r") == [keys.jobs("r", lane) for lane in LANES]
    assert LANES == ("high", "default", "low")


def test_the_batch_prefix_is_completed_by_run_and_id() -> None:
    keys = Keys("p")
    assert f"{keys.batch_prefix}r:b" == keys.batch("r", "b")


@pytest.mark.parametrize("pool", ["", "a:b", "a{b", "a}b", "a/b", "a b", ".a", "-a", "x" * 129])
def test_a_pool_name_that_could_leave_its_place_is_refused(pool: str) -> None:
    with pytest.raises(SettingsError, match="pool"):
        Keys(pool)


def test_a_pool_name_that_ends_in_a_newline_is_refused() -> None:
    with pytest.raises(SettingsError, match="pool"):
        Keys("pool\n")
