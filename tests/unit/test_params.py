"""Parameters by name: translation, layout, and what is written as a checkpoint."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from rollpool.ops.local.tiny_model import make_tiny_model
from rollpool.producer import CheckpointFolder, PolicyRejected, SettingsError, checkpoint_folder, hf_tensors
from rollpool.schemas.sources import inventory

#: As Tunix names what its Qwen3 has, and where its engine has it; two layers' worth of each kind.
MAPPING: dict[str, Any] = {
    "to_hf_mappings": {
        "lm_head.w": ("lm_head.embedding", (None, "tp")),
        "embedder.input_embedding": ("model.embed_tokens.embedding", ("tp", None)),
        "layers.*.input_layernorm.w": ("model.layers.*.input_layernorm.scale", (None,)),
        "layers.*.mlp.down_proj.kernel": ("model.layers.*.mlp.down_proj.weight", ("tp", None)),
        "layers.*.attn.q_proj.w": ("model.layers.*.self_attn.q_proj.weight", (None, "tp", None)),
        "layers.*.attn.o_proj.w": ("model.layers.*.self_attn.o_proj.weight", ("tp", None, None)),
        "layers.*.attn.q_bias": ("model.layers.*.self_attn.q_proj.bias", (None,)),
    },
    "to_hf_transpose_keys": {"lm_head.w": (1, 0)},
    "to_hf_hook_fns": None,
}

EMBED, HEADS, HEAD, FFN, VOCAB = 3, 2, 4, 5, 7


def drawn(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def tunix_params() -> dict[str, Any]:
    layer = {
        "input_layernorm": {"w": drawn(EMBED, seed=1)},
        "mlp": {"down_proj": {"kernel": drawn(FFN, EMBED, seed=2)}},
        "attn": {
            "q_proj": {"w": drawn(EMBED, HEADS, HEAD, seed=3)},
            "o_proj": {"w": drawn(HEADS, HEAD, EMBED, seed=4)},
            "q_bias": drawn(HEADS * HEAD, seed=5),
        },
    }
    return {
        "lm_head": {"w": drawn(EMBED, VOCAB, seed=6)},
        "embedder": {"input_embedding": drawn(VOCAB, EMBED, seed=7)},
        "layers": {0: layer, 1: {**layer, "input_layernorm": {"w": drawn(EMBED, seed=8)}}},
    }


class Variable:
    """As flax keeps an array in a state; its generators of random numbers hold what is none."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def get_value(self) -> Any:
        return self._value


class State:
    """As flax flattens a state."""

    def __init__(self, flat: Mapping[tuple[Any, ...], Any]) -> None:
        self._flat = flat

    def flat_state(self) -> list[tuple[tuple[Any, ...], Any]]:
        return [(path, Variable(value)) for path, value in self._flat.items()]


# Names and layout


@pytest.mark.parametrize(
    "params",
    [
        {"model.norm.weight": drawn(3), "model.layers.0.up.weight": drawn(2, 3)},
        {"model": {"norm": {"weight": drawn(3)}, "layers": [{"up": {"weight": drawn(2, 3)}}]}},
        {"model": {"norm.weight": drawn(3), "layers": {0: {"up": {"weight": drawn(2, 3)}}}}},
        State({("model", "norm", "weight"): drawn(3), ("model", "layers", 0, "up", "weight"): drawn(2, 3)}),
    ],
    ids=["flat", "nested", "mixed", "state"],
)
def test_hugging_face_names_are_taken_as_they_are(params: Any) -> None:
    tensors = hf_tensors(params)
    assert set(tensors) == {"model.norm.weight", "model.layers.0.up.weight"}
    np.testing.assert_array_equal(tensors["model.layers.0.up.weight"], drawn(2, 3))


