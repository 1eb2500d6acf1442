"""The life of an engine process, with a small script in the engine's place."""

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from rollpool.schemas import Policy, PolicyRejected
from rollpool.schemas.jobs import SamplingParams
from rollpool.worker.engines import process_group
from rollpool.worker.engines.dialects import pick_dialect
from rollpool.worker.engines.http_engine import HttpEngine
from rollpool.worker.engines.owner import AttachedEngine, LaunchedEngine, owner_for
from rollpool.worker.engines.process import LIFELINE_ENV, EngineProcess, default_launcher, free_port
from rollpool.worker.engines.protocol import Adapter, EngineUnavailable, OnProgress, SampleRequest, new_rid
from rollpool.worker.engines.settings import EngineSettings

#: As sglang-jax is built: an HTTP parent that stays up, and a child that does the work.
SERVER = """
import argparse, fcntl, json, os, signal, subprocess, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

parser = argparse.ArgumentParser()
parser.add_argument("--port", type=int)
parser.add_argument("--model-path")
args, _ = parser.parse_known_args()
if args.model_path == "dies":
    print("loading", flush=True)
    sys.exit("jaxlib.XlaRuntimeError: RESOURCE_EXHAUSTED: out of HBM")
if args.model_path == "silent":
    signal.pause()
if args.model_path == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

def lifeline(fd):
    while os.read(fd, 1):
        pass
    os.killpg(os.getpgrp(), signal.SIGKILL)

if "DEVICE" in os.environ:  # as a TPU: one process at a time; as JAX: a program for each model, which is kept
    device = open(os.environ["DEVICE"], "w")
    fcntl.flock(device, fcntl.LOCK_EX | fcntl.LOCK_NB)
    program = "jit_" + args.model_path.replace("/", "_") + "-cache"
    open(os.path.join(os.environ["JAX_COMPILATION_CACHE_DIR"], program), "w").close()

threading.Thread(target=lifeline, args=(int(os.environ["ROLLPOOL_LIFELINE_FD"]),), daemon=True).start()
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *args): pass
    def say(self, said):
        body = json.dumps(said).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        if self.path == "/openapi.json":
            return self.say({"paths": {}})
        self.say({"argv": sys.argv, "weights": os.environ["ROLLPOOL_WEIGHT_VERSION"], "version": "0.0.2",
                  "model_path": args.model_path, "tp_size": 1, "random_seed": 1, "max_running_requests": 4,
                  "max_total_num_tokens": 64, "max_req_input_len": 50, "attention_backend": "native",
                  "skip_server_warmup": True, "internal_states": [{}]})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if asked["input_ids"] == [99]:
            threading.Event().wait()
        count = asked["sampling_params"]["max_new_tokens"]
        self.say({"text": "", "meta_info": {"id": asked["rid"], "finish_reason": {"type": "length"},
                  "prompt_tokens": 1, "completion_tokens": count,
                  "output_token_logprobs": [[-1.0, 5, None]] * count}})

server = ThreadingHTTPServer(("127.0.0.1", args.port), Handler)
server.daemon_threads = True
print("serving", child.pid, flush=True)
signal.getsignal(signal.SIGTERM) == signal.SIG_IGN or signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
server.serve_forever()
"""

MAIN = pick_dialect("0.0.2")


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., EngineProcess]:
    script = tmp_path / "server.py"
    script.write_text(SERVER)

    def build(**changes: Any) -> EngineProcess:
        fields: dict[str, Any] = {
            "python": Path(sys.executable),
            "launcher": script,
            "device": "cpu",
            "jit_cache_dir": tmp_path / "jit",
            "start_timeout_s": 30,
            "stop_timeout_s": 10,
        }
        settings = EngineSettings(**(fields | changes))
        return EngineProcess(settings, MAIN, log_path=tmp_path / "logs" / "engine.log")

    return build


@pytest.fixture
async def running(make: Callable[..., EngineProcess]) -> AsyncIterator[EngineProcess]:
    engine = make()
    await engine.start("model")
    yield engine
    await engine.kill()


def request(ids: list[int] | None = None) -> SampleRequest:
    return SampleRequest(
        rid=new_rid(), input_ids=np.array(ids or [1], np.int32), sampling=SamplingParams(max_new_tokens=3)
    )


