"""Files of a remote source, brought onto the disk.

Invariant: a file has its own name only when all of it is there, has been checked, and is on the disk; until then it
ends in `.part`. A transfer that moves nothing for a while, or breaks, is begun again a few times, and no longer.
"""

import asyncio
import errno
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from aiohttp import ClientTimeout
from redis.backoff import AbstractBackoff, ExponentialWithJitterBackoff

from rollpool.schemas import EngineUnavailable, PolicyRejected, SourceFile
from rollpool.schemas.stores import told_tag
from rollpool.worker.sources.checking import WrongFile, check_file, check_tag, has_tag
from rollpool.worker.sources.working import Meter, Stop, Stopped, for_each

#: Files fetched at once: one stream of an object store is slower than a host's network.
_AT_ONCE = 4

#: Times a file is begun before the source counts as unreachable.
_ATTEMPTS = 5

#: Times a file is fetched that arrives whole but is not what was published: once more tells an accident on the way
#: from a source that was changed.
_WRONG_ATTEMPTS = 2

#: Seconds between attempts: they double from the first to the second.
_BACKOFF = ExponentialWithJitterBackoff(base=0.5, cap=10.0)

#: Seconds without a byte after which a transfer is begun again.
_STALL_S = 60.0

#: Seconds between looks whether a transfer moved, or was told to stop.
_LOOK_S = 0.1

#: Answers that say who asks is not allowed to: no further attempt mends it.
_FORBIDDEN = (401, 403)


#: Errors of the disk that is written to, not of the source.
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long an unreliable source is tried."""

    attempts: int = _ATTEMPTS
    backoff: AbstractBackoff = _BACKOFF
    stall_s: float = _STALL_S


class Fetcher:
    """Brings the files of one source into a directory.

    Args:
        source: URL of the source.
        meter: counts what is there, and says when to stop.
        patience: with transfers that break.

    Raises:
        EngineUnavailable: nothing on this host reads such a URL.
    """

    def __init__(self, source: str, meter: Meter, patience: Patience) -> None:
        self._source = source
        self._meter = meter
        self._patience = patience
        #: Set when one file failed: the others end too.
        self._failed = Stop()
        self._fs, self._root = filesystem(source)

    def fetch(self, files: Sequence[SourceFile], folder: Path) -> None:
        """Have all files in `folder`; those that are there and right are not fetched again.

        Raises:
            PolicyRejected: a file is not there, or is not what was published.
            EngineUnavailable: the source cannot be reached.
        """
        # The largest first: they take longest.
        ordered = sorted(files, key=lambda file: -file.size)
        for_each(ordered, lambda file: self._one(file, folder / file.name), at_once=_AT_ONCE, failed=self._failed)

    def _one(self, file: SourceFile, to: Path) -> None:
        if to.is_file() and self._is_right(to, file):
            self._meter.add(file.size)
            return
        to.parent.mkdir(parents=True, exist_ok=True)
        part = to.with_name(f"{to.name}.part")
        try:
            self._bring(file, part)
            part.replace(to)
        finally:
            part.unlink(missing_ok=True)

    def _is_right(self, path: Path, file: SourceFile) -> bool:
        with suppress(WrongFile):
            check_file(path, file)
            return True
        return False

    def _bring(self, file: SourceFile, part: Path) -> None:
        failures = wrong = 0
        while True:
            try:
                self._transfer(file, part)
                return
            except WrongFile as error:
                wrong += 1
                if wrong == _WRONG_ATTEMPTS:
                    raise PolicyRejected(
                        f"{file.name} at {self._source} is not what was published: {error}; publish the source anew, "
                        "and do not change its files afterwards"
                    ) from None
            except (Stopped, PolicyRejected, EngineUnavailable):
                raise
            except Exception as error:
                failures += 1
                if (final := self._final(error, file)) is not None:
                    raise final from error
                if failures == self._patience.attempts:
                    raise EngineUnavailable(
                        f"cannot fetch {file.name} from {self._source}: {error!r}, {failures} times over; see that "
                        "this host reaches it"
                    ) from error
                self._sleep(self._patience.backoff.compute(failures))

    def _final(self, error: Exception, file: SourceFile) -> Exception | None:
        """What no further attempt mends."""
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            return EngineUnavailable(
                f"no room for {file.name} from {self._source}: {error}; free the disk, or set stage_dir to another"
            )
        status = getattr(error, "status", None) or getattr(error, "code", None)
        if isinstance(error, FileNotFoundError) or status in (404, 410):
            return PolicyRejected(
                f"{self._source} is not whole: {file.name}, which was published with it, is not there; publish it anew"
            )
        if isinstance(error, PermissionError) or status in _FORBIDDEN:
            return EngineUnavailable(
                f"this host may not read {file.name} at {self._source}: {error}; give it credentials that may"
            )
        return None

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._look()
            time.sleep(min(left, _LOOK_S))

    def _look(self) -> None:
        self._meter.stop.check()
        self._failed.check()

    def _transfer(self, file: SourceFile, part: Path) -> None:
        """One attempt; what it counted is taken back when it fails."""
        counted = _Counted(file.size, self._meter, self._look)
        url = f"{self._root}/{file.name}"
        try:
            if self._fs.async_impl:
                self._drive(self._fs._get_file(url, str(part), callback=counted), counted)
            else:
                self._fs.get_file(url, str(part), callback=counted)
            self._look()
            counted.settle(part.stat().st_size)
            check_file(part, file)
            if has_tag(file):
                self._fs.invalidate_cache()
                check_tag(told_tag(self._fs.info(url)), file)
            with part.open("rb") as written:
                os.fsync(written.fileno())
        except BaseException:
            counted.take_back()
            raise

    def _drive(self, transfer: Any, counted: "_Counted") -> None:
        """Run a coroutine in fsspec's own loop, whatever it waits for: it is cancelled when it is to stop."""
        running = asyncio.run_coroutine_threadsafe(transfer, self._fs.loop)
        seen, since = counted.count, time.monotonic()
        ended = threading.Event()
        running.add_done_callback(lambda _: ended.set())
        try:
            while not ended.wait(_LOOK_S):
                self._look()
                if counted.count != seen:
                    seen, since = counted.count, time.monotonic()
                elif time.monotonic() - since > self._patience.stall_s:
                    raise TimeoutError(f"nothing came for {self._patience.stall_s:.0f} s")
        except BaseException:
            running.cancel()
            raise
        running.result()


