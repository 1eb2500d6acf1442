"""What is known to go wrong before a launch, and in which words a death is told."""

import json
import logging
import multiprocessing as mp
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from rollpool.schemas.errors import SettingsError
from rollpool.worker.engines import preflight as checks
from rollpool.worker.engines.diagnosis import advice, death_note, describe_exit, last_lines
from rollpool.worker.engines.host_lock import HostLock
from rollpool.worker.engines.preflight import ProbeReport, parse_probe, preflight
from rollpool.worker.engines.protocol import EngineUnavailable
from rollpool.worker.engines.settings import EngineSettings

SAID = {
    "sglang_jax": "0.0.1.post1",
    "jax": "0.6.2",
    "python": "3.11.9",
    "platform": "tpu",
    "devices": 4,
    "msgpack_ok": True,
    "single_process": False,
    "lora": False,
}


def report(**changes: Any) -> ProbeReport:
    return ProbeReport.model_validate(SAID | changes)


def said(**changes: Any) -> bytes:
    return f"some warning\n{json.dumps(SAID | changes)}\n".encode()


def test_a_tp_size_over_the_devices_says_which_value_works() -> None:
    with pytest.raises(SettingsError, match=r"4 devices visible.*tp_size=8: set engine\.tp_size=4"):
        checks.check_devices(report(devices=4), EngineSettings(tp_size=8))


def test_a_tp_size_that_does_not_divide_the_devices_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"set engine\.tp_size=8"):
        checks.check_devices(report(devices=8), EngineSettings(tp_size=3))


def test_idle_devices_are_only_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        checks.check_devices(report(devices=8), EngineSettings(tp_size=4))
        assert "leaves 4 idle" in caplog.text
        caplog.clear()
        checks.check_devices(report(devices=8), EngineSettings(tp_size=8))
        assert not caplog.text


def test_adapters_for_an_engine_without_lora_are_only_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        checks.check_lora(report(lora=True), EngineSettings(max_lora_rank=16))
        checks.check_lora(report(lora=False), EngineSettings())
        assert not caplog.text
        checks.check_lora(report(lora=False), EngineSettings(max_lora_rank=16))
        assert "engine.max_lora_rank=16 has no effect" in caplog.text


def test_every_program_is_kept_whatever_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "5")
    env = checks.engine_environment(EngineSettings(jit_cache_dir=Path("/jit")))
    assert env["JAX_COMPILATION_CACHE_DIR"] == "/jit"
    assert env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] == "0"
    assert env["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] == "-1"
    asked = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1"}
    assert checks.engine_environment(EngineSettings(env=asked)).items() >= asked.items()


@pytest.mark.parametrize(
    ("rank", "platforms", "expected"), [(16, "tpu", None), (None, "tpu", "tpu"), (16, "cpu", "cpu"), (16, None, None)]
)
def test_with_lora_jax_may_open_the_cpu_too(
    monkeypatch: pytest.MonkeyPatch, rank: int | None, platforms: str | None, expected: str | None
) -> None:
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    if platforms is not None:
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert checks.engine_environment(EngineSettings(max_lora_rank=rank)).get("JAX_PLATFORMS") == expected


def test_a_clash_of_msgpack_names_the_repair_for_that_interpreter() -> None:
    with pytest.raises(SettingsError, match="/e/python -m pip install --force-reinstall --no-deps msgpack"):
        checks.check_msgpack(report(msgpack_ok=False), Path("/e/python"))


def test_a_report_is_read_behind_other_output() -> None:
    assert parse_probe(said(), b"", EngineSettings()).devices == 4


def test_a_tpu_in_use_names_the_process() -> None:
    out = json.dumps({"error": "The TPU is already in use by process with pid 4321."}).encode()
    with pytest.raises(EngineUnavailable, match=r"process 4321 holds this host's TPU.*one worker on each"):
        parse_probe(out, b"", EngineSettings())


def test_jax_that_fell_back_to_the_cpu_is_no_tpu() -> None:
    err = b"E0101 The TPU is already in use by process with pid 77. Not attempting to load libtpu.so\n"
    with pytest.raises(EngineUnavailable, match=r"runs on cpu: process 77 holds"):
        parse_probe(said(platform="cpu"), err, EngineSettings())
    with pytest.raises(EngineUnavailable, match=r"set engine\.device=cpu"):
        parse_probe(said(platform="cpu"), b"", EngineSettings())


@pytest.mark.parametrize("out", [b"", b"no json", b"[1]", b'{"jax": "1"}'])
def test_an_interpreter_without_a_report_is_told_with_its_last_words(out: bytes) -> None:
    with pytest.raises(EngineUnavailable, match="last words"):
        parse_probe(out, b"Traceback\nlast words", EngineSettings())


def test_a_model_is_a_checkpoint_directory_or_a_name_on_the_hub(tmp_path: Path) -> None:
    checks.check_model(None)
    checks.check_model("Qwen/Qwen3-8B")
    with pytest.raises(EngineUnavailable, match=r"no config\.json"):
        checks.check_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    checks.check_model(str(tmp_path))
    with pytest.raises(EngineUnavailable, match="no model at"):
        checks.check_model(str(tmp_path / "absent"))


def test_a_port_in_use_names_who_listens() -> None:
    checks.check_port("127.0.0.1", 0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(EngineUnavailable, match=rf"process {os.getpid()} already listens on port {port}"):
            checks.check_port("127.0.0.1", port)


def test_a_cache_that_takes_no_writes_is_refused(tmp_path: Path) -> None:
    checks.check_cache(tmp_path / "new" / "cache")
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match="jit_cache_dir"):
        checks.check_cache(tmp_path / "file" / "cache")
    assert [p.name for p in (tmp_path / "new" / "cache").iterdir()] == []


async def test_an_interpreter_that_is_not_there_is_a_setting(tmp_path: Path) -> None:
    settings = EngineSettings(python=tmp_path / "python", jit_cache_dir=tmp_path / "jit")
    with pytest.raises(SettingsError, match=r"engine\.python"):
        await preflight(settings)


async def test_a_probe_of_ones_own_says_what_the_environment_holds(tmp_path: Path) -> None:
    script = tmp_path / "probe.py"
    script.write_text(f"print({json.dumps(said(devices=2, platform='cpu').decode())})")
    settings = EngineSettings(
        python=Path(sys.executable), probe=script, device="cpu", tp_size=2, jit_cache_dir=tmp_path / "jit"
    )
    assert (await preflight(settings)).devices == 2


async def test_a_probe_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineUnavailable, match="absent"):
        await checks.probe(EngineSettings(python=Path(sys.executable), probe=tmp_path / "absent.py"))


