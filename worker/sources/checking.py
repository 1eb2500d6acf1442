"""Whether a file on the disk is the one that was published.

Invariant: a file that passes has the published size, and the published digest where one can be computed from its
bytes; a store's own tag cannot, and is compared with what the store tells.
"""

from collections.abc import Callable
from pathlib import Path

from rollpool.schemas import SourceFile
from rollpool.schemas.stores import digest_of

#: Digests that are computed here.
_COMPUTED = ("sha256", "md5")


class WrongFile(Exception):  # noqa: N818 - callers turn it into the policy's rejection
    """A file is not the one that was published; the message says in what it differs."""


def check_file(path: Path, file: SourceFile, on_bytes: Callable[[int], None] = lambda _: None) -> None:
    """Compare a file with what was published; it is read where a digest was.

    Args:
        path: of the file.
        file: as it was published.
        on_bytes: told the size of each chunk that was read; what it raises ends the reading.

    Raises:
        WrongFile: it differs.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    if size != file.size:
        raise WrongFile(f"it has {size} bytes, {file.size} were published")
    kind, _, expected = file.digest.partition(":")
    if kind in _COMPUTED and (found := digest_of(path, kind, on_bytes)) != expected.lower():
        raise WrongFile(f"its {kind} is {found}, {expected} was published")


def check_tag(told: str, file: SourceFile) -> None:
    """Compare what a store tells of a file now with what it told when the file was published.

    Args:
        told: as in `SourceFile`; empty: it tells nothing.
        file: as it was published.

    Raises:
        WrongFile: both are of one kind, and differ.
    """
    kind = file.digest.partition(":")[0]
    if kind and told.partition(":")[0] == kind and told != file.digest:
        raise WrongFile(f"its store tells {told} of it, {file.digest} was published")


def has_tag(file: SourceFile) -> bool:
    """True where the digest is the store's own, and cannot be computed here."""
    return bool(file.digest) and file.digest.partition(":")[0] not in _COMPUTED
