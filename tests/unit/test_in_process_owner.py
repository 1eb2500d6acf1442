"""What an engine in this process is launched with, and which parameters it is served: without an engine."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from rollpool.schemas import EngineUnavailable, Policy, PolicyRejected
from rollpool.worker.engines.in_process_owner import InProcessOwner, InProcessSettings, paddings
from rollpool.worker.sources import Sources


@given(st.integers(1, 4096), st.integers(16, 16384))
def test_few_shapes_are_compiled_and_the_largest_is_among_them(requests: int, tokens: int) -> None:
    prefills, steps = paddings(requests, tokens)
    assert 1 <= len(prefills) <= 2
    assert 1 <= len(steps) <= 2
    assert prefills[-1] == tokens
    assert steps[-1] == requests
    assert all(size >= 1 for size in (*prefills, *steps))


def test_paddings_of_the_users_own_are_taken_as_they_are() -> None:
    settings = InProcessSettings(
        model_path="/m", device_indexes=(0, 1), device="cpu", token_paddings=(64, 128), batch_paddings=(3,)
    )
    arguments = settings.arguments("/m")
    assert arguments["precompile_token_paddings"] == [64, 128]
    assert arguments["precompile_bs_paddings"] == [3]


def test_the_engine_is_split_over_the_devices_it_is_given() -> None:
    arguments = InProcessSettings(model_path="/m", device_indexes=(2, 3), device="tpu").arguments("/other")
    assert arguments["device_indexes"] == [2, 3]
    assert arguments["tp_size"] == 2
    assert arguments["model_path"] == "/other"
    assert "enable_lora" not in arguments


def test_adapters_get_a_slot_more_for_none() -> None:
    settings = InProcessSettings(model_path="/m", device_indexes=(0,), device="cpu", max_lora_rank=8, adapter_slots=2)
    arguments = settings.arguments("/m")
    assert arguments["max_loras_per_batch"] == 3
    assert arguments["max_lora_rank"] == 8


@pytest.mark.parametrize("wrong", [{"device_indexes": ()}, {"staging": "disk"}, {"pages": 1}, {"max_seq_len": 1}])
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        InProcessSettings.model_validate({"model_path": "/m", "device_indexes": (0,), "device": "cpu", **wrong})


@pytest.fixture
def owner(tmp_path: Path) -> InProcessOwner:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    (model / "tokenizer.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"weights")
    (model / "model.safetensors.index.json").write_text("{}")
    settings = InProcessSettings(model_path=str(model), device_indexes=(0,), device="cpu")
    return InProcessOwner(settings, Sources(tmp_path / "stage", roots=(), budget_bytes=0))


TENSORS = {"a": np.ones(2, np.float32)}


def test_parameters_are_named_by_a_directory_with_everything_but_weights(owner: InProcessOwner) -> None:
    directory = Path(owner.put(3, TENSORS))
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", "tokenizer.json"]
    assert owner.holds(str(directory))


async def test_parameters_that_wait_are_there_for_the_next_engine_alone(owner: InProcessOwner) -> None:
    third = Policy(version=3, checkpoint=owner.put(3, TENSORS), run="r")
    assert await owner.stage(third, lambda done, size: None) == third.checkpoint
    owner.put(4, TENSORS)
    with pytest.raises(PolicyRejected, match="parameters of policy 3 are in memory no more"):
        await owner.stage(third, lambda done, size: None)
    assert third.checkpoint is not None
    with pytest.raises(EngineUnavailable, match="publish the next policy"):
        await owner.open(third.checkpoint, version=3)


def test_parameters_do_not_change_with_the_trainers_arrays(owner: InProcessOwner) -> None:
    mine = np.ones(2, np.float32)
    owner.put(1, {"a": mine})
    mine[:] = 7
    assert owner._waiting is not None
    assert owner._waiting[1]["a"].tolist() == [1, 1]


class Side:
    """Refuses what it is given, or keeps it."""

    def __init__(self) -> None:
        self.staged: list[str] = []

    def deposit(self, directory: str, tensors: Any, staging: str) -> None:
        from rollpool.worker.launch.hot_swap_messages import Refused

        if "bad" in tensors:
            raise Refused("the model has no bad")
        self.staged.append(directory)

    def has_deposit(self, directory: str) -> bool:
        return directory in self.staged


def test_what_the_engine_refuses_is_refused_to_the_trainer(owner: InProcessOwner) -> None:
    side = Side()
    owner._engine = SimpleNamespace(  # type: ignore[assignment]
        embedded=SimpleNamespace(failure="", side=side, scheduler=object()), facts=SimpleNamespace(model_path="/m")
    )
    with pytest.raises(PolicyRejected, match=r"policy 5 are not served: the model has no bad"):
        owner.put(5, {"bad": np.ones(1)})
    directory = owner.put(6, TENSORS)
    assert owner.holds(directory)
    assert side.staged == [directory]


async def test_an_adapter_is_not_merged_into_what_has_no_files(owner: InProcessOwner) -> None:
    base = owner.put(1, TENSORS)
    adapter = Policy(version=2, lora_path="/adapter", base=base, run="r")
    with pytest.raises(PolicyRejected, match="set max_lora_rank"):
        await owner.merge(base, adapter, "/adapter")
