"""One real engine for the session: 0.0.1.post1 on CPU over the tiny model."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rollpool.ops.local.engine_env import ensure_engine_env
from rollpool.ops.local.engine_settings import cpu_engine_args, cpu_engine_env
from rollpool.ops.local.tiny_model import make_tiny_model

SERVE = Path(__file__).parents[2] / "worker" / "launch" / "serve_cpu.py"
TP_SIZE = 8
# A cold start compiles everything: some 15 s on two cores, more beside other work.
START_TIMEOUT = 240.0


@dataclass(frozen=True)
class Engine:
    url: str
    model_path: Path
    pid: int

    def generate(self, input_ids: list[int], **sampling: Any) -> dict[str, Any]:
        body = {
            "input_ids": input_ids,
            "return_logprob": True,
            "sampling_params": {"ignore_eos": True, "skip_special_tokens": False, "no_stop_trim": True} | sampling,
        }
        request = urllib.request.Request(
            f"{self.url}/generate", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as reply:
            answer: dict[str, Any] = json.load(reply)
        return answer


def launch(model: Path, log: Path, cache: Path, **options: Any) -> tuple[subprocess.Popen[bytes], str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(ensure_engine_env()), str(SERVE), "--model-path", str(model), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--tp-size", str(TP_SIZE), "--device", "cpu"]
    command += cpu_engine_args("0.0.1.post1")
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= cpu_engine_env(TP_SIZE, cache) | options.pop("env", {})
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, **options
        )
    return process, f"http://127.0.0.1:{port}"


def wait_until_it_answers(process: subprocess.Popen[bytes], engine: Engine, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while True:
        assert process.poll() is None, f"the engine ended:\n{log.read_text()[-3000:]}"
        assert time.monotonic() < deadline, f"the engine does not answer:\n{log.read_text()[-3000:]}"
        try:
            engine.generate([1, 2, 3], max_new_tokens=2)
            return
        except OSError:
            time.sleep(0.3)


def end_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("engine")
    model = make_tiny_model(folder / "tiny-0", seed=0)
    log = folder / "engine.log"
    process, url = launch(model, log, folder / "jit")
    try:
        started = Engine(url, model, process.pid)
        wait_until_it_answers(process, started, log)
        yield started
    finally:
        end_group(process.pid)
        process.wait()
