"""The storm's own processes: trainers and the tap.

Invariant: each ends with the storm, however that ends; one that was killed is started again on the same files.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rollpool.ops.local.child import spawn
from storm import journal

#: Folder that holds the package `storm`.
HOME = Path(__file__).parent.parent

#: Seconds that a process may take to end after SIGTERM.
STOP_S = 5.0


class Children:
    """Processes by name, each with its settings file and log in one directory."""

    def __init__(self, directory: Path, env: Mapping[str, str]) -> None:
        self._directory = directory
        path = os.pathsep.join(part for part in (str(HOME), env.get("PYTHONPATH", "")) if part)
        self._env = {**env, "PYTHONPATH": path}
        self._modules: dict[str, str] = {}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._lock = threading.Lock()

    @property
    def names(self) -> list[str]:
        """All there ever were."""
        return sorted(self._modules)

    def add(self, name: str, module: str, settings: dict[str, Any]) -> None:
        """Start `python -m MODULE SETTINGS`."""
        journal.replace(self._file(name), settings)
        self._modules[name] = module
        self.start(name)

    def start(self, name: str) -> None:
        """Start it, again or for the first time."""
        command = [sys.executable, "-m", self._modules[name], str(self._file(name))]
        with self._lock, self.log(name).open("ab") as log:
            self._processes[name] = spawn(command, log, self._env)

    def kill(self, name: str) -> None:
        """End it with SIGKILL."""
        self._processes[name].kill()
        self._processes[name].wait()

    def ended(self, name: str) -> int | None:
        """Its exit status; None while it runs."""
        return self._processes[name].poll()

    def log(self, name: str) -> Path:
        """What it wrote."""
        return self._directory / f"{name}.log"

    def _file(self, name: str) -> Path:
        return self._directory / f"{name}.json"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes.values():
            process.send_signal(signal.SIGTERM)
        for process in self._processes.values():
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
