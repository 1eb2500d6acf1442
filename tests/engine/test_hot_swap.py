"""Weights and adapters change under a real engine of the main line while it serves, judged by a numpy model."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rollpool.ops.local.engine_env import PYTHON_ENV, cache_dir
from rollpool.ops.local.engine_settings import cpu_engine_args, cpu_engine_env
from rollpool.ops.local.hosts import launcher
from rollpool.ops.local.reference import ReferenceModel, check_sample
from rollpool.ops.local.run import engine_line
from rollpool.ops.local.tiny_adapter import make_tiny_adapter
from rollpool.ops.local.tiny_model import make_tiny_model
from rollpool.schemas.results import Sample, VersionSpan
from rollpool.worker.engines import process_group
from rollpool.worker.engines.listener import listener_of
from rollpool.worker.engines.process import free_port

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

COMMAND = f"{PYTHON_ENV}=/path/to/python pytest tests/engine/test_hot_swap.py"

#: Fewer than the eight of other tests: three engines start in here, one after the other.
TP_SIZE = 4
SLOTS = 16

#: Seconds until an engine answers, on two cores that others use too.
START_S = 240.0

#: The engine agrees to 3e-5 in float32; another version or another adapter is off by whole nats.
TOLERANCE = 1e-3

VERSIONS = (1, 2, 3)
MAX_RANK = 8


@dataclass(frozen=True)
class Files:
    """Checkpoints by version, adapters by name, and what numpy makes of each pair of them."""

    checkpoints: dict[int, Path]
    adapters: dict[str, Path]
    bases: dict[int, ReferenceModel]

    def models(self, adapter: str | None) -> dict[int, ReferenceModel]:
        if adapter is None:
            return self.bases
        return {version: base.with_adapter(self.adapters[adapter]) for version, base in self.bases.items()}


@dataclass(frozen=True)
class Answer:
    """What `/generate` said."""

    prompt: list[int]
    adapter: str | None
    sample: Sample
    cached_tokens: int

    @property
    def versions(self) -> tuple[int, ...]:
        return self.sample.versions


class Engine:
    """A running engine."""

    def __init__(self, port: int, pid: int, log: Path) -> None:
        self.port = port
        self.pid = pid
        self.log = log

    def call(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            None if body is None else json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=300) as reply:
                status, content = reply.status, reply.read()
        except urllib.error.HTTPError as error:
            status, content = error.code, error.read()
        try:
            return status, json.loads(content)
        except ValueError:
            return status, content.decode()

    def generate(self, prompt: list[int], tokens: int = 16, adapter: str | None = None) -> Answer:
        sampling = {
            "temperature": 0.0,
            "max_new_tokens": tokens,
            "ignore_eos": True,
            "skip_special_tokens": False,
            "no_stop_trim": True,
        }
        body = {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True, "logprob_start_len": -1}
        status, reply = self.call("/generate", body | ({} if adapter is None else {"lora_path": adapter}))
        assert status == 200, reply
        meta = reply["meta_info"]
        rows = meta["output_token_logprobs"][-meta["completion_tokens"] :]
        spans = tuple(VersionSpan(int(each["version"]), each["start"], each["end"]) for each in meta["weight_versions"])
        sample = Sample(
            output_ids=np.array([row[1] for row in rows], np.int32),
            logprobs=np.array([row[0] for row in rows], np.float32),
            text=reply["text"],
            finish_reason=meta["finish_reason"]["type"],
            version_spans=spans,
        )
        return Answer(prompt, adapter, sample, meta["cached_tokens"])

    def swap(self, checkpoint: Path, version: int, staging: str = "auto") -> tuple[int, dict[str, Any]]:
        body = {"model_path": str(checkpoint), "weight_version": str(version), "staging": staging}
        return self.call("/update_weights_from_disk", body)

    def load(self, name: str, path: Path) -> tuple[int, dict[str, Any]]:
        return self.call("/load_lora_adapter", {"lora_name": name, "lora_path": str(path)})

    def unload(self, name: str) -> tuple[int, dict[str, Any]]:
        return self.call("/unload_lora_adapter", {"lora_name": name})

    def flush(self) -> None:
        until(lambda: self.call("/flush_cache", {})[0] == 200, "nothing runs")

    def running(self) -> int:
        state: dict[str, Any] = self.call("/get_server_info")[1]["internal_states"][0]
        return int(state["running_batch_size"])


def until(condition: Callable[[], object], what: str, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def python() -> Path:
    given = os.environ.get(PYTHON_ENV)
    if not given:
        pytest.skip(f"needs an environment with sglang-jax main: {COMMAND}")
    if (line := engine_line(Path(given))) != "main":
        pytest.skip(f"{given} has sglang-jax {line}, whose weights cannot change; name one with main: {COMMAND}")
    return Path(given)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the numpy model beside a busy engine
    folder = tmp_path_factory.mktemp("hot-swap")
    checkpoints = {version: make_tiny_model(folder / f"m{version}", seed=version) for version in VERSIONS}
    adapters = {
        "a": make_tiny_adapter(folder / "a", seed=1),
        "b": make_tiny_adapter(folder / "b", seed=2, rank=2, alpha=4, targets=("q_proj", "v_proj", "down_proj")),
        "c": make_tiny_adapter(folder / "c", seed=3, rank=MAX_RANK, alpha=8),
    }
    bases = {version: ReferenceModel.from_checkpoint(path) for version, path in checkpoints.items()}
    return Files(checkpoints, adapters, bases)


@contextlib.contextmanager
def launched(python: Path, model: Path, log: Path, args: Sequence[str], script: Path | None = None) -> Iterator[Engine]:
    """An engine that serves version 1, until the end of the block."""
    port = free_port("127.0.0.1")
    flags = cpu_engine_args("main", max_running_requests=SLOTS, max_total_tokens=2048)
    command = [python, script or launcher(), "--model-path", model, "--host", "127.0.0.1", "--port", port]
    command += ["--tp-size", TP_SIZE, "--device", "cpu", "--random-seed", 1, *flags, *args]
    env = os.environ | cpu_engine_env(TP_SIZE, cache_dir() / "jit-hot-swap") | {"ROLLPOOL_WEIGHT_VERSION": "1"}
    with log.open("w") as written:
        process = subprocess.Popen(
            [str(part) for part in command], env=env, stdout=written, stderr=written, start_new_session=True
        )
    engine = Engine(port, process.pid, log)

    def answers() -> bool:
        assert process.poll() is None, log.read_text()[-3000:]
        return listener_of(port) is not None and engine.call("/health")[0] == 200

    try:
        until(answers, f"the engine answers; see {log}", START_S)
        yield engine
        assert process.poll() is None, "the engine died"
    finally:
        for pid in process_group.members(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def with_lora(python: Path, files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """With room for two adapters, and one batch after the other."""
    args = ["--enable-lora", "--max-lora-rank", str(MAX_RANK), "--lora-target-modules", "all"]
    log = tmp_path_factory.mktemp("logs") / "engine.log"
    with launched(python, files.checkpoints[1], log, [*args, "--max-loras-per-batch", "3"]) as engine:
        yield engine


@pytest.fixture
def engine(with_lora: Engine, files: Files) -> Iterator[Engine]:
    """It serves version 1, without adapters, before each test."""
    yield with_lora
    for name in with_lora.unload("there is none of this name")[1]["loaded_adapters"]:
        until(lambda name=name: with_lora.unload(name)[0] == 200, "no request uses the adapter")  # type: ignore[misc]
    if with_lora.call("/get_model_info")[1]["model_path"] != str(files.checkpoints[1]):
        assert with_lora.swap(files.checkpoints[1], 1)[0] == 200


@pytest.fixture
def prompts(request: pytest.FixtureRequest) -> list[list[int]]:
    """Of a few tokens, and of more than are prefilled at once (128)."""
    rng = np.random.default_rng(list(request.node.name.encode()))
    return [rng.integers(0, 508, length).tolist() for length in (5, 20, 60, 150, 9, 180, 30, 12, 140, 7, 90, 16)]


def check(files: Files, answers: Sequence[Answer]) -> None:
    """Every token, and its log-prob, is what the version that its span names says after all tokens before it."""
    models = {adapter: files.models(adapter) for adapter in {each.adapter for each in answers}}
    for each in answers:
        assert check_sample(models[each.adapter], each.prompt, each.sample, temperature=0) < TOLERANCE


@pytest.mark.parametrize("staging", ["device", "leaf", "auto"])
def test_new_weights_answer_as_the_numpy_model_does(
    engine: Engine, files: Files, prompts: list[list[int]], staging: str
) -> None:
    status, reply = engine.swap(files.checkpoints[2], 2, staging)
    assert (status, reply["success"]) == (200, True), reply
    assert reply["num_paused_requests"] == 0
    assert 0 < reply["stall_seconds"] < 60
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(engine.generate, prompts))
    assert {each.versions for each in answers} == {(2,)}
    check(files, answers)
    assert engine.call("/get_model_info")[1]["model_path"] == str(files.checkpoints[2])
    assert engine.call("/get_server_info")[1]["model_path"] == str(files.checkpoints[2])
    assert engine.call("/rollpool_engine")[1]["weight_version"] == "2"


def in_the_middle(engine: Engine, files: Files, prompts: list[list[int]], adapters: Sequence[str | None]) -> None:
    """Change the weights over and over while requests run; each token is of the version that its span names."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        asked: list[Future[Answer]] = [
            pool.submit(engine.generate, prompt, 50 + i, adapters[i % len(adapters)])
            for i, prompt in enumerate(prompts)
        ]
        until(lambda: engine.running() >= 8, "many run")
        stopped = []
        for version, staging in ((2, "device"), (3, "leaf"), (1, "device")):
            if all(each.done() for each in asked):
                break
            status, reply = engine.swap(files.checkpoints[version], version, staging)
            assert status == 200, reply
            stopped.append(reply["num_paused_requests"])
        answers = [each.result() for each in asked]
    assert stopped[0] > 0
    assert [len(each.sample.output_ids) for each in answers] == [50 + i for i in range(len(prompts))]
    assert max(len(each.versions) for each in answers) > 1, "no change came in the middle of a request"
    check(files, answers)


