"""A sample whose weights changed in the midst of it: what each made, and the proof of it."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollpool.ops.sim import MOST_PIECES, VOCABULARY, logprobs_of, made_by, made_by_spans, output_of
from rollpool.ops.sim.pieces import Made, Pieces
from rollpool.ops.sim.tokens import LOGPROB_STEP

PROMPT = np.array([5, 6, 7])
POLICIES = {1: 1001, 2: 1002, 3: 1003}

#: Version and tokens of each piece, and its nonce.
Story = Sequence[tuple[int, int]]
Spans = list[tuple[int, int, int]]

stories = st.lists(st.tuples(st.sampled_from(list(POLICIES)), st.integers(1, 30)), min_size=1, max_size=5)
nonces = st.integers(0, VOCABULARY - 1)


def tell(story: Story, nonce: int = 11) -> tuple[Made, Spans]:
    """A sample made so, and its spans, those of one policy merged."""
    pieces, at = Pieces(POLICIES[story[0][0]], str(story[0][0]), nonce), 0
    spans: Spans = []
    for number, (version, count) in enumerate(story):
        pieces.change(at, POLICIES[version], str(version), (nonce + 7 * number) % VOCABULARY)
        start = spans.pop()[1] if spans and spans[-1][0] == version else at
        at += count
        spans.append((version, start, at))
    return pieces.made(PROMPT, at), spans


def logprobs(made: Made) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return ((made.places + 1) * -LOGPROB_STEP).astype(np.float32)


@given(stories, nonces)
def test_what_the_spans_tell_truly_passes(story: Story, nonce: int) -> None:
    made, spans = tell(story, nonce)
    assert made_by_spans(POLICIES, PROMPT, made.ids, spans)
    assert made_by_spans(POLICIES, PROMPT.astype(np.int32), made.ids.tolist(), spans, logprobs=logprobs(made))


@given(st.lists(st.tuples(st.sampled_from(list(POLICIES)), st.integers(12, 30)), min_size=1, max_size=4), st.data())
def test_no_other_policy_passes_for_one_of_them(story: Story, data: st.DataObject) -> None:
    made, spans = tell(story)
    wrong = data.draw(st.integers(0, len(spans) - 1))
    version, start, end = spans[wrong]
    others = [(version % 3 + 1, start, end) if number == wrong else span for number, span in enumerate(spans)]
    assert not made_by_spans(POLICIES, PROMPT, made.ids, others)
    assert not made_by_spans(POLICIES, PROMPT, made.ids, others, logprobs=logprobs(made))
    altered = made.ids.copy()
    altered[-1] = (altered[-1] + 1) % VOCABULARY
    assert not made_by_spans(POLICIES, PROMPT, altered, spans, most_pieces=1)


def test_each_piece_is_a_continuation_by_whoever_came_after() -> None:
    made, spans = tell([(1, 10), (2, 20)])
    assert spans == [(1, 0, 10), (2, 10, 30)]
    assert made_by(POLICIES[1], PROMPT, made.ids[:10])
    longer = np.concatenate([PROMPT, made.ids[:10]])
    assert (made.ids[10:] == output_of(POLICIES[2], longer, 18, 20)).all()
    assert (logprobs(made)[10:] == logprobs_of(POLICIES[2], longer, made.ids[10:])).all()


def test_a_piece_that_made_nothing_is_none() -> None:
    pieces = Pieces(POLICIES[1], "1", 11)
    pieces.change(0, POLICIES[2], "2", 12)
    pieces.change(4, POLICIES[3], "3", 13)
    assert pieces.versions(4) == [{"version": "2", "start": 0, "end": 4}]
    assert pieces.versions(6)[1] == {"version": "3", "start": 4, "end": 6}
    assert pieces.versions(0) == []
    assert made_by(POLICIES[2], PROMPT, pieces.made(PROMPT, 4).ids)
    nothing = pieces.made(PROMPT, 0)
    assert (len(nothing.ids), len(nothing.places)) == (0, 0)


def test_boundaries_within_a_span_are_bounded() -> None:
    made, spans = tell([(1, 20)] * 4)
    assert spans == [(1, 0, 80)]
    assert made_by_spans(POLICIES, PROMPT, made.ids, spans, most_pieces=4)
    assert not made_by_spans(POLICIES, PROMPT, made.ids, spans, most_pieces=3)


def test_a_boundary_that_the_spans_tell_of_costs_none_of_those_within() -> None:
    made, spans = tell([(1, 20), (2, 20), (2, 20), (3, 20)])
    assert made_by_spans(POLICIES, PROMPT, made.ids, spans, most_pieces=2)
    assert not made_by_spans(POLICIES, PROMPT, made.ids, spans, most_pieces=1)


def test_a_boundary_is_found_where_the_next_piece_begins_as_this_one_would_have_gone_on() -> None:
    whole = output_of(POLICIES[1], PROMPT, 11, 11)
    pieces = Pieces(POLICIES[1], "1", 11)
    pieces.change(10, POLICIES[1], "1", int(whole[10]))
    made = pieces.made(PROMPT, 30)
    assert (made.ids[:11] == whole).all()
    assert made_by_spans(POLICIES, PROMPT, made.ids, [(1, 0, 30)])


def test_what_nobody_made_is_told_from_a_dozen_tokens_on() -> None:
    noise = np.random.default_rng(1).integers(0, VOCABULARY, 400)
    for count in (MOST_PIECES + 1, 12, 400):
        assert not made_by_spans(POLICIES, PROMPT, noise[:count], [(1, 0, count)])


def test_with_logprobs_pieces_of_one_token_prove_something() -> None:
    """A boundary that is told one token late: the token there is for the other policy a piece of its own."""
    made, _ = tell([(1, 20), (2, 20)])
    early = [(1, 0, 19), (2, 19, 40)]
    assert made_by_spans(POLICIES, PROMPT, made.ids, early), "as could be"
    assert not made_by_spans(POLICIES, PROMPT, made.ids, early, logprobs=logprobs(made))
    wrong = logprobs(made).copy()
    wrong[25] -= LOGPROB_STEP
    assert not made_by_spans(POLICIES, PROMPT, made.ids, [(1, 0, 20), (2, 20, 40)], logprobs=wrong, most_pieces=1)


@pytest.mark.parametrize(
    "spans",
    [
        [],
        [(1, 0, 29)],
        [(1, 0, 31)],
        [(1, 1, 30)],
        [(1, 0, 10), (1, 11, 30)],
        [(1, 0, 20), (1, 10, 30)],
        [(1, 0, 30), (1, 30, 20), (1, 20, 30)],
        [(4, 0, 30)],
    ],
)
def test_spans_that_do_not_cover_the_tokens_prove_nothing(spans: Spans) -> None:
    made, true = tell([(1, 30)])
    assert made_by_spans(POLICIES, PROMPT, made.ids, [(4, 0, 0), *true, (9, 30, 30)]), "empty ones say nothing"
    assert not made_by_spans(POLICIES, PROMPT, made.ids, spans)


def test_nobody_makes_nothing_and_logprobs_belong_to_tokens() -> None:
    made, spans = tell([(1, 30)])
    assert not made_by_spans(POLICIES, PROMPT, [], [(1, 0, 0)])
    assert not made_by_spans(POLICIES, PROMPT, [made.ids.tolist()], spans)
    assert not made_by_spans(POLICIES, PROMPT, made.ids, spans, logprobs=logprobs(made)[1:])
    assert not made_by_spans(POLICIES, PROMPT, [VOCABULARY, *made.ids[1:]], spans)
