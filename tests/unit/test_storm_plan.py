"""What a storm does follows from its seed; so a storm that found something can be had again."""

import itertools
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "chaos"))

from storm import options
from storm.faults import DECK, STOP_LEASES, faults
from storm.work import POISON_EVERY, digest, sim_batch, text_batch

ORDERS = {kind: 10**9 + number for number, kind in enumerate(POISON_EVERY)}


def plan(seed, count):
    return list(itertools.islice(faults(seed, lease_s=3.0), count))


def test_the_same_seed_gives_the_same_faults():
    assert plan(7, 200) == plan(7, 200)
    assert plan(7, 20) != plan(8, 20)


@pytest.mark.parametrize("seed", range(20))
def test_every_kind_comes_before_any_comes_twice(seed):
    assert Counter(fault.kind for fault in plan(seed, len(DECK))) == dict.fromkeys(DECK, 1)


def test_faults_of_some_kinds_are_of_no_other():
    chosen = itertools.islice(faults(5, lease_s=3.0, kinds=("cut", "policy")), 30)
    assert {fault.kind for fault in chosen} == {"cut", "policy"}


def test_faults_come_in_order_and_a_hundred_of_them_within_the_default_time():
    times = [fault.at for fault in plan(3, 115)]
    assert times == sorted(times)
    assert times[99] < options.SECONDS


def test_a_stopped_worker_sleeps_past_its_lease():
    seconds = [fault.seconds for fault in plan(3, 300) if fault.kind == "worker_stop"]
    assert seconds
    assert all(3.0 * STOP_LEASES[0] <= each <= 3.0 * STOP_LEASES[1] for each in seconds)


def test_a_batch_made_again_is_the_same_to_the_last_token():
    first, again = (sim_batch(5, "run-0", 3, 2, 40, ORDERS) for _ in range(2))
    assert first == again
    assert first.facts() == again.facts()
    assert text_batch(5, "run-real", 3, 2, 4) == text_batch(5, "run-real", 3, 2, 4)


@pytest.mark.parametrize("seed", range(10))
def test_a_short_run_has_poison_of_every_kind_and_mostly_none(seed):
    batches = [sim_batch(seed, "run-1", step, 1, 40, ORDERS) for step in range(8)]
    poison = Counter(kind for batch in batches for kind in batch.poison.values())
    assert set(poison) == set(POISON_EVERY)
    assert poison.total() < 0.06 * 8 * 40
    for batch in batches:
        for index, prompt in enumerate(batch.prompts):
            assert (prompt[0] >= 10**9) == (index in batch.poison)


def test_a_digest_tells_token_ids_apart():
    assert digest([[1, 2], [3]]) != digest([[1], [2, 3]])
    assert digest(["a"]) == digest(["a"])
    assert digest([[1]]) != digest([[2]])


def test_a_shorter_storm_asks_for_less_unless_it_is_said_outright():
    short = options.from_environment({"CHAOS_SECONDS": "44", "CHAOS_SEED": "9"})
    assert (short.seed, short.jobs, short.faults) == (9, 1000, 10)
    assert options.from_environment({"CHAOS_SECONDS": "44", "CHAOS_JOBS": "10000"}).jobs == 10_000
    assert options.from_environment({}).jobs == options.JOBS


@pytest.mark.parametrize(
    "environ", [{"CHAOS_SECOND": "1"}, {"CHAOS_SEED": "x"}, {"CHAOS_BREAK": "all"}, {"CHAOS_KINDS": "cut,flood"}]
)
def test_a_knob_that_is_wrong_is_refused(environ):
    with pytest.raises(SystemExit, match=next(iter(environ))):
        options.from_environment(environ)
