"""What a server's URL says, and how a message may show it.

Invariant: no password leaves this module in a message, whatever form the URL has and however malformed it is.
"""

import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, parse_qsl, unquote, urlencode

from rollpool.schemas.errors import SettingsError

#: What a URL may look like, for messages.
FORMS = (
    "a URL is redis://[user:password@]host:port/db, unix:///path?db=0, "
    "redis+sentinel://[user:password@]host:port,host:port/SERVICE/db[?sentinel_password=…] or "
    "redis+cluster://[user:password@]host:port,host:port; with rediss in place of redis for TLS, and then "
    "?ssl_ca_certs=FILE; a password is percent-encoded"
)


class Kind(Enum):
    """How the server is found."""

    SERVER = "server"
    SENTINEL = "sentinel"
    CLUSTER = "cluster"


#: Every scheme: how the server is found, and whether over TLS.
_SCHEMES = {
    "redis": (Kind.SERVER, False),
    "rediss": (Kind.SERVER, True),
    "unix": (Kind.SERVER, False),
    "redis+sentinel": (Kind.SENTINEL, False),
    "rediss+sentinel": (Kind.SENTINEL, True),
    "redis+cluster": (Kind.CLUSTER, False),
    "rediss+cluster": (Kind.CLUSTER, True),
}
_DEFAULT_PORTS = {Kind.SERVER: 6379, Kind.SENTINEL: 26379, Kind.CLUSTER: 6379}

_URL = re.compile(
    r"(?P<scheme>[a-z+]+)://((?P<login>[^/?#@]*)@)?(?P<places>[^/?#@]*)(?P<path>/[^?#]*)?(\?(?P<query>[^#]*))?"
)
#: Narrower: where an @ is left, it may be that of a password that was not encoded.
_SHOWABLE = re.compile(r"((?P<scheme>[\w+.-]+)://)?([^/?#@]*@)?(?P<place>[^?#@]*)(\?(?P<query>[^#@]*))?")
_PLACE = re.compile(r"(?P<host>\[[0-9a-fA-F:.%]+\]|[^\[\]:\s]+)(:(?P<port>\d+))?")

#: Options that a message may show: any other may be a part of a password that was not encoded.
_SHOWN = {
    *("db", "sentinel_username", "socket_timeout", "socket_connect_timeout"),
    *("ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname"),
}

#: Options that name a file, which must be there before the first connection.
_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")


class Node(NamedTuple):
    """Where a process listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, repr=False)  # it holds passwords
class Address:
    """A URL, understood.

    Attributes:
        kind: How the server is found.
        tls: Whether everything is spoken to over TLS.
        nodes: The servers, Sentinels or cluster nodes that the URL names.
        service: The master's name at its Sentinels.
        plain: The same login, database and options as a URL of one server, which redis-py understands.
        sentinel_login: Options of a connection to a Sentinel.
    """

    kind: Kind
    tls: bool
    nodes: tuple[Node, ...]
    service: str
    plain: str
    sentinel_login: dict[str, str]


def without_password(url: str) -> str:
    """The URL as a message may show it: without its login, and without options that may be passwords."""
    found = _SHOWABLE.fullmatch(url)
    if found is None:
        scheme = url.partition("://")[0]
        return f"{scheme}://…" if scheme in _SCHEMES else "…"
    shown = f"{found['scheme']}://{found['place']}" if found["scheme"] else found["place"]
    options = [option for option in (found["query"] or "").split("&") if option.partition("=")[0] in _SHOWN]
    return f"{shown}?{'&'.join(options)}" if options else shown


def parse_address(url: str) -> Address:
    """Understand a URL. Raises SettingsError on a malformed one."""
    try:
        address, query = _parsed(url)
    except ValueError as error:  # never one of a library: it might quote a part of the password
        raise refused(url, f"{error}; {FORMS}") from None
    for name in _FILES:
        for file in parse_qs(query).get(name, ()):
            if not Path(file).is_file():
                raise refused(url, f"{name} names {file}, which is not a file")
    return address


def refused(url: str, reason: str) -> SettingsError:
    """The error to raise for a URL that cannot be used."""
    return SettingsError(f"url {without_password(url)!r}: {reason}")


def _parsed(url: str) -> tuple[Address, str]:
    """The address and its options."""
    found = _URL.fullmatch(url)
    if found is None or found["scheme"] not in _SCHEMES:
        raise ValueError("rollpool knows no such URL")
    scheme, path, query = found["scheme"], found["path"] or "", found["query"] or ""
    kind, tls = _SCHEMES[scheme]
    if scheme == "unix":
        return Address(kind, tls, (), "", url, {}), query
    nodes = _nodes(found["places"], kind)
    service, db = _path(path, kind)
    rest, sentinel_login = _options(query, kind)
    plain = f"{'rediss' if tls else 'redis'}://{found['login'] + '@' if found['login'] else ''}"
    plain += f"{nodes[0] if nodes else ''}/{db}" + (f"?{rest}" if rest else "")
    return Address(kind, tls, nodes, service, plain, sentinel_login), query


def _nodes(places: str, kind: Kind) -> tuple[Node, ...]:
    nodes = []
    for place in places.split(",") if places else ():
        found = _PLACE.fullmatch(place)
        port = int(found["port"] or _DEFAULT_PORTS[kind]) if found else 0
        if found is None or not 0 < port < 65536:
            raise ValueError("its host and port are not understood")
        nodes.append(Node(found["host"].strip("[]"), port))
    if kind is Kind.SERVER and len(nodes) > 1:
        raise ValueError("only Sentinels and cluster nodes may be several")
    if kind is not Kind.SERVER and not nodes:
        raise ValueError(f"it names no {'Sentinel' if kind is Kind.SENTINEL else 'node'}")
    return tuple(nodes)


def _path(path: str, kind: Kind) -> tuple[str, str]:
    """The service and the database that a URL's path names."""
    parts = [unquote(part) for part in path.strip("/").split("/")]
    service = parts.pop(0) if kind is Kind.SENTINEL else ""
    if kind is Kind.SENTINEL and not service:
        raise ValueError("it does not name the service, the master's name at its Sentinels")
    db = parts.pop(0) if parts else ""
    if parts or (db and not db.isdecimal()):
        raise ValueError("its database is no number")
    if kind is Kind.CLUSTER and int(db or 0):
        raise ValueError("a cluster has database 0 alone")
    return service, db or "0"


def _options(query: str, kind: Kind) -> tuple[str, dict[str, str]]:
    """The options of a connection to the server, and those to its Sentinels."""
    if kind is not Kind.SENTINEL:
        return query, {}
    server, sentinel = [], {}
    for name, value in parse_qsl(query):
        if name in ("sentinel_username", "sentinel_password"):
            sentinel[name.removeprefix("sentinel_")] = value
        else:
            server.append((name, value))
    return urlencode(server), sentinel
