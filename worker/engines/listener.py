"""Which process listens on a port of this host.

Invariant: what is not visible (another user's process, another host) is None, never a guess.
"""

import contextlib
from typing import Any

import psutil


def listener_of(port: int) -> psutil.Process | None:
    """The process that listens on TCP `port` of this host, when this user may see it."""
    with contextlib.suppress(psutil.Error, PermissionError):
        for connection in psutil.net_connections(kind="tcp"):
            if _listening_on(connection, port) and connection.pid:
                return psutil.Process(connection.pid)
    return None


class Listener:
    """Tells apart the processes that listen on one port over time."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._process: psutil.Process | None = None

    def identity(self) -> str:
        """`PID@START` of the process that listens now; empty where it cannot be seen.

        A whole scan looks at every process; so the process found before is asked first.
        """
        if self._process is None or not _listens(self._process, self._port):
            self._process = listener_of(self._port)
        if self._process is None:
            return ""
        with contextlib.suppress(psutil.Error):
            return f"{self._process.pid}@{self._process.create_time():.2f}"
        return ""


def _listens(process: psutil.Process, port: int) -> bool:
    try:
        return process.is_running() and any(
            _listening_on(connection, port) for connection in process.net_connections(kind="tcp")
        )
    except psutil.Error:
        return False


def _listening_on(connection: Any, port: int) -> bool:
    """`connection` is one of psutil's two named tuples; an unbound one has an empty address."""
    return bool(connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port)
