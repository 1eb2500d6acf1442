"""The scripts that run in the engine's own interpreter: what the probe says, what the launch refuses, the lifeline."""

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from waiting import LONG, until_blocking

from rollpool.ops.local.engine_env import ensure_engine_env
from rollpool.ops.local.engine_settings import cpu_engine_env
from rollpool.ops.local.hosts import launcher
from rollpool.schemas import SettingsError
from rollpool.worker.engines import process_group
from rollpool.worker.engines.dialects import pick_dialect
from rollpool.worker.engines.preflight import ProbeReport, engine_environment, preflight, probe
from rollpool.worker.engines.process import LIFELINE_ENV, default_launcher
from rollpool.worker.engines.protocol import EngineUnavailable
from rollpool.worker.engines.settings import EngineSettings

pytestmark = pytest.mark.timeout(300)

SERVE = default_launcher()
PROBE = SERVE.with_name("probe.py")

#: The release that `serve_cpu.py` mends.
MENDED = "0.0.1.post1"


@pytest.fixture(scope="module")
def python() -> Path:
    return ensure_engine_env()


def settings(python: Path, tmp_path: Path, devices: int = 8, **changes: Any) -> EngineSettings:
    """Of an engine on CPU with so many devices."""
    fields = {"python": python, "device": "cpu", "jit_cache_dir": tmp_path / "jit", "env": cpu_engine_env(devices)}
    return EngineSettings.model_validate(fields | changes)


