"""A directory of sources that are whole, shared by the processes of one host.

Invariant: a directory under its final name is whole: it was filled under another name, by one process at a time, and
renamed in one step with all its bytes on the disk. What some process keeps is never removed. Both rest on locks of the
kernel on the directories themselves, which a process cannot leave behind.
"""

import contextlib
import fcntl
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollpool.schemas import EngineUnavailable, PolicyRejected
from rollpool.worker.sources.budget import Entry, Room, evictions, no_room
from rollpool.worker.sources.working import Stop

log = logging.getLogger(__name__)

#: In each directory: what it is, and what it holds once it is whole.
MARKER = ".rollpool.json"

#: Ends of the names of directories that are being filled, or were when their process ended, and of those on their way
#: out; the engine is given neither.
_PARTIAL, _DOOMED = ".partial", ".rollpool-doomed"

#: Seconds between looks at a lock that another process has.
_LOOK_S = 0.1


@dataclass(slots=True)
class _Hold:
    """A directory that this process keeps."""

    fd: int
    #: Calls that have it in hand; while there are any, `keep` does not let go of it.
    pins: int = 0


class Shelf:
    """Sources under one directory and within one budget.

    Args:
        directory: made when it is first needed.
        budget_bytes: all of it together; 0: what the disk has, less a tenth of it.
        clock: seconds; kept with each source as the time of its last use.
        disk: bytes of the disk in all, and free.
    """

    def __init__(
        self,
        directory: Path,
        budget_bytes: int,
        *,
        clock: Callable[[], float] = time.time,
        disk: Callable[[Path], tuple[int, int]] = lambda path: shutil.disk_usage(path)[::2],
    ) -> None:
        self.directory = directory.expanduser().absolute()
        self._budget = budget_bytes
        self._clock = clock
        self._disk = disk
        self._holds: dict[str, _Hold] = {}
        self._mutex = threading.Lock()

    def keep(self, paths: Iterable[str]) -> None:
        """Keep these, and let go of all others but those that a call has in hand; paths elsewhere do not matter."""
        names = {name for path in paths if (name := self._name_of(path))}
        with self._mutex:
            for name in [name for name, hold in self._holds.items() if name not in names and not hold.pins]:
                _unlock(self._holds.pop(name).fd)
            for name in names - self._holds.keys():
                if (fd := _lock(self.directory / name, fcntl.LOCK_SH)) is not None:
                    self._holds[name] = _Hold(fd)
                    self._touch(self.directory / name)

    def _name_of(self, path: str) -> str:
        absolute = Path(path).expanduser().absolute()
        return absolute.name if absolute.parent == self.directory else ""

    @contextlib.contextmanager
    def pinned(self, *paths: str) -> Iterator[None]:
        """Within, these stay where they are, if they are here."""
        with contextlib.ExitStack() as stack:
            for name in {name for path in paths if (name := self._name_of(path))}:
                if self._pin(name):
                    stack.callback(self.unpin, name)
            yield

    def _pin(self, name: str) -> bool:
        """Hold a directory for a call; False when it is not there, or is about to go."""
        with self._mutex:
            if name not in self._holds:
                if (fd := _lock(self.directory / name, fcntl.LOCK_SH)) is None:
                    return False
                self._holds[name] = _Hold(fd)
            self._holds[name].pins += 1
            return True

    def unpin(self, name: str) -> None:
        """The call that had it in hand is over: the next `keep` decides."""
        with self._mutex:
            self._holds[name].pins -= 1

    def obtain(
        self,
        name: str,
        size: int,
        what: str,
        fill: Callable[[Path], None],
        stop: Stop,
        *,
        resumable: bool = False,
    ) -> Path:
        """The directory of this name, whole; made where it is not there. It is pinned: see `unpin`.

        Args:
            name: says everything of which the content is a function.
            size: bytes it will have.
            what: it is, for people.
            fill: writes the files into a directory, in which those of an attempt that was interrupted may be.
            stop: looked at while others are waited for.
            resumable: leave the directory to the next attempt when `fill` fails, but for PolicyRejected.

        Raises:
            PolicyRejected: there is no room, or `fill` says so.
            EngineUnavailable: the disk does not take it.
        """
        path = self.directory / name
        while not self._take(path):
            with self._turned_into_errors(what):
                if (partial := self._begin(name, size, what, stop)) is not None:
                    self._finish(partial, path, fill, what, size, resumable)
                    continue
            stop.sleep(_LOOK_S)  # another call, or another process, fills it
        return path

    def _take(self, path: Path) -> bool:
        if not self._pin(path.name):
            return False
        if _is_whole(path):
            self._touch(path)
            return True
        with self._mutex:
            hold = self._holds[path.name]
            hold.pins -= 1
            if hold.pins:
                raise EngineUnavailable(f"{path} was changed while it is in use; restart this worker to have it anew")
            _unlock(self._holds.pop(path.name).fd)
        return False

    def _begin(self, name: str, size: int, what: str, stop: Stop) -> "_Partial | None":
        """A directory to fill, locked, for which there is room; None while another has it."""
        self._make_directory()
        with self._one_at_a_time(stop):
            self._remove_doomed()
            final, partial = self.directory / name, self.directory / f"{name}{_PARTIAL}"
            if final.exists():
                fd = _lock(final, fcntl.LOCK_EX)
                if fd is None or _is_whole(final):
                    _unlock(fd)
                    return None
                log.warning("%s is not whole any more: it is made anew", final)
                self._remove(final, fd)
            fd = _lock(partial, fcntl.LOCK_EX)
            if fd is None and partial.exists():
                return None
            need = Entry(name=partial.name, reserved=size, on_disk=_bytes_in(partial), used_at=0.0, kept=True)
            try:
                self._make_room(need, what)
                partial.mkdir(exist_ok=True)
                if fd is None and (fd := _lock(partial, fcntl.LOCK_EX)) is None:
                    return None
                _write_marker(partial, {"what": what, "bytes": size})
            except BaseException:
                _unlock(fd)
                raise
            return _Partial(partial, fd)

    def _finish(
        self, partial: "_Partial", path: Path, fill: Callable[[Path], None], what: str, size: int, resumable: bool
    ) -> None:
        try:
            fill(partial.path)
            files = {str(file.relative_to(partial.path)): file.stat().st_size for file in _files(partial.path)}
            _write_marker(partial.path, {"what": what, "bytes": max(size, sum(files.values())), "files": files})
            self._touch(partial.path)
            partial.path.rename(path)
            _sync(self.directory)
        except BaseException as error:
            if isinstance(error, PolicyRejected) or not resumable:
                shutil.rmtree(partial.path, ignore_errors=True)
            raise
        finally:
            _unlock(partial.fd)

    def _make_room(self, need: Entry, what: str) -> None:
        """Remove what was used least recently, as far as it has to be."""
        locks = dict[str, int]()
        try:
            entries = [self._entry(path, locks) for path in self._directories() if path.name != need.name]
            total, free = self._disk(self.directory)
            room = Room(budget=self._budget or None, free=free if self._budget else free - total // 10)
            chosen = evictions(entries, need, room)
            if chosen is None:
                raise no_room(what, str(self.directory), entries, need, room)
            for name in locks.keys() - {entry.name for entry in chosen}:
                _unlock(locks.pop(name))
            for entry in chosen:
                log.info("removing %s, last used %.0f s ago, to make room for %s", *self._said(entry), what)
                self._remove(self.directory / entry.name, locks.pop(entry.name))
        finally:
            for fd in locks.values():
                _unlock(fd)

    def _said(self, entry: Entry) -> tuple[Path, float]:
        return self.directory / entry.name, self._clock() - entry.used_at

    def _entry(self, path: Path, locks: dict[str, int]) -> Entry:
        fd = _lock(path, fcntl.LOCK_EX)
        if fd is not None:
            locks[path.name] = fd
        on_disk = _bytes_in(path)
        marker = _read_marker(path)
        try:
            used_at = (path / MARKER).stat().st_mtime
        except OSError:
            used_at = 0.0
        reserved = max(on_disk, int(marker.get("bytes", 0)))
        return Entry(name=path.name, reserved=reserved, on_disk=on_disk, used_at=used_at, kept=fd is None)

    def _directories(self) -> Iterator[Path]:
        """Those of ours: whatever else is there is not ours to remove."""
        return (path for path in sorted(self.directory.iterdir()) if (path / MARKER).is_file())

    def _remove(self, path: Path, fd: int) -> None:
        """A crash in the middle leaves it under a name that is removed by whoever comes next."""
        doomed = path.with_name(path.name + _DOOMED)
        path.rename(doomed)
        shutil.rmtree(doomed)
        _unlock(fd)

    def _remove_doomed(self) -> None:
        for path in self.directory.glob(f"*{_DOOMED}"):
            shutil.rmtree(path, ignore_errors=True)

    def _touch(self, path: Path) -> None:
        now = self._clock()
        with contextlib.suppress(OSError):
            os.utime(path / MARKER, (now, now))

    def _make_directory(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        if self.directory.stat().st_uid not in (os.geteuid(), 0):
            raise EngineUnavailable(
                f"stage_dir: {self.directory} belongs to another user, who could change what is served; name another"
            )

    @contextlib.contextmanager
    def _one_at_a_time(self, stop: Stop) -> Iterator[None]:
        """Of all processes that share the directory, one decides what is removed."""
        fd = os.open(self.directory / ".lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
        try:
            while not _try_lock(fd, fcntl.LOCK_EX):
                stop.sleep(_LOOK_S)
            yield
        finally:
            _unlock(fd)

    @contextlib.contextmanager
    def _turned_into_errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise EngineUnavailable(
                f"cannot put {what} into {self.directory}: {error}; see that the disk has room and takes writes, or "
                "set stage_dir to another"
            ) from error


@dataclass(frozen=True, slots=True)
class _Partial:
    path: Path
    fd: int


def _lock(path: Path, how: int) -> int | None:
    """A descriptor that holds a lock on a directory; None when it is not there, or others hold it otherwise."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        # Between the two calls it may have been removed, and another may stand there.
        if _try_lock(fd, how) and os.path.samestat(os.fstat(fd), path.stat()):
            return fd
    except OSError:
        pass
    _unlock(fd)
    return None


def _try_lock(fd: int, how: int) -> bool:
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _unlock(fd: int | None) -> None:
    """Let go of a lock, also of a copy that a forked child has."""
    if fd is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


def _files(path: Path) -> Iterator[Path]:
    return (file for file in path.rglob("*") if file.is_file() and not file.name.startswith(MARKER))


def _bytes_in(path: Path) -> int:
    size = 0
    for file in _files(path):
        with contextlib.suppress(OSError):  # it goes away meanwhile
            size += file.stat().st_size
    return size


def _is_whole(path: Path) -> bool:
    """Whether the files are those that it was whole with."""
    files = _read_marker(path).get("files")
    if not isinstance(files, dict):
        return False
    try:
        return all((path / name).stat().st_size == size for name, size in files.items())
    except OSError:
        return False


def _read_marker(path: Path) -> dict[str, Any]:
    try:
        read = json.loads((path / MARKER).read_text())
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}


def _write_marker(path: Path, content: dict[str, Any]) -> None:
    """Replaces the one before in one step, and is on the disk when it returns."""
    new = path / f"{MARKER}.new"
    with new.open("w") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path / MARKER)
    _sync(path)


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
