"""A job that kills engines is found and ends dead after few deaths, and no innocent job is charged for one."""

import random
from collections import deque
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rollpool.schemas.scripts import Record
from rollpool.worker.suspects import (
    BACKOFF_MOST_S,
    BACKOFF_S,
    HISTORY_CHARS,
    LINE_CHARS,
    SHRINK,
    admitted,
    after_death,
    after_loss,
    backoff_ms,
    history_line,
    least,
    smaller,
)

MAX_FAULTS = 2

limits = st.one_of(st.none(), st.integers(1, 12))


def died(record: Record, company: int) -> Record:
    return after_death(record, company=company, worker="w", line="its engine died")


# One loss


@pytest.mark.parametrize("company", [2, 8, 64, 1000])
def test_the_first_death_in_company_changes_nothing_of_a_jobs_company(company: int) -> None:
    after = died(Record(), company)
    assert (after.attempts, after.faults, after.losses, after.company, after.avoid) == (0, 0, 1, company, "w")


@given(limits, st.integers(2, 1000))
def test_a_death_in_company_charges_nobody(before: int | None, company: int) -> None:
    after = died(Record(company=before), company)
    assert (after.attempts, after.faults, after.losses) == (0, 0, 1)


@given(limits)
def test_a_death_alone_is_a_suspects_fault_and_from_then_on_the_job_runs_alone(before: int | None) -> None:
    after = died(Record(company=before), 1)
    assert (after.attempts, after.faults, after.losses, after.company) == (0, int(before is not None), 1, 1)


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_from_the_second_loss_on_company_shrinks_and_never_to_nobody(before: int, company: int) -> None:
    after = smaller(before, company)
    assert 1 <= after <= max(1, min(before, company) // SHRINK)


@given(limits)
def test_a_loss_while_the_engine_lives_is_an_attempt_and_makes_nobody_a_suspect(before: int | None) -> None:
    after = after_loss(Record(company=before), worker="w", line="lost")
    assert (after.attempts, after.faults, after.losses, after.company, after.avoid) == (1, 0, 1, before, "w")


# What is told of it


@given(st.lists(st.tuples(st.sampled_from(["death", "loss"]), st.text(max_size=3 * LINE_CHARS)), max_size=60))
def test_the_history_is_bounded_and_ends_with_the_last_loss(losses: list[tuple[str, str]]) -> None:
    record = Record()
    for at, (kind, why) in enumerate(losses):
        line = history_line(at, why)
        if kind == "death":
            record = after_death(record, company=2, worker="w", line=line)
        else:
            record = after_loss(record, worker="w", line=line)
        assert record.history.endswith(f"{line}\n")
    assert len(record.history) <= HISTORY_CHARS
    assert record.losses == len(losses)


def test_a_history_of_any_length_keeps_its_last_lines() -> None:
    record = Record()
    for at in range(1000):
        record = after_loss(record, worker="w", line=history_line(at, f"loss {at} {'x' * LINE_CHARS}"))
    assert HISTORY_CHARS - 2 * LINE_CHARS < len(record.history) <= HISTORY_CHARS
    assert all(f" loss {at} x" in record.history for at in range(985, 1000))


@given(st.one_of(st.text(), st.text(st.characters(categories=["Cs", "Cc", "Zl", "Zp", "Zs"]))))
def test_a_line_of_it_is_one_line_that_a_server_takes(what: str) -> None:
    line = history_line(1_700_000_000.9, what)
    assert line.startswith("2023-11-14T22:13:20Z ")
    assert len(line.splitlines()) == 1
    assert len(line) <= LINE_CHARS + 21
    assert line.encode().decode() == line


def test_what_a_record_says_is_carried_and_read_back() -> None:
    record = Record(attempts=1, faults=2, losses=3, company=4, avoid="w", history="é\n")
    for made in (record, replace(record, company=None), Record()):
        carried = {name.encode(): str(value).encode() for name, value in made.fields().items()}
        assert Record.of(carried) == made


# When it runs again


@given(st.integers(1, 10**6), st.floats(0.0, 1.0))
def test_the_wait_is_between_half_and_all_of_what_the_losses_ask_for(losses: int, jitter: float) -> None:
    longest = min(1000 * BACKOFF_S * 2.0 ** min(losses - 1, 100), 1000 * BACKOFF_MOST_S)
    assert longest / 2 - 1 <= backoff_ms(losses, jitter) <= longest


# What a host takes on


@given(st.lists(limits, max_size=8), st.lists(limits, max_size=8))
def test_what_a_host_takes_on_leaves_at_most_one_job_to_wait_for_the_others(
    companies: list[int | None], new: list[int | None]
) -> None:
    taken = admitted(companies, new)
    before = [*companies, *new[: max(0, taken - 1)]]
    limit = least(before)
    if taken > 1 or (taken and limit is not None and limit >= len(companies)):
        assert limit is None or len(before) <= limit  # the last one taken is the only one that may not fit
    if taken < len(new):
        limit = least([*companies, *new[:taken]])
        assert limit is not None
        assert len(companies) + taken + 1 > limit  # else the next would have found room


@given(st.integers(0, 100), st.integers(0, 100))
def test_jobs_that_nobody_suspects_are_all_taken_on(here: int, new: int) -> None:
    assert admitted([None] * here, [None] * new) == new


@given(st.lists(limits, min_size=1))
def test_an_empty_host_takes_at_least_one_job_whatever_it_needs(new: list[int | None]) -> None:
    assert admitted([], new) >= 1


def test_a_suspect_is_taken_on_to_wait_for_the_others_and_nothing_is_behind_it() -> None:
    assert admitted([None, None], [None, 1, None, None]) == 2
    assert admitted([None, None, 1], [None]) == 0
    assert admitted([], [2, None, None]) == 2


# A pool


@dataclass
class IdealPool:
    """Hosts of which each round one runs what it may; an engine dies whenever a killer is in it, and only then.

    A round of it is the worst case for the search: everything that may be in the engine is, whenever it dies.
    """

    chance: random.Random
    room: int
    killers: set[int]
    queue: deque[tuple[int, Record]]
    finished: dict[int, Record] = field(default_factory=dict)
    dead: dict[int, Record] = field(default_factory=dict)
    deaths: int = 0

    def round(self) -> None:
        pulled = [self.queue.popleft() for _ in range(min(self.chance.randint(1, self.room), len(self.queue)))]
        alive = []
        for name, record in pulled:
            if record.faults >= MAX_FAULTS:
                self.dead[name] = record
            else:
                alive.append((name, record))
        taken = admitted([], [record.company for _, record in alive])
        inside: list[tuple[int, Record]] = []
        for _, record in alive[:taken]:
            limit = least([record.company, *(each.company for _, each in inside)])
            if limit is not None and len(inside) >= limit:
                break
            inside.append(alive[len(inside)])
        self.queue.extendleft(reversed(alive[len(inside) :]))
        if not self.killers & {name for name, _ in inside}:
            self.finished.update(inside)
            return
        self.deaths += 1
        for name, record in inside:  # each comes back when its wait is over, among whatever is there then
            self.queue.insert(self.chance.randint(0, len(self.queue)), (name, died(record, len(inside))))


def deaths_at_most(room: int) -> int:
    """Of one killer: at first sight, then one for each smaller company it is found in, then alone."""
    company, shrinks = room, 0
    while company > 1:
        company, shrinks = smaller(company, company), shrinks + 1
    return 1 + shrinks + MAX_FAULTS


def test_a_killer_among_64_costs_five_engines() -> None:
    assert deaths_at_most(64) == 5


@given(innocents=st.integers(0, 150), killers=st.integers(0, 4), room=st.integers(1, 100), seed=st.integers(0, 2**32))
@example(innocents=63, killers=1, room=64, seed=0)
@example(innocents=150, killers=4, room=100, seed=1)
def test_killers_end_dead_after_few_deaths_and_innocents_are_never_charged(
    innocents: int, killers: int, room: int, seed: int
) -> None:
    chance = random.Random(seed)
    total = innocents + killers
    names = list(range(total))
    chance.shuffle(names)
    pool = IdealPool(chance, room, set(names[:killers]), deque((name, Record()) for name in range(total)))
    for _ in range(100 + 50 * total):
        if not pool.queue:
            break
        pool.round()
    assert set(pool.dead) == pool.killers
    assert set(pool.finished) == set(names[killers:])
    for record in pool.dead.values():
        assert record.faults == MAX_FAULTS
        assert record.losses <= deaths_at_most(room)
    assert all((record.faults, record.attempts) == (0, 0) for record in pool.finished.values())
    assert pool.deaths <= killers * deaths_at_most(room)
