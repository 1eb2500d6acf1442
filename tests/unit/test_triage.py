"""No entry makes it past triage that this host must not run, and none of any kind makes it fail."""

from typing import Any

import msgpack
import pytest
from fakes import entry_of, job
from hypothesis import given
from hypothesis import strategies as st

from rollpool.schemas import Policy, PromptJob
from rollpool.schemas.scripts import Entry
from rollpool.schemas.wire import pack, pack_model
from rollpool.worker.policy.offer import Offer
from rollpool.worker.triage import Avoid, Budgets, Bury, Expire, Fail, Park, Pass, Passed, Run, Verdict, triage

BUDGETS = Budgets(attempts=3, faults=2)


def judged(entry: Entry, *, version: int = 0, now_ms: int = 0) -> Verdict:
    offer = Offer(Policy(version=version, checkpoint="/c", run="r"))
    return triage(entry, worker="me", offer=offer, now_ms=now_ms, budgets=BUDGETS)


tags = st.fixed_dictionaries(
    {
        "policy_version": st.integers(0, 20),
        "max_staleness": st.one_of(st.none(), st.integers(0, 20)),
        "exact": st.booleans(),
    }
)


@given(tags, st.integers(0, 20))
def test_no_job_runs_on_a_policy_that_its_tag_forbids(tag: dict[str, Any], version: int) -> None:
    made = job(**tag)
    lowest = made.policy_version if made.exact else made.policy_version - (tag["max_staleness"] or 0)
    anything = tag["max_staleness"] is None and not made.exact
    allowed = version == made.policy_version if made.exact else anything or version >= lowest
    verdict = judged(entry_of(made), version=version)
    assert isinstance(verdict, Run) == allowed
    match verdict:
        case Park(version=needed):
            assert version < needed
            assert made.may_run_on(needed)
        case Passed():
            assert made.exact
            assert version > made.policy_version


@given(st.binary(max_size=200))
def test_bytes_of_any_kind_are_buried(body: bytes) -> None:
    assert isinstance(judged(Entry("s", "1-1", {b"body": body, b"job": b"b/0", b"run": b"r"})), Bury)


json_like = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(), st.binary()),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner)),
    max_leaves=8,
)


@given(st.sampled_from([*PromptJob.model_fields, "schema", "foreign"]), json_like)
def test_a_field_of_any_value_is_judged_and_never_raises(name: str, value: Any) -> None:
    body = pack({"schema": 1, **job().__dict__, name: value})
    assert isinstance(judged(Entry("s", "1-1", {b"body": body, b"job": b"b/0", b"run": b"r"})), Verdict)


@given(st.integers(0, 200))
def test_a_truncated_body_is_buried(missing: int) -> None:
    body = pack_model(job())
    cut = body[: max(0, len(body) - 1 - missing)]
    assert isinstance(judged(Entry("s", "1-1", {b"body": cut, b"job": b"b/0", b"run": b"r"})), Bury)


