"""Servers in the arrangements that users have: with TLS, watched by Sentinels, in a cluster.

They need Debian's `redis-server`, which has all three; the embedded one has no TLS.
"""

import contextlib
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trustme
from redis import Redis
from redis.crc import key_slot
from redis.exceptions import RedisError
from waiting import until_blocking

from rollpool.ops.local.child import spawn
from rollpool.ops.local.server import LocalServer, find_servers

HOST = "127.0.0.1"
SERVICE = "pool"
SLOTS = 16384

REDIS = find_servers().get("redis-server")

#: Where CI has none, conftest ends the session.
needs_redis_server = pytest.mark.skipif(
    REDIS is None, reason="no redis-server on PATH, and the embedded server has no TLS: apt-get install redis-server"
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def asked(port: int) -> Any:
    """A plain client, of which the types are unions over every protocol."""
    return Redis(host=HOST, port=port, protocol=2)


# TLS


@dataclass
class Certificates:
    """An authority, and what it signed: files.

    Attributes:
        ca: the authority.
        server: certificate and key for 127.0.0.1.
        client: the same for a client.
    """

    ca: Path
    server: tuple[Path, Path]
    client: tuple[Path, Path]


def certificates(directory: Path, *, host: str = HOST) -> Certificates:
    """Make an authority, and certificates that it signed."""
    directory.mkdir(parents=True)
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(directory / "ca.pem"))

    def signed(name: str, made: trustme.LeafCert) -> tuple[Path, Path]:
        certificate, key = directory / f"{name}.pem", directory / f"{name}.key"
        made.private_key_pem.write_to_path(str(key))
        for blob in made.cert_chain_pems:
            blob.write_to_path(str(certificate), append=True)
        return certificate, key

    return Certificates(
        directory / "ca.pem",
        signed("server", authority.issue_cert(host)),
        signed("client", authority.issue_cert("client@example.org")),
    )


def tls_options(made: Certificates, port: int, *, clients: bool = False) -> Sequence[str]:
    """Options of a server that speaks TLS on `port`, and of Sentinels.

    Args:
        made: what it shows and trusts.
        port: for TLS.
        clients: ask clients for a certificate too.
    """
    certificate, key = made.server
    return (
        *("--tls-port", str(port), "--tls-cert-file", str(certificate), "--tls-key-file", str(key)),
        *("--tls-ca-cert-file", str(made.ca), "--tls-auth-clients", "yes" if clients else "no"),
    )


@dataclass
class TlsServer:
    """A server that speaks TLS, beside its plain port."""

    local: LocalServer
    tls_port: int

    def url(self, **options: object) -> str:
        """With these options of the connection."""
        query = "&".join(f"{name}={value}" for name, value in options.items())
        return f"rediss://{HOST}:{self.tls_port}/0?{query}"


@contextlib.contextmanager
def tls_server(made: Certificates, *, clients: bool = False) -> Iterator[TlsServer]:
    """Run one."""
    port = free_port()
    with LocalServer(binary=REDIS, options=tls_options(made, port, clients=clients)) as local:
        yield TlsServer(local, port)


@contextlib.contextmanager
def tls_sentinel(made: Certificates, directory: Path) -> Iterator[str]:
    """The URL of a master and its one Sentinel, which both speak TLS."""
    port, sentinel = free_port(), free_port()
    replication = ("--tls-replication", "yes")
    with LocalServer(binary=REDIS, options=(*tls_options(made, port), *replication)):
        options = {name[2:]: value for name, value in _pairs((*tls_options(made, sentinel), *replication))}
        conf = "".join(f"{name} {value}\n" for name, value in options.items()) + _conf(directory, 0, port, quorum=1)
        with _running(directory, conf):
            yield f"rediss+sentinel://{HOST}:{sentinel}/{SERVICE}/0?ssl_ca_certs={made.ca}"


@contextlib.contextmanager
def tls_cluster(made: Certificates) -> Iterator[str]:
    """The URL of a cluster of one node, which speaks TLS."""
    port = free_port()
    options = ("--cluster-enabled", "yes", "--cluster-port", str(free_port()), "--tls-cluster", "yes")
    with LocalServer(binary=REDIS, options=(*tls_options(made, port), *options)) as node:
        with contextlib.closing(asked(node.port)) as client:
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, SLOTS - 1)
        until_blocking(lambda: _complete(node.port, 1), "the cluster is complete")
        yield f"rediss+cluster://{HOST}:{port}?ssl_ca_certs={made.ca}"


# Sentinels


@dataclass
class Watched:
    """A master and a replica, watched by three Sentinels."""

    master: LocalServer
    replica: LocalServer
    sentinels: list[int]

    def url(self, *, login: str = "", options: str = "") -> str:
        places = ",".join(f"{HOST}:{port}" for port in self.sentinels)
        return f"redis+sentinel://{login}{places}/{SERVICE}/0{options}"

    def named_master(self) -> int | None:
        """The port of the master that every Sentinel names; None while they do not agree."""
        named = set()
        for port in self.sentinels:
            with contextlib.closing(asked(port)) as client:
                named.add(int(client.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)[1]))
        return named.pop() if len(named) == 1 else None

    def fail_over(self) -> None:
        """Kill the master, and return when the replica is the master to all."""
        self.master.kill()
        until_blocking(lambda: self.named_master() == self.replica.port, "the replica is promoted")


