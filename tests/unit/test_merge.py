import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import safe_open
from small_checkpoints import LORA_A, LORA_B, MODULE, WEIGHT, make_adapter, make_base, random, write_tensors

from rollpool.schemas import PolicyRejected
from rollpool.worker.sources import merge as merging
from rollpool.worker.sources.adapter import adapter_facts, check_for_engine
from rollpool.worker.sources.merge import merge_adapter
from rollpool.worker.sources.tensors import FLOATS, Floats, from_float32, layout, to_float32

GOLDEN = Path(__file__).with_name("golden") / "peft-merge.safetensors"

with safe_open(GOLDEN, "np") as opened:
    CONFIGS: dict[str, str] = {name: text for name, text in opened.metadata().items() if name != "made_with"}


def stored(file: Path) -> dict[str, NDArray[Any]]:
    """Tensors as they are stored; bfloat16 as its bits."""
    found = {}
    raw = file.read_bytes()
    for name, tensor in layout(file).items():
        kind = FLOATS[tensor.dtype]
        flat = np.frombuffer(raw, kind, count=tensor.size // kind.itemsize, offset=tensor.offset)
        found[name] = flat.reshape(tensor.shape)
    return found


def numbers(file: Path) -> dict[str, Floats]:
    kinds = {name: tensor.dtype for name, tensor in layout(file).items()}
    return {name: to_float32(value, kinds[name]) for name, value in stored(file).items()}


def golden(case: str, part: str) -> dict[str, NDArray[Any]]:
    prefix = f"{case}/{part}/"
    return {name.removeprefix(prefix): value for name, value in stored(GOLDEN).items() if name.startswith(prefix)}


def merged_like_peft(case: str, tmp_path: Path) -> dict[str, NDArray[Any]]:
    base = make_base(tmp_path / "base", golden(case, "base"))
    adapter = make_adapter(tmp_path / "adapter", golden(case, "adapter"))
    (adapter / "adapter_config.json").write_text(CONFIGS[case])
    merge_adapter(base, adapter, tmp_path / "out")
    return stored(tmp_path / "out" / "model.safetensors")


def test_the_golden_has_all_its_cases() -> None:
    assert CONFIGS.keys() == {"plain", "rslora", "bfloat16", "ends"}


@pytest.mark.parametrize("case", ["plain", "rslora", "ends"])
def test_merges_as_peft_does(case: str, tmp_path: Path) -> None:
    mine, its, base = merged_like_peft(case, tmp_path), golden(case, "merged"), golden(case, "base")
    assert mine.keys() == its.keys()
    for name in its:
        assert not np.allclose(base[name], its[name], atol=1e-2)
        np.testing.assert_allclose(mine[name], its[name], rtol=1e-6, atol=1e-6, err_msg=name)


def test_rounds_to_the_bases_type_once(tmp_path: Path) -> None:
    """peft rounds the change and the sum: one step of the type may lie between it and the exact value."""
    mine, its, base = (merged_like_peft("bfloat16", tmp_path), golden("bfloat16", "merged"), golden("bfloat16", "base"))
    adapter, scale = golden("bfloat16", "adapter"), 4 / 2
    for name, bits in mine.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (adapter[f"{prefix}.lora_{side}.weight"].astype(np.float64) for side in "AB")
        exact = to_float32(base[name], "BF16") + scale * b @ a
        np.testing.assert_array_equal(bits, from_float32(exact.astype(np.float32), "BF16"))
        assert np.abs(bits.astype(np.int64) - its[name]).max() <= 1


def test_a_matrix_is_worked_on_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = merged_like_peft("plain", tmp_path / "whole")
    monkeypatch.setattr(merging, "_PIECE", 1)  # one row at a time
    in_rows = merged_like_peft("plain", tmp_path / "rows")
    for name in whole:
        np.testing.assert_allclose(in_rows[name], whole[name], rtol=1e-6, atol=1e-7)


def test_only_what_the_adapter_is_on_changes(tmp_path: Path) -> None:
    other: dict[str, NDArray[Any]] = {"model.norm.weight": random(3, 3), "odd": np.arange(5, dtype=np.int8)}
    base = make_base(tmp_path / "base", {WEIGHT: random(6, 4), "model.x.weight": random(2, 2)}, other)
    merge_adapter(base, make_adapter(tmp_path / "adapter"), tmp_path / "out")
    names = sorted(path.name for path in base.iterdir())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    for name in names:
        if name != "model-00001-of-00002.safetensors":
            assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    before, after = (numbers(where / "model-00001-of-00002.safetensors") for where in (base, tmp_path / "out"))
    np.testing.assert_array_equal(before["model.x.weight"], after["model.x.weight"])
    expected = before[WEIGHT] + 2 * random(6, 2, 3) @ random(2, 4, 2)
    np.testing.assert_allclose(after[WEIGHT], expected, rtol=1e-6)


def test_the_base_stays_as_it_is(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    merge_adapter(base, make_adapter(tmp_path / "adapter"), tmp_path / "out")
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before


def test_weights_in_other_formats_are_left_behind(tmp_path: Path) -> None:
    """They are the unmerged ones, and an engine might prefer them."""
    base = make_base(tmp_path / "base")
    (base / "pytorch_model.bin").write_bytes(b"unmerged")
    (base / "original").mkdir()
    (base / "original" / "consolidated.safetensors").write_bytes(b"unmerged")
    (base / ".rollpool.json").write_text("{}")
    merge_adapter(base, make_adapter(tmp_path / "adapter"), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").rglob("*")} == {
        "config.json",
        "tokenizer.json",
        "model.safetensors",
    }


def test_tells_how_far_it_is(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    base = make_base(tmp_path / "base")
    merge_adapter(base, make_adapter(tmp_path / "adapter"), tmp_path / "out", lambda *now: told.append(now))
    size = sum(path.stat().st_size for path in base.iterdir())
    assert told == sorted(told)
    assert (told[0], told[-1]) == ((0, size), (size, size))


def test_an_interrupted_merge_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter")
    with pytest.raises(KeyboardInterrupt):
        merge_adapter(base, adapter, tmp_path / "out", interrupt)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_does_not_overwrite(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    with pytest.raises(PolicyRejected, match="there already"):
        merge_adapter(base, adapter, tmp_path / "out")


EXTRA = {LORA_A: random(2, 4, 2), LORA_B: random(6, 2, 3)}


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
        ({"bias": "lora_only"}, "bias=lora_only"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
        ({"of_a_later_peft": 1}, "of_a_later_peft=1"),
        ({"peft_type": "LOHA"}, "peft_type"),
        ({"r": 0}, "r is 0"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"r": 3}, "its rank is 2, the config's r is 3"),
    ],
)
def test_settings_that_are_not_plain_are_refused_by_name(config: dict[str, Any], named: str, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", **config)
    with pytest.raises(PolicyRejected, match=named):
        merge_adapter(make_base(tmp_path / "base"), adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        (
            {"base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector": random(1, 6)},
            "lora_magnitude_vector",
        ),
        ({f"base_model.model.{MODULE}.lora_B.bias": random(1, 6)}, "lora_B.bias"),
        ({"model.layers.0.mlp.up_proj.lora_A.weight": random(2, 4)}, "does not begin with base_model.model."),
        ({"base_model.model.model.norm.weight": random(1, 4)}, "model.norm.weight: not a matrix"),
        ({"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": random(2, 4)}, "lora_A alone"),
        ({LORA_B: random(6, 3)}, "no pair of matrices"),
        ({LORA_B: np.zeros((6, 2), np.int8)}, "stored as I8"),
        (
            {"base_model.model.model.embed_tokens.weight": random(8, 4, 9)},
            "embed_tokens.weight in .* differs",
        ),
    ],
)
def test_tensors_that_are_not_plain_are_refused_by_name(
    tensors: Mapping[str, NDArray[Any]], named: str, tmp_path: Path
) -> None:
    adapter = make_adapter(tmp_path / "adapter", EXTRA | dict(tensors))
    with pytest.raises(PolicyRejected, match=named):
        merge_adapter(make_base(tmp_path / "base"), adapter, tmp_path / "out")


@pytest.mark.parametrize(
    ("shards", "named"),
    [
        ([{"model.embed_tokens.weight": random(8, 4)}], f"{WEIGHT}, which .* does not have"),
        ([{WEIGHT: random(6, 5)}], "6 by 4, the weight in .* is 6 by 5"),
        ([{WEIGHT: random(24, 1).reshape(24)}], "is 24"),
        ([{WEIGHT: np.zeros((6, 4), np.float64)}], "stored as F64"),
        ([{WEIGHT: random(6, 4)}, {WEIGHT: random(6, 4)}], "which of them counts"),
        ([{WEIGHT: np.full((6, 4), np.nan, np.float32)}], "not finite"),
    ],
)
def test_a_base_it_does_not_fit_is_refused(
    shards: list[Mapping[str, NDArray[Any]]], named: str, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base", *shards)
    with pytest.raises(PolicyRejected, match=named):
        merge_adapter(base, make_adapter(tmp_path / "adapter"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_sum_too_large_for_the_bases_type_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", {WEIGHT: np.zeros((6, 4), np.float16)})
    adapter = make_adapter(tmp_path / "adapter", lora_alpha=1e7)
    with pytest.raises(PolicyRejected, match=f"{WEIGHT} is not finite in F16"):
        merge_adapter(base, adapter, tmp_path / "out")


def test_a_quantized_base_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", config={"quantization_config": {"bits": 4}})
    with pytest.raises(PolicyRejected, match="quantized"):
        merge_adapter(base, make_adapter(tmp_path / "adapter"), tmp_path / "out")


def test_a_base_without_its_parts_is_refused(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    base = make_base(tmp_path / "base", {WEIGHT: random(6, 4)}, {"model.norm.weight": random(2, 2)})
    (base / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(PolicyRejected, match=r"not whole: .* model.norm.weight is in model-00002"):
        merge_adapter(base, adapter, tmp_path / "out")
    (base / "config.json").unlink()
    with pytest.raises(PolicyRejected, match=r"no config\.json"):
        merge_adapter(base, adapter, tmp_path / "out")


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    shard = base / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(PolicyRejected, match="not a whole safetensors file"):
        merge_adapter(base, make_adapter(tmp_path / "adapter"), tmp_path / "out")


@pytest.mark.parametrize(
    "tied", [{"tie_word_embeddings": True}, {"text_config": {"tie_word_embeddings": True}}, {"a": 1}]
)
def test_tied_ends_are_not_merged_into(tied: dict[str, Any], tmp_path: Path) -> None:
    name = "base_model.model.model.embed_tokens"
    adapter = make_adapter(
        tmp_path / "adapter", {f"{name}.lora_embedding_A": random(2, 8), f"{name}.lora_embedding_B": random(4, 2)}
    )
    with pytest.raises(PolicyRejected, match=r"embed_tokens, and .* ties its embeddings"):
        merge_adapter(make_base(tmp_path / "base", config=tied), adapter, tmp_path / "out")


def test_projections_of_a_tied_model_are_merged_into(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", config={"tie_word_embeddings": True})
    merge_adapter(base, make_adapter(tmp_path / "adapter"), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


@given(st.floats(width=32, allow_nan=False, allow_infinity=False), st.sampled_from(["F32", "F16", "BF16"]))
def test_rounding_finds_the_nearest_number_of_the_type(value: float, dtype: str) -> None:
    exact = np.array([value], np.float32)
    try:
        bits = from_float32(exact, dtype)
    except OverflowError:
        assert abs(value) > {"F16": 65504.0, "BF16": 3.389e38}[dtype]
        return
    kind = np.dtype("<u4" if dtype == "F32" else "<u2")
    near = bits.view(kind).astype(np.int64) + np.array([-1, 0, 1])
    around = to_float32(near.clip(0).astype(kind).view(FLOATS[dtype]), dtype).astype(np.float64)
    distances = np.abs(around - value)
    assert distances[1] == np.nanmin(distances)


def test_half_way_between_two_numbers_the_even_one_is_taken() -> None:
    ties = np.array([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8], np.float32)
    np.testing.assert_array_equal(to_float32(from_float32(ties, "BF16"), "BF16"), [1.0, 1 + 2**-6, -1.0])


def test_the_facts_of_an_adapter(tmp_path: Path) -> None:
    facts = adapter_facts(make_adapter(tmp_path / "adapter"))
    assert (facts.rank, facts.scale, facts.rslora, facts.oddities) == (2, 2.0, False, ())
    assert [(target.module, target.rows, target.columns) for target in facts.targets] == [(MODULE, 6, 4)]
    assert check_for_engine(facts, max_rank=2, layers=1) == []


def test_layers_are_the_files_affair(tmp_path: Path) -> None:
    facts = adapter_facts(make_adapter(tmp_path / "adapter", layers_to_transform=[0], layers_pattern="layers"))
    assert check_for_engine(facts, max_rank=2) == []


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"use_rslora": True}, "use_rslora=false and lora_alpha=5.65685"),
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ({"bias": "all"}, "bias=all"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ".*q_proj"}, "not a pattern"),
        ({"target_modules": None}, "list of names"),
    ],
)
def test_what_the_engine_would_ignore_is_named(config: dict[str, Any], named: str, tmp_path: Path) -> None:
    (message,) = check_for_engine(adapter_facts(make_adapter(tmp_path / "adapter", **config)), max_rank=8)
    assert re.search(named, message)


def test_a_rank_the_engine_would_cut_is_named(tmp_path: Path) -> None:
    facts = adapter_facts(make_adapter(tmp_path / "adapter"))
    assert check_for_engine(facts, max_rank=1) == ["r=2: the engine was launched for ranks up to 1 and would cut it"]


@pytest.mark.parametrize(
    ("module", "named"),
    [
        ("lm_head", "projections only"),
        ("model.layers.0.mlp.experts.0.up_proj", "projections only"),
        ("model.layers.1.mlp.up_proj", "the model has 1 layers"),
        ("other.layers.0.self_attn.q_proj", "one q_proj a layer"),
    ],
)
def test_modules_the_engine_would_pass_over_are_named(module: str, named: str, tmp_path: Path) -> None:
    prefix = f"base_model.model.{module}"
    more = {f"{prefix}.lora_A.weight": random(2, 4), f"{prefix}.lora_B.weight": random(6, 2)}
    (message,) = check_for_engine(adapter_facts(make_adapter(tmp_path / "adapter", EXTRA | more)), layers=1)
    assert named in message


def test_an_adapter_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyRejected, match=r"has no adapter_config.json"):
        adapter_facts(tmp_path)
    adapter = make_adapter(tmp_path / "adapter", {})
    with pytest.raises(PolicyRejected, match="holds no LoRA matrix"):
        adapter_facts(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(PolicyRejected, match=r"has no adapter_model.safetensors"):
        adapter_facts(adapter)
    (adapter / "adapter_config.json").write_text(json.dumps([]))
    with pytest.raises(PolicyRejected, match="peft_type is not LORA"):
        adapter_facts(adapter)


@pytest.mark.parametrize(
    "broken",
    [b"", b"\xff" * 8, b"\x02\0\0\0\0\0\0\0[]", b'\x10\0\0\0\0\0\0\0{"a": {"b": [0]}'],
    ids=["empty", "huge", "no object", "no tensor"],
)
def test_a_broken_header_is_refused(broken: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(broken)
    with pytest.raises(PolicyRejected, match="not a whole safetensors file"):
        layout(tmp_path / "a.safetensors")


def test_a_header_that_points_outside_its_file_is_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", {"a": random(2, 2)})
    written = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(written.replace(b"[0, 16]", b"[8, 24]"))
    with pytest.raises(PolicyRejected, match="said to be at 8 to 24 of 16 bytes"):
        layout(tmp_path / "a.safetensors")
