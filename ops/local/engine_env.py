"""The virtual environment of the CPU engine: sglang-jax 0.0.1.post1, made once for each Python version.

The engine has an environment of its own because its pins are strict (jax, numpy, pydantic, transformers) and
because its dependencies break one another's `msgpack` in whatever environment they land.

Invariant: a path that this module returns is the Python of a complete environment whose `msgpack` was seen
to work; an environment without its stamp is never used, only made again.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from rollpool.schemas.errors import RollpoolError

CACHE_ENV = "ROLLPOOL_CACHE"
PYTHON_ENV = "ROLLPOOL_ENGINE_PYTHON"

ENGINE_VERSION = "0.0.1.post1"
# The release's own requirements bring all that serving on CPU needs, and pin what must be pinned (jax 0.6.2,
# flax 0.10, transformers 4.55). They bring libtpu too, through `jax[tpu]`; it does nothing on CPU, and leaving
# it out would mean to install without dependencies and to keep that list here.
REQUIREMENT = f"sglang-jax=={ENGINE_VERSION}"

_STAMP = "rollpool-complete"
_TAIL_LINES = 20
# One try at each file is too few for an install of this size.
_PIP_OPTIONS = ("--disable-pip-version-check", "--no-input", "--retries", "5")
# See the probe of the engine: the old package unpacks strings as bytes.
_MSGPACK_CHECK = (
    "import msgpack, sys; want = {'text': b'bytes'}; "
    "sys.exit(msgpack.unpackb(msgpack.packb(want, use_bin_type=True)) != want)"
)


def ensure_engine_env(root: Path | None = None, *, echo: Callable[[str], None] = print) -> Path:
    """Return the Python of an environment that holds the CPU engine, making it if need be.

    Callers in other processes wait for the one that is making it. `ROLLPOOL_ENGINE_PYTHON`, where set, is
    returned as it is: nothing is installed or checked.

    Args:
        root: The folder that holds such environments; by default `$ROLLPOOL_CACHE`, else
            `~/.cache/rollpool`.
        echo: Takes lines of progress.

    Returns:
        The path of the environment's Python.

    Raises:
        RollpoolError: `ROLLPOOL_ENGINE_PYTHON` names no file, or the environment could not be made; the
            message has the end of pip's output.
    """
    if given := os.environ.get(PYTHON_ENV):
        if not Path(given).is_file():
            raise RollpoolError(f"{PYTHON_ENV}={given} is no file; name the engine's Python, or unset it")
        return Path(given)
    # Absolute and not resolved: an environment's Python is a link, and the link is what makes it one.
    folder = (root or _default_root()).absolute() / environment_name()
    if not _is_complete(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(folder.name + ".lock"), echo):
            if not _is_complete(folder):  # Else another process made it while this one waited.
                _make(folder, echo)
    return _python_of(folder)


def environment_name() -> str:
    """Name the environment's folder after what must not mix: the engine's version and the Python's."""
    return f"engine-{ENGINE_VERSION}-py{sys.version_info.major}.{sys.version_info.minor}"


def _default_root() -> Path:
    given = os.environ.get(CACHE_ENV)
    return Path(given).expanduser() if given else Path.home() / ".cache" / "rollpool"


def _python_of(folder: Path) -> Path:
    return folder / "bin" / "python"


def _is_complete(folder: Path) -> bool:
    # The Python is asked for too: it is a link, and its interpreter may have been removed since.
    return (folder / _STAMP).is_file() and _python_of(folder).exists()


def _locked(path: Path, echo: Callable[[str], None]) -> FileLock:
    """Take the lock, saying so if another process has it. The system frees it when its holder ends."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0.1)
    except Timeout:
        echo(f"Another process is making the engine's environment ({path.stem}); waiting for it.")
        lock.acquire()
    return lock


def _make(folder: Path, echo: Callable[[str], None]) -> None:
    if folder.exists():
        echo(f"Removing the unfinished environment {folder}.")
        shutil.rmtree(folder)
    echo(f"Making the engine's environment in {folder}: {REQUIREMENT}, once; some 1.5 GB of disk.")
    venv.EnvBuilder(with_pip=True, symlinks=True).create(folder)
    python = _python_of(folder)
    _pip(python, ["install", REQUIREMENT], echo)
    _mend_msgpack(python, echo)
    (folder / _STAMP).write_text(REQUIREMENT + "\n")
    echo("The engine's environment is ready.")


def _mend_msgpack(python: Path, echo: Callable[[str], None]) -> None:
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


def _pip(python: Path, arguments: Sequence[str], echo: Callable[[str], None]) -> None:
    """Run pip in the environment, echoing its main steps.

    Raises:
        RollpoolError: pip failed.
    """
    options = _PIP_OPTIONS[:2] if arguments[0] == "uninstall" else _PIP_OPTIONS
    command = [str(python), "-m", "pip", *arguments, *options]
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            tail.append(line.rstrip())
            if line.startswith(("Collecting", "Installing", "Successfully")):
                echo(line.rstrip()[:100])
    if process.returncode != 0:
        shown = "\n".join(f"  {line}" for line in tail)
        raise RollpoolError(
            f"pip {' '.join(arguments)} failed with status {process.returncode}:\n{shown}\n"
            f"See that this machine reaches a package index (PIP_INDEX_URL) and has some 1.5 GB of disk free, then "
            f"run it again; or set {PYTHON_ENV} to a Python that already has {REQUIREMENT}."
        )
