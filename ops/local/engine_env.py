"""The virtual environment of the CPU engine: sglang-jax 0.0.1.post1, made once for each Python version.

The engine has an environment of its own because its pins are strict (jax, numpy, pydantic, transformers) and
because its dependencies break one another's `msgpack` in whatever environment they land.

Invariant: a path that this module returns is the Python of a complete environment whose `msgpack` was seen
to work; an environment without its stamp is never used, only made again.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import venv
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from rollpool.ops.local.child import dies_with_us
from rollpool.schemas.errors import RollpoolError

CACHE_ENV = "ROLLPOOL_CACHE"
PYTHON_ENV = "ROLLPOOL_LOCAL_ENGINE_PYTHON"

ENGINE_VERSION = "0.0.1.post1"
# The release's own requirements bring all that serving on CPU needs, and pin what must be pinned (jax 0.6.2,
# flax 0.10, transformers 4.55). They bring libtpu too, through `jax[tpu]`; it does nothing on CPU, and leaving
# it out would mean to install without dependencies and to keep that list here.
REQUIREMENT = f"sglang-jax=={ENGINE_VERSION}"

#: Seconds between two lines of progress while pip works.
HEARTBEAT_S = 15.0

_STAMP = "rollpool-complete"
_TAIL_LINES = 20
# One try at each file is too few for an install of this size.
_PIP_OPTIONS = ("--disable-pip-version-check", "--no-input", "--retries", "5")
# See the probe of the engine: the old package unpacks strings as bytes.
_MSGPACK_CHECK = (
    "import msgpack, sys; want = {'text': b'bytes'}; "
    "sys.exit(msgpack.unpackb(msgpack.packb(want, use_bin_type=True)) != want)"
)


Echo = Callable[[str], None]

#: Flushed: into a pipe or a file, lines that wait in a buffer are no progress.
_print: Echo = functools.partial(print, flush=True)


def ensure_engine_env(root: Path | None = None, *, echo: Echo = _print) -> Path:
    """Return the Python of an environment that holds the CPU engine, making it if need be.

    Callers in other processes wait for the one that is making it. `ROLLPOOL_LOCAL_ENGINE_PYTHON`, where set, is
    returned as it is: nothing is installed or checked.

    Args:
        root: The folder that holds such environments; by default that of `cache_dir`.
        echo: Takes lines of progress: one at the beginning, one at the end, and every `HEARTBEAT_S` one between.

    Returns:
        The path of the environment's Python.

    Raises:
        RollpoolError: `ROLLPOOL_LOCAL_ENGINE_PYTHON` names no file, or the environment could not be made; the
            message has the end of pip's output.
    """
    if given := os.environ.get(PYTHON_ENV):
        if not Path(given).is_file():
            raise RollpoolError(f"{PYTHON_ENV}={given} is no file; name the engine's Python, or unset it")
        return Path(given)
    # Absolute and not resolved: an environment's Python is a link, and the link is what makes it one.
    folder = (root or cache_dir()).absolute() / environment_name()
    if not _is_complete(folder):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _locked(folder.with_name(folder.name + ".lock"), echo):
                if not _is_complete(folder):  # Else another process made it while this one waited.
                    _make(folder, echo)
        except OSError as error:
            raise RollpoolError(
                f"cannot make the engine's environment {folder}: {error}; set {CACHE_ENV} to a folder that takes "
                f"1.5 GB, or {PYTHON_ENV} to a Python that already has {REQUIREMENT}"
            ) from error
    return _python_of(folder)


def environment_name() -> str:
    """Name the environment's folder after what must not mix: the engine's version and the Python's."""
    return f"engine-{ENGINE_VERSION}-py{sys.version_info.major}.{sys.version_info.minor}"


def cache_dir() -> Path:
    """Where engines, models and JIT caches are kept between runs: `$ROLLPOOL_CACHE`, or under the user's cache.

    Absolute: it is named to processes that may run elsewhere.
    """
    given = os.environ.get(CACHE_ENV)
    return (Path(given).expanduser() if given else Path.home() / ".cache" / "rollpool").absolute()


def _python_of(folder: Path) -> Path:
    return folder / "bin" / "python"


def _is_complete(folder: Path) -> bool:
    # The Python is asked for too: it is a link, and its interpreter may have been removed since.
    return (folder / _STAMP).is_file() and _python_of(folder).exists()


