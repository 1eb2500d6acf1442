"""The arithmetic of the example: advantages, ratios, and which way the loss pushes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from grpo_tiny import grpo


def rows(new: list[list[float]], old: list[list[float]], advantage: list[float], mask: list[list[bool]]) -> grpo.Rows:
    return grpo.Rows(
        ids=np.zeros(np.shape(new), np.int32),
        mask=np.array(mask),
        logprobs=np.array(old, np.float32),
        advantages=np.array(advantage, np.float32),
    )


def gradient(new: list[list[float]], given: grpo.Rows) -> np.ndarray:
    return np.asarray(jax.grad(grpo.clipped_loss)(jnp.array(new), given))


def test_advantages_compare_samples_of_one_prompt_alone() -> None:
    rewards = np.array([0.0, 1.0, 5.0, 7.0], dtype=np.float32)
    found = grpo.advantages(rewards, np.array([0, 0, 1, 1], dtype=np.int32))
    np.testing.assert_allclose(found, [-1, 1, -1, 1], atol=1e-3)


def test_a_group_whose_samples_are_alike_has_no_advantage() -> None:
    found = grpo.advantages(np.full(3, 0.25, np.float32), np.zeros(3, np.int32))
    np.testing.assert_array_equal(found, 0)


def test_the_ratio_is_one_at_equal_weights_and_wherever_nothing_is_trained_on() -> None:
    given = rows([[-2.0, -3.0]], [[-2.0, -9.0]], [1.0], [[True, False]])
    np.testing.assert_array_equal(grpo.importance_ratio(jnp.array([[-2.0, -3.0]]), given), 1)


def test_the_ratio_is_of_the_new_policy_to_the_old() -> None:
    given = rows([[0.0]], [[np.log(0.1)]], [1.0], [[True]])
    np.testing.assert_allclose(grpo.importance_ratio(jnp.array([[np.log(0.4)]]), given), 4, rtol=1e-5)


def test_descent_makes_good_tokens_likelier_and_bad_ones_rarer() -> None:
    new = [[-2.0], [-2.0]]
    found = gradient(new, rows(new, new, [1.0, -1.0], [[True], [True]]))
    assert found[0, 0] < 0 < found[1, 0]


def test_what_is_masked_has_no_gradient() -> None:
    new = [[-2.0, -2.0]]
    found = gradient(new, rows(new, new, [1.0], [[False, True]]))
    assert found[0, 0] == 0
    assert found[0, 1] != 0


def test_a_large_ratio_weighs_no_more_than_the_limit_and_is_not_silenced() -> None:
    mask = [[True]]
    at_one = gradient([[-2.0]], rows([[-2.0]], [[-2.0]], [1.0], mask))
    far_off = gradient([[-2.0]], rows([[-2.0]], [[-8.0]], [1.0], mask))
    np.testing.assert_allclose(far_off, grpo.RATIO_MAX * at_one, rtol=1e-6)


def test_minibatches_hold_every_row_once_in_one_shape() -> None:
    count, size = 10, 4
    given = grpo.Rows(
        np.arange(count, dtype=np.int32)[:, None],
        np.ones((count, 1), bool),
        np.zeros((count, 1), np.float32),
        np.arange(count, dtype=np.float32),
    )
    parts = grpo.minibatches(given, size, np.random.default_rng(0))
    assert [len(part.ids) for part in parts] == [size] * 3
    trained = np.concatenate([part.ids[part.mask] for part in parts])
    np.testing.assert_array_equal(np.sort(trained), np.arange(count))
    assert all((part.ids[:, 0] == part.advantages).all() for part in parts)
    assert given.mask.all(), "the caller's rows are its own"


def test_an_update_raises_the_likelihood_of_what_was_rewarded_and_tells_the_ratios_before_it() -> None:
    def logprobs(logits: jnp.ndarray, ids: jnp.ndarray) -> Any:
        return jax.nn.log_softmax(logits)[ids]

    optimizer = optax.sgd(0.5)
    logits = jnp.zeros(3)
    old = np.log(np.full((2, 1), 1 / 3, np.float32))
    given = grpo.Rows(np.array([[0], [1]]), np.ones((2, 1), bool), old, np.array([1.0, -1.0], np.float32))
    after, _, ratio = grpo.make_update(logprobs, optimizer)(logits, optimizer.init(logits), given)
    assert after[0] > after[2] > after[1]
    np.testing.assert_allclose(ratio, 1, atol=1e-6)
