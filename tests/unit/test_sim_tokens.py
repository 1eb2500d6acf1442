"""What a simulated engine answers proves who made it: nothing else passes for it."""

from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollpool.ops.sim import (
    FAIL,
    FORGET,
    HANG,
    KILL,
    REFUSE,
    VOCABULARY,
    adapted,
    logprobs_of,
    made_by,
    make_sim_model,
    output_of,
)
from rollpool.ops.sim.tokens import draw_length, draw_nonce
from rollpool.worker.engines.preflight import check_model
from rollpool.worker.tokenizer import PromptEncoder, PromptRefused

PROMPTS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=20)
SIGNATURES = st.integers(0, 2**63 - 1)
NONCES = st.integers(0, VOCABULARY - 1)


@given(SIGNATURES, PROMPTS, NONCES, st.integers(1, 300))
def test_what_a_policy_made_is_known_and_a_prefix_of_it_too(
    signature: int, prompt: list[int], nonce: int, count: int
) -> None:
    output = output_of(signature, prompt, nonce, count)
    assert output.dtype == np.int32
    assert len(output) == count
    assert output[0] == nonce
    assert ((output >= 0) & (output < VOCABULARY)).all()
    assert made_by(signature, np.array(prompt, np.int32), output)
    assert made_by(signature, prompt, output[: count // 2 + 1].tolist())
    logprobs = logprobs_of(signature, prompt, output)
    assert logprobs.dtype == np.float32
    assert len(logprobs) == count
    assert (logprobs < 0).all()
    assert np.isfinite(logprobs).all()
    assert (logprobs_of(signature, prompt, output[: count // 2 + 1]) == logprobs[: count // 2 + 1]).all()


def test_what_another_made_is_not() -> None:
    signature, prompt, count = 7, (5, 6, 7), 40
    output = output_of(signature, prompt, 11, count)
    wrong = output.copy()
    wrong[20] = (wrong[20] + 1) % VOCABULARY
    other = output_of(8, prompt, 11, count)
    assert not made_by(8, prompt, output)
    assert not made_by(signature, (7, 6, 5), output), "the order of the prompt counts"
    assert not made_by(signature, (*prompt, 0), output)
    assert not made_by(signature, prompt, wrong)
    assert not made_by(signature, prompt, output[::-1])
    assert not made_by(signature, prompt, np.delete(output, 5))
    assert not made_by(signature, prompt, np.concatenate([output[:20], other[20:]])), "weights changed in the middle"
    assert not made_by(signature, prompt, [])
    assert not made_by(signature, prompt, [VOCABULARY])
    assert not made_by(signature, prompt, [output.tolist()])
    assert (logprobs_of(signature, prompt, output) != logprobs_of(8, prompt, other)).any()


def test_two_samples_of_one_prompt_differ_in_all_their_tokens() -> None:
    random = Random(1)
    first, second = (output_of(7, [5], draw_nonce(random), 50) for _ in range(2))
    assert (first != second).sum() > 45


def test_a_continuation_is_known_by_the_prompt_it_had() -> None:
    begun, prompt = output_of(7, [5, 6], 11, 10), np.array([5, 6])
    ended = output_of(8, [*prompt, *begun], 12, 10)
    assert made_by(8, np.concatenate([prompt, begun]), ended)
    assert not made_by(8, prompt, ended)


def test_nothing_has_no_logprobs() -> None:
    assert len(logprobs_of(7, [1], [])) == 0


def test_faults_are_far_over_ordinary_ids_and_fit_what_carries_ids() -> None:
    faults = {KILL, HANG, REFUSE, FORGET, FAIL}
    assert len(faults) == 5
    assert all(100 * VOCABULARY < fault < 2**31 for fault in faults)


def test_lengths_stay_within_their_bounds_and_half_are_under_the_median() -> None:
    random = Random(2)
    drawn = [draw_length(random, 64, 0.6, least=5, most=200) for _ in range(4000)]
    assert min(drawn) >= 5
    assert max(drawn) == 200
    assert 0.45 < sum(length < 64 for length in drawn) / len(drawn) < 0.55
    assert draw_length(random, 64, 0.0, least=0, most=200) == 64
    assert draw_length(random, 0.001, 0.0, least=0, most=200) == 1


@given(SIGNATURES, SIGNATURES)
def test_an_adapter_makes_another_policy_of_its_base(base: int, adapter: int) -> None:
    mixed = adapted(base, adapter)
    assert 0 <= mixed < 2**63
    assert mixed not in {base, adapter, adapted(adapter, base) if base != adapter else -1}


def test_a_worker_takes_the_model_with_ids_alone(tmp_path: Path) -> None:
    model = str(make_sim_model(tmp_path / "a", signature=7))
    check_model(model)
    encoder = PromptEncoder(model)
    for fault in (KILL, HANG, REFUSE, FORGET, FAIL):
        assert encoder.encode(np.array([fault, 1], np.int32)).tolist() == [fault, 1]
    with pytest.raises(PromptRefused, match="token ids"):
        encoder.encode("text")
