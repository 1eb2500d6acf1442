import inspect

import numpy as np
import pytest

from rollpool.producer import (
    AsyncBatch,
    AsyncRolloutPool,
    Batch,
    InvalidPrompt,
    RolloutPool,
    SamplingParams,
    enqueue_prompts,
)
from rollpool.producer.enqueue import draft
from rollpool.schemas.wire import unpack_job


def jobs(drafted, deadline_ms=None):
    return [unpack_job(body) for body in drafted.previews_and_bodies(deadline_ms)[1::2]]


def make(prompts, **options):
    return draft(prompts, **{"run": "r", "policy_version": 3, "batch_id": "b", **options})


def test_every_job_carries_the_shared_fields_and_its_own():
    made = make(
        ["one", "two"], n=4, sampling={"max_new_tokens": 7}, max_staleness=2, lane="high", metadata=[{"a": 1}, 2]
    )
    first, second = jobs(made, deadline_ms=99)
    assert (first.index, first.prompt, first.metadata) == (0, "one", {"a": 1})
    assert (second.index, second.prompt, second.metadata) == (1, "two", 2)
    assert first.sampling == second.sampling == SamplingParams(max_new_tokens=7)
    assert {(job.n, job.max_staleness, job.lane, job.deadline_ms, job.policy_version) for job in (first, second)} == {
        (4, 2, "high", 99, 3)
    }


def test_a_split_group_is_so_many_jobs_one_after_the_other():
    made = make(["one", "two"], n=np.int64(6), split=np.int32(3), metadata=["x", "y"])
    assert (made.size, made.parts) == (2, 3)
    split = jobs(made, deadline_ms=99)
    assert [(job.id, job.prompt, job.metadata) for job in split] == [
        (f"b/{index}#{part}", prompt, extra)
        for index, (prompt, extra) in enumerate([("one", "x"), ("two", "y")])
        for part in range(3)
    ]
    assert {(job.n, job.parts, job.deadline_ms) for job in split} == {(2, 3, 99)}
    assert made.previews_and_bodies(None)[::2] == ["one"] * 3 + ["two"] * 3


def test_each_part_counts_towards_the_size_limit(monkeypatch):
    monkeypatch.setattr("rollpool.producer.enqueue.MAX_BATCH_BYTES", 3000)
    make(["x" * 600], n=4)
    with pytest.raises(InvalidPrompt, match="several batches"):
        make(["x" * 600], n=4, split=4)


@pytest.mark.parametrize(
    "prompt", [[5, 6, 7], np.array([5, 6, 7]), np.array([5, 6, 7], np.uint8), (5, np.int64(6), 7)], ids=str
)
def test_token_ids_of_any_integer_kind_become_int32(prompt):
    (job,) = jobs(make([prompt]))
    assert isinstance(job.prompt, np.ndarray)
    assert job.prompt.dtype == np.int32
    assert job.prompt.tolist() == [5, 6, 7]


def test_chat_messages_keep_further_keys():
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi", "name": "ann"}]
    (job,) = jobs(make([messages]))
    assert job.prompt == messages


def test_numpy_integers_count_as_integers():
    (job,) = jobs(make(["x"], n=np.int64(2), policy_version=np.int32(4), max_staleness=np.int16(1)))
    assert (job.n, job.policy_version, job.max_staleness) == (2, 4, 1)