@contextlib.contextmanager
def _locked(path: Path, echo: Echo) -> Iterator[None]:
    """Hold the lock, saying so if another process has it. The system frees it when its holder ends."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0.1)
    except Timeout:
        echo(f"Another process is making the engine's environment ({path.stem}); waiting for it.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _make(folder: Path, echo: Echo) -> None:
    if folder.exists():
        shutil.rmtree(folder)  # unfinished
    begin = time.monotonic()
    echo(f"Installing {REQUIREMENT} in {folder}, once: some 1.5 GB, and minutes that depend on the network.")
    _create(folder)
    python = _python_of(folder)
    _pip(python, ["install", REQUIREMENT], echo)
    _mend_msgpack(python, echo)
    (folder / _STAMP).write_text(REQUIREMENT + "\n")
    echo(f"The engine's environment is ready after {time.monotonic() - begin:.0f} s.")


def _create(folder: Path) -> None:
    """Make an environment with pip and nothing else.

    Raises:
        RollpoolError: this Python has no pip to give.
    """
    try:
        venv.EnvBuilder(with_pip=True, symlinks=True).create(folder)
    except subprocess.CalledProcessError as error:
        raise RollpoolError(
            f"{sys.executable} cannot make a virtual environment: {error}; install what it lacks (on Debian and "
            f"Ubuntu apt-get install python3-venv), or set {PYTHON_ENV} to a Python that already has {REQUIREMENT}"
        ) from error


def _mend_msgpack(python: Path, echo: Echo) -> None:
    """See that `msgpack` unpacks strings as strings, and let the right package write the module if not."""
    if _msgpack_works(python):
        return
    echo("Mending msgpack: msgpack-python, of the engine's requirements, wrote over it.")
    # Uninstalling takes the files that both own: so the right one is installed again, whole.
    _pip(python, ["uninstall", "-y", "msgpack-python"], echo)
    _pip(python, ["install", "--force-reinstall", "--no-deps", "msgpack"], echo)
    if not _msgpack_works(python):
        raise RollpoolError(
            f"msgpack in {python.parent.parent} still unpacks wrongly after its repair; remove that folder and "
            f"try again, or set {PYTHON_ENV} to a Python that can serve"
        )


def _msgpack_works(python: Path) -> bool:
    # -I: neither the caller's PYTHONPATH nor its folder may lend the environment a msgpack.
    return subprocess.run([str(python), "-I", "-c", _MSGPACK_CHECK], capture_output=True).returncode == 0


def _pip(python: Path, arguments: Sequence[str], echo: Echo) -> None:
    """Run pip in the environment, echoing now and then what it does.

    Raises:
        RollpoolError: pip failed.
    """
    options = _PIP_OPTIONS[:2] if arguments[0] == "uninstall" else _PIP_OPTIONS
    # Killed, we let go of the lock: a pip that went on would write into what the next caller makes.
    command = [*dies_with_us(), str(python), "-m", "pip", *arguments, *options]
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    progress, begin = _Progress(), time.monotonic()
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,  # so that what it runs can be ended with it
    ) as process:
        assert process.stdout is not None
        reader = threading.Thread(target=progress.read, args=(process.stdout,), name="rollpool-pip", daemon=True)
        reader.start()
        try:
            while not progress.ended.wait(HEARTBEAT_S):
                echo(f"  {time.monotonic() - begin:.0f} s: {progress.doing}")
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            reader.join()
    if process.returncode != 0:
        shown = "\n".join(f"  {line}" for line in progress.tail)
        raise RollpoolError(
            f"pip {' '.join(arguments)} failed with status {process.returncode}:\n{shown}\n"
            f"See that this machine reaches a package index (PIP_INDEX_URL) and has some 1.5 GB of disk free, then "
            f"run it again; or set {PYTHON_ENV} to a Python that already has {REQUIREMENT}."
        )


class _Progress:
    """What pip said last, read while somebody else looks."""

    def __init__(self) -> None:
        self.tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self.doing = "starting pip"
        self.ended = threading.Event()

    def read(self, lines: Iterable[str]) -> None:
        """Read to the end."""
        try:
            for line in lines:
                self.tail.append(line.rstrip())
                self.doing = _doing(line) or self.doing
        finally:
            self.ended.set()


def _doing(line: str) -> str | None:
    """Pip's line in a few words; None for one that begins no step."""
    verb, _, rest = line.strip().partition(" ")
    match verb:
        case "Collecting":
            return f"collecting {rest.split()[0]}" if rest else None
        case "Downloading":
            name, _, size = rest.partition(" ")
            # A file's name begins with the package's, and is long.
            return f"downloading {name.rpartition('/')[2].partition('-')[0]} {size}".rstrip()
        case "Building":
            return f"building {rest}"[:80]
        case "Installing" if "collected packages:" in rest:
            return f"installing {rest.count(',') + 1} packages"
        case "Uninstalling":
            return f"uninstalling {rest.rstrip(':')}"
    return None