def test_tunix_names_and_layout_come_out_as_hugging_faces() -> None:
    params = tunix_params()
    tensors = hf_tensors(params, MAPPING)
    layer = params["layers"][1]
    q, o = layer["attn"]["q_proj"]["w"], layer["attn"]["o_proj"]["w"]
    expected = {
        "model.embed_tokens.weight": params["embedder"]["input_embedding"],
        "lm_head.weight": params["lm_head"]["w"].T,
        "model.layers.1.input_layernorm.weight": layer["input_layernorm"]["w"],
        "model.layers.1.mlp.down_proj.weight": layer["mlp"]["down_proj"]["kernel"].T,
        "model.layers.1.self_attn.q_proj.bias": layer["attn"]["q_bias"],
        # Row h * HEAD + i of q makes feature i of head h; column h * HEAD + i of o takes it.
        "model.layers.1.self_attn.q_proj.weight": np.stack([q[:, h, i] for h in range(HEADS) for i in range(HEAD)]),
        "model.layers.1.self_attn.o_proj.weight": np.stack([o[h, i] for h in range(HEADS) for i in range(HEAD)], 1),
    }
    assert len(tensors) == 2 + 2 * 5
    for name, array in expected.items():
        np.testing.assert_array_equal(tensors[name], array, err_msg=name)
        assert tensors.shape(name) == array.shape


def test_a_state_and_a_mapping_object_serve_as_well() -> None:
    class Config:
        to_hf_transpose_keys = None

        def to_hf_mappings(self) -> Any:
            return {"blocks.*.down.kernel": ("model.layers.*.down.weight", None)}

    state = State({("blocks", 3, "down", "kernel"): drawn(2, 5), ("dropout", "rngs", "key"): "no array"})
    (name,) = [*hf_tensors(State({("blocks", 3, "down", "kernel"): drawn(2, 5)}), Config())]
    assert name == "model.layers.3.down.weight"
    with pytest.raises(PolicyRejected, match=r"dropout\.rngs\.key is no array"):
        hf_tensors(state)


def test_what_belongs_to_generators_of_random_numbers_is_left_out() -> None:
    params = {"embedder": {"input_embedding": drawn(VOCAB, EMBED)}, "rngs": {"count": drawn(1)}}
    assert [*hf_tensors(params, MAPPING)] == ["model.embed_tokens.weight"]


def test_layers_in_one_array_come_apart_and_hooks_and_preprocessing_are_applied() -> None:
    mapping = {
        "to_hf_mappings": {"layers.up.kernel": ("model.layers.*.mlp.up_proj.weight", (None, "layer", None))},
        "to_hf_hook_fns": {"layers.up.kernel": lambda array: array * 2},
        "preprocess_src_state": lambda params: {"layers": {"up": {"kernel": params["all"] + 1}}},
    }
    stacked = drawn(EMBED, 2, FFN)
    tensors = hf_tensors({"all": stacked}, mapping)
    assert set(tensors) == {"model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"}
    np.testing.assert_array_equal(tensors["model.layers.1.mlp.up_proj.weight"], ((stacked[:, 1] + 1) * 2).T)


@pytest.mark.parametrize(
    ("params", "mapping", "words"),
    [
        ({"layers": {0: {"attn": {"z": drawn(2)}}}}, MAPPING, r"no name for layers\.0\.attn\.z"),
        ({"layers": {0: {"attn": {"q_proj": {"w_lora_a": drawn(2, 2)}}}}}, MAPPING, r"w_lora_a.*lora_path"),
        ({"layers": {0: {"mlp": {"down_proj": {"kernel": drawn(1, 2, 3)}}}}}, MAPPING, r"down_proj.*\(1, 2, 3\)"),
        ({"a": {"b": 3.0}}, None, r"a\.b is no array but float"),
        ({"a.b": drawn(2), "a": {"b": drawn(2)}}, None, r"two arrays are to be a\.b"),
        ({}, None, "no array"),
        (object(), None, r"nnx\.state\(model\)"),
    ],
)
def test_what_has_no_place_in_a_checkpoint_is_refused_by_name(params: Any, mapping: Any, words: str) -> None:
    with pytest.raises(PolicyRejected, match=words):
        hf_tensors(params, mapping)


