"""One engine process and its whole life: launch, watch, end.

Invariants: whatever happens to this object or to the process that holds it, no process of the engine's
group stays behind (a lifeline pipe ends the group when its holder dies); and an engine that `start`
returned has generated.

The write end of the lifeline must live in this process alone: a fork of it that outlives it keeps the
engine alive.
"""

import asyncio
import contextlib
import os
import secrets
import signal
import socket
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from pathlib import Path

import psutil

from rollpool.worker.engines import diagnosis, process_group
from rollpool.worker.engines.dialects import Dialect, pick_dialect
from rollpool.worker.engines.http_engine import HttpEngine
from rollpool.worker.engines.listener import listener_of
from rollpool.worker.engines.preflight import engine_environment, probe
from rollpool.worker.engines.progress import ProgressWatch
from rollpool.worker.engines.protocol import Adapter, EngineKilled, EngineUnavailable
from rollpool.worker.engines.settings import EngineSettings

#: Names the descriptor of the pipe whose end ends the engine; read by the launch scripts.
LIFELINE_ENV = "ROLLPOOL_LIFELINE_FD"

#: Names the version of the weights it is launched on; read by engines that can change them.
WEIGHT_VERSION_ENV = "ROLLPOOL_WEIGHT_VERSION"

#: Seconds between two looks at the engine's processes; a death is told within about this.
_WATCH_S = 0.5

#: Seconds without progress after which the engine itself is asked, and between two such questions.
_ASK_AFTER_S = 5.0

#: Bytes of the log that are looked at for the cause of a death.
_TAIL_BYTES = 64 * 1024

#: Not the engine's own working processes: Python's helper outlives or precedes them without meaning.
_HELPERS = ("resource_tracker",)