class _Counted(fsspec.Callback):  # type: ignore[misc]
    """Counts the bytes of one attempt; what it raises ends the attempt."""

    def __init__(self, size: int, meter: Meter, look: Callable[[], None]) -> None:
        super().__init__()
        self.count = 0
        self._expected = size
        self._meter = meter
        self._look = look
        self._over = False

    def relative_update(self, inc: int = 1) -> None:
        """Called by fsspec with the size of each chunk."""
        self._look()
        if self._over:  # the transfer was given up, and does not know yet
            raise Stopped
        self.count += inc
        self._meter.add(inc)
        if self.count > self._expected:  # else a source that grew could fill the disk
            raise WrongFile(f"it has more than the {self._expected} bytes that were published")

    def absolute_update(self, value: int) -> None:
        """Called by some file systems in place of the other."""
        self.relative_update(value - self.count)

    def settle(self, size: int) -> None:
        """Count `size` bytes in all, however many were told."""
        self._meter.add(size - self.count)
        self.count = size

    def take_back(self) -> None:
        """Count none, now and later."""
        self._over = True
        with suppress(Stopped):
            self._meter.add(-self.count)
        self.count = 0


def filesystem(source: str) -> tuple[Any, str]:
    """What reads a URL, and the URL as it wants it.

    Raises:
        PolicyRejected: it is a chain of URLs.
        EngineUnavailable: nothing on this host reads it.
    """
    if "::" in source:
        raise PolicyRejected(f"{source}: chained URLs are not followed; publish the one that leads to the files")
    options: dict[str, Any] = {}
    if source.startswith(("http://", "https://")):
        # aiohttp's default ends a transfer after five minutes, however well it goes.
        options["client_kwargs"] = {"timeout": ClientTimeout(total=None, sock_connect=30.0, sock_read=_STALL_S)}
    try:
        fs, root = fsspec.core.url_to_fs(source, **options)
    except (ImportError, ValueError) as error:
        raise EngineUnavailable(f"this host cannot read {source}: {error}") from error
    return fs, root.rstrip("/")


def unreachable(source: str, name: str) -> str:
    """Why a file behind a URL cannot be asked for now; empty where its server answers, if only that it is not there.

    Of an HTTP server that does not answer, fsspec says that its files are not there.
    """
    fs, root = filesystem(source)
    try:
        fs.cat_file(f"{root}/{name}")
    except FileNotFoundError:
        return ""
    except Exception as error:
        return str(error) or type(error).__name__
    return ""


def local_name(name: str) -> str:
    """A published file's name, where it stays within the directory.

    Raises:
        PolicyRejected: it leads elsewhere.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts or name.startswith(".rollpool"):
        raise PolicyRejected(f"the policy names a file {name!r}, which is not one within its source; publish it anew")
    return str(path)