def test_a_mapping_without_names_is_a_settings_error() -> None:
    with pytest.raises(SettingsError, match="to_hf_mappings"):
        hf_tensors({"a": drawn(2)}, {"to_hf_mappings": None})


class Gone:
    """A JAX array that was donated."""

    shape, dtype = (2, 3), np.dtype(np.float32)
    reshape = transpose = None

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("Array has been deleted")


def test_what_the_trainer_gave_away_is_told_by_name(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "out", like=tied(tmp_path / "like", "w"))
    with pytest.raises(PolicyRejected, match=r"params: w cannot be copied .*deleted"):
        folder.put(1, hf_tensors({"w": type("Donated", (Gone,), {"shape": (4, 3)})()}))
    assert not list((tmp_path / "out").iterdir())


# A folder of checkpoints


@pytest.fixture(scope="module")
def like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "like", seed=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return load_file(make_tiny_model(tmp_path_factory.mktemp("models") / "trained", seed=2) / "model.safetensors")


def test_a_checkpoint_is_written_whole(like: Path, trained: dict[str, Any], tmp_path: Path) -> None:
    written = Path(CheckpointFolder(tmp_path / "out", like=like).put(3, trained))
    assert written.name.startswith("3-")
    assert written.parent == tmp_path / "out"
    assert list(written.parent.iterdir()) == [written]
    found = load_file(written / "model.safetensors")
    assert found.keys() == trained.keys()
    assert all(np.array_equal(found[name], trained[name]) for name in trained)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (written / name).read_bytes() == (like / name).read_bytes()
    assert {file.name for file in inventory(str(written), "checkpoint", digests=False)} >= {"model.safetensors"}


def test_large_weights_are_written_in_shards_with_an_index(
    like: Path, trained: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 4 << 20
    monkeypatch.setattr(checkpoint_folder, "SHARD_BYTES", most)
    written = Path(CheckpointFolder(tmp_path, like=like).put(3, trained))
    inventory(str(written), "checkpoint", digests=False)
    index = json.loads((written / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in trained.values())
    files = sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert len(files) > 2
    assert not (written / "model.safetensors").exists()
    assert all((written / file).stat().st_size < most + 10_000 for file in files)
    found: dict[str, Any] = {}
    for file in files:
        found |= load_file(written / file)
    assert all(np.array_equal(found[name], trained[name]) for name in trained)


@pytest.mark.parametrize("like_is", ["float32", "bfloat16"])
@pytest.mark.parametrize("given", ["float32", "bfloat16"])
@pytest.mark.parametrize("asked", [None, "bfloat16", "float32"])
def test_dtypes_are_those_asked_for_or_of_the_model(
    tmp_path: Path, like_is: str, given: str, asked: str | None
) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    types = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
    (tmp_path / "like").mkdir()
    (tmp_path / "like" / "config.json").write_text("{}")
    weights = drawn(4, 3).astype(types["bfloat16"]).astype(types[given])
    save_file({"w": drawn(4, 3).astype(types[like_is])}, tmp_path / "like" / "model.safetensors")
    written = CheckpointFolder(tmp_path / "out", like=tmp_path / "like", dtype=asked).put(1, {"w": weights})
    with safe_open(f"{written}/model.safetensors", framework="numpy") as file:
        assert file.get_slice("w").get_dtype() == {"float32": "F32", "bfloat16": "BF16"}[asked or like_is]
    body = Path(written, "model.safetensors").read_bytes()
    values = weights.astype(types[asked or like_is]).tobytes()
    assert body.endswith(values)


def without(tensors: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: array for key, array in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: without(t, "model.norm.weight"), r"lack model\.norm\.weight"),
        (lambda t: {**t, "model.extra.weight": drawn(2)}, r"hold model\.extra\.weight"),
        (
            lambda t: {**t, "model.layers.0.self_attn.q_proj.weight": t["model.layers.0.self_attn.q_proj.weight"].T},
            r"q_proj\.weight has shape \(256, 2048\), and \(2048, 256\)",
        ),
        (lambda t: {**t, "model.norm.weight": np.ones(256, np.int64)}, r"model\.norm\.weight is of int64"),
    ],
    ids=["missing", "unknown", "shape", "dtype"],
)
def test_tensors_that_are_not_the_models_are_refused_and_leave_nothing(
    like: Path, trained: dict[str, Any], tmp_path: Path, change: Any, words: str
) -> None:
    folder = CheckpointFolder(tmp_path, like=like)
    with pytest.raises(PolicyRejected, match=words):
        folder.put(1, change(trained))
    assert not list(tmp_path.iterdir())


