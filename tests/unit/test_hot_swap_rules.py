"""What the launch scripts decide about weights and adapters without an engine: spans, whole files, plain adapters."""

import importlib
import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_checkpoints import LORA_A, LORA_B, WEIGHT, make_adapter, make_base, random, write_tensors

from rollpool.worker.engines.process import default_launcher


def launch_module(name: str) -> Any:
    """A module of the launch folder, as the engine's interpreter imports it."""
    folder = str(default_launcher().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


files = launch_module("hot_swap_files")
rules = launch_module("hot_swap_adapter_rules")
spans = launch_module("hot_swap_spans")
internals = launch_module("hot_swap_internals")
Refused = launch_module("hot_swap_messages").Refused

LIMITS = rules.Limits(max_rank=4, layers=1, modules={"q_proj": (6, 4)})


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("change"), st.sampled_from(["1", "2", "3"])),
            st.tuples(st.just("make"), st.integers(0, 3)),
            st.tuples(st.just("end"), st.integers(0, 3)),
        ),
        max_size=30,
    )
)
def test_spans_say_of_each_token_what_served_when_it_was_made(moves: list[tuple[str, Any]]) -> None:
    marks = spans.VersionMarks("0")
    runs: dict[int, list[str]] = {rid: [] for rid in range(4)}
    for move, value in moves:
        if move == "change":
            marks.change(value, [(rid, len(made)) for rid, made in runs.items()])
        elif move == "make":
            runs[value].append(marks.version)
        else:
            marks.of_outputs([value], [len(runs[value])], ["stop"])
            runs[value] = []  # A new request; the engine forbids that an id comes again, and this one forgives it.
        for rid, made in runs.items():
            told = marks.spans(rid, len(made))
            assert [version for version, start, end in told for _ in range(start, end)] == made
            assert [start for _, start, _ in told] == [0, *(end for _, _, end in told)][: len(told)]
            assert all(one[0] != other[0] for one, other in itertools.pairwise(told))


def test_a_request_that_ended_without_an_output_is_forgotten_at_the_next_change() -> None:
    marks = spans.VersionMarks("1")
    marks.change("2", [("a", 3), ("b", 4)])
    marks.change("3", [("b", 6)])
    assert marks.spans("a", 5) == [("3", 0, 5)]
    assert marks.spans("b", 5) == [("1", 0, 4), ("2", 4, 5)], "an output cut short has no span past its end"


def test_a_whole_checkpoint_passes(tmp_path: Path) -> None:
    made = make_base(tmp_path / "m", {WEIGHT: random(6, 4)}, {"b": random(2, 2)})
    assert set(files.check_checkpoint(str(made))) == {WEIGHT, "b"}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda m: (m / "model-00002-of-00002.safetensors").unlink(), "lacks model-00002"),
        (lambda m: cut(m / "model-00001-of-00002.safetensors", -1), "not written to its end"),
        (lambda m: cut(m / "model-00001-of-00002.safetensors", 20), "no whole safetensors file"),
        (lambda m: (m / "model-00001-of-00002.safetensors").write_bytes(b"x" * 64), "no whole safetensors file"),
        (lambda m: write_tensors(m / "model-00002-of-00002.safetensors", {"c": random(2, 2)}), "lacks the tensors b,"),
        (lambda m: write_tensors(m / "other.safetensors", {"b": random(2, 2)}), "the tensor b twice"),
        (lambda m: (m / "config.json").unlink(), "config.json cannot be read"),
        (lambda m: (m / "config.json").write_text("[]"), "does not hold a JSON object"),
        (lambda m: [file.unlink() for file in m.glob("*.safetensors")], "holds no *.safetensors"),
    ],
)
def test_files_that_are_not_whole_are_found_without_loading_them(tmp_path: Path, damage: Any, said: str) -> None:
    made = make_base(tmp_path / "m", {WEIGHT: random(6, 4)}, {"b": random(2, 2)})
    damage(made)
    with pytest.raises(Refused) as refused:
        files.check_checkpoint(str(made))
    assert said in str(refused.value)


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def test_a_plain_adapter_passes(tmp_path: Path) -> None:
    rules.check_adapter(make_adapter(tmp_path / "a"), LIMITS)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"peft_type": "IA3"}, "not LoRA"),
        ({"r": 5}, "--max-lora-rank 5"),
        ({"r": 0}, "no rank"),
        ({"use_rslora": True}, "use_rslora"),
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"q_proj": 1}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 1}}, "alpha_pattern"),
        ({"bias": "lora_only"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"something_of_next_year": 1}, "something_of_next_year"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"target_modules": "all-linear"}, "a list of names"),
    ],
)
def test_what_the_engine_would_silently_cut_or_ignore_is_refused(
    tmp_path: Path, config: dict[str, Any], said: str
) -> None:
    with pytest.raises(Refused) as refused:
        rules.check_adapter(make_adapter(tmp_path / "a", **config), LIMITS)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({LORA_A: random(2, 4)}, "lora_A alone"),
        ({LORA_A: random(2, 5), LORA_B: random(6, 2)}, "has shape (2, 5); (2, 4) fits"),
        ({LORA_A: random(2, 4), LORA_B: random(6, 3)}, "has shape (6, 3); (6, 2) fits"),
        ({LORA_A.replace("layers.0", "layers.1"): random(2, 4)}, "is of layer 1; the model has 1"),
        ({LORA_A.replace("q_proj", "router"): random(2, 4)}, "adapters on q_proj alone"),
        ({LORA_A.replace("lora_A", "lora_A.default"): random(2, 4)}, "the engine applies no"),
        ({"base_model.model.model.embed_tokens.weight": random(2, 4)}, "the engine applies no"),
        ({LORA_A: np.zeros((2, 4), np.int8)}, "is I8"),
        ({}, "holds no tensor"),
    ],
)
def test_tensors_without_a_place_in_the_engine_are_refused(tmp_path: Path, tensors: dict[str, Any], said: str) -> None:
    with pytest.raises(Refused) as refused:
        rules.check_adapter(make_adapter(tmp_path / "a", tensors), LIMITS)
    assert said in str(refused.value)


def test_an_internal_that_is_gone_or_changed_is_named() -> None:
    def expect(*args: Any) -> str:
        return str(internals.unexpected((internals.Expected(*args),)))

    assert expect("json:dumps", None, ("sort_keys=False",)) == ""
    assert "no_such_module" in expect("no_such_module:x")
    assert "no attribute 'x'" in expect("json:JSONDecoder.x")
    assert expect("json:JSONDecoder.decode", ("self", "s", "_w")) == ""
    assert "not ('self', 's')" in expect("json:JSONDecoder.decode", ("self", "s"))
    assert "no longer holds 'gone'" in expect("json:dumps", None, ("gone",))