def _hold(path: Path, held: Any, let_go: Any) -> None:
    lock = HostLock(path)  # kept: a lock that is collected lets go
    lock.acquire()
    held.set()
    let_go.wait()


def test_a_second_worker_on_a_host_is_told_who_holds_it(tmp_path: Path) -> None:
    path, context = tmp_path / "host.lock", mp.get_context("spawn")
    held, let_go = context.Event(), context.Event()
    first = context.Process(target=_hold, args=(path, held, let_go))
    first.start()
    try:
        assert held.wait(60)
        second = HostLock(path)
        with pytest.raises(EngineUnavailable, match=rf"process {first.pid} holds"):
            second.acquire()
        first.kill()  # no chance to clean up: the kernel lets go
        first.join()
        second.acquire()
        assert (tmp_path / "host.lock.pid").read_text().strip() == str(os.getpid())
        second.release()
    finally:
        first.kill()
        first.join()
        first.close()


def test_the_host_lock_is_taken_once_and_let_go_once(tmp_path: Path) -> None:
    lock = HostLock(tmp_path / "host.lock")
    lock.acquire()
    lock.acquire()
    lock.release()
    lock.release()
    other = HostLock(tmp_path / "host.lock")
    other.acquire()
    other.release()


def test_a_lock_that_cannot_be_made_names_its_setting(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EngineUnavailable, match=r"engine\.host_lock"):
        HostLock(tmp_path / "file" / "lock").acquire()


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("RuntimeError: The TPU is already in use by process with pid 12.", "process 12 holds"),
        ("OSError: [Errno 98] Address already in use", "engine.port=0"),
        ("jaxlib.XlaRuntimeError: RESOURCE_EXHAUSTED: allocating", "do not fit"),
        ("ModuleNotFoundError: No module named 'sgl_jax'", "engine.python"),
        ("error: unrecognized arguments: --lora-paths x", "does not know --lora-paths x"),
    ],
)
def test_a_known_death_says_what_to_do(log: str, said: str) -> None:
    assert said in (advice(log) or "")


def test_an_unknown_death_quotes_the_log() -> None:
    tail = last_lines(b"one\n\n" + b"line\n" * 40 + b"last\n")
    assert len(tail.splitlines()) == 15
    note = death_note(f"the engine {describe_exit(-9)}", tail, "/x.log")
    assert "SIGKILL" in note
    assert note.endswith("last")
    assert "status 3" in describe_exit(3)
    assert "empty" in death_note("x", "", "/x.log")
