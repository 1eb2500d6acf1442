"""`rollpool local` as a user runs it: it says how to use it, serves, and Ctrl-C leaves nothing."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from real_pool import wait_for

from rollpool.ops.local.engine_env import CACHE_ENV, PYTHON_ENV, cache_dir, ensure_engine_env
from rollpool.producer import RolloutPool, SamplingParams
from rollpool.schemas.connection import connect
from rollpool.worker.engines import process_group

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


class Command:
    """The running command, and every process it ever had."""

    def __init__(self, environment: dict[str, str], directory: Path) -> None:
        self.lines: list[str] = []
        # A group of its own, as a terminal gives a command: Ctrl-C is sent to the group.
        self.process = subprocess.Popen(
            [Path(sys.executable).with_name("rollpool"), "local", "--pool", "trial"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=directory,
            env=environment,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            self.lines.extend(lines)

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def processes(self) -> list[psutil.Process]:
        """What runs for it: its server, its worker, and the worker's engine."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).children(recursive=True)
        return []

    def said(self, words: str) -> bool:
        assert self.process.poll() is None, self.output
        return words in self.output

    def ended(self) -> int:
        status = self.process.wait(120)
        self._reader.join(120)
        return status


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Command]:
    """Started with a cache of its own, but for the engine and what it has compiled."""
    cache = tmp_path / "cache"
    cache.mkdir()
    for line in ("0.0.1.post1", "main"):
        (cache_dir() / f"jit-{line}").mkdir(parents=True, exist_ok=True)
        (cache / f"jit-{line}").symlink_to(cache_dir() / f"jit-{line}")
    bare = {name: value for name, value in os.environ.items() if not name.startswith("ROLLPOOL_")}
    started = Command(bare | {PYTHON_ENV: str(ensure_engine_env()), CACHE_ENV: str(cache)}, tmp_path)
    try:
        yield started
    finally:
        left = started.processes()
        for process in [*left, psutil.Process(started.process.pid)] if started.process.poll() is None else left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        started.ended()


def test_it_says_how_to_use_it_serves_and_ends_on_an_interrupt_with_nothing_left(command: Command) -> None:
    wait_for(lambda: command.said("Ctrl-C ends it."), 400)
    told = re.search(r"^ *export ROLLPOOL_URL=(\S+) ROLLPOOL_POOL=(\S+)$", command.output, re.MULTILINE)
    assert told, command.output
    assert "rollpool status" in command.output
    with RolloutPool(told[1], pool=told[2], run="trial") as pool:
        batch = pool.enqueue_prompts(["1 + 1 ="], policy_version=1, sampling=SamplingParams(max_new_tokens=2))
        (group,) = batch.collect(timeout=240)
        assert len(group.samples) == 1
    before = command.processes()
    names = " ".join(" ".join(process.cmdline()) for process in before)
    assert "rq.cli" in names
    assert "serve_cpu.py" in names
    assert len(before) >= 5, "a server, a worker, and the engine's three"

    os.killpg(command.process.pid, signal.SIGINT)
    assert command.ended() == 130
    assert "everything that was started has ended" in command.lines[-1]
    assert "Traceback" not in command.output
    # Zombies hold nothing: those whose parent is gone wait for the machine's first process.
    assert not [process for process in before if process_group.alive(process)]
    with connect(told[1], retries=0) as client, pytest.raises(Exception, match="refused"):
        client.ping()
