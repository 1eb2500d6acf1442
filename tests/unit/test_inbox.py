"""The inbox: each group is handed out once, whatever arrives twice, and every job is in one count."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollpool.producer.inbox import BEGIN, Inbox, as_ranges, from_ranges
from rollpool.schemas import Group, Outcome, SamplingParams


def group(index: int, outcome: Outcome = "ok", prompt: int = 3, output: int = 2) -> Group:
    sample = {
        "output_ids": np.ones(output, np.int32),
        "logprobs": np.zeros(output, np.float32),
        "text": "",
        "finish_reason": "stop",
        "version_spans": [(0, 0, output)],
    }
    fields: dict[str, Any] = {
        "run": "r",
        "batch": "b",
        "index": index,
        "outcome": outcome,
        "policy_version": 0,
        "prompt_ids": np.ones(prompt, np.int32),
        "samples": [sample] if outcome == "ok" else [],
        "sampling": SamplingParams(),
    }
    return Group.model_validate(fields)


def take(inbox: Inbox) -> int:
    index = inbox.head().index
    inbox.given += 1
    return index


def test_an_entry_read_twice_is_handed_out_once() -> None:
    inbox = Inbox("b", 2)
    inbox.add("1-0", group(0))
    inbox.add("1-0", group(0))
    assert take(inbox) == 0
    assert not inbox.ready
    assert not inbox.complete


def test_the_report_accounts_for_every_job(caplog: pytest.LogCaptureFixture) -> None:
    inbox = Inbox("b", 6)
    arrived = [
        group(0, output=2),
        group(1, output=4),
        group(2, "failed", prompt=9),
        group(3, "stale", prompt=0),
        group(4, "failed"),
    ]
    for entry, each in enumerate(arrived):
        inbox.add(f"{entry}-1", each)
    report = inbox.report()
    assert (report.enqueued, report.ok, report.failed, report.stale, report.open) == (6, 2, 2, 1, 1)
    assert report.ok + report.dropped + report.open == report.enqueued
    assert (report.kept_outputs.count, report.kept_outputs.mean, report.kept_outputs.max) == (2, 3.0, 4)
    assert (report.dropped_prompts.count, report.dropped_prompts.median) == (2, 6.0)
    # One warning for each reason, not for each job.
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]


def test_what_was_read_is_counted_in_bytes_from_the_beginning_of_the_stream() -> None:
    inbox = Inbox("b", 3)
    inbox.add("1-0", group(0), 10)
    inbox.add("2-0", group(1), 5)
    assert (inbox.cursor, inbox.read_bytes) == ("2-0", 15)
    inbox.rewind()
    assert (inbox.cursor, inbox.read_bytes) == (BEGIN, 0)
    inbox.add("1-0", group(0), 10)
    assert (inbox.read_bytes, inbox.settled) == (10, 2)


@given(
    size=st.integers(1, 12),
    before=st.sets(st.integers(0, 11)),
    first_k=st.integers(1, 12),
    steps=st.lists(st.sampled_from(["ok", "failed", "take", "keep"]), max_size=40),
)
def test_no_more_than_the_first_k_are_handed_out_and_all_jobs_are_counted(
    size: int, before: set[int], first_k: int, steps: list[str]
) -> None:
    before = {index for index in before if index < size}
    inbox = Inbox("b", size, before)
    arriving, taken, kept = iter(range(size)), list[int](), False
    for step in steps:
        if step == "take" and inbox.ready:
            taken.append(take(inbox))
        elif step == "keep" and not kept:
            kept, most = True, max(first_k, len(before) + len(taken))
            inbox.keep_first(first_k)
        elif step in ("ok", "failed") and (index := next(arriving, None)) is not None:
            inbox.add(f"{index + 1}-0", group(index, "ok" if step == "ok" else "failed"))
    report = inbox.report()
    assert report.ok + report.dropped + report.open == report.enqueued == size
    assert not before & set(taken)
    assert len(taken) == len(set(taken)) == inbox.given
    assert from_ranges(inbox.consumed()) == before | set(taken)
    if kept:
        assert inbox.handed <= most
        assert inbox.handed + inbox.ready <= most
    else:
        assert report.surplus == 0


def test_the_last_of_the_first_is_seen_before_it_is_handed_out() -> None:
    inbox = Inbox("b", 4)
    inbox.add("1-0", group(0))
    assert not inbox.reached(2)
    take(inbox)
    assert not inbox.reached(2)
    inbox.add("2-0", group(1))
    assert inbox.reached(2)
    inbox.add("3-0", group(2))
    inbox.add("4-0", group(3, "failed"))
    # All is here, but one more than wanted.
    assert inbox.reached(2)
    inbox.keep_first(2)
    assert not inbox.reached(2)
    assert take(inbox) == 1
    assert inbox.complete
    assert (inbox.report().ok, inbox.report().surplus, inbox.report().failed) == (2, 1, 1)
    assert inbox.not_kept() == [[2, 4]]


def test_ranges_come_back_as_they_were() -> None:
    assert as_ranges([0, 1, 2, 5, 7, 8]) == [[0, 3], [5, 6], [7, 9]]
    assert from_ranges(as_ranges([0, 1, 2, 5, 7, 8])) == {0, 1, 2, 5, 7, 8}
    assert as_ranges([]) == []
