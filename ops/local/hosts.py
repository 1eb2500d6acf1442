"""Hosts on one machine: real `rq worker` processes, each with a real engine on CPU.

Invariant: what `start` began ends with its `LocalHosts`: workers get a warm stop, then a cold one, and are killed when
that does not help, when their owner is told to hurry, or when it is killed itself; and each worker ends its engine
however it ends.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rollpool.ops.inspect import read_workers
from rollpool.ops.local.child import spawn
from rollpool.ops.local.engine_settings import EngineLine, cpu_engine_args, cpu_engine_env
from rollpool.schemas import Keys, RollpoolError
from rollpool.schemas.connection import connect

#: Seconds a worker may take for its warm stop, then for its cold one: giving back work, and ending an engine.
WARM_STOP_S, COLD_STOP_S = 60.0, 30.0

#: Requests each engine runs at once on a CPU: small enough that a few hosts share two cores, and enough for batching.
MAX_RUNNING_REQUESTS = 16


def cpu_engine(
    python: Path, cache: Path, line: EngineLine, *, max_running_requests: int = MAX_RUNNING_REQUESTS
) -> dict[str, Any]:
    """The `engine` settings of a host on CPU.

    Args:
        python: interpreter with sglang-jax.
        cache: directory of the JIT cache, shared by the hosts.
        line: `0.0.1.post1` or `main`.
        max_running_requests: what the engine runs at once.
    """
    jit_cache = cache / f"jit-{line}"
    return {
        "python": str(python),
        "launcher": str(launcher()),
        "device": "cpu",
        "tp_size": 8,
        "jit_cache_dir": str(jit_cache),
        "max_seq_len": 256,
        "page_size": 1,
        "max_running_requests": max_running_requests,
        "extra_args": _not_owned(cpu_engine_args(line, max_running_requests=max_running_requests)),
        "env": cpu_engine_env(8, cache_dir=jit_cache),
    }


#: Flags that the worker sets from settings of its own.
_OWNED = ("--page-size", "--context-length", "--max-seq-len", "--max-running-requests")


def _not_owned(args: Sequence[str]) -> list[str]:
    """Drop `--flag value` pairs of `_OWNED`."""
    skip = {at + offset for at, arg in enumerate(args) if arg in _OWNED for offset in (0, 1)}
    return [arg for at, arg in enumerate(args) if at not in skip]


def launcher() -> Path:
    """The launch script that mends what keeps an engine from serving on CPU."""
    from importlib.resources import files

    return Path(str(files("rollpool.worker") / "launch" / "serve_cpu.py"))


class LocalHosts:
    """Workers of one pool on this machine.

    Args:
        url: server of the pool.
        pool: its name.
        directory: for logs and locks.
        engine: `engine` settings of every host.
        settings: further settings of every host, by name.
    """

    def __init__(
        self, url: str, pool: str, directory: Path, engine: dict[str, Any], settings: dict[str, Any] | None = None
    ) -> None:
        self._url = url
        self._pool = pool
        self._directory = directory
        self._engine = engine
        self._settings = settings or {}
        self._workers: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def workers(self) -> dict[str, subprocess.Popen[bytes]]:
        """The worker processes, by name."""
        return self._workers

    def log(self, name: str) -> Path:
        """Where a worker writes; its engine's log is beside it."""
        return self._directory / f"{name}.log"

    def engine_log(self, name: str) -> Path:
        """Where a worker's engine writes."""
        return self._directory / f"engine-{name}.log"

    def start(self, name: str, options: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        """Start one worker; `options` are those of `rq worker`.

        Raises:
            RollpoolError: a worker of this name runs.
        """
        if name in self._workers and self._workers[name].poll() is None:
            raise RollpoolError(f"worker {name} runs already; give each host a name of its own")
        self._directory.mkdir(parents=True, exist_ok=True)
        command = [
            *(sys.executable, "-m", "rq.cli", "worker", "--url", self._url, "--name", name),
            *("--worker-class", "rollpool.worker.RolloutWorker", *options, self._pool),
        ]
        with self.log(name).open("ab") as log:
            self._workers[name] = spawn(command, log, self._environment(name))
        return self._workers[name]

    def _environment(self, name: str) -> dict[str, str]:
        engine = {**self._engine, "host_lock": str(self._directory / f"{name}.lock")}
        settings = {"url": self._url, "log_dir": str(self._directory), "engine": json.dumps(engine), **self._settings}
        # A part of the engine's settings by its own name would win over the whole: those are of the user's other hosts.
        inherited = {key: value for key, value in os.environ.items() if not key.upper().startswith("ROLLPOOL_ENGINE__")}
        return inherited | {f"ROLLPOOL_{key.upper()}": str(value) for key, value in settings.items()}

    def check(self) -> None:
        """Raise RollpoolError when a worker ended by itself."""
        for name, worker in self._workers.items():
            if worker.poll() is not None:
                tail = "\n".join(self.log(name).read_text(errors="replace").splitlines()[-15:])
                raise RollpoolError(f"worker {name} ended with status {worker.returncode}; its log ends:\n{tail}")

    def listed(self) -> int:
        """Workers of ours that have a heartbeat."""
        with connect(self._url) as client:
            return sum(worker.name in self._workers for worker in read_workers(client, Keys(self._pool)))

    def stop(self) -> None:
        """End all workers: warm, then cold, then by force; harmless to repeat.

        An interrupt meanwhile, as a second Ctrl-C, ends them by force at once.
        """
        try:
            for worker in self._workers.values():
                worker.send_signal(signal.SIGTERM)
            for worker in self._workers.values():
                _end(worker)
        except BaseException:
            for worker in self._workers.values():
                worker.kill()
                worker.wait()
            raise
        finally:
            self._workers.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _end(worker: subprocess.Popen[bytes]) -> None:
    for patience, number in ((WARM_STOP_S, signal.SIGTERM), (COLD_STOP_S, signal.SIGKILL)):
        try:
            worker.wait(patience)
            return
        except subprocess.TimeoutExpired:
            worker.send_signal(number)
    worker.wait()
