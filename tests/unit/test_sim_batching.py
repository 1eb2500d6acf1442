"""Continuous batching of a simulated engine, with time as an argument."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollpool.ops.sim.batching import Batch, Costs, Ended, Request

STEP = 0.02


def batch(slots: int = 2, *, request_s: float = 0.0, prompt_token_s: float = 0.0) -> Batch:
    return Batch(slots, Costs(step_s=STEP, request_s=request_s, prompt_token_s=prompt_token_s))


def put(made: Batch, now: float, *lengths: int, first: int = 0) -> None:
    for key, tokens in enumerate(lengths, start=first):
        made.submit(now, Request(key, 10, tokens))


def finish(made: Batch) -> list[tuple[float, Ended]]:
    """Let all end; when, and what."""
    ended = []
    while (event := made.next_event()) is not None:
        ended += [(event, each) for each in made.advance(event)]
    return ended


def keys(ended: Sequence[Ended]) -> list[int]:
    return [each.key for each in ended]


def test_a_request_takes_a_step_for_each_token() -> None:
    made = batch()
    put(made, 1.0, 5)
    assert made.next_event() == pytest.approx(1.0 + 5 * STEP)
    assert made.advance(1.0 + 4.9 * STEP) == []
    assert (made.steps, made.tokens, made.kv_tokens) == (4, 4, 14)
    assert made.advance(1.0 + 5 * STEP) == [Ended(0, 5)]
    assert made.next_event() is None


def test_a_request_that_comes_during_a_step_begins_with_the_next() -> None:
    made = batch()
    put(made, 0.0, 10)
    made.advance(2.5 * STEP)
    put(made, 2.5 * STEP, 3, first=1)
    assert made.waiting == (1,)
    assert made.next_event() == pytest.approx(3 * STEP)
    made.advance(3 * STEP)
    assert made.running == (0, 1)
    assert [(round(when / STEP), each.key) for when, each in finish(made)] == [(6, 1), (10, 0)]


def test_one_that_ends_makes_room_for_the_next_at_once() -> None:
    made = batch(slots=2)
    put(made, 0.0, 2, 5, 4)
    assert (made.running, made.waiting) == ((0, 1), (2,))
    assert [(round(when / STEP), each.key) for when, each in finish(made)] == [(2, 0), (5, 1), (6, 2)]


def test_running_requests_and_prompts_cost_time() -> None:
    made = batch(slots=4, request_s=0.01, prompt_token_s=0.001)
    put(made, 0.0, 3, 3)
    # Two prompts of ten tokens, then three steps of two requests.
    assert made.next_event() == pytest.approx(20 * 0.001 + 3 * (STEP + 2 * 0.01))
    assert made.advance(0.015) == []
    assert (made.steps, made.running) == (0, (0, 1))
    assert len(finish(made)) == 2


def test_a_saturated_engine_makes_a_token_a_slot_a_step() -> None:
    made = batch(slots=8)
    put(made, 0.0, *(1 + key * 7 % 31 for key in range(4000)))
    made.advance(1000 * STEP)
    assert len(made.waiting) > 0, "saturated to the end"
    assert made.steps == 1000
    assert made.tokens == 8 * 1000


def test_an_abort_ends_one_that_runs_with_what_it_has() -> None:
    made = batch(slots=1)
    put(made, 0.0, 9, 4)
    made.advance(3 * STEP)
    assert made.abort(3 * STEP, 0) == Ended(0, 3, aborted=True)
    assert made.abort(3 * STEP, 0) is None
    assert made.running == (1,)
    assert keys([each for _, each in finish(made)]) == [1]


def test_an_abort_ends_one_that_waits_with_nothing() -> None:
    made = batch(slots=1)
    put(made, 0.0, 3, 4, 5)
    assert made.abort(0.0, 1) == Ended(1, 0, aborted=True)
    assert keys([each for _, each in finish(made)]) == [0, 2]


def test_nothing_moves_during_a_pause() -> None:
    made = batch()
    put(made, 0.0, 4)
    made.advance(2 * STEP)
    made.pause()
    put(made, 3 * STEP, 4, first=1)
    assert made.next_event() is None
    assert made.advance(100.0) == []
    made.resume(100.0)
    assert made.running == (0, 1)
    assert [round((when - 100.0) / STEP) for when, _ in finish(made)] == [2, 4]


def test_what_was_retracted_goes_first_and_keeps_its_tokens() -> None:
    made = batch(prompt_token_s=0.001)
    put(made, 0.0, 5, 5, 5)
    made.advance(0.02 + 2 * STEP)
    made.pause(retract=True)
    assert (made.running, made.waiting) == ((), (0, 1, 2))
    assert made.abort(1.0, 1) == Ended(1, 2, aborted=True)
    made.resume(1.0)
    assert made.running == (0, 2)
    # Ten tokens of each prompt and two that were generated are computed again.
    (when, first), (_, second) = finish(made)
    assert (first, second) == (Ended(0, 5), Ended(2, 5))
    assert when == pytest.approx(1.0 + 0.022 + 3 * STEP)


def test_a_change_stands_for_a_while_and_goes_on_with_the_tokens_there_are() -> None:
    made = batch(prompt_token_s=0.001)
    put(made, 0.0, 5, 5, 5)
    made.advance(0.02 + 2.5 * STEP)
    assert made.retract(1.0, 0.5) == {0: 2, 1: 2, 2: 0}
    assert (made.running, made.waiting) == ((0, 1), (2,)), "the first in the queue run at once"
    assert made.advance(1.5) == []
    assert made.kv_tokens == 2 * 12
    assert made.abort(1.5, 1) == Ended(1, 2, aborted=True)
    (when, first), *_ = finish(made)
    assert first == Ended(0, 5)
    assert when == pytest.approx(1.5 + 2 * 0.012 + 0.010 + 3 * STEP), "prompts are computed again, with what was made"


def test_a_change_during_a_pause_does_not_end_it() -> None:
    made = batch()
    put(made, 0.0, 4)
    made.advance(2 * STEP)
    made.pause()
    assert made.retract(1.0, 0.1) == {0: 2}
    assert made.next_event() is None
    made.resume(2.0)
    assert [round((when - 2.0) / STEP) for when, _ in finish(made)] == [2]


@st.composite
def stories(draw: st.DrawFn) -> list[tuple[float, str, int]]:
    """Times, and what comes then: a request of so many tokens, the abort of one, a pause, or a change of weights."""
    what = st.tuples(
        st.floats(0.0, 0.3),
        st.sampled_from(["submit"] * 5 + ["abort", "pause", "retract", "resume", "change"]),
        st.integers(1, 12),
    )
    gaps = draw(st.lists(what, max_size=40))
    now, story = 0.0, []
    for gap, name, number in gaps:
        now += gap
        story.append((now, name, number))
    return story


def live(made: Batch, slots: int, story: list[tuple[float, str, int]], *, looks: int) -> list[tuple[int, int, bool]]:
    """Live through a story, looking so often between its events; everything that ended."""
    ended: list[Ended] = []
    submitted, before = 0, 0.0
    for now, name, number in story:
        for look in range(1, looks + 1):
            ended += made.advance(before + (now - before) * look / looks)
            assert len(made.running) <= slots
        before = now
        if name == "submit":
            put(made, now, number, first=submitted)
            submitted += 1
        elif name == "abort":
            ended += [each for each in [made.abort(now, number)] if each]
        elif name == "resume":
            made.resume(now)
        elif name == "change":
            has = made.retract(now, number / 100)
            assert list(has) == [*made.running, *made.waiting]
        else:
            made.pause(retract=name == "retract")
        assert len(made.running) <= slots
        alive = (*made.running, *made.waiting)
        assert list(alive) == sorted(alive), "whoever came first, runs or waits first"
        assert sorted([*alive, *keys(ended)]) == list(range(submitted)), "each is here, or ended once"
    made.resume(before)
    ended += [each for _, each in finish(made)]
    assert sorted(keys(ended)) == list(range(submitted))
    return [(each.key, each.tokens, each.aborted) for each in ended]


@given(stories(), st.integers(1, 4), st.sampled_from([0.0, 0.003]))
def test_slots_bound_what_runs_order_is_kept_and_each_ends_once(
    story: list[tuple[float, str, int]], slots: int, cost: float
) -> None:
    rarely, often = (batch(slots, request_s=cost, prompt_token_s=cost) for _ in range(2))
    assert live(rarely, slots, story, looks=1) == live(often, slots, story, looks=7), "looking changes nothing"
    assert (rarely.steps, rarely.tokens) == (often.steps, often.tokens)