@pytest.mark.engine
@pytest.mark.parametrize("devices", [8, 2])
def test_the_probe_prints_one_json_object_with_the_devices_there_are(
    python: Path, tmp_path: Path, devices: int
) -> None:
    done = subprocess.run(
        [python, PROBE],
        env=engine_environment(settings(python, tmp_path, devices)),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    report = ProbeReport.model_validate(json.loads(line))
    assert report.devices == devices
    assert report.platform == "cpu"
    assert report.msgpack_ok
    assert pick_dialect(report.sglang_jax).line in ("0.0.1.post1", "main")


@pytest.mark.engine
async def test_preflight_compares_tp_size_with_the_devices_the_interpreter_really_sees(
    python: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert (await preflight(settings(python, tmp_path, tp_size=4))).devices == 8
    assert "8 devices visible, tp_size=4: the engine leaves 4 idle" in caplog.text
    with pytest.raises(SettingsError, match=r"2 devices visible, tp_size=8: set engine\.tp_size=2"):
        await preflight(settings(python, tmp_path, 2, tp_size=8))


@pytest.mark.engine
async def test_a_tpu_that_is_not_there_is_refused_by_name(python: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineUnavailable, match=r"engine\.device=tpu.*runs on cpu.*set engine\.device=cpu"):
        await probe(settings(python, tmp_path, device="tpu"))


@pytest.mark.engine
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            "from sgl_jax.srt.layers import sampler\ndel sampler.top_k_top_p_min_p_sampling_from_probs_jax",
            "there is no such function",
        ),
        (
            "from sgl_jax.srt.managers import scheduler\n"
            "def event_loop_normal(self): pass\n"
            "scheduler.Scheduler.event_loop_normal = event_loop_normal",
            "source",
        ),
        (
            "from sgl_jax.srt.mem_cache import memory_pool\nmemory_pool.update_kv_cache_vectorized = lambda k, v: None",
            "its parameters are not",
        ),
    ],
    ids=["a function is gone", "its source is another", "its parameters are others"],
)
def test_the_launch_on_cpu_refuses_code_that_it_was_not_written_for(
    python: Path, tmp_path: Path, damage: str, said: str
) -> None:
    made = settings(python, tmp_path)
    if asyncio.run(probe(made)).sglang_jax != MENDED:
        pytest.skip(f"only {MENDED} is mended; this engine is served as it is")
    code = f"import sys; sys.path.insert(0, {str(launcher().parent)!r})\n{damage}\nimport serve_cpu"
    done = subprocess.run(
        [python, "-c", code], env=engine_environment(made), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 1
    assert "RuntimeError: cannot mend" in done.stderr
    assert said in done.stderr


def test_the_probe_of_an_interpreter_without_the_engine_says_what_is_missing() -> None:
    # -S: no packages at all.
    done = subprocess.run([sys.executable, "-S", PROBE], capture_output=True, text=True, timeout=LONG)
    assert done.returncode == 1
    (line,) = done.stdout.splitlines()
    assert "No module named 'jax'" in json.loads(line)["error"]


def test_what_libraries_print_is_kept_out_of_the_report(tmp_path: Path) -> None:
    # Stand-ins for JAX and the engine, which print where they should not.
    (tmp_path / "jax.py").write_text("print('noise')\nraise SystemError('device or resource busy')\n")
    done = subprocess.run(
        [sys.executable, "-S", PROBE],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=LONG,
    )
    assert json.loads(done.stdout) == {"error": "SystemError: device or resource busy"}
    assert "noise" in done.stderr


#: In the engine's place: a server with a child of its own, which says what it was given.
SERVER = f"""
import json, os, signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], close_fds=False)
fds = os.listdir(f"/proc/{{child.pid}}/fd") if os.path.isdir("/proc") else []
said = {{"child": child.pid, "args": sys.argv[1:], "lifeline": os.environ.get({LIFELINE_ENV!r}), "fds": fds}}
print(json.dumps(said), flush=True)
signal.pause()
"""


class Launched:
    """`serve.py` with the stand-in behind it."""

    def __init__(self, site: Path, lifeline: int | None, **options: Any) -> None:
        env = os.environ | {"PYTHONPATH": str(site)}
        if lifeline is not None:
            env[LIFELINE_ENV] = str(lifeline)
        self.process = subprocess.Popen(
            [sys.executable, SERVE, "--model-path", "/m"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
            **{"start_new_session": True, "pass_fds": () if lifeline is None else (lifeline,)} | options,
        )

    def said(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate(timeout=LONG)[1]
        said: dict[str, Any] = json.loads(line)
        return said


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    module = tmp_path / "sgl_jax" / "launch_server.py"
    module.parent.mkdir()
    (module.parent / "__init__.py").touch()
    module.write_text(SERVER)
    started: list[Launched] = []

    def begin(lifeline: int | None, **options: Any) -> Launched:
        started.append(Launched(tmp_path, lifeline, **options))
        return started[-1]

    yield begin
    for launched in started:
        with launched.process as process:
            for pid in process_group.members(process.pid):
                os.kill(pid, signal.SIGKILL)
            process.kill()


def test_the_group_ends_when_the_lifeline_is_closed_and_not_when_it_is_written_to(
    launch: Callable[..., Launched],
) -> None:
    read_end, write_end = os.pipe()
    launched = launch(read_end)
    os.close(read_end)
    said = launched.said()
    assert said["args"] == ["--model-path", "/m"]
    assert said["lifeline"] is None, "a child would take it for its own"
    assert str(read_end) not in said["fds"], "a child would hold the pipe"
    os.write(write_end, b"still here")
    assert len(process_group.members(launched.process.pid)) == 2
    os.close(write_end)
    assert launched.process.wait(LONG) == -signal.SIGKILL
    until_blocking(lambda: not process_group.members(launched.process.pid), "the child ends with its server")


def test_without_a_lifeline_it_serves_all_the_same(launch: Callable[..., Launched]) -> None:
    assert launch(None).said()["lifeline"] is None


@pytest.mark.parametrize("value", [987, -1])
def test_a_lifeline_that_is_no_open_descriptor_is_refused(launch: Callable[..., Launched], value: int) -> None:
    launched = launch(value, pass_fds=())
    _, err = launched.process.communicate(timeout=LONG)
    assert launched.process.returncode == 1
    assert f"{LIFELINE_ENV}='{value}' is not an open file descriptor" in err


def test_an_engine_that_does_not_lead_its_group_is_not_given_the_power_to_end_it(
    launch: Callable[..., Launched],
) -> None:
    read_end, write_end = os.pipe()
    launched = launch(read_end, start_new_session=False)
    os.close(read_end)
    _, err = launched.process.communicate(timeout=LONG)
    os.close(write_end)
    assert launched.process.returncode == 1
    assert "lead its own process group" in err
