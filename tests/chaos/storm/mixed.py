"""Hosts of one pool with settings of their own each.

Invariant: what starts and ends one host touches no other.
"""

import contextlib
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

from rollpool.ops.local.hosts import LocalHosts


class MixedHosts:
    """As `LocalHosts`, for hosts that are not alike.

    Args:
        hosts: those of each worker, by its name.
    """

    def __init__(self, hosts: Mapping[str, LocalHosts]) -> None:
        self._hosts = dict(hosts)

    @property
    def workers(self) -> dict[str, subprocess.Popen[bytes]]:
        """The worker processes, by name."""
        return {name: worker for hosts in self._hosts.values() for name, worker in hosts.workers.items()}

    def start(self, name: str) -> None:
        """Start one worker."""
        self._hosts[name].start(name)

    def log(self, name: str) -> Path:
        """Where a worker writes."""
        return self._hosts[name].log(name)

    def check(self) -> None:
        """Raise RollpoolError when a worker ended by itself."""
        for hosts in self._hosts.values():
            hosts.check()

    def stop(self) -> None:
        """End all workers; they get their time to end together."""
        for worker in self.workers.values():
            with contextlib.suppress(ProcessLookupError):
                worker.send_signal(signal.SIGTERM)
        for hosts in self._hosts.values():
            hosts.stop()