def nested(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("prompt", [[{"role": nested(1000), "content": "x"}], nested(1000)])
def test_a_body_nested_as_deep_as_msgpack_reads_is_buried(prompt: Any) -> None:
    fields = {"schema": 1, "run": "r", "batch": "b", "index": 0, "policy_version": 0, "prompt": prompt}
    body = msgpack.packb(fields)
    assert isinstance(judged(Entry("s", "1-1", {b"body": body, b"job": b"b/0", b"run": b"r"})), Bury)


@pytest.mark.parametrize("fields", [{b"job": b"b/1"}, {b"run": b"other"}, {b"job": b""}])
def test_an_entry_whose_fields_name_another_job_than_its_body_is_buried(fields: dict[bytes, bytes]) -> None:
    entry = entry_of(job())
    assert isinstance(judged(Entry(entry.stream, entry.id, entry.fields | fields)), Bury)


def test_a_job_is_expired_only_past_its_deadline() -> None:
    entry = entry_of(job(deadline_ms=1000))
    assert isinstance(judged(entry, now_ms=1000), Run)
    assert isinstance(judged(entry, now_ms=1001), Expire)


def test_a_job_past_its_deadline_expires_whatever_its_tag_and_attempts() -> None:
    entry = entry_of(job(deadline_ms=0, policy_version=9, max_staleness=0), attempts=b"99", faults=b"99")
    assert isinstance(judged(entry, now_ms=1), Expire)


@pytest.mark.parametrize(
    ("counts", "verdict"),
    [
        ({"attempts": b"2", "faults": b"1"}, Run),
        ({"attempts": b"3"}, Fail),
        ({"faults": b"2"}, Fail),
        ({"losses": b"99"}, Run),
        ({"attempts": b"-3"}, Run),
        ({"attempts": b"9" * 5000, "faults": b"x", "losses": "²".encode(), "company": b"0", "avoid": b"\xff"}, Run),
    ],
)
def test_a_job_that_was_lost_too_often_fails(counts: dict[str, Any], verdict: type[Verdict]) -> None:
    assert isinstance(judged(entry_of(job(), **counts)), verdict)


@pytest.mark.parametrize("counts", [{"attempts": b"3"}, {"faults": b"2"}])
def test_a_job_that_fails_says_how_often_it_was_lost_and_how_the_last_time(counts: dict[str, Any]) -> None:
    verdict = judged(entry_of(job(), history=b"first\nthe engine died\n", **counts))
    assert isinstance(verdict, Fail)
    assert verdict.error.endswith("the last time: the engine died")
    assert verdict.error.startswith(next(iter(counts.values())).decode())
    assert "first" not in verdict.error
    bare = judged(entry_of(job(), **counts))
    assert isinstance(bare, Fail)
    assert bare.error.endswith("this job") or bare.error.endswith("alone")


@pytest.mark.parametrize(
    ("carried", "verdict"),
    [
        ({"losses": b"1", "avoid": b"me"}, Run),  # one may be anybody's
        ({"losses": b"2", "avoid": b"me"}, Avoid),
        ({"losses": b"2", "avoid": b"another"}, Run),
        ({"losses": b"2"}, Run),
        ({"losses": b"9", "avoid": b"me", "faults": b"2"}, Fail),
    ],
)
def test_a_job_that_was_lost_here_twice_is_for_another_host(carried: dict[str, Any], verdict: type[Verdict]) -> None:
    assert isinstance(judged(entry_of(job(), **carried)), verdict)


@pytest.mark.parametrize(
    ("host", "carried", "verdict"),
    [
        (None, {}, Run),
        ("me", {}, Run),
        ("another", {}, Pass),
        ("another", {"passed": b"another"}, Run),  # it was asked before
        ("another", {"passed": b"yet-another"}, Run),
        ("another", {"losses": b"1", "avoid": b"another"}, Run),  # where it was lost there is nothing to wait for
        ("another", {"losses": b"2", "avoid": b"me"}, Avoid),
        ("another", {"attempts": b"3"}, Fail),
    ],
)
def test_a_job_that_wishes_for_another_host_is_left_to_it_once(
    host: str | None, carried: dict[str, Any], verdict: type[Verdict]
) -> None:
    found = judged(entry_of(job(host=host), **carried))
    assert isinstance(found, verdict)
    if isinstance(found, Pass):
        assert (found.host, found.policy.version) == ("another", 0)


def test_what_a_host_may_not_run_anyway_is_not_left_to_the_host_it_wishes_for() -> None:
    assert isinstance(judged(entry_of(job(host="another", policy_version=5, max_staleness=0)), version=4), Park)
    assert isinstance(judged(entry_of(job(host="another", deadline_ms=0)), now_ms=1), Expire)


def test_what_a_host_may_not_run_anyway_is_not_avoided() -> None:
    lost_here: dict[str, Any] = {"losses": b"2", "avoid": b"me"}
    assert isinstance(judged(entry_of(job(policy_version=5, max_staleness=0), **lost_here), version=4), Park)
    assert isinstance(judged(entry_of(job(policy_version=5, exact=True), **lost_here), version=6), Passed)


def test_an_exact_job_waits_for_its_version_and_has_passed_after_it() -> None:
    entry = entry_of(job(policy_version=5, exact=True))
    verdict = judged(entry, version=4)
    assert isinstance(verdict, Park)
    assert verdict.version == 5
    assert isinstance(judged(entry, version=5), Run)
    assert isinstance(judged(entry, version=6), Passed)


def adapter(version: int, run: str = "r") -> Policy:
    return Policy(version=version, lora_path=f"/lora/{version}", run=run)


@given(tags, st.sets(st.integers(1, 20)), st.integers(0, 20))
def test_a_run_gets_its_own_adapters_and_no_others(tag: dict[str, Any], versions: set[int], others: int) -> None:
    offer = Offer(Policy(version=0, checkpoint="/c", run="x")).with_adapter(adapter(others, run="other"))
    for version in versions:
        offer = offer.with_adapter(adapter(version))
    made = job(**tag)
    served = sorted({0, *versions})
    verdict = triage(entry_of(made), worker="me", offer=offer, now_ms=0, budgets=BUDGETS)
    if isinstance(verdict, Run):
        assert made.may_run_on(verdict.policy.version)
        assert verdict.policy.version == (made.policy_version if made.exact else served[-1])
        assert (offer.adapter_of(verdict.policy) is None) == (verdict.policy.version == 0)
    elif made.exact:
        assert made.policy_version not in served
    else:
        assert not made.may_run_on(served[-1])


def test_an_adapter_that_is_merged_in_is_for_its_run_alone() -> None:
    offer = Offer(adapter(3))
    assert offer.adapter_of(adapter(3)) is None
    assert (offer.newest("r"), offer.newest("other"), offer.checkpoint) == (3, None, None)
    assert offer.shown() == "r:3"
    verdict = triage(entry_of(job(run="other")), worker="me", offer=offer, now_ms=0, budgets=BUDGETS)
    assert isinstance(verdict, Park)
