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
        *(keys.ready(run, lane) for lane in LANES),
        *(keys.retries, keys.waiting, keys.parked(run), keys.exact(run), keys.delayed, keys.deadlines),
        *(keys.runs, keys.dead, keys.control, keys.acks, keys.policies, keys.policy),
        *(keys.run_policy(run), keys.generations, keys.publisher),
        *(keys.batch(run, batch), keys.parts(run, batch), keys.results(run, batch)),
        *(keys.open_batches(run), keys.run(run), keys.fair),
        *(keys.rollout, keys.sweep, keys.ended, keys.worker(worker), keys.passed(worker)),
    ]


def test_no_key_is_left_out_of_these_tests() -> None:
    methods = {name for name in vars(Keys) if not name.startswith("_")} - {"pool"}
    # Lanes are jobs; streams are lanes and retries, tested below; all begin with the prefix, tested below too.
    spelled = set(every_key.__code__.co_names) | {"jobs", "streams", "prefix"}
    for code in every_key.__code__.co_consts:
        spelled |= set(getattr(code, "co_names", ()))
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


def test_a_job_can_be_in_somebodys_hands_on_every_lane_and_on_the_retries() -> None:
    keys = Keys("p")
    assert keys.streams([]) == [keys.retries]
    assert keys.streams(["r", "s"]) == [keys.retries, *keys.lanes("r"), *keys.lanes("s")]


@given(names, names, names)
def test_all_keys_of_a_pool_begin_with_its_prefix_and_those_of_another_do_not(
    run: str, batch: str, worker: str
) -> None:
    keys, other = Keys("p"), Keys("p2")
    assert all(key.startswith(keys.prefix) for key in every_key(keys, run, batch, worker))
    assert not any(key.startswith(keys.prefix) for key in every_key(other, run, batch, worker))


@pytest.mark.parametrize("pool", ["", "a:b", "a{b", "a}b", "a/b", "a b", ".a", "-a", "x" * 129])
def test_a_pool_name_that_could_leave_its_place_is_refused(pool: str) -> None:
    with pytest.raises(SettingsError, match="pool"):
        Keys(pool)


def test_a_pool_name_that_ends_in_a_newline_is_refused() -> None:
    with pytest.raises(SettingsError, match="pool"):
        Keys("pool\n")