def pid_of(engine: EngineProcess) -> int:
    assert engine.pid is not None
    return engine.pid


async def test_a_started_engine_has_generated_and_leads_its_own_group(
    make: Callable[..., EngineProcess],
) -> None:
    process = make()
    engine = await process.start("model")
    try:
        assert engine.facts.model_path == "model"
        assert (await engine.generate(request())).output_ids.tolist() == [5, 5, 5]
        assert os.getpgid(pid_of(process)) == process.pid != os.getpgrp()
        assert len(process_group.members(pid_of(process))) == 2
    finally:
        await process.stop()
    assert process_group.members(pid_of(process)) == []


async def test_stopping_twice_is_stopping_once(running: EngineProcess) -> None:
    await running.stop()
    await running.stop()
    await running.kill()
    assert await running.watch() == "the engine was stopped"


async def test_a_death_while_loading_is_told_at_once_with_last_words_and_advice(
    make: Callable[..., EngineProcess],
) -> None:
    with pytest.raises(EngineUnavailable, match="status 1") as raised:
        await make(start_timeout_s=1000).start("dies")
    assert "do not fit" in str(raised.value)
    assert "out of HBM" in str(raised.value)


async def test_an_engine_that_never_answers_is_ended_after_the_start_timeout(
    make: Callable[..., EngineProcess],
) -> None:
    process = make(start_timeout_s=0.5)
    with pytest.raises(EngineUnavailable, match="did not generate"):
        await process.start("silent")
    assert process_group.members(pid_of(process)) == []


async def test_a_start_that_is_cancelled_leaves_nothing(make: Callable[..., EngineProcess]) -> None:
    process = make()
    starting = asyncio.create_task(process.start("silent"))
    while process.pid is None:  # noqa: ASYNC110 - the launch has no event of its own
        await asyncio.sleep(0.01)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert process_group.members(pid_of(process)) == []


async def test_a_dead_child_is_a_dead_engine_though_http_still_answers(running: EngineProcess) -> None:
    watching = asyncio.create_task(running.watch())
    child = psutil.Process(pid_of(running)).children()[0]
    child.kill()
    reason = await asyncio.wait_for(watching, 10)
    assert f"process {child.pid} died" in reason
    assert psutil.pid_exists(pid_of(running))


async def test_a_dead_server_is_told_with_its_signal(running: EngineProcess) -> None:
    watching = asyncio.create_task(running.watch())
    os.kill(pid_of(running), signal.SIGKILL)
    assert "SIGKILL" in await asyncio.wait_for(watching, 10)
    await running.stop()
    assert process_group.members(pid_of(running)) == []


async def test_an_engine_that_stands_still_is_dead_though_its_processes_live(
    make: Callable[..., EngineProcess],
) -> None:
    process = make(stall_timeout_s=0.5)
    engine = await process.start("model")
    call = asyncio.create_task(engine.generate(request([99])))
    assert "no progress" in await asyncio.wait_for(process.watch(), 10)
    await process.kill()
    with pytest.raises(EngineUnavailable):
        await call


async def test_a_server_that_ignores_sigterm_is_killed_after_the_deadline(
    make: Callable[..., EngineProcess],
) -> None:
    process = make(stop_timeout_s=0.3)
    await process.start("deaf")
    await process.stop()
    assert process_group.members(pid_of(process)) == []


async def test_stopping_with_work_in_flight_waits_for_no_drain(make: Callable[..., EngineProcess]) -> None:
    process = make(stop_timeout_s=1000)
    engine = await process.start("deaf")
    calls = [asyncio.create_task(engine.generate(request([99]))) for _ in range(3)]
    await asyncio.sleep(0)
    await asyncio.wait_for(process.stop(), 10)
    ended = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(error, EngineUnavailable) for error in ended)


async def test_an_abort_leaves_no_hope_in_sigterm(make: Callable[..., EngineProcess]) -> None:
    process = make(stop_timeout_s=1000)
    engine = await process.start("deaf")
    call = asyncio.create_task(engine.generate(request([99])))
    await asyncio.sleep(0)
    process._progress.gave_up(1)  # as an abort does
    process._progress.in_flight = 0
    await asyncio.wait_for(process.stop(), 10)
    process._progress.in_flight = 1
    with pytest.raises(EngineUnavailable):
        await call