def test_requests_go_on_under_the_new_weights_from_the_tokens_they_have(
    engine: Engine, files: Files, prompts: list[list[int]]
) -> None:
    in_the_middle(engine, files, prompts, [None])


def test_requests_with_adapters_go_on_too(engine: Engine, files: Files, prompts: list[list[int]]) -> None:
    for name in ("a", "b"):
        assert engine.load(name, files.adapters[name])[0] == 200
    in_the_middle(engine, files, prompts, ["a", "b", None])


def test_aborted_requests_say_of_what_they_have_which_version_made_it(
    engine: Engine, files: Files, prompts: list[list[int]]
) -> None:
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(engine.generate, prompt, 70) for prompt in prompts[:8]]
        until(lambda: engine.running() == 8 or any(each.done() for each in asked), "all run")
        assert engine.swap(files.checkpoints[2], 2)[0] == 200
        until(lambda: engine.running() == 8 or any(each.done() for each in asked), "all run again")
        assert engine.call("/abort_request", {"rid": "", "abort_all": True})[0] == 200
        answers = [each.result() for each in asked]
    assert "abort" in {each.sample.finish_reason for each in answers}
    assert any(len(each.versions) > 1 for each in answers)
    check(files, answers)
    engine.flush()


def test_a_shared_prefix_holds_nothing_of_the_old_weights(
    engine: Engine, files: Files, prompts: list[list[int]]
) -> None:
    prefix = prompts[3]
    assert engine.generate([*prefix, 1]).cached_tokens == 0
    assert engine.generate([*prefix, 2]).cached_tokens >= len(prefix), "the engine caches prefixes at all"
    assert engine.swap(files.checkpoints[2], 2)[0] == 200
    again = engine.generate([*prefix, 3])
    assert (again.versions, again.cached_tokens) == ((2,), 0)
    check(files, [again, engine.generate([*prefix, 4])])