def tied(path: Path, *names: str) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    save_file({name: drawn(4, 3) for name in names}, path / "model.safetensors")
    return path


@pytest.mark.parametrize("like_has", [True, False])
@pytest.mark.parametrize("given", [True, False])
def test_a_tied_head_may_be_given_or_not(tmp_path: Path, like_has: bool, given: bool) -> None:
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    folder = CheckpointFolder(tmp_path / "out", like=tied(tmp_path / "like", *names[: 1 + like_has]))
    written = folder.put(1, {name: drawn(4, 3) for name in names[: 1 + given]})
    assert sorted(load_file(f"{written}/model.safetensors")) == sorted(names[: 1 + (like_has and given)])


def versions_in(folder: Path) -> list[int]:
    return sorted(int(path.name.partition("-")[0]) for path in folder.iterdir())


def test_older_versions_go_and_those_that_training_went_back_from_wait(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "out", like=tied(tmp_path / "like", "w"), keep=2)
    for version in (10, 20, 30, 40):
        folder.put(version, {"w": drawn(4, 3)})
    assert versions_in(tmp_path / "out") == [20, 30, 40]
    # Back to 20, and on from it: what hosts serve until then must stay.
    folder.put(25, {"w": drawn(4, 3)})
    assert versions_in(tmp_path / "out") == [20, 25, 30, 40]
    folder.put(50, {"w": drawn(4, 3)})
    assert versions_in(tmp_path / "out") == [30, 40, 50]


def test_what_a_trainer_that_died_left_unfinished_is_removed_and_nothing_else(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "out", like=tied(tmp_path / "like", "w"), keep=1)
    (tmp_path / "out" / ".7-0123abcd.writing").mkdir(parents=True)
    (tmp_path / "out" / "1-notes").mkdir()
    first, second = folder.put(8, {"w": drawn(4, 3)}), folder.put(9, {"w": drawn(4, 3)})
    folder.put(10, {"w": drawn(4, 3)})
    assert not folder.holds(first)
    assert folder.holds(second)
    assert versions_in(tmp_path / "out") == [1, 9, 10]


def test_a_version_written_again_has_another_name(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "out", like=tied(tmp_path / "like", "w"))
    assert folder.put(1, {"w": drawn(4, 3)}) != folder.put(1, {"w": drawn(4, 3)})


def test_a_folder_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = CheckpointFolder(tmp_path / "file" / "out", like=tied(tmp_path / "like", "w"))
    with pytest.raises(PolicyRejected, match=r"policy 1 cannot be written to .*file/out"):
        folder.put(1, {"w": drawn(4, 3)})


def test_without_safetensors_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = CheckpointFolder(tmp_path / "out", like=tied(tmp_path / "like", "w"))
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(PolicyRejected, match="pip install safetensors"):
        folder.put(1, {"w": drawn(4, 3)})


@pytest.mark.parametrize(
    ("folder", "options", "words"),
    [
        ("gs://bucket/out", {}, "mount the bucket"),
        ("out", {"keep": 0}, "keep is 0"),
        ("out", {"dtype": "int8"}, "dtype is 'int8'"),
    ],
)
def test_settings_of_a_folder_are_checked(tmp_path: Path, folder: str, options: Any, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        CheckpointFolder(folder, like=tied(tmp_path / "like", "w"), **options)