async def test_without_time_for_sigterm_it_is_not_sent(make: Callable[..., EngineProcess]) -> None:
    process = make(stop_timeout_s=0)
    await process.start("deaf")
    await asyncio.wait_for(process.stop(), 10)
    assert process_group.members(pid_of(process)) == []


async def test_the_group_dies_with_the_process_that_owns_it(tmp_path: Path) -> None:
    script = tmp_path / "server.py"
    script.write_text(SERVER)
    read_end, write_end = os.pipe()
    owner = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", OWNER, str(script), str(tmp_path), str(write_end)), pass_fds=(write_end,)
    )
    os.close(write_end)
    with os.fdopen(read_end, "rb") as told:
        line = await asyncio.wait_for(asyncio.to_thread(told.readline), 60)
        pid = int(line)
        assert len(process_group.members(pid)) == 2
        owner.kill()
        await owner.wait()
    async with asyncio.timeout(10):
        while process_group.members(pid):  # noqa: ASYNC110 - it is no child of ours
            await asyncio.sleep(0.01)


OWNER = """
import asyncio, os, sys
from pathlib import Path
from rollpool.worker.engines.dialects import pick_dialect
from rollpool.worker.engines.process import EngineProcess
from rollpool.worker.engines.settings import EngineSettings

async def main():
    script, place, told = sys.argv[1:]
    settings = EngineSettings(python=sys.executable, launcher=script, device="cpu", jit_cache_dir=place)
    process = EngineProcess(settings, pick_dialect("0.0.2"), log_path=Path(place) / "owned.log")
    await process.start("model")
    os.write(int(told), f"{process.pid}\\n".encode())
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_a_stranger_on_the_port_is_not_taken_for_the_engine(
    make: Callable[..., EngineProcess], running: EngineProcess
) -> None:
    assert running._engine is not None
    port = int(running._engine.url.rsplit(":", 1)[1])
    intruded = make(port=port)
    with pytest.raises(EngineUnavailable, match=rf"process {running.pid} listens on port {port}|in use"):
        await intruded.start("silent")


async def test_an_attached_engine_is_never_ended(make: Callable[..., EngineProcess], running: EngineProcess) -> None:
    assert running._engine is not None
    attached = make(url=running._engine.url)
    engine = await attached.start("whatever")
    await engine.generate(request())
    await attached.stop()
    assert attached.pid is None
    assert psutil.pid_exists(pid_of(running))


async def test_an_interpreter_that_is_not_there_is_told(make: Callable[..., EngineProcess], tmp_path: Path) -> None:
    with pytest.raises(EngineUnavailable, match=r"set engine\.python"):
        await make(python=tmp_path / "python").start("model")


async def test_the_log_of_the_launch_before_is_kept(make: Callable[..., EngineProcess]) -> None:
    for _ in range(3):
        with pytest.raises(EngineUnavailable):
            await make().start("dies")
    logs = make().log_path.parent
    assert sorted(p.name for p in logs.iterdir()) == ["engine.log", "engine.log.1"]


def test_the_launch_script_comes_with_the_package() -> None:
    assert default_launcher().is_file()
    assert LIFELINE_ENV in default_launcher().read_text()


def test_a_free_port_is_free() -> None:
    with socket.socket() as mine:
        mine.bind(("127.0.0.1", free_port("127.0.0.1")))


class FakeSources:
    """Has everything where it was published."""

    def __init__(self) -> None:
        self.kept: list[str] = []

    async def stage(self, policy: Policy, on_progress: OnProgress) -> str:
        on_progress(1, 1)
        return policy.source

    async def merge(self, base: str, policy: Policy, adapter: str, on_progress: OnProgress | None = None) -> str:
        return f"{base}+{adapter}"

    def keep(self, paths: Iterable[str]) -> None:
        self.kept = list(paths)


#: In the place of the probe: says what the interpreter has, and leaves a mark each time it is asked.
PROBE = """
import json, pathlib
with (pathlib.Path(__file__).parent / "probed").open("a") as marks:
    marks.write("x")
