import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollpool.producer import Group, RollpoolError, Sample, SamplingParams, VersionSpan, pack


def spans_of(versions):
    """Version spans of a list with one version a token."""
    spans, start = [], 0
    for end in range(1, len(versions) + 1):
        if end == len(versions) or versions[end] != versions[start]:
            spans.append(VersionSpan(versions[start], start, end))
            start = end
    return spans


@st.composite
def samples(draw):
    size = draw(st.integers(0, 12))
    ids = draw(st.lists(st.integers(1, 1000), min_size=size, max_size=size))
    versions = sorted(draw(st.lists(st.integers(0, 3), min_size=size, max_size=size)))
    logprobs = draw(st.lists(st.floats(-20, -0.5, width=32), min_size=size, max_size=size))
    return Sample(
        output_ids=np.array(ids, np.int32),
        logprobs=np.array(logprobs, np.float32),
        text="",
        finish_reason="stop",
        version_spans=spans_of(versions),
    )


@st.composite
def groups(draw):
    return Group(
        run="r",
        batch="b",
        index=draw(st.integers(0, 99)),
        outcome="ok",
        policy_version=3,
        prompt_ids=np.array(draw(st.lists(st.integers(1, 1000), min_size=1, max_size=10)), np.int32),
        samples=draw(st.lists(samples(), min_size=0, max_size=4)),
        sampling=SamplingParams(top_p=draw(st.sampled_from([1.0, 0.9]))),
    )


@given(st.lists(groups(), max_size=5), st.integers(1, 24))
def test_every_token_that_fits_is_once_at_its_place(made, length):
    packed = pack(made, length=length, pad_id=-7)
    rows = [(place, group, sample) for place, group in enumerate(made) for sample in group.samples]
    assert len(packed) == len(rows)
    assert (
        packed.ids.shape == packed.mask.shape == packed.logprobs.shape == packed.versions.shape == (len(rows), length)
    )
    for row, (place, group, sample) in enumerate(rows):
        prompt, output = group.prompt_ids.tolist(), sample.output_ids.tolist()
        whole = (prompt + output)[:length]
        assert packed.ids[row].tolist() == whole + [-7] * (length - len(whole))
        assert packed.valid[row].tolist() == [True] * len(whole) + [False] * (length - len(whole))
        kept = len(whole) - min(len(prompt), length)
        assert np.flatnonzero(packed.mask[row]).tolist() == list(range(len(prompt), len(prompt) + kept))
        assert packed.logprobs[row][packed.mask[row]].tolist() == sample.logprobs[:kept].tolist()
        versions = [span.version for span in sample.version_spans for _ in range(span.start, span.end)]
        assert packed.versions[row][packed.mask[row]].tolist() == versions[:kept]
        assert packed.lengths[row] == len(whole)
        assert packed.prompt_lengths[row] == min(len(prompt), length)
        assert packed.group[row] == place
        assert packed.filtered[row] == group.filtered
    assert not packed.logprobs[~packed.mask].any()
    assert (packed.versions[~packed.mask] == -1).all()
    assert packed.truncated == sum(len(g.prompt_ids) + len(s.output_ids) > length for _, g, s in rows)


@given(st.lists(groups(), max_size=3))
def test_dtypes_are_those_a_step_was_compiled_for(made):
    packed = pack(made, length=8)
    assert (packed.ids.dtype, packed.versions.dtype, packed.logprobs.dtype) == (np.int32, np.int32, np.float32)  # type: ignore[comparison-overlap]
    assert (packed.mask.dtype, packed.valid.dtype, packed.filtered.dtype) == (bool, bool, bool)  # type: ignore[comparison-overlap]
    assert {array.dtype for array in (packed.prompt_lengths, packed.lengths, packed.group)} == {np.dtype(np.int32)}


def test_no_groups_make_no_rows():
    packed = pack([], length=5)
    assert packed.ids.shape == (0, 5)
    assert packed.truncated == 0


def test_a_row_needs_room():
    with pytest.raises(RollpoolError, match="length"):
        pack([], length=0)


def test_groups_without_token_ids_are_refused():
    sample = Sample(
        output_ids=np.empty(0, np.int32),
        logprobs=np.empty(0, np.float32),
        text="hello",
        finish_reason="stop",
        version_spans=[],
    )
    chat = Group(
        run="r",
        batch="b",
        index=4,
        outcome="ok",
        policy_version=0,
        prompt_ids=np.empty(0, np.int32),
        samples=[sample],
        sampling=SamplingParams(),
    )
    with pytest.raises(RollpoolError, match="b/4"):
        pack([chat], length=4)
