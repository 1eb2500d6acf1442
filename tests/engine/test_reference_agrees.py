"""A real engine computes what the numpy oracle computes, and samples as it was asked to."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from real_pool import RealEngine

from rollpool.ops.local.reference import ReferenceModel, log_softmax

pytestmark = pytest.mark.engine

NEW_TOKENS = 24
# The engine agrees to 2e-5 in float32; 0.05 is what a wrong token, position or temperature far exceeds.
TOLERANCE = 0.05
# A nucleus' edge is a sum of many probabilities: rounding may put one more token inside.
EDGE = 1e-3

Sample = tuple[list[int], npt.NDArray[np.int64], npt.NDArray[np.float64]]
Ask = Callable[..., list[Sample]]


@pytest.fixture
def model(engine: RealEngine) -> ReferenceModel:
    return ReferenceModel.from_checkpoint(engine.model_path)


@pytest.fixture
def ask(engine: RealEngine, request: pytest.FixtureRequest) -> Ask:
    """Sixteen prompts at once, new ones in each test: neither batching nor an empty prefix cache may matter."""
    rng = np.random.default_rng(list(request.node.name.encode()))
    prompts = [rng.integers(0, 508, rng.integers(3, 40)).tolist() for _ in range(16)]

    def one(prompt: list[int], sampling: dict[str, Any]) -> Sample:
        meta = engine.generate(prompt, max_new_tokens=NEW_TOKENS, **sampling)["meta_info"]
        rows = meta["output_token_logprobs"][-meta["completion_tokens"] :]
        assert len(rows) == NEW_TOKENS
        return prompt, np.array([row[1] for row in rows]), np.array([row[0] for row in rows])

    def ask_all(**sampling: Any) -> list[Sample]:
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(lambda prompt: one(prompt, sampling), prompts))

    return ask_all


def table(model: ReferenceModel, sample: Sample) -> npt.NDArray[np.float32]:
    """`[N, V]` log-probs at temperature 1 of every token at each output position."""
    prompt, output, _ = sample
    return log_softmax(model.logits([*prompt, *output])[len(prompt) - 1 : -1])


def test_greedy_tokens_are_the_oracles(model: ReferenceModel, ask: Ask) -> None:
    for sample in ask(temperature=0.0):
        np.testing.assert_array_equal(sample[1], table(model, sample).argmax(-1))


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.0},
        {"temperature": 0.7},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 0.7, "top_k": 4},
        {"temperature": 1.3, "min_p": 0.05},
    ],
    ids=lambda sampling: "-".join(f"{key}{value}" for key, value in sampling.items()),
)
def test_logprobs_are_of_the_scaled_distribution_before_filters(
    model: ReferenceModel, ask: Ask, sampling: dict[str, float]
) -> None:
    for prompt, output, logprobs in ask(**sampling):
        expected = model.logprobs(prompt, output, temperature=sampling["temperature"])
        np.testing.assert_allclose(logprobs, expected, atol=TOLERANCE)


def greedy_share(model: ReferenceModel, samples: list[Sample]) -> float:
    return float(np.mean([sample[1] == table(model, sample).argmax(-1) for sample in samples]))


def test_temperature_shapes_sampling(model: ReferenceModel, ask: Ask) -> None:
    assert greedy_share(model, ask(temperature=0.01)) > 0.9
    assert greedy_share(model, ask(temperature=1.0)) < 0.5


def test_top_k_of_one_is_greedy(model: ReferenceModel, ask: Ask) -> None:
    assert greedy_share(model, ask(temperature=1.0, top_k=1)) == 1.0


def test_top_k_keeps_the_most_likely(model: ReferenceModel, ask: Ask) -> None:
    seen: set[int] = set()
    for sample in ask(temperature=1.0, top_k=4):
        rows = table(model, sample)
        own = np.take_along_axis(rows, sample[1][:, None], axis=-1)
        seen |= set((rows > own).sum(-1).tolist())
    assert seen == {0, 1, 2, 3}


def test_top_p_keeps_the_nucleus(model: ReferenceModel, ask: Ask) -> None:
    for sample in ask(temperature=1.0, top_p=0.5):
        probabilities = np.exp(table(model, sample))
        own = np.take_along_axis(probabilities, sample[1][:, None], axis=-1)
        likelier = np.where(probabilities > own, probabilities, 0).sum(-1)
        assert (likelier <= 0.5 + EDGE).all()


def test_min_p_cuts_the_tail(model: ReferenceModel, ask: Ask) -> None:
    for sample in ask(temperature=1.0, min_p=0.1):
        rows = table(model, sample)
        own = np.take_along_axis(rows, sample[1][:, None], axis=-1)[:, 0]
        assert (own >= rows.max(-1) + np.log(0.1) - EDGE).all()


def test_sampling_follows_the_distribution(model: ReferenceModel, ask: Ask) -> None:
    """The mean log-prob of sampled tokens is minus the entropy, if they were drawn from that distribution."""
    surprise, entropy = [], []
    for sample in ask(temperature=1.0):
        rows = table(model, sample)
        surprise.append(-np.take_along_axis(rows, sample[1][:, None], axis=-1).mean())
        entropy.append(-(np.exp(rows) * rows).sum(-1).mean())
    assert abs(np.mean(surprise) - np.mean(entropy)) < 0.5