def copy(files: Files, folder: Path) -> Path:
    return Path(shutil.copytree(files.checkpoints[2], folder))


def without_a_tensor(model: Path) -> None:
    change(model, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))


def of_another_shape(model: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    change(model, lambda weights: weights.update({name: np.ascontiguousarray(weights[name][:256])}))


def not_finite(model: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    change(model, lambda weights: weights.update({name: np.where(weights[name] > 0.2, np.nan, weights[name])}))


def that_overflow(model: Path) -> None:
    """All finite, but not what they compute."""
    name = "lm_head.weight"
    change(model, lambda weights: weights.update({name: np.full_like(weights[name], 3e38)}))


def cut_short(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def a_shard_short(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    save_file(dict(list(weights.items())[:10]), model / "model-00001-of-00002.safetensors")
    index = {name: f"model-0000{1 + (i >= 10)}-of-00002.safetensors" for i, name in enumerate(weights)}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def without_config(model: Path) -> None:
    (model / "config.json").unlink()


def of_other_settings(**settings: Any) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        file = model / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))

    return edit


def change(model: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    weights = load_file(model / "model.safetensors")
    edit(weights)
    save_file(
        {name: np.ascontiguousarray(value, np.float32) for name, value in weights.items()}, model / "model.safetensors"
    )


@pytest.mark.parametrize(
    ("damage", "said", "restart_may_help", "staging"),
    [
        (cut_short, "not written to its end", False, "auto"),
        (a_shard_short, "lacks model-00002-of-00002", False, "auto"),
        (without_config, "config.json cannot be read", False, "auto"),
        (of_other_settings(num_hidden_layers=1), "num_hidden_layers", True, "auto"),
        (of_other_settings(rope_theta=20_000.0), "rope_theta", True, "auto"),
        (of_other_settings(tie_word_embeddings=True), "tie_word_embeddings", True, "auto"),
        (of_other_settings(architectures=["Qwen2ForCausalLM"]), "architectures", True, "auto"),
        *(
            (damage, said, False, staging)
            for staging in ("device", "leaf")
            for damage, said in (
                (without_a_tensor, "no tensor for model.layers.1.mlp.up_proj.weight"),
                (of_another_shape, "up_proj"),
                (not_finite, "layers.1.self_attn.k_proj.weight holds numbers that are not finite"),
                (that_overflow, "logits that are not finite"),
            )
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_leaves_the_old_weights_serving_bit_for_bit(
    engine: Engine,
    files: Files,
    prompts: list[list[int]],
    tmp_path: Path,
    damage: Callable[[Path], None],
    said: str,
    restart_may_help: bool,
    staging: str,
) -> None:
    engine.flush()
    before = [engine.generate(prompt, 6).sample for prompt in prompts[:2]]
    broken = copy(files, tmp_path / "broken")
    damage(broken)
    status, reply = engine.swap(broken, 9, staging)
    assert status == 400
    assert reply["success"] is False
    assert said in reply["message"]
    assert reply["restart_may_help"] is restart_may_help
    engine.flush()
    after = [engine.generate(prompt, 6) for prompt in prompts[:2]]
    for old, new in zip(before, after, strict=True):
        assert old.output_ids.tolist() == new.sample.output_ids.tolist()
        assert old.logprobs.tobytes() == new.sample.logprobs.tobytes()
    check(files, after)
    assert engine.call("/get_model_info")[1]["model_path"] == str(files.checkpoints[1])


def test_requests_go_on_after_a_change_that_was_taken_back(
    engine: Engine, files: Files, prompts: list[list[int]], tmp_path: Path
) -> None:
    broken = copy(files, tmp_path / "broken")
    that_overflow(broken)
    with ThreadPoolExecutor(12) as pool:
        asked = [pool.submit(engine.generate, prompt, 60) for prompt in prompts[:12]]
        until(lambda: engine.running() >= 8, "many run")
        for staging in ("device", "leaf"):
            status, reply = engine.swap(broken, 9, staging)
            assert (status, reply["restart_may_help"]) == (400, False)
        answers = [each.result() for each in asked]
    assert {each.versions for each in answers} == {(1,)}
    check(files, answers)


def test_one_change_at_a_time(engine: Engine, files: Files) -> None:
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda version: engine.swap(files.checkpoints[version], version), (2, 3)))
    assert sorted(status for status, _ in both) == [200, 400]
    (told,) = (reply["message"] for status, reply in both if status == 400)
    assert "under way" in told


@pytest.mark.parametrize("field", [{"flush_cache": False}, {"abort_all_requests": True}, {"staging": "wherever"}])
def test_what_is_not_done_is_refused(engine: Engine, files: Files, field: dict[str, Any]) -> None:
    body = {"model_path": str(files.checkpoints[2]), "weight_version": "2"} | field
    assert engine.call("/update_weights_from_disk", body)[0] == 400
    assert engine.call("/get_model_info")[1]["model_path"] == str(files.checkpoints[1])


def test_two_adapters_and_none_answer_side_by_side(engine: Engine, files: Files, prompts: list[list[int]]) -> None:
    for name in ("a", "b"):
        status, reply = engine.load(name, files.adapters[name])
        assert status == 200, reply
    assert engine.load("a", files.adapters["a"])[0] == 200, "loading it again is harmless"
    with ThreadPoolExecutor(len(prompts)) as pool:
        asked = [(prompt, 16, ("a", "b", None)[i % 3]) for i, prompt in enumerate(prompts)]
        answers = list(pool.map(lambda each: engine.generate(*each), asked))
    check(files, answers)


def test_a_change_of_weights_and_loading_adapters_do_not_undo_each_other(
    engine: Engine, files: Files, prompts: list[list[int]]
) -> None:
    def ask(*adapters: str | None) -> None:
        answers = [engine.generate(prompts[0], 16, adapter) for adapter in adapters]
        assert {each.versions for each in answers} == {(version,)}
        check(files, answers)

    version = 1
    assert engine.load("a", files.adapters["a"])[0] == 200
    version = 2
    assert engine.swap(files.checkpoints[2], 2, "device")[0] == 200
    ask(None, "a")
    assert engine.load("b", files.adapters["b"])[0] == 200
    ask(None, "b", "a")
    version = 3
    assert engine.swap(files.checkpoints[3], 3, "leaf")[0] == 200
    ask("a", "b", None)
    assert engine.unload("a")[0] == 200
    assert engine.load("c", files.adapters["c"])[0] == 200, "a slot that was freed is filled again"
    ask("c", None, "b")


def test_adapters_that_do_not_fit_are_refused_and_the_engine_goes_on(
    engine: Engine, files: Files, prompts: list[list[int]], tmp_path: Path
) -> None:
    status, reply = engine.load("wide", make_tiny_adapter(tmp_path / "wide", seed=4, rank=2 * MAX_RANK))
    assert status == 400
    assert f"--max-lora-rank {2 * MAX_RANK}" in reply["message"]
    unsound = make_tiny_adapter(tmp_path / "unsound", seed=5)
    file = unsound / "adapter_model.safetensors"
    weights = load_file(file)
    first = min(weights)
    save_file(weights | {first: np.full_like(weights[first], np.nan)}, file)
    status, reply = engine.load("unsound", unsound)
    assert (status, reply["success"], reply["loaded_adapters"]) == (400, False, {})
    assert "not finite" in reply["message"]
    assert engine.load("gone", tmp_path / "gone")[0] == 400
    for name in ("a", "b"):
        assert engine.load(name, files.adapters[name])[0] == 200, "what was refused holds no slot"
    status, reply = engine.load("c", files.adapters["c"])
    assert status == 400
    assert "slots" in reply["message"]
    assert engine.load("a", files.adapters["c"])[0] == 400, "a name has one meaning"
    check(files, [engine.generate(prompts[0], 8, name) for name in ("a", "b", None)])


def test_an_adapter_is_not_unloaded_under_a_request_and_afterwards_not_served(
    engine: Engine, files: Files, prompts: list[list[int]]
) -> None:
    assert engine.load("a", files.adapters["a"])[0] == 200
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(engine.generate, prompts[0], 200, "a")
        until(lambda: engine.running() > 0 or asked.done(), "it runs")
        status, reply = engine.unload("a")
        assert not asked.done(), "it ran meanwhile"
        assert status == 400
        assert "still use" in reply["message"]
        check(files, [asked.result()])
    assert engine.unload("a")[0] == 200
    assert engine.unload("a")[0] == 400
    body = {"input_ids": [1, 2], "lora_path": "a", "return_logprob": True, "sampling_params": {"max_new_tokens": 2}}
    status, reply = engine.call("/generate", body)
    assert status == 400
    assert "not loaded" in reply["error"]["message"]


def test_requests_that_cross_an_unloading_are_served_with_the_adapter_or_refused(
    engine: Engine, files: Files, prompts: list[list[int]]
) -> None:
    answers: list[Answer] = []
    refused: list[str] = []
    gone = threading.Event()

    def ask(prompt: list[int]) -> None:
        while not gone.is_set():
            try:
                answers.append(engine.generate(prompt, 2, "a"))
            except AssertionError as error:
                refused.append(str(error))

    for _ in range(3):
        gone.clear()
        assert engine.load("a", files.adapters["a"])[0] == 200
        with ThreadPoolExecutor(2) as pool:
            asking = [pool.submit(ask, prompt) for prompt in prompts[:2]]
            until(lambda: engine.unload("a")[0] == 200, "a moment in which nobody uses it")
            gone.set()
            for each in asking:
                each.result()
    assert answers
    assert all("adapter" in each for each in refused)
    check(files, answers)


def test_the_whole_holds_with_batches_overlapping_and_without_adapters(
    python: Path, files: Files, prompts: list[list[int]], tmp_path: Path
) -> None:
    """As the engine is launched on a TPU."""
    overlapping = tmp_path / "overlapping.py"
    overlapping.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(launcher().parent)!r})\n"
        "from serve import main\n"
        "if __name__ == '__main__':\n"
        "    sys.argv.remove('--disable-overlap-schedule')\n"
        "    main()\n"
    )
    with launched(python, files.checkpoints[1], tmp_path / "log", [], overlapping) as engine:
        about = engine.call("/rollpool_engine")[1]
        assert about == {"hot_swap": True, "lora": "none", "adapter_slots": 0, "reason": "", "weight_version": "1"}
        assert engine.load("a", files.adapters["a"])[0] == 404, "a route is there only where it works"
        in_the_middle(engine, files, prompts, [None])
        assert engine.swap(files.checkpoints[3], 3)[0] == 200
        answer = engine.generate(prompts[0])
        assert answer.versions == (3,)
        check(files, [answer])


def test_an_engine_that_is_not_as_expected_is_served_as_it_is_and_says_why(
    python: Path, files: Files, tmp_path: Path
) -> None:
    changed = tmp_path / "changed.py"
    changed.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(launcher().parent)!r})\n"
        "from sgl_jax.srt.managers.schedule_batch import ScheduleBatch\n"
        "from sgl_jax.srt.managers.scheduler import Scheduler\n"
        "def pause_generation(self, mode): pass\n"
        "Scheduler.pause_generation = pause_generation\n"
        "from serve import main\n"
        "if __name__ == '__main__':\n    main()\n"
    )
    with launched(python, files.checkpoints[1], tmp_path / "log", [], changed) as engine:
        about = engine.call("/rollpool_engine")[1]
        assert about["hot_swap"] is False
        assert about["lora"] == "none"
        assert "Scheduler.pause_generation takes ('self', 'mode')" in about["reason"]
        paths = engine.call("/openapi.json")[1]["paths"]
        assert "/rollpool_engine" in paths
        assert "/update_weights_from_disk" not in paths
        assert engine.swap(files.checkpoints[2], 2)[0] == 404
        status, reply = engine.call("/generate", {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 2}})
        assert status == 200
        assert "weight_versions" not in reply["meta_info"]
        (line,) = (line for line in engine.log.read_text().splitlines() if line.startswith("rollpool: "))
        assert about["reason"] in line


