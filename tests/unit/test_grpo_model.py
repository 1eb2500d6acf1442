"""The example's model and adapter in JAX, against the independent one in numpy."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from grpo_tiny import lora, model

from rollpool.ops.local.reference import ReferenceModel
from rollpool.ops.local.tiny_model import VOCAB_SIZE, make_tiny_model
from rollpool.schemas.sources import inventory

#: Float32 in another order of summation.
TOLERANCE = 2e-4

PROMPT, LENGTH = 5, 12


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", seed=7)


@pytest.fixture
def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(VOCAB_SIZE, size=(3, LENGTH)).astype(np.int32)


def of_reference(reference: ReferenceModel, ids: np.ndarray) -> np.ndarray:
    return np.stack([reference.logprobs(row[:PROMPT], row[PROMPT:]) for row in ids])


def test_it_scores_tokens_as_the_reference_does(checkpoint: Path, ids: np.ndarray) -> None:
    found = model.token_logprobs(model.load(checkpoint), model.Config.read(checkpoint), jnp.asarray(ids))
    assert found.shape == ids.shape
    wanted = of_reference(ReferenceModel.from_checkpoint(checkpoint), ids)
    np.testing.assert_allclose(found[:, PROMPT:], wanted, atol=TOLERANCE)


def test_padding_changes_nothing_before_it(checkpoint: Path, ids: np.ndarray) -> None:
    params, config = model.load(checkpoint), model.Config.read(checkpoint)
    padded = np.pad(ids, ((0, 0), (0, 4)), constant_values=9)
    whole = model.token_logprobs(params, config, jnp.asarray(ids))
    np.testing.assert_allclose(model.token_logprobs(params, config, jnp.asarray(padded))[:, :LENGTH], whole, atol=1e-5)


def test_a_new_adapter_changes_nothing(checkpoint: Path) -> None:
    base = model.load(checkpoint)
    merged = lora.merged(base, lora.new_adapter(base))
    assert all(np.array_equal(merged[name], base[name]) for name in base)


def test_a_saved_adapter_is_what_was_trained(checkpoint: Path, ids: np.ndarray, tmp_path: Path) -> None:
    base, rng = model.load(checkpoint), np.random.default_rng(1)
    adapter = {
        name: jnp.asarray(rng.normal(0, 0.05, value.shape), jnp.float32)
        for name, value in lora.new_adapter(base).items()
    }
    saved = lora.save_adapter(tmp_path / "adapter", adapter, checkpoint)
    config = model.Config.read(checkpoint)
    found = model.token_logprobs(lora.merged(base, adapter), config, jnp.asarray(ids))
    plain = ReferenceModel.from_checkpoint(checkpoint)
    wanted = of_reference(plain.with_adapter(saved), ids)
    np.testing.assert_allclose(found[:, PROMPT:], wanted, atol=TOLERANCE)
    assert np.abs(of_reference(plain, ids) - wanted).max() > 0.1, "an adapter that says nothing would pass"


def test_a_saved_adapter_can_be_published(checkpoint: Path, tmp_path: Path) -> None:
    saved = lora.save_adapter(tmp_path / "adapter", lora.new_adapter(model.load(checkpoint)), checkpoint)
    assert {file.name for file in inventory(str(saved), "adapter", digests=False)} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
