"""The demo's last line is computed: each claim turns when the groups say otherwise.

The groups here are made by hand, scored by the very models that the demo's check computes them again with.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from redis import Redis

from rollpool.ops import demo
from rollpool.ops.demo import Checked, check, summary
from rollpool.ops.local.reference import ReferenceModel
from rollpool.ops.local.tiny_adapter import make_tiny_adapter
from rollpool.ops.local.tiny_model import make_tiny_model
from rollpool.producer import Group, SamplingParams
from rollpool.schemas import Ack, Keys, RollpoolError
from rollpool.schemas.results import Sample, VersionSpan

#: What the demo's reader is told to accept.
TOLERANCE = 0.05

TOKENS = 6

Models = dict[int, ReferenceModel]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """As in the demo: a checkpoint, an adapter on it, and another checkpoint."""
    directory = tmp_path_factory.mktemp("models")
    first, second = (
        ReferenceModel.from_checkpoint(make_tiny_model(directory / f"tiny-{seed}", seed=seed)) for seed in (1, 2)
    )
    return {1: first, 2: first.with_adapter(make_tiny_adapter(directory / "adapter", seed=1)), 3: second}


def group(
    models: Models,
    index: int = 0,
    *,
    spans: Sequence[tuple[int, int, int]] = ((1, 0, TOKENS),),
    named: Sequence[tuple[int, int, int]] | None = None,
    temperature: float = 1.0,
    samples: int = 2,
) -> Group:
    """A group scored by the policies of `spans`, that claims to be of those of `named`."""
    rng = np.random.default_rng(index)
    prompt = rng.integers(0, 500, 4).astype(np.int32)
    made = []
    for _ in range(samples):
        output = rng.integers(0, 500, TOKENS).astype(np.int32)
        scores = {version: model.logprobs(prompt, output, temperature=temperature) for version, model in models.items()}
        made.append(
            Sample(
                output_ids=output,
                logprobs=np.concatenate([scores[version][begin:end] for version, begin, end in spans]),
                text="",
                finish_reason="length",
                version_spans=tuple(VersionSpan(*span) for span in named or spans),
            )
        )
    return Group(
        run=demo.RUN,
        batch="step-1",
        index=index,
        outcome="ok",
        policy_version=1,
        prompt_ids=prompt,
        samples=tuple(made),
        sampling=SamplingParams(max_new_tokens=TOKENS, temperature=temperature),
    )


def with_logprobs(of: Group, change: Callable[[Any], Any]) -> Group:
    """The group, with the log-probs of its last sample changed."""
    *others, last = of.samples
    changed = last.model_copy(update={"logprobs": change(last.logprobs.copy()).astype(np.float32)})
    return of.model_copy(update={"samples": (*others, changed)})


def line(groups: list[Group], *, twice: int = 0, max_error: float = 0.0) -> dict[str, Any]:
    return summary(groups, twice, Checked(max_error=max_error, median_gap=1.0), {}, 1.0)


@pytest.fixture
def all_groups(models: Models) -> list[Group]:
    """As many as the demo enqueues, one sample each, by three policies; the last one by two."""
    spans = [((1, 0, TOKENS),)] * 24 + [((2, 0, TOKENS),)] * 20 + [((3, 0, TOKENS),)] * 19
    made = [group(models, index, spans=each, samples=1) for index, each in enumerate(spans)]
    return [*made, group(models, 63, spans=((2, 0, 2), (3, 2, TOKENS)), samples=1)]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_results_of_the_policies_they_name_are_found_right(models: Models, temperature: float) -> None:
    groups = [
        group(models, 0, temperature=temperature),
        group(models, 1, spans=((2, 0, TOKENS),), temperature=temperature),
        group(models, 2, spans=((3, 0, TOKENS),), temperature=temperature),
        group(models, 3, spans=((1, 0, 2), (2, 2, 3), (3, 3, TOKENS)), temperature=temperature),
    ]
    found = check(groups, models)
    assert found.max_error < 1e-4
    assert found.median_gap > 10 * TOLERANCE, "the policies are too much alike for the check to tell anything"


@pytest.mark.parametrize(
    ("spans", "named"),
    [
        (((1, 0, TOKENS),), ((2, 0, TOKENS),)),
        (((2, 0, TOKENS),), ((1, 0, TOKENS),)),
        (((2, 0, TOKENS),), ((3, 0, TOKENS),)),
        (((1, 0, 2), (2, 2, TOKENS)), ((1, 0, 3), (2, 3, TOKENS))),
        (((1, 0, TOKENS - 1), (2, TOKENS - 1, TOKENS)), ((1, 0, TOKENS),)),
    ],
    ids=["1 named 2", "2 named 1", "2 named 3", "switch named one token late", "last token unnamed"],
)
def test_one_result_that_names_the_wrong_policy_is_found_among_right_ones(
    models: Models, spans: Any, named: Any
) -> None:
    groups = [group(models, 0), group(models, 1, spans=spans, named=named), group(models, 2)]
    found = check(groups, models)
    assert found.max_error > TOLERANCE
    assert summary(groups, 0, found, {}, 1.0)["max_logprob_error"] == pytest.approx(found.max_error, abs=1e-5)


def test_a_single_wrong_logprob_is_found(models: Models) -> None:
    def shift(logprobs: Any) -> Any:
        logprobs[-1] += 0.06
        return logprobs

    groups = [group(models, 0), with_logprobs(group(models, 1), shift)]
    assert check(groups, models).max_error == pytest.approx(0.06, abs=1e-3)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_logprob_that_is_no_number_is_not_small(models: Models, wrong: float) -> None:
    groups = [with_logprobs(group(models, 0), lambda logprobs: np.full_like(logprobs, wrong)), group(models, 1)]
    assert check(groups, models).max_error == np.inf


def test_logprobs_of_another_temperature_are_found(models: Models) -> None:
    wrong = group(models, temperature=0.7).model_copy(update={"sampling": SamplingParams(temperature=1.0)})
    assert check([wrong], models).max_error > TOLERANCE


def test_a_policy_that_nobody_published_is_refused_by_name(models: Models) -> None:
    with pytest.raises(RollpoolError, match="step-1/4 names policy 4"):
        check([group(models, 4, named=((4, 0, TOKENS),))], models)


def test_policies_that_are_the_same_show_as_a_gap_of_nothing(models: Models) -> None:
    same = {**models, 3: models[1]}
    assert check([group(models, 0)], same).median_gap == 0.0


def test_a_whole_job_is_counted(all_groups: list[Group]) -> None:
    said = line(all_groups)
    assert said["lost"] == said["twice"] == 0
    assert said["groups"] == said["samples"] == demo.GROUPS
    assert said["tokens"] == demo.GROUPS * TOKENS
    assert said["by_policy"] == {"1": 24, "2": 21, "3": 20}
    assert said["tokens_by_policy"] == {"1": 24 * TOKENS, "2": 20 * TOKENS + 2, "3": 20 * TOKENS - 2}
    assert said["samples_over_a_change"] == 1


def test_the_parts_of_the_job_are_the_whole_of_it() -> None:
    assert demo.FOR_FIRST + demo.FOR_ADAPTER + demo.UNDER_WAY + demo.FOR_SECOND == demo.GROUPS


def test_the_seconds_of_a_change_are_those_of_its_last_host() -> None:
    def ack(worker: str, version: int, state: Any, seconds: float) -> Ack:
        return Ack(worker=worker, command="1-0", version=version, state=state, seconds=seconds)

    said = [
        ack("a", 2, "applied", 3.0),
        ack("b", 2, "applied", 7.04),
        ack("a", 2, "failed", 9.0),
        ack("a", 3, "applied", 1.0),
    ]
    assert demo.change_seconds(said) == {"2": 7.0, "3": 1.0}


def test_lost_groups_are_counted(all_groups: list[Group]) -> None:
    said = line(all_groups[:10] + all_groups[13:])
    assert said["lost"] == 3
    assert said["groups"] == demo.GROUPS - 3
    assert said["twice"] == 0


def test_a_group_delivered_twice_is_counted(all_groups: list[Group]) -> None:
    said = line([*all_groups, all_groups[5], all_groups[5]])
    assert (said["lost"], said["twice"]) == (0, 2)


def test_a_group_delivered_twice_hides_no_lost_one(all_groups: list[Group]) -> None:
    said = line([*all_groups[:-1], all_groups[0]])
    assert (said["lost"], said["twice"]) == (1, 1)


def test_results_of_one_job_on_the_stream_are_counted_beyond_the_first(redis_url: str) -> None:
    keys = Keys(demo.POOL)
    with Redis.from_url(redis_url) as client:
        for job in ("a", "b", "b", "c", "b"):
            client.xadd(keys.results(demo.RUN, "step-1"), {"job": job, "body": b""})
        client.xadd(keys.results(demo.RUN, "step-2"), {"job": "d", "body": b""})
        batches: Any = [_Named("step-1"), _Named("step-2")]
        assert demo.results_settled_twice(client, batches) == 2


def test_what_was_settled_twice_reaches_the_last_line(all_groups: list[Group]) -> None:
    assert line(all_groups, twice=4)["twice"] == 4


class _Named:
    """A batch of which only its name is asked."""

    def __init__(self, name: str) -> None:
        self.id = name
