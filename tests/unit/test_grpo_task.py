"""The task of the example: what is asked, and what is good."""

import numpy as np
import pytest
from grpo_tiny import task

from rollpool.ops.local.tiny_model import VOCAB_SIZE, tiny_tokenizer


def test_reward_is_the_share_of_tokens_that_are_good_for_the_digit() -> None:
    assert task.reward(3, [3, 11, 4, 12]) == 0.5
    assert task.reward(4, np.array([3, 11, 4, 12], dtype=np.int32)) == 0.5
    assert task.reward(0, []) == 0.0


def test_an_answer_that_ignores_the_prompt_gets_an_eighth_whatever_it_is() -> None:
    digits = [prompt.digit for prompt in task.draw(np.random.default_rng(0), 64)]
    for answer in ([8, 16, 24, 32], list(np.random.default_rng(1).integers(VOCAB_SIZE, size=4))):
        assert np.mean([task.reward(digit, answer) for digit in digits]) == pytest.approx(1 / task.DIGITS)


@pytest.mark.parametrize("held_out", [False, True])
def test_a_prompt_holds_its_digit_once_amid_filler_of_its_own_side(held_out: bool) -> None:
    for prompt in task.draw(np.random.default_rng(2), 200, held_out=held_out):
        filler = prompt.text.replace(str(prompt.digit), "")
        assert len(filler) == task.PROMPT_LENGTH - 1
        assert set(filler) <= set(task.FILLER)
        assert task.is_held_out(filler) == held_out


def test_a_character_is_a_token() -> None:
    tokenizer = tiny_tokenizer()
    for prompt in task.draw(np.random.default_rng(3), 50):
        assert len(tokenizer.encode(prompt.text).ids) == task.PROMPT_LENGTH


def test_prompts_are_a_function_of_the_seed_and_differ() -> None:
    first, again, other = (task.draw(np.random.default_rng(seed), 64) for seed in (4, 4, 5))
    assert first == again
    assert first != other
    assert len({prompt.text for prompt in first}) > 60
