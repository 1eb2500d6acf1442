"""The oracle and the tiny model keep their own promises; that they agree with an engine is tested elsewhere."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from rollpool.ops.local.reference import ReferenceModel, check_sample, log_softmax
from rollpool.ops.local.tiny_adapter import ALL_TARGETS, make_tiny_adapter
from rollpool.ops.local.tiny_model import (
    EOS_TOKEN_ID,
    SPECIAL_TOKENS,
    VOCAB_SIZE,
    make_tiny_model,
    tiny_tokenizer,
)
from rollpool.schemas.results import Sample, VersionSpan
from rollpool.worker.sources.adapter import adapter_facts, check_for_engine
from rollpool.worker.sources.merge import merge_adapter

IDS = list(range(40, 72))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny-0", seed=0)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> ReferenceModel:
    return ReferenceModel.from_checkpoint(checkpoint)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_adapter(tmp_path_factory.mktemp("adapters") / "tiny-0", seed=0)


@pytest.fixture(scope="module")
def models(model: ReferenceModel, adapter: Path) -> dict[int, ReferenceModel]:
    """Two policies: 1 is the model, 2 has the adapter on it."""
    return {1: model, 2: model.with_adapter(adapter)}


def test_a_later_token_never_changes_earlier_logits(model: ReferenceModel) -> None:
    before = model.logits(IDS)
    after = model.logits([*IDS[:-1], 7])
    np.testing.assert_allclose(before[:-1], after[:-1], atol=1e-4)
    assert np.abs(before[-1] - after[-1]).max() > 1


def test_an_earlier_token_changes_later_logits(model: ReferenceModel) -> None:
    assert np.abs(model.logits(IDS)[-1] - model.logits([7, *IDS[1:]])[-1]).max() > 0.1


def test_order_matters(model: ReferenceModel) -> None:
    swapped = [IDS[1], IDS[0], *IDS[2:]]
    assert np.abs(model.logits(IDS)[-1] - model.logits(swapped)[-1]).max() > 0.01


def test_probabilities_sum_to_one(model: ReferenceModel) -> None:
    logits = model.logits(IDS)
    assert logits.shape == (len(IDS), VOCAB_SIZE)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(np.exp(log_softmax(logits)).sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_scaled_logits(model: ReferenceModel, temperature: float) -> None:
    scored = model.logprobs(IDS[:8], IDS[8:], temperature=temperature)
    table = log_softmax(model.logits(IDS) / np.float32(temperature))
    expected = [table[position - 1, IDS[position]] for position in range(8, len(IDS))]
    np.testing.assert_allclose(scored, expected, atol=1e-4)


def test_a_batch_scores_as_its_samples_do(model: ReferenceModel) -> None:
    samples = [(IDS[:3], IDS[3:10]), (IDS[:20], IDS[20:21]), (IDS[:5], [])]
    batch = model.logprobs_batch(samples)
    assert [len(scores) for scores in batch] == [7, 1, 0]
    np.testing.assert_allclose(batch[0], model.logprobs(*samples[0]), atol=1e-6)


def test_bad_questions_are_refused(model: ReferenceModel) -> None:
    with pytest.raises(ValueError, match="prompt is empty"):
        model.logprobs([], IDS)
    with pytest.raises(ValueError, match="temperature"):
        model.logprobs(IDS, IDS, temperature=0.0)


def test_two_seeds_are_easy_to_tell_apart(model: ReferenceModel, tmp_path: Path) -> None:
    other = ReferenceModel.from_checkpoint(make_tiny_model(tmp_path / "tiny-1", seed=1))
    rng = np.random.default_rng(0)
    ids = [1, 2, 3]
    for _ in range(40):
        probabilities = np.exp(log_softmax(model.logits(ids)[-1].astype(np.float64)))
        ids.append(int(rng.choice(VOCAB_SIZE, p=probabilities / probabilities.sum())))
    gap = np.abs(model.logprobs(ids[:3], ids[3:]) - other.logprobs(ids[:3], ids[3:]))
    assert np.median(gap) > 1


def test_the_end_token_is_rare(model: ReferenceModel) -> None:
    assert np.exp(log_softmax(model.logits(IDS))[:, EOS_TOKEN_ID]).max() < 0.01


def test_the_maker_returns_what_is_there(checkpoint: Path) -> None:
    stamps = {file.name: file.stat().st_mtime_ns for file in checkpoint.iterdir()}
    assert make_tiny_model(checkpoint, seed=0) == checkpoint
    assert {file.name: file.stat().st_mtime_ns for file in checkpoint.iterdir()} == stamps
    assert [file.name for file in checkpoint.parent.iterdir()] == [checkpoint.name]


def test_the_maker_never_takes_another_model_for_its_own(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="seed"):
        make_tiny_model(checkpoint, seed=1)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not a tiny model"):
        make_tiny_model(tmp_path, seed=0)


def test_equal_seeds_give_equal_files(checkpoint: Path, tmp_path: Path) -> None:
    again = make_tiny_model(tmp_path / "again", seed=0)
    for file in checkpoint.iterdir():
        assert (again / file.name).read_bytes() == file.read_bytes()


def test_every_text_encodes_and_every_id_decodes() -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    text = "How many Rs are in “strawberry”? 🍓\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert all(tokenizer.decode([i], skip_special_tokens=False) for i in range(VOCAB_SIZE))
    assert tokenizer.encode("<|im_start|>").ids == [VOCAB_SIZE - len(SPECIAL_TOKENS) + 1]


@pytest.mark.parametrize(("rank", "alpha", "targets"), [(4, 4.0, ALL_TARGETS), (8, 2.0, ("q_proj", "down_proj"))])
def test_an_adapter_on_the_model_is_the_checkpoint_it_is_merged_into(
    model: ReferenceModel, checkpoint: Path, tmp_path: Path, rank: int, alpha: float, targets: Sequence[str]
) -> None:
    adapter = make_tiny_adapter(tmp_path / "adapter", seed=3, rank=rank, alpha=alpha, targets=targets)
    merge_adapter(checkpoint, adapter, tmp_path / "merged")
    merged = ReferenceModel.from_checkpoint(tmp_path / "merged")
    np.testing.assert_allclose(model.with_adapter(adapter).logits(IDS), merged.logits(IDS), atol=1e-4)
    assert np.abs(model.logits(IDS) - merged.logits(IDS)).max() > 1


def test_an_adapter_adds_its_scaled_product_to_each_matrix_it_is_on(
    model: ReferenceModel, adapter: Path, models: dict[int, ReferenceModel]
) -> None:
    scale = 4.0 / 4
    matrices = load_file(adapter / "adapter_model.safetensors")
    changed = {name for name, value in models[2]._weights.items() if not np.array_equal(value, model._weights[name])}
    assert len(changed) == 2 * len(ALL_TARGETS)
    for name in changed:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (matrices[f"{module}.lora_{side}.weight"].astype(np.float64) for side in "AB")
        expected = model._weights[name] + scale * np.einsum("or,ri->oi", b, a)
        np.testing.assert_allclose(models[2]._weights[name], expected, atol=1e-6)


def test_two_adapters_and_their_base_are_easy_to_tell_apart(
    model: ReferenceModel, models: dict[int, ReferenceModel], tmp_path: Path
) -> None:
    other = model.with_adapter(make_tiny_adapter(tmp_path / "tiny-1", seed=1))
    said = [each.greedy(IDS[:6], 12).tolist() for each in (model, models[2], other)]
    for i in range(3):
        for j in range(i):
            assert np.mean(np.equal(said[i], said[j])) < 0.5
    gap = np.abs(model.logprobs(IDS[:6], said[0]) - models[2].logprobs(IDS[:6], said[0]))
    assert np.median(gap) > 1


def test_an_adapter_is_one_that_engines_take_whole(adapter: Path) -> None:
    facts = adapter_facts(adapter)
    assert len(facts.targets) == 2 * len(ALL_TARGETS)
    assert check_for_engine(facts, max_rank=4, layers=2) == []


def test_equal_seeds_give_equal_adapters_and_others_are_refused(adapter: Path, tmp_path: Path) -> None:
    again = make_tiny_adapter(tmp_path / "again", seed=0)
    for file in adapter.iterdir():
        assert (again / file.name).read_bytes() == file.read_bytes()
    assert make_tiny_adapter(adapter, seed=0) == adapter
    with pytest.raises(FileExistsError, match=r"already holds a tiny adapter of .*'seed': 0"):
        make_tiny_adapter(adapter, seed=1)
    with pytest.raises(FileExistsError, match="not a tiny adapter"):
        make_tiny_adapter(adapter.parent, seed=1)


@pytest.mark.parametrize(
    "setting",
    [{"use_rslora": True}, {"use_dora": True}, {"rank_pattern": {"q_proj": 2}}, {"alpha_pattern": {"q_proj": 2}}],
)
def test_an_adapter_of_another_formula_is_refused(
    model: ReferenceModel, adapter: Path, tmp_path: Path, setting: dict[str, Any]
) -> None:
    for file in adapter.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((adapter / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | setting))
    with pytest.raises(ValueError, match=next(iter(setting))):
        model.with_adapter(tmp_path)


#: A span of each policy, which together are a sample.
SPANS = ((1, 0, 7), (2, 7, 16))
PROMPT = IDS[:5]


def sample(
    models: dict[int, ReferenceModel],
    spans: Sequence[tuple[int, int, int]] = SPANS,
    *,
    named: Sequence[tuple[int, int, int]] | None = None,
    temperature: float = 0.0,
    shift: int = 0,
) -> Sample:
    """Made token by token, each by the policy of its span: the most likely one, or the one `shift` places behind."""
    output: list[int] = []
    scores: list[float] = []
    for version, start, end in spans:
        for _ in range(start, end):
            row = log_softmax(models[version].logits([*PROMPT, *output])[-1] / np.float32(temperature or 1.0))
            output.append(int(np.argsort(-row)[shift]))
            scores.append(float(row[output[-1]]))
    return Sample(
        output_ids=np.asarray(output, dtype=np.int32),
        logprobs=np.asarray(scores, dtype=np.float32),
        text="",
        finish_reason="length",
        version_spans=tuple(VersionSpan(*span) for span in named or spans),
    )


@pytest.mark.parametrize("spans", [SPANS, ((2, 0, 3), (1, 3, 3), (2, 3, 6), (1, 6, 12)), ((1, 0, 0),)])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_sample_of_the_policies_its_spans_name_is_found_right(
    models: dict[int, ReferenceModel], spans: Sequence[tuple[int, int, int]], temperature: float
) -> None:
    made = sample(models, spans, temperature=temperature, shift=0 if temperature == 0 else 3)
    assert check_sample(models, PROMPT, made, temperature=temperature) < 1e-4


@pytest.mark.parametrize(
    "named",
    [((2, 0, 7), (1, 7, 16)), ((1, 0, 16),), ((2, 0, 16),), ((1, 0, 6), (2, 6, 16)), ((1, 0, 8), (2, 8, 16))],
    ids=["the other way round", "the first alone", "the second alone", "a token early", "a token late"],
)
def test_a_sample_that_names_another_policy_for_one_token_is_found(
    models: dict[int, ReferenceModel], named: Sequence[tuple[int, int, int]]
) -> None:
    for temperature in (0.0, 1.0):
        made = sample(models, named=named, temperature=temperature)
        assert check_sample(models, PROMPT, made, temperature=temperature) > 0.1


def test_a_token_that_greedy_sampling_does_not_pick_is_found_though_its_logprob_is_right(
    models: dict[int, ReferenceModel],
) -> None:
    made = sample(models, shift=1)
    assert check_sample(models, PROMPT, made, temperature=1.0) < 1e-4
    assert check_sample(models, PROMPT, made, temperature=0.0) > 0.1


def test_a_logprob_that_is_no_number_is_not_small(models: dict[int, ReferenceModel]) -> None:
    made = sample(models)
    wrong = made.model_copy(update={"logprobs": np.full_like(made.logprobs, np.nan)})
    assert check_sample(models, PROMPT, wrong, temperature=0.0) == np.inf


def test_a_version_without_a_model_is_an_error(models: dict[int, ReferenceModel]) -> None:
    with pytest.raises(KeyError, match="3"):
        check_sample(models, PROMPT, sample(models, named=((3, 0, 16),)))
