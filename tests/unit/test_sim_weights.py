"""Checkpoints and adapters of simulated policies, and what an engine takes of them while it serves."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rollpool.ops.sim import adapted, adapter_signature_of, make_sim_adapter, make_sim_model, signature_of
from rollpool.ops.sim.arguments import Arguments, parse_arguments
from rollpool.ops.sim.model import WEIGHT, read_tensors
from rollpool.ops.sim.replies import RefusedError
from rollpool.ops.sim.safetensors import decode, encode
from rollpool.ops.sim.serving import ChangeRefusedError, Serving
from rollpool.worker.engines.preflight import check_model


def arguments(model: Path, *extra: str) -> Arguments:
    return parse_arguments(["--model-path", str(model), "--sim-lora", "runtime", "--enable-lora", *extra])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_sim_model(tmp_path / "model", signature=7)


@pytest.fixture
def serving(model: Path) -> Serving:
    return Serving.launch(arguments(model, "--max-loras-per-batch", "3"), "0")


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_tensors_come_back() -> None:
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones((0, 4), np.float32)}
    file = encode(tensors)
    assert int.from_bytes(file[:8], "little") % 8 == 0
    read = decode(file)
    assert list(read) == ["a", "b"]
    assert all(read[name].shape == each.shape and (read[name] == each).all() for name, each in tensors.items())
    assert decode(encode({})) == {}


@pytest.mark.parametrize("stored", ["F16", "BF16"])
def test_tensors_of_half_the_size_are_read(stored: str) -> None:
    values = np.array([0, 1, 255], np.float32)
    half = values.astype("<f2") if stored == "F16" else (values.view(np.uint32) >> 16).astype("<u2")
    header = json.dumps({"a": {"dtype": stored, "shape": [3], "data_offsets": [0, 6]}}).encode()
    assert (decode(len(header).to_bytes(8, "little") + header + half.tobytes())["a"] == values).all()


def test_what_is_not_whole_is_refused() -> None:
    file = encode({"a": np.ones((4, 4), np.float32)})
    for length in range(len(file)):
        with pytest.raises(ValueError, match=r"bytes|header"):
            decode(file[:length])
    with pytest.raises(ValueError, match="bytes of tensors"):
        decode(file + b"x")
    for header in (b"[1]", b"{", b'{"a": 3}', b'{"a": {"dtype": "F8", "shape": [], "data_offsets": [0, 0]}}'):
        with pytest.raises(ValueError):  # noqa: PT011 - each in its words
            decode(len(header).to_bytes(8, "little") + header)


def test_a_model_keeps_its_signature(tmp_path: Path) -> None:
    model = make_sim_model(tmp_path / "models" / "a", signature=7)
    assert model == make_sim_model(model, signature=7)
    assert signature_of(model) == signature_of(str(model)) == 7
    with pytest.raises(FileExistsError, match=r"signature 7.*signature 8"):
        make_sim_model(model, signature=8)
    with pytest.raises(FileExistsError, match="fault start"):
        make_sim_model(model, signature=7, fault="start")
    with pytest.raises(ValueError, match="signature -1"):
        make_sim_model(tmp_path / "b", signature=-1)
    with pytest.raises(ValueError, match="cannot read"):
        signature_of(tmp_path / "b")


def test_a_model_without_signature_is_none_of_ours(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="no model of a simulated engine"):
        signature_of(tmp_path)


def test_a_model_is_as_large_as_its_config_says(model: Path) -> None:
    check_model(str(model))
    config = json.loads((model / "config.json").read_text())
    tensors = read_tensors(model / "model.safetensors")
    assert tensors[WEIGHT].shape == (config["num_attention_heads"] * config["head_dim"], config["hidden_size"])


def test_an_adapter_keeps_its_signature(tmp_path: Path, model: Path) -> None:
    path = make_sim_adapter(tmp_path / "adapters" / "a", 2**63 - 5, base=model)
    assert path == make_sim_adapter(path, 2**63 - 5)
    assert adapter_signature_of(str(path)) == 2**63 - 5
    config = json.loads((path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model)
    assert {"r", "lora_alpha", "target_modules", "peft_type"} <= config.keys()
    with pytest.raises(FileExistsError, match="another adapter"):
        make_sim_adapter(path, 3)
    with pytest.raises(ValueError, match="signature 0"):
        make_sim_adapter(tmp_path / "b", 0)
    with pytest.raises(ValueError, match="rank 8, over the engine's 4"):
        adapter_signature_of(path, most_rank=4)
    edit(path / "adapter_config.json", peft_type="IA3")
    with pytest.raises(ValueError, match="no config of a LoRA"):
        adapter_signature_of(path)


@pytest.mark.parametrize("sharded", [False, True])
def test_an_adapter_merged_into_its_base_is_the_policy_of_both(tmp_path: Path, model: Path, sharded: bool) -> None:
    adapter = make_sim_adapter(tmp_path / "adapter", 1234567890123456789)
    (down, up) = read_tensors(adapter / "adapter_model.safetensors").values()
    merged = {WEIGHT: read_tensors(model / "model.safetensors")[WEIGHT] + up @ down}
    if sharded:
        (model / "model.safetensors").unlink()
        (model / "model-00001-of-00001.safetensors").write_bytes(encode(merged))
        index = {"weight_map": {WEIGHT: "model-00001-of-00001.safetensors"}}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        (model / "model.safetensors").write_bytes(encode(merged))
    assert signature_of(model) == adapted(7, 1234567890123456789)


def test_weights_that_nobody_made_are_refused(model: Path) -> None:
    for wrong in (0.5, np.nan, -1.0, 256.0):
        (model / "model.safetensors").write_bytes(encode({WEIGHT: np.full((8, 8), wrong, np.float32)}))
        with pytest.raises(ValueError, match="something other than zeros"):
            signature_of(model)
    (model / "model.safetensors").write_bytes(encode({}))
    with pytest.raises(ValueError, match="no tensor"):
        signature_of(model)


def test_what_is_broken_is_refused_for_good(tmp_path: Path, serving: Serving) -> None:
    for name in ("config.json", "model.safetensors"):
        missing, cut = (make_sim_model(tmp_path / f"{how}-{name}", signature=8) for how in ("missing", "cut"))
        (missing / name).unlink()
        (cut / name).write_bytes((cut / name).read_bytes()[:-3])
        for broken in (missing, cut):
            with pytest.raises(ChangeRefusedError, match=name) as refused:
                serving.check(str(broken))
            assert not refused.value.restart_may_help
    with pytest.raises(ChangeRefusedError, match="cannot read"):
        serving.check(str(tmp_path / "nowhere"))
    assert serving.model.signature == 7


def test_a_restart_may_help_with_another_shape(tmp_path: Path, serving: Serving) -> None:
    other = make_sim_model(tmp_path / "other", signature=8, hidden_size=16)
    with pytest.raises(ChangeRefusedError, match="hidden_size 16, and the engine runs 8") as refused:
        serving.check(str(other))
    assert refused.value.restart_may_help
    deeper = make_sim_model(tmp_path / "deeper", signature=9)
    edit(deeper / "config.json", num_hidden_layers=2)
    with pytest.raises(ChangeRefusedError, match="num_hidden_layers") as refused:
        serving.check(str(deeper))
    assert refused.value.restart_may_help
    assert Serving.launch(arguments(other), "1").model.signature == 8
    assert serving.check(str(make_sim_model(tmp_path / "next", signature=9))).signature == 9


def test_faults_are_brought_out(tmp_path: Path, serving: Serving) -> None:
    start, probe, swap = (
        make_sim_model(tmp_path / each, signature=8, fault=each) for each in ("start", "probe", "swap")
    )
    for path in (start, probe, swap):
        with pytest.raises(ChangeRefusedError, match="fault") as refused:
            serving.check(str(path))
        assert refused.value.restart_may_help is (path is start)
    with pytest.raises(ValueError, match="no engine starts"):
        Serving.launch(arguments(start), "0")
    for path in (probe, swap):
        assert Serving.launch(arguments(path), "0").model.signature == 8
    with pytest.raises(ValueError, match="none of start, probe, swap"):
        make_sim_model(tmp_path / "none", signature=8, fault="stop")  # type: ignore[arg-type]


def test_adapters_fill_slots_and_free_them(tmp_path: Path, serving: Serving) -> None:
    paths = {name: str(make_sim_adapter(tmp_path / name, 10 + number)) for number, name in enumerate("abc")}
    for name in "ab":
        serving.load_adapter(name, paths[name])
    serving.load_adapter("a", paths["a"] + "/")  # again is harmless
    with pytest.raises(ChangeRefusedError, match="all 2 slots"):
        serving.load_adapter("c", paths["c"])
    with pytest.raises(ChangeRefusedError, match="loaded from"):
        serving.load_adapter("a", paths["c"])
    with pytest.raises(ChangeRefusedError, match="3 requests use a"):
        serving.unload_adapter("a", 3)
    with pytest.raises(ChangeRefusedError, match="no adapter c"):
        serving.unload_adapter("c", 0)
    serving.unload_adapter("a", 0)
    with pytest.raises(RefusedError, match="never been loaded: a"):
        serving.adapter("a")
    with pytest.raises(ChangeRefusedError, match="cannot read"):
        serving.load_adapter("c", str(tmp_path / "nowhere"))
    serving.load_adapter("c", paths["c"])
    assert sorted(serving.adapters) == ["b", "c"]
    assert serving.signature(serving.adapter("c")) == adapted(7, 12)
    assert serving.signature(serving.adapter(None)) == 7


def test_too_many_adapters_at_the_launch_end_the_engine(tmp_path: Path, model: Path) -> None:
    paths = [f"{name}={make_sim_adapter(tmp_path / name, 5)}" for name in "abc"]
    with pytest.raises(ValueError, match="slots"):
        Serving.launch(arguments(model, "--max-loras-per-batch", "3", "--lora-paths", *paths), "0")
    serving = Serving.launch(arguments(model, "--max-loras-per-batch", "4", "--lora-paths", *paths), "0")
    assert sorted(serving.adapters) == ["a", "b", "c"]
