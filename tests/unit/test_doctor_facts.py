"""What the doctor makes of facts, and that it knows every key a pool has."""

import inspect

import pytest

from rollpool.ops.doctor import _KINDS, judge, row_of
from rollpool.schemas import Keys
from rollpool.schemas.scripts.doctor import KEY_KINDS, PoolFacts, RunFacts

#: Of `Keys`, what is no key of one kind: names of several, a prefix, a channel.
NO_KEYS = {"pool", "prefix", "lanes", "streams", "ended"}


def facts(**changes: object) -> RunFacts:
    """A run of ten jobs, seven of them settled, that is in order."""
    whole = {
        "run": "math",
        "listed": True,
        "expires": False,
        "counters": {"enqueued": "10", "open": "3", "ok": "6", "failed": "1", "unread": "50", "weight": "0.5"},
        "batches": 1,
        "committed": 1,
        "open": 3,
        "pieces": 3,
        "unread": 50,
        "backlog": 1,
        "in_flight": 1,
        "ready": 0,
        "delayed": 0,
        "parked": 1,
        "exact": 0,
        "tombstones": 2,
    }
    return RunFacts.model_validate(whole | changes)


def kinds(run: RunFacts) -> list[str]:
    return [finding.kind for finding in judge(PoolFacts(runs=[run], trouble={}, results=[], counts={}))]


def test_a_run_in_order_gives_no_finding() -> None:
    assert kinds(facts()) == []
    assert row_of(facts()).holds


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"counters": {"enqueued": "11", "open": "3", "ok": "7", "unread": "50"}}, "counter-enqueued"),
        ({"open": 4}, "counter-open"),
        ({"unread": 49}, "counter-unread"),
        ({"listed": False}, "run-unlisted"),
        ({"expires": True}, "run-expires"),
    ],
)
def test_what_does_not_add_up_is_found(changes: dict[str, object], kind: str) -> None:
    assert kinds(facts(**changes)) == [kind]


def test_a_counter_that_is_no_number_does_not_add_up() -> None:
    assert "counter-enqueued" in kinds(facts(counters={"enqueued": "many", "open": "3", "unread": "50"}))


def test_a_run_that_was_forgotten_may_keep_its_counters() -> None:
    gone = facts(counters={"enqueued": "7", "ok": "7"}, listed=False, expires=True, batches=0, open=0, unread=0)
    assert kinds(gone) == []


def test_the_row_does_not_hold_when_a_job_is_in_no_place() -> None:
    assert not row_of(facts(backlog=0)).holds


def test_what_is_not_named_is_counted() -> None:
    found = PoolFacts(runs=[], trouble={"lost": (7, [("math:b/0", ""), ("math:b/1", "")])}, results=[], counts={})
    lines = [str(finding) for finding in judge(found)]
    assert [line.partition(":")[0] for line in lines] == ["job b/0 of run math", "job b/1 of run math", "5 more"]


@pytest.mark.parametrize("kind", _KINDS)
def test_every_kind_of_trouble_says_what_and_what_to_do(kind: str) -> None:
    found = PoolFacts(runs=[], trouble={kind: (1, [("math:b/0", "DETAIL")])}, results=[], counts={})
    (finding,) = judge(found)
    assert finding.subject
    assert finding.what
    assert finding.remedy
    assert str(finding).count("{") == 0


def test_every_key_of_a_pool_is_of_a_known_kind() -> None:
    keys, known = Keys("p"), {(name, len_) for name, len_, _ in KEY_KINDS}
    for name, member in vars(Keys).items():
        if name.startswith("_") or name in NO_KEYS:
            continue
        value = getattr(keys, name)
        if inspect.isfunction(member):
            value = value(*("x" * (len(inspect.signature(member).parameters) - 1)))
        kind, *names = value.removeprefix(keys.prefix).split(":")
        assert (kind, len(names)) in known or (kind, "*") in known, f"{name} is unknown to the doctor: add {value}"