@pytest.mark.parametrize(
    ("prompts", "options", "named"),
    [
        ([], {}, "prompts: the list is empty"),
        ("one text", {}, "prompts: expected a list"),
        ({"role": "user", "content": "x"}, {}, "prompts: expected a list"),
        (["a", "", "c"], {}, "prompts[1]: the text is empty"),
        (["a", []], {}, "prompts[1]: the prompt is an empty list"),
        (["a", None], {}, "prompts[1]: a prompt is a string"),
        (["a", "b", [1, 2]], {}, "prompts[2]: token ids, but prompts[0] is text"),
        ([[1], [{"role": "user", "content": "x"}]], {}, "prompts[1]: chat messages, but prompts[0] is token ids"),
        ([[1], [1, "x"]], {}, "prompts[1]: a prompt is of one kind"),
        ([[1], [2, True]], {}, "prompts[1]: a prompt is of one kind"),
        ([[1], [-1]], {}, "prompts[1]: token ids lie in"),
        ([[1], [2**31]], {}, "prompts[1]: token ids lie in"),
        ([[1], [2**70]], {}, "prompts[1]: token ids are"),
        ([np.zeros((2, 2), int)], {}, "prompts[0]: token ids are"),
        ([np.zeros(2)], {}, "prompts[0]: token ids are"),
        (["a", "\ud800"], {}, "prompts[1]:"),
        ([[{"role": "user", "content": ""}]], {}, "prompts[0]: a chat message needs"),
        ([[{"role": "user", "content": "x", "more": {1: 2}}]], {}, "prompts[0]:"),
        ([[{"role": "user", "content": "x", "more": object()}]], {}, "prompts[0]:"),
        (["a"], {"n": 0}, "n: "),
        (["a"], {"n": True}, "n: "),
        (["a"], {"n": 8, "split": 3}, "split: 8 samples do not divide into 3 equal parts"),
        (["a"], {"n": 2, "split": 4}, "split: 2 samples do not divide into 4"),
        (["a"], {"n": 2, "split": 0}, "split: "),
        (["a"], {"n": 2, "split": True}, "split: "),
        (["a"], {"n": 2000, "split": 2000}, "split: 2000 parts are over the limit of 1000"),
        (["a"], {"n": 4, "split": 2, "min_samples": 2}, "min_samples: a split group"),
        (["a"], {"n": 4, "min_samples": 5}, "min_samples: 5 is over n=4"),
        (["a"], {"n": 4, "min_samples": 0}, "min_samples: "),
        (["a"], {"policy_version": -1}, "policy_version: "),
        (["a"], {"policy_version": "12"}, "policy_version: "),
        (["a"], {"max_staleness": -1}, "max_staleness: "),
        (["a"], {"lane": "urgent"}, "lane: "),
        (["a"], {"batch_id": "no spaces"}, "batch_id: "),
        (["a"], {"batch_id": ""}, "batch_id: "),
        (["a"], {"endpoint": "completions"}, "endpoint: "),
        (["a"], {"endpoint": "chat"}, "logprobs: "),
        ([[1]], {"endpoint": "chat", "logprobs": False}, "prompts[0]: "),
        (["a"], {"sampling": {"temprature": 1.0}}, "sampling.temprature: "),
        (["a"], {"sampling": {"temperature": float("nan")}}, "sampling.temperature: "),
        (["a"], {"sampling": {"top_k": 0}}, "sampling: top_k: 0"),
        (["a"], {"sampling": SamplingParams.model_construct(temperature=-1.0)}, "sampling.temperature: "),
        (["a"], {"sampling": 3}, "sampling: "),
        (["a"], {"metadata": []}, "metadata: 0 entries for 1 prompts"),
        (["a"], {"metadata": "x"}, "metadata: expected a list"),
        (["a", "b"], {"metadata": [1, {1: 2}]}, "metadata[1]: "),
        (["a", "b"], {"metadata": [1, object()]}, "metadata[1]: "),
        (["a", "b"], {"metadata": [1, 2**80]}, "metadata[1]: "),
        (["a"], {"deadline": 0.0}, "deadline: "),
        (["a"], {"deadline": float("inf")}, "deadline: "),
        (["a"], {"deadline": float("nan")}, "deadline: "),
    ],
)
def test_bad_input_is_refused_by_name_and_index(prompts, options, named):
    with pytest.raises(InvalidPrompt) as refused:
        make(prompts, **options)
    assert str(refused.value).startswith(named)


def test_unknown_sampling_names_are_answered_with_the_known_ones():
    with pytest.raises(InvalidPrompt, match="max_new_tokens"):
        make(["a"], sampling={"max_tokens": 5})


def test_a_batch_over_the_size_limit_is_refused(monkeypatch):
    monkeypatch.setattr("rollpool.producer.enqueue.MAX_BATCH_BYTES", 1000)
    with pytest.raises(InvalidPrompt, match="several batches"):
        make(["x" * 600, "y" * 600])


def test_equal_batches_have_equal_content_whatever_their_deadline():
    assert make(["a", "b"], deadline=5.0).content == make(["a", "b"], deadline=9.0).content == make(["a", "b"]).content


@pytest.mark.parametrize(
    "other",
    [
        {"n": 2},
        {"n": 2, "split": 2},
        {"min_samples": 1},
        {"policy_version": 4},
        {"max_staleness": 0},
        {"exact": True},
        {"lane": "low"},
        {"endpoint": "chat", "logprobs": False},
        {"metadata": [1, 2]},
        {"sampling": {"temperature": 0.5}},
    ],
    ids=lambda other: next(iter(other)),
)
def test_content_covers_every_parameter(other):
    assert make(["a", "b"], **other).content != make(["a", "b"]).content


def test_content_covers_every_prompt_and_their_order():
    contents = {make(prompts).content for prompts in (["a", "b"], ["b", "a"], ["ab", "c"], ["a", "bc"], ["a"])}
    assert len(contents) == 5


def test_a_batch_without_a_name_gets_a_new_one():
    assert draft(["a"], run="r", policy_version=0).batch != draft(["a"], run="r", policy_version=0).batch


@pytest.mark.parametrize(("blocking", "asynchronous"), [(RolloutPool, AsyncRolloutPool), (Batch, AsyncBatch)])
def test_the_blocking_classes_mirror_the_asyncio_ones(blocking, asynchronous):
    internal = "for the pool, not for users"
    names = {name for name, member in inspect.getmembers(asynchronous) if not name.startswith("_")}
    public = {name for name in names if internal not in (inspect.getdoc(getattr(asynchronous, name)) or "").lower()}
    assert public - {"content"} == {name for name in dir(blocking) if not name.startswith("_")}
    for name in public:
        ours, theirs = getattr(blocking, name), getattr(asynchronous, name)
        assert inspect.getdoc(ours)
        if callable(theirs):
            assert inspect.signature(ours).parameters == inspect.signature(theirs).parameters
    if blocking is RolloutPool:
        assert inspect.signature(blocking).parameters == inspect.signature(asynchronous).parameters


def test_the_function_has_the_parameters_of_the_method():
    function, method = inspect.signature(enqueue_prompts), inspect.signature(RolloutPool.enqueue_prompts)
    assert ["self", *function.parameters] == list(method.parameters)
    assert function.return_annotation == method.return_annotation == Batch
    assert enqueue_prompts.__doc__ == RolloutPool.enqueue_prompts.__doc__