class EngineProcess:
    """The one owner of one engine; start it once, stop it once, make a new one to restart."""

    #: `dialect` None: the engine's interpreter is asked at the start.
    def __init__(
        self,
        settings: EngineSettings,
        dialect: Dialect | None = None,
        *,
        log_path: Path,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._dialect = dialect
        self._log_path = log_path
        self._clock = clock
        self._progress = ProgressWatch(clock, settings.stall_timeout_s, settings.start_timeout_s)
        self._process: asyncio.subprocess.Process | None = None
        self._lifeline: int | None = None
        self._children: list[psutil.Process] = []
        self._engine: HttpEngine | None = None
        self._stopping = False
        self._gone = False

    @property
    def pid(self) -> int | None:
        """The server's process, which leads its group; None before the launch and for an attached engine."""
        return self._process.pid if self._process else None

    @property
    def log_path(self) -> Path:
        """Where the engine writes; the launch before this one is beside it, ending in `.1`."""
        return self._log_path

    async def start(self, model_path: str, *, version: int = 0, adapters: Sequence[Adapter] = ()) -> HttpEngine:
        """Launch the engine on `model_path`, or attach to it, and wait until it has generated.

        Args:
            model_path: what it serves.
            version: of those weights, by which it names them.
            adapters: given to it at its launch, for an engine that takes them only then.

        Raises:
            EngineUnavailable: it died, or did not generate in time; the message holds its last words.
                Nothing of it is left running.
        """
        if self._settings.url is not None:
            self._engine = await self._attach(self._settings.url, self._settings.start_timeout_s)
            return self._engine
        port = self._settings.port or free_port(self._settings.host)
        try:
            process = await self._launch(model_path, port, version, adapters)
            self._engine = await self._until_ready(process, port)
            self._children = _workers_of(process.pid)
        except BaseException:
            await asyncio.shield(self.kill())
            raise
        return self._engine

    async def watch(self) -> str:
        """Return, with the reason, when the engine no longer works.

        That is: it ended, a part of it died, or it stands still. It is asked about itself only while nothing
        completes; an attached one always, as its processes cannot be seen.
        """
        asking: asyncio.Task[str | None] | None = None
        asked_at = self._clock()
        try:
            while True:
                if reason := self._dead() or self._progress.stalled():
                    return reason
                if asking is not None and asking.done():
                    if reason := asking.result():
                        return reason
                    asking = None
                quiet = self._process is None or self._progress.still_for() > _ASK_AFTER_S
                if asking is None and quiet and self._clock() - asked_at > _ASK_AFTER_S:
                    asked_at = self._clock()
                    asking = asyncio.create_task(self._ask())
                await asyncio.sleep(_WATCH_S)
        finally:
            if asking is not None:
                await _drop(asking)

    async def stop(self) -> None:
        """End the engine: SIGTERM, and SIGKILL for its whole group after `stop_timeout_s`; idempotent.

        SIGKILL at once where SIGTERM may be without effect: the server waits for ever when a process of it is dead,
        and when requests were given up that still waited in its queue, which from here cannot be told from others.
        """
        settings, progress = self._settings, self._progress
        hopeless = self._dead() is not None or progress.in_flight > 0 or progress.given_up > 0
        self._stopping = True
        if self._engine is not None:
            await self._engine.close()
        if self._process is not None and not hopeless and settings.stop_timeout_s > 0:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), settings.stop_timeout_s)
        await self.kill()

    async def kill(self) -> None:
        """End the engine at once, and return when nothing of its group runs; idempotent.

        An engine keeps no state worth a drain: its JIT cache is written as it compiles.
        """
        self._stopping = True
        if self._engine is not None:
            await self._engine.close()
        if self._process is not None and not self._gone:
            await process_group.end_group(self._process.pid)
            await self._process.wait()
            self._gone = True  # from now on the system may give the group's number to others
        if self._lifeline is not None:
            os.close(self._lifeline)
            self._lifeline = None

    async def _launch(
        self, model_path: str, port: int, version: int, adapters: Sequence[Adapter]
    ) -> asyncio.subprocess.Process:
        """Start the server as leader of a group of its own, bound to this process by the lifeline."""
        settings = self._settings
        dialect = self._dialect
        if dialect is None:
            dialect = pick_dialect((await probe(settings)).sglang_jax)
        seed = _seed_of_host(settings) if dialect.compiles_seed else secrets.randbelow(2**31)
        args = dialect.launch_args(settings, model_path=model_path, port=port, seed=seed, adapters=adapters)
        launcher = settings.launcher or default_launcher()
        env = engine_environment(settings) | {WEIGHT_VERSION_ENV: str(version)}
        read_end, self._lifeline = os.pipe()
        try:
            with _fresh_log(self._log_path) as log:
                self._process = await asyncio.create_subprocess_exec(
                    str(settings.python),
                    str(launcher),
                    *args,
                    env=env | {LIFELINE_ENV: str(read_end)},
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(read_end,),
                    start_new_session=True,
                )
        except OSError as error:
            raise EngineUnavailable(
                f"cannot run {settings.python} {launcher}: {error}; set engine.python to the interpreter "
                "that has sglang-jax"
            ) from error
        finally:
            os.close(read_end)
        return self._process

    async def _until_ready(self, process: asyncio.subprocess.Process, port: int) -> HttpEngine:
        """Attach, unless the process ends first: a death while loading is told at once."""
        url = f"http://{_reachable(self._settings.host)}:{port}"
        attaching = asyncio.create_task(self._attach(url, self._settings.start_timeout_s))
        exiting = asyncio.create_task(process.wait())
        try:
            await asyncio.wait({attaching, exiting}, return_when=asyncio.FIRST_COMPLETED)
            if not attaching.done():
                killed = process.returncode == -signal.SIGKILL
                raise (EngineKilled if killed else EngineUnavailable)(self._death_note())
            engine = await self._with_last_words(attaching)
            # The server of another process on the same port would answer in place of ours, while ours still
            # loads.
            listener = await asyncio.to_thread(listener_of, port)
            if listener is not None and os.getpgid(listener.pid) != process.pid:
                await engine.close()
                raise EngineUnavailable(
                    f"process {listener.pid} listens on port {port}, not the engine just launched: end it, or "
                    "set engine.port=0 to have a free port picked"
                )
            return engine
        finally:
            await _drop(attaching)
            await _drop(exiting)

    async def _with_last_words(self, attaching: "asyncio.Task[HttpEngine]") -> HttpEngine:
        try:
            return await attaching
        except EngineUnavailable as error:
            raise EngineUnavailable(diagnosis.death_note(str(error), self._log_tail(), str(self._log_path))) from error

    async def _attach(self, url: str, timeout_s: float) -> HttpEngine:
        key = self._settings.api_key
        return await HttpEngine.attach(
            url,
            timeout_s=timeout_s,
            api_key=key.get_secret_value() if key else None,
            progress=self._progress,
        )

    def _dead(self) -> str | None:
        """The reason, when a process of the engine is gone. `/health` says 200 without a scheduler."""
        if self._stopping:
            return "the engine was stopped"
        if self._process is None:
            return None
        if self._process.returncode is not None:
            return self._death_note()
        for child in self._children:
            if not process_group.alive(child):
                note = f"the engine's process {child.pid} died, and without it the server hangs"
                return diagnosis.death_note(note, self._log_tail(), str(self._log_path))
        return None

    async def _ask(self) -> str | None:
        """Have the engine tell of itself, which shows progress where no request completes."""
        if self._engine is None:
            return None
        try:
            await self._engine.load()
        except EngineUnavailable as error:
            return str(error)
        return None

    def _death_note(self) -> str:
        code = self._process.returncode if self._process else None
        what = "ended" if code is None else diagnosis.describe_exit(code)
        return diagnosis.death_note(f"the engine {what}", self._log_tail(), str(self._log_path))

    def _log_tail(self) -> str:
        with contextlib.suppress(OSError), self._log_path.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - _TAIL_BYTES))
            return diagnosis.last_lines(log.read())
        return ""


def default_launcher() -> Path:
    """The launch script that comes with rollpool; run by path, in the engine's own interpreter."""
    return Path(str(resources.files("rollpool.worker") / "launch" / "serve.py"))


def _seed_of_host(settings: EngineSettings) -> int:
    """Another on each host, since hosts are to sample independently; the same at each launch of one host."""
    return zlib.crc32(f"{socket.gethostname()}:{settings.host_lock}".encode()) & 0x7FFFFFFF


def free_port(host: str) -> int:
    """A port that was free a moment ago."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def _reachable(host: str) -> str:
    """Where a client on this host finds a server bound to `host`."""
    if host == "0.0.0.0":
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


@contextlib.contextmanager
def _fresh_log(path: Path) -> Iterator[int]:
    """A descriptor of a new log; the one before is kept beside it, and none older."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        path.replace(path.with_name(path.name + ".1"))
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _workers_of(pid: int) -> list[psutil.Process]:
    """The children that the server cannot do without: the scheduler and the detokenizer."""
    try:
        children = psutil.Process(pid).children(recursive=True)
        return [child for child in children if not any(h in " ".join(child.cmdline()) for h in _HELPERS)]
    except psutil.Error as error:
        raise EngineUnavailable(f"the engine ended just as it was ready: {error}") from error


async def _drop(task: "asyncio.Task[object]") -> None:
    """Cancel a task that is of no more use, and let its result go."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, Exception):
        await task
