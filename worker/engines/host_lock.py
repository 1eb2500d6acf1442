"""One worker a host.

Invariant: of all processes that name the same lock file, one holds it, and its death lets go of it: the
lock is the kernel's, the file beside it only tells people who.
"""

import contextlib
import os
from pathlib import Path

import filelock

from rollpool.worker.engines.protocol import EngineUnavailable


class HostLock:
    """Held while this worker owns the host's engine; acquiring it twice is acquiring it once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._holder = path.with_name(path.name + ".pid")
        self._lock = filelock.FileLock(path, mode=0o666)

    def acquire(self) -> None:
        """Take the host.

        Raises:
            EngineUnavailable: another process has it; the message names which.
        """
        if self._lock.is_locked:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise EngineUnavailable(
                f"{self._who()} holds {self._path}, so another worker already owns this host's engine, and a TPU "
                "serves one process: end that worker, or, where several share a machine without a TPU, give "
                "each its own engine.host_lock"
            ) from None
        except OSError as error:
            raise EngineUnavailable(
                f"cannot open the lock {self._path}: {error}; set engine.host_lock to a writable place"
            ) from error
        # A note for people: without it the lock works as well.
        with contextlib.suppress(OSError):
            self._holder.write_text(f"{os.getpid()}\n")

    def release(self) -> None:
        """Let another worker have the host; harmless to repeat."""
        if self._lock.is_locked:
            self._holder.unlink(missing_ok=True)
            self._lock.release()

    def _who(self) -> str:
        with contextlib.suppress(OSError):
            if pid := self._holder.read_text().strip():
                return f"process {pid}"
        return "another process"
