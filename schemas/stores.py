"""Reading a source where it lies: in a directory, or behind a URL.

Invariant: what goes wrong is a `PolicyRejected` that names the file; nothing is read but what was asked for, so that
to look at weights behind a URL does not download them.
"""

import base64
import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from rollpool.schemas.errors import PolicyRejected
from rollpool.schemas.roots import is_remote, local_path

#: Bytes read at once: large enough for a disk or a network file system at full speed.
CHUNK = 4 << 20

#: Schemes that cannot list a directory: each file is asked for by name.
_UNLISTED = ("http", "https")


class Store(Protocol):
    """The files of one source."""

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""

    def read(self, name: str, count: int) -> bytes:
        """The first bytes of a file, fewer where it ends."""

    def path(self, name: str) -> str:
        """The file's location, for messages and for the roots."""

    def tag(self, name: str, read: Callable[[int], None]) -> str:
        """Its digest, as `SourceFile` has it; `read` is told of the bytes that were read for it."""


def open_store(location: str) -> Store:
    """The store of a source.

    Raises:
        PolicyRejected: there is nothing, or nothing here can read it.
    """
    return RemoteStore(location) if is_remote(location) else LocalStore(location)


class LocalStore:
    """A directory on this machine."""

    def __init__(self, location: str) -> None:
        self._directory = local_path(location)
        if not self._directory.is_dir():
            what = "a file" if self._directory.exists() else "nothing"
            raise PolicyRejected(
                f"{location}: a source is a directory, and there is {what} at this path on this machine; where only "
                "the hosts see it, publish it with check=False"
            )

    def size(self, name: str) -> int | None:
        """See `Store`."""
        with _reading(self.path(name)):
            try:
                path = self._directory / name
                return path.stat().st_size if path.is_file() else None
            except FileNotFoundError:
                return None

    def read(self, name: str, count: int) -> bytes:
        """See `Store`."""
        with _reading(self.path(name)), (self._directory / name).open("rb") as file:
            return file.read(count)

    def path(self, name: str) -> str:
        """See `Store`."""
        return str(self._directory / name)

    def tag(self, name: str, read: Callable[[int], None]) -> str:
        """See `Store`."""
        with _reading(self.path(name)):
            return f"sha256:{digest_of(self._directory / name, 'sha256', read)}"


class RemoteStore:
    """A directory behind a URL that fsspec knows."""

    def __init__(self, location: str) -> None:
        self._location = location.rstrip("/")
        self._files, self._root = _file_system(location)
        self._infos: dict[str, Mapping[str, Any] | None] = {}
        protocol = self._files.protocol
        self._listed = not set(_UNLISTED) & {protocol, *([] if isinstance(protocol, str) else protocol)}
        if self._listed:
            self._list()

    def _list(self) -> None:
        with _reading(self._location):
            # Listings are remembered for the life of the process, and the trainer has written since.
            self._files.invalidate_cache()
            try:
                entries = self._files.ls(self._root, detail=True)
            except FileNotFoundError:
                raise PolicyRejected(f"{self._location}: there is no such directory, or it is empty") from None
        for entry in entries:
            if entry.get("type") == "file":
                self._infos[str(entry["name"]).rstrip("/").rpartition("/")[2]] = entry

    def _info(self, name: str) -> Mapping[str, Any] | None:
        if name not in self._infos and not self._listed:
            with _reading(self.path(name)):
                try:
                    self._infos[name] = self._files.info(f"{self._root}/{name}")
                except FileNotFoundError:
                    self._infos[name] = None
        return self._infos.get(name)

    def size(self, name: str) -> int | None:
        """See `Store`."""
        info = self._info(name)
        if info is None:
            return None
        if not isinstance(info.get("size"), int):
            raise PolicyRejected(
                f"{self.path(name)}: its server does not tell its size, so a copy could not be checked"
            )
        return int(info["size"])

    def read(self, name: str, count: int) -> bytes:
        """See `Store`."""
        # Always from the start, which servers without ranges can do too; without a cache, which would read ahead.
        with _reading(self.path(name)), self._files.open(f"{self._root}/{name}", "rb", cache_type="none") as file:
            return bytes(file.read(count))

    def path(self, name: str) -> str:
        """See `Store`."""
        return f"{self._location}/{name}"

    def tag(self, name: str, read: Callable[[int], None]) -> str:
        """See `Store`; it is the server's word, nothing is read."""
        return told_tag(self._info(name) or {})


def told_tag(info: Mapping[str, Any]) -> str:
    """The best digest or tag among what a store tells of a file; empty where it tells none."""
    found = {name.lower().replace("-", ""): value for name, value in info.items() if isinstance(value, str) and value}
    for told in ("md5hash", "contentmd5"):
        if told in found:
            with contextlib.suppress(ValueError):
                return f"md5:{base64.b64decode(found[told], validate=True).hex()}"
    for kind in ("crc32c", "etag"):
        if kind in found:
            return f"{kind}:{found[kind].removeprefix('W/').strip(chr(34))}"
    return ""


def digest_of(path: Path, algorithm: str, read: Callable[[int], None] = lambda count: None) -> str:
    """The digest of a file, in hex; `read` is told of each chunk's bytes."""
    made = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            made.update(chunk)
            read(len(chunk))
    return made.hexdigest()


def _file_system(location: str) -> tuple[Any, str]:
    """Fsspec's file system, and the location as it calls it."""
    if "::" in location:
        raise PolicyRejected(f"{location}: chained URLs are not followed; give the one that leads to the files")
    try:
        import fsspec
    except ImportError:
        raise PolicyRejected(
            f"{location}: to read it takes fsspec: pip install 'rollpool[remote]', or publish with check=False"
        ) from None
    scheme = location.partition("://")[0]
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        raise PolicyRejected(
            f"{location}: fsspec needs a package for {scheme}://: {error} (gs:// needs gcsfs, s3:// needs s3fs)"
        ) from error
    except ValueError:
        raise PolicyRejected(f"{location}: fsspec knows no {scheme}://; give a path, or a URL such as gs://…") from None
    with _reading(location):
        files, root = fsspec.url_to_fs(location)
        return files, str(root).rstrip("/")


@contextlib.contextmanager
def _reading(what: str) -> Iterator[None]:
    """Each store has errors of its own; all of them mean that this cannot be read."""
    try:
        yield
    except PolicyRejected:
        raise
    except Exception as error:
        words = str(error) or type(error).__name__
        raise PolicyRejected(f"cannot read {what}: {words}; mend its access, and publish again") from error
