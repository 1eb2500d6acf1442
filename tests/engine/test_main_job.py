"""The main job on real workers and real engines: what comes back is what was asked, made by the policy it names."""

from collections import Counter

import numpy as np
import pytest
from real_pool import RealPool

from rollpool.ops.local.tiny_model import tiny_tokenizer
from rollpool.producer import SamplingParams

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

#: Engine and oracle differ by float32 rounding; another policy differs by several units.
TOLERANCE = 0.05

PROMPTS = [f"{number} + {number} =" for number in range(8)]


def sampling(**options: float | int | bool) -> SamplingParams:
    return SamplingParams.model_validate({"max_new_tokens": 12, "ignore_eos": True, **options})


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"temperature": 0.7}, {"temperature": 1.0, "top_p": 0.9}])
def test_logprobs_are_those_of_the_policy_the_result_names(real_pool: RealPool, options: dict[str, float]) -> None:
    batch = real_pool.trainer.enqueue_prompts(PROMPTS, policy_version=1, n=3, sampling=sampling(**options))
    groups = list(batch.collect(timeout=240))
    batch.commit()
    assert sorted(group.index for group in groups) == list(range(len(PROMPTS)))
    assert all(len(sample.output_ids) == 12 for group in groups for sample in group.samples)
    assert real_pool.logprob_error(groups) < TOLERANCE
    assert all(group.filtered == ("top_p" in options) for group in groups)


def test_all_kinds_of_prompts_are_tokenized_as_the_policy_does(real_pool: RealPool) -> None:
    ids = np.asarray(tiny_tokenizer().encode("7 + 7 =").ids, dtype=np.int32)
    pool, once = real_pool.trainer, sampling()
    batches = [
        pool.enqueue_prompts(["7 + 7 ="], policy_version=1, sampling=once),
        pool.enqueue_prompts([ids], policy_version=1, sampling=once, metadata=[{"answer": 14}]),
        pool.enqueue_prompts([[{"role": "user", "content": "7 + 7 ="}]], policy_version=1, sampling=once),
    ]
    text, tokens, chat = (next(iter(batch.collect(timeout=240))) for batch in batches)
    for batch in batches:
        batch.commit()
    np.testing.assert_array_equal(text.prompt_ids, ids)
    np.testing.assert_array_equal(tokens.prompt_ids, ids)
    assert tokens.metadata == {"answer": 14}
    assert len(chat.prompt_ids) > len(ids), "the chat template adds its own tokens"
    assert real_pool.logprob_error([text, tokens, chat]) < TOLERANCE


def test_an_evaluation_through_chat_returns_text_alone(real_pool: RealPool) -> None:
    batch = real_pool.trainer.enqueue_prompts(
        [[{"role": "user", "content": "7 + 7 ="}]],
        policy_version=1,
        n=2,
        sampling=sampling(temperature=0.0),
        endpoint="chat",
        logprobs=False,
        lane="high",
    )
    (group,) = batch.collect(timeout=240)
    batch.commit()
    assert len(group.samples) == 2
    assert group.samples[0].text == group.samples[1].text != ""
    assert group.samples[0].output_ids.size == group.samples[0].logprobs.size == 0


def test_a_job_the_engine_cannot_run_fails_alone_and_says_why(real_pool: RealPool) -> None:
    too_long = np.ones(300, dtype=np.int32)
    outside = np.array([100_000], dtype=np.int32)
    good = np.array([1, 2, 3], dtype=np.int32)
    batch = real_pool.trainer.enqueue_prompts([too_long, outside, good], policy_version=1, sampling=sampling())
    groups = list(batch.collect(timeout=240))
    batch.commit()
    assert [group.index for group in groups] == [2]
    errors = {group.index: group.error or "" for group in batch.dropped}
    assert "300 tokens is over the engine" in errors[0]
    assert "outside the vocabulary" in errors[1]


def test_a_policy_published_midway_serves_the_rest(real_pool: RealPool) -> None:
    pool, twelve = real_pool.trainer, sampling()
    before = pool.enqueue_prompts(PROMPTS * 3, policy_version=1, n=2, sampling=twelve)
    collected = before.collect(timeout=240)
    groups = [next(collected) for _ in range(6)]
    pool.publish_policy(2, checkpoint=str(real_pool.checkpoints[2]))
    after = pool.enqueue_prompts(PROMPTS, policy_version=2, max_staleness=0, n=2, sampling=twelve)
    groups += list(collected)
    fresh = list(after.collect(timeout=400))
    real_pool.until_serving(2)
    for batch in (before, after):
        batch.commit()
    assert len(groups) == 24
    assert len(fresh) == 8
    assert {version for group in fresh for sample in group.samples for version in sample.versions} == {2}
    assert Counter(group.id for group in groups).most_common(1)[0][1] == 1
    assert real_pool.logprob_error(groups + fresh) < TOLERANCE
