"""The oracle and the tiny model keep their own promises; that they agree with an engine is tested elsewhere."""

from pathlib import Path

import numpy as np
import pytest

from rollpool.ops.local.reference import ReferenceModel, log_softmax
from rollpool.ops.local.tiny_model import (
    EOS_TOKEN_ID,
    SPECIAL_TOKENS,
    VOCAB_SIZE,
    make_tiny_model,
    tiny_tokenizer,
)

IDS = list(range(40, 72))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny-0", seed=0)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> ReferenceModel:
    return ReferenceModel.from_checkpoint(checkpoint)


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
