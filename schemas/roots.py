"""Where weights may come from: the allowed roots of sources.

Invariant: nothing outside the roots passes, however it is written: through `..`, through a symbolic link, through a
name that only begins like a root, or through a URL that another reader would understand otherwise.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from rollpool.schemas.errors import PolicyRejected

#: A URL: what is before `://` is its scheme.
_URL = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://(.*)$", re.DOTALL)

#: Schemes of files on this machine.
_LOCAL_SCHEMES = ("file", "local")

#: Schemes of which hosts are the same in capitals.
_CASELESS = ("http", "https")

#: A model on the hub: `organisation/name`.
_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")

#: What some readers of URLs take for more than a character of a name: separators of another system, queries, fragments,
#: and what is dropped or cut at silently.
_TREACHEROUS = re.compile(r"[\\?#\x00-\x20\x7f]")

#: Percent signs decoded in turn: who hides `..` deeper than this is refused as well.
_MOST_DECODINGS = 4


def is_remote(location: str) -> bool:
    """True for a URL; `file://` is on this machine."""
    url = _URL.match(location)
    return url is not None and url[1].lower() not in _LOCAL_SCHEMES


def local_path(location: str) -> Path:
    """The path that a location on this machine names."""
    url = _URL.match(location)
    if url is None:
        # Not Path.expanduser, which raises for a user that is not there.
        return Path(os.path.expanduser(location))  # noqa: PTH111
    host, slash, path = url[2].partition("/")
    if host not in ("", "localhost") or not slash:
        raise PolicyRejected(f"{location}: a file URL has no host, as in file:///models/12")
    return Path("/" + path)


def is_hub_name(location: str) -> bool:
    """True for `organisation/name` where no such directory is here: only the engine can look it up."""
    return _HUB_NAME.match(location) is not None and not os.path.exists(location)  # noqa: PTH110 - it never raises


def check_roots(location: str, roots: Sequence[str]) -> None:
    """Refuse what is not at or below one of the roots; without roots everything passes.

    Args:
        location: of a source, or of a file of one.
        roots: directories, or URLs.

    Raises:
        PolicyRejected: it is outside.
    """
    if not roots or any(_is_under(location, root) for root in roots):
        return
    if is_hub_name(location):
        raise PolicyRejected(
            f"{location} is a name on the hub, and sources must be under {_listed(roots)}: download it there, or add "
            "to ROLLPOOL_MODEL_ROOTS, which is empty where everything is allowed"
        )
    raise PolicyRejected(
        f"{location} is outside the allowed roots of sources, {_listed(roots)}: move it there, or add its directory to "
        "ROLLPOOL_MODEL_ROOTS on the trainer and on the hosts"
    )


def _listed(roots: Sequence[str]) -> str:
    return ", ".join(roots)


def _is_under(location: str, root: str) -> bool:
    if is_remote(location) or is_remote(root):
        below, above = _parts(location), _parts(root)
        if below is None or above is None or below.store != above.store:
            return False
        return below.names[: len(above.names)] == above.names
    if is_hub_name(location) or "\0" in location:
        return False
    try:
        return local_path(location).resolve().is_relative_to(local_path(root).resolve())
    except (OSError, RuntimeError):  # links that lead in a circle
        return False


class _Parts(NamedTuple):
    """A URL, taken apart."""

    #: Scheme and host, which must be equal.
    store: tuple[str, str]
    names: tuple[str, ...]


def _parts(location: str) -> _Parts | None:
    """None where it is no URL, or one that may lead elsewhere than it says."""
    url = _URL.match(location)
    if url is None or _TREACHEROUS.search(location) or "::" in location:
        return None
    host, _, path = url[2].partition("/")
    names = tuple(path.rstrip("/").split("/")) if path.rstrip("/") else ()
    if any(_is_step(name) for name in (host, *names)):
        return None
    scheme = url[1].lower()
    return _Parts((scheme, host.lower() if scheme in _CASELESS else host), names)


def _is_step(name: str) -> bool:
    """True for `.` and `..`, and for what becomes one of them, or two names, once it is decoded."""
    for _ in range(_MOST_DECODINGS):
        decoded = unquote(name)
        if decoded in (".", "..") or (decoded != name and _TREACHEROUS.search(decoded.replace(" ", ""))):
            return True
        if decoded == name:
            return False
        if "/" in decoded:
            return True
        name = decoded
    return True