def test_the_switch_leaves_the_engine_as_it_is(python: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(launcher().parent)!r}); import hot_swap; hot_swap.install()\n"
        "from sgl_jax.srt.entrypoints import engine\n"
        "print(engine.run_scheduler_process.__module__)"
    )
    for switch, module in (("0", "sgl_jax.srt.managers.scheduler"), ("1", "hot_swap")):
        env = os.environ | cpu_engine_env(TP_SIZE) | {"ROLLPOOL_HOT_SWAP": switch}
        done = subprocess.run([python, "-c", code], env=env, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == module
        assert ("ROLLPOOL_HOT_SWAP=0" in done.stderr) == (switch == "0")


def test_a_request_for_an_adapter_that_is_gone_ends_with_a_refusal_inside_the_engine(python: Path) -> None:
    """It was on its way when the adapter was unloaded; the engine itself would serve it with zeros."""
    code = (
        f"import sys; sys.path.insert(0, {str(launcher().parent)!r})"
        + """
from types import SimpleNamespace
import hot_swap
class Scheduler:
    def __init__(self): self.waiting_queue, self.grammar_queue, self.refused = [], [], []
    def process_input_requests(self, recv_reqs): pass
    def handle_generate_request(self, recv_req):
        def refuse(why): self.refused.append((recv_req.rid, why))
        self.waiting_queue.append(SimpleNamespace(rid=recv_req.rid, set_finish_with_abort=refuse))
import hot_swap_scheduler
hot_swap_scheduler.unsupported = lambda scheduler: ""
hot_swap_scheduler.SchedulerSide = lambda scheduler: SimpleNamespace(
    facts=None, knows_adapter=lambda lora_id: lora_id in (None, "here"))
hot_swap.patch_scheduler(Scheduler)
scheduler = Scheduler()
for rid, lora_id in (("1", None), ("2", "here"), ("3", "gone")):
    request = SimpleNamespace(rid=rid, lora_id=lora_id)
    scheduler.handle_generate_request(request)
    print(rid, request.lora_id, scheduler.refused)
"""
    )
    env = os.environ | cpu_engine_env(TP_SIZE)
    done = subprocess.run([python, "-c", code], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    plain, here, gone = done.stdout.splitlines()
    assert (plain, here) == ("1 None []", "2 here []")
    assert gone.startswith("3 None [('3', 'the adapter")