print(json.dumps({said!r}))
"""

SAID = {
    "sglang_jax": "0.0.2",
    "jax": "x",
    "python": "x",
    "platform": "cpu",
    "devices": 1,
    "msgpack_ok": True,
    "lora": True,
}


@pytest.fixture
async def own(tmp_path: Path) -> AsyncIterator[Callable[..., LaunchedEngine]]:
    made: list[LaunchedEngine] = []

    def build(*, sglang_jax: str = "0.0.2", **changes: Any) -> LaunchedEngine:
        (tmp_path / "server.py").write_text(SERVER)
        (tmp_path / "probe.py").write_text(PROBE.format(said=SAID | {"sglang_jax": sglang_jax}))
        fields: dict[str, Any] = {
            "python": Path(sys.executable),
            "launcher": tmp_path / "server.py",
            "probe": tmp_path / "probe.py",
            "device": "cpu",
            "tp_size": 1,
            "jit_cache_dir": tmp_path / "jit",
            "host_lock": tmp_path / "host.lock",
            "env": {"DEVICE": str(tmp_path / "device")},
            "start_timeout_s": 30,
        }
        sources: Any = FakeSources()
        made.append(LaunchedEngine(EngineSettings(**(fields | changes)), tmp_path / "engine.log", sources))
        return made[-1]

    yield build
    for owner in made:
        await owner.close()


def make_model(directory: Path) -> str:
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    return str(directory)


def make_adapter(directory: Path, *, rank: int = 2, **config: Any) -> Adapter:
    directory.mkdir()
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": 2, "target_modules": ["q_proj"], **config}
    (directory / "adapter_config.json").write_text(json.dumps(fields))
    prefix, size = "base_model.model.model.layers.0.self_attn.q_proj", 4 * rank * 4
    header = json.dumps(
        {
            f"{prefix}.lora_A.weight": {"dtype": "F32", "shape": [rank, 4], "data_offsets": [0, size]},
            f"{prefix}.lora_B.weight": {"dtype": "F32", "shape": [4, rank], "data_offsets": [size, 2 * size]},
        }
    ).encode()
    weights = len(header).to_bytes(8, "little") + header + bytes(2 * size)
    (directory / "adapter_model.safetensors").write_bytes(weights)
    return Adapter(directory.name, str(directory))


async def info_of(owner: LaunchedEngine) -> dict[str, Any]:
    assert isinstance(owner._engine, HttpEngine)
    return await owner._engine._info()


async def test_each_launch_ends_the_engine_before_it_and_asks_the_interpreter_only_once(
    own: Callable[..., LaunchedEngine], tmp_path: Path
) -> None:
    owner = own()
    models = [make_model(tmp_path / name) for name in ("a", "b")]
    seen = []
    for version, model in enumerate([*models, models[0]]):  # two at a time: the second would not get the device
        engine = await owner.open(model, version=version)
        assert engine.facts.model_path == model
        assert (await info_of(owner))["weights"] == str(version)
        seen.append(owner.opened.partition(", ")[2])
        assert owner.opened.startswith(f"{owner.opened_s:.1f} s, ")
    assert seen == [
        "JIT cache: 1 programs compiled anew, 0 were there",
        "JIT cache: 1 programs compiled anew, 1 were there",
        "JIT cache: 0 programs compiled anew, 2 were there",
    ]
    assert (tmp_path / "probed").read_text() == "x"


async def test_each_launch_has_the_seed_for_which_the_sampler_is_compiled(
    own: Callable[..., LaunchedEngine], tmp_path: Path
) -> None:
    model = make_model(tmp_path / "a")

    async def seeds(owner: LaunchedEngine) -> list[str]:
        found = []
        for version in (1, 2):
            await owner.open(model, version=version)
            argv = (await info_of(owner))["argv"]
            found.append(argv[argv.index("--random-seed") + 1])
        await owner.close()
        return found

    here, there = await seeds(own()), await seeds(own(host_lock=tmp_path / "other.lock"))
    assert here[0] == here[1] != there[0] == there[1]
    first, second = await seeds(own(sglang_jax="0.0.1.post1", host_lock=tmp_path / "third.lock"))
    assert first != second  # that line passes its seed in: sampling the same numbers again is of no use


async def test_a_launch_that_fails_leaves_the_way_free_for_the_next(
    own: Callable[..., LaunchedEngine], tmp_path: Path
) -> None:
    owner, model = own(start_timeout_s=1), make_model(tmp_path / "a")
    await owner.open(model, version=1)
    with pytest.raises(EngineUnavailable, match="do not fit"):
        await owner.open("dies", version=2)
    assert owner.url == ""
    assert (await owner.open(model, version=1)).facts.model_path == model


async def test_adapters_are_given_to_an_engine_that_takes_them_at_its_launch_only(
    own: Callable[..., LaunchedEngine], tmp_path: Path
) -> None:
    owner, model = own(max_lora_rank=4, adapter_slots=2), make_model(tmp_path / "a")
    adapters = [make_adapter(tmp_path / f"r.g0.v{version}") for version in (1, 2, 3)]
    await owner.open(model, version=0, adapters=adapters[:2])
    argv = (await info_of(owner))["argv"]
    at = argv.index("--lora-paths")
    assert argv[at + 1 : at + 3] == [f"{adapter.name}={adapter.path}" for adapter in adapters[:2]]
    with pytest.raises(EngineUnavailable, match=r"3 adapters are over the 2 slots.*engine\.adapter_slots"):
        await owner.open(model, version=0, adapters=adapters)


@pytest.mark.parametrize(
    ("config", "why"),
    [({"rank": 8}, "ranks up to 4"), ({"use_dora": True}, "use_dora"), ({"lora_alpha": None}, "alpha")],
)
async def test_an_adapter_that_the_engine_would_not_apply_whole_is_not_launched_with(
    own: Callable[..., LaunchedEngine], tmp_path: Path, config: dict[str, Any], why: str
) -> None:
    owner, model = own(max_lora_rank=4), make_model(tmp_path / "a")
    with pytest.raises(EngineUnavailable, match=why):
        await owner.open(model, version=0, adapters=[make_adapter(tmp_path / "r.g0.v1", **config)])


async def test_a_line_without_lora_is_not_launched_with_an_adapter(
    own: Callable[..., LaunchedEngine], tmp_path: Path
) -> None:
    owner, model = own(sglang_jax="0.0.1.post1"), make_model(tmp_path / "a")
    with pytest.raises(EngineUnavailable, match=r"0\.0\.1\.post1 has no LoRA.*merge it"):
        await owner.open(model, version=0, adapters=[make_adapter(tmp_path / "r.g0.v1")])


async def test_what_is_staged_is_a_model_before_the_engine_that_serves_has_to_end(
    own: Callable[..., LaunchedEngine], tmp_path: Path
) -> None:
    owner, model = own(), make_model(tmp_path / "a")
    told: list[tuple[int, int]] = []
    whole = Policy(version=1, checkpoint=model, run="r")
    assert await owner.stage(whole, lambda done, of: told.append((done, of))) == model
    assert told == [(1, 1)]
    (tmp_path / "empty").mkdir()
    with pytest.raises(PolicyRejected, match=r"no config\.json"):
        await owner.stage(Policy(version=2, checkpoint=str(tmp_path / "empty"), run="r"), lambda done, of: None)
    adapter = Policy(version=3, lora_path=str(tmp_path / "empty"), run="r")
    staged = await owner.stage(adapter, lambda done, of: None)  # an adapter is the sources' to look at
    assert await owner.merge(model, adapter, staged) == f"{model}+{staged}"
    owner.keep([model])
    sources: Any = owner._sources
    assert sources.kept == [model]


def test_an_engine_is_attached_where_a_url_is_set(tmp_path: Path) -> None:
    sources: Any = FakeSources()
    assert isinstance(owner_for(EngineSettings(), tmp_path / "log", sources), LaunchedEngine)
    assert isinstance(owner_for(EngineSettings(url="http://127.0.0.1:1"), tmp_path / "log", sources), AttachedEngine)


async def test_an_attached_engine_says_how_long_it_took(running: EngineProcess) -> None:
    assert running._engine is not None
    owner = AttachedEngine(EngineSettings(url=running._engine.url))
    engine = await owner.open("whatever", version=3)
    assert engine.facts.model_path == "model"
    assert owner.opened == f"attached in {owner.opened_s:.1f} s"
    await owner.close()