@contextlib.contextmanager
def watched(directory: Path) -> Iterator[Watched]:
    """Run one."""
    with contextlib.ExitStack() as stack:
        quick = ("--repl-diskless-sync-delay", "0", "--repl-ping-replica-period", "1")
        master = stack.enter_context(LocalServer(binary=REDIS, options=quick))
        follows = ("--replicaof", HOST, str(master.port))
        replica = stack.enter_context(LocalServer(binary=REDIS, options=(*quick, *follows)))
        ports = [stack.enter_context(_sentinel(directory / f"sentinel-{n}", master.port)) for n in range(3)]
        until_blocking(lambda: all(_knows_all(port) for port in ports), "the Sentinels know the replica and each other")
        yield Watched(master, replica, ports)


@contextlib.contextmanager
def _sentinel(directory: Path, master: int) -> Iterator[int]:
    port = free_port()
    with _running(directory, _conf(directory, port, master, quorum=2)):
        yield port


def _conf(directory: Path, port: int, master: int, *, quorum: int) -> str:
    return (
        f"port {port}\nbind {HOST}\ndir {directory}\n"
        f"sentinel monitor {SERVICE} {HOST} {master} {quorum}\n"
        f"sentinel down-after-milliseconds {SERVICE} 500\n"
        f"sentinel failover-timeout {SERVICE} 3000\n"
    )


@contextlib.contextmanager
def _running(directory: Path, conf: str) -> Iterator[None]:
    directory.mkdir(parents=True)
    (directory / "sentinel.conf").write_text(conf)
    with (directory / "log").open("wb") as log:
        process = spawn([str(REDIS), str(directory / "sentinel.conf"), "--sentinel"], log)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _knows_all(port: int) -> bool:
    try:
        with contextlib.closing(asked(port)) as client:
            flat = client.execute_command("SENTINEL", "MASTER", SERVICE)
    except RedisError:
        return False
    pairs = flat if isinstance(flat, dict) else dict(_pairs(flat))
    state = {_text(name): _text(value) for name, value in pairs.items()}
    return state["num-other-sentinels"] == "2" and state["num-slaves"] == "1"


def _pairs(flat: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    return zip(flat[::2], flat[1::2], strict=True)


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


# A cluster


@dataclass
class Cluster:
    """Nodes that share the slots."""

    nodes: list[LocalServer]

    def owner(self, key: str) -> LocalServer:
        """The node that owns a key, by what the first one says."""
        with contextlib.closing(asked(self.nodes[0].port)) as client:
            owner = _owner_of(client, key_slot(key.encode()))
        return next(node for node in self.nodes if node.port == owner)

    def other(self, key: str) -> LocalServer:
        """A node that does not own it."""
        return next(node for node in self.nodes if node is not self.owner(key))

    def move(self, key: str) -> None:
        """Move the slot of a key, with all that is in it, to another node."""
        slot, source, target = key_slot(key.encode()), self.owner(key), self.other(key)
        with contextlib.closing(asked(source.port)) as old, contextlib.closing(asked(target.port)) as new:
            old_id, new_id = (_text(node.execute_command("CLUSTER", "MYID")) for node in (old, new))
            new.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", old_id)
            old.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", new_id)
            while keys := old.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 100):
                old.execute_command("MIGRATE", HOST, target.port, "", 0, 5000, "KEYS", *keys)
            for node in (new, old):
                node.execute_command("CLUSTER", "SETSLOT", slot, "NODE", new_id)
        until_blocking(lambda: self.owner(key) is target, "every node knows the new owner")


@contextlib.contextmanager
def cluster(count: int = 2) -> Iterator[Cluster]:
    """Run one, each node with an equal share of the slots."""
    with contextlib.ExitStack() as stack:
        nodes, buses = [], []
        for _ in range(count):
            buses.append(free_port())
            options = ("--cluster-enabled", "yes", "--cluster-port", str(buses[-1]), "--cluster-node-timeout", "2000")
            nodes.append(stack.enter_context(LocalServer(binary=REDIS, options=options)))
        for number, node in enumerate(nodes):
            with contextlib.closing(asked(node.port)) as client:
                first, last = SLOTS * number // count, SLOTS * (number + 1) // count - 1
                client.execute_command("CLUSTER", "ADDSLOTSRANGE", first, last)
                client.execute_command("CLUSTER", "MEET", HOST, nodes[0].port, buses[0])
        until_blocking(lambda: all(_complete(node.port, count) for node in nodes), "the cluster is complete")
        yield Cluster(nodes)


def _complete(port: int, count: int) -> bool:
    with contextlib.closing(asked(port)) as client:
        info = client.execute_command("CLUSTER", "INFO")
    state = info if isinstance(info, dict) else dict(line.split(":") for line in _text(info).split())
    return state["cluster_state"] == "ok" and state["cluster_known_nodes"] == str(count)


def _owner_of(client: Any, slot: int) -> int | None:
    connection = client.connection_pool.get_connection()
    try:
        connection.send_command("CLUSTER", "SLOTS")
        for first, last, owner, *_ in connection.read_response():
            if first <= slot <= last:
                return int(owner[1])
    finally:
        client.connection_pool.release(connection)
    return None
