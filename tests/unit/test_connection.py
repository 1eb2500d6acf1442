"""URLs: which are understood, how they are shown, and what is told of those that are not; whom a client asks."""

import ssl
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.exceptions import AuthenticationError, ConnectionError, MovedError, NoPermissionError, ResponseError

from rollpool.schemas import RollpoolError, SettingsError
from rollpool.schemas.address import Kind, Node, parse_address
from rollpool.schemas.connection import connect, connect_async, without_password
from rollpool.schemas.following import ClusterGuide, Guide, SentinelGuide, moved
from rollpool.schemas.retries import PatientRetry, TlsRefused, final_error

SECRET = "s3cr3t"


# How a URL is shown


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://h:1/0", "redis://h:1/0"),
        (f"redis://user:{SECRET}@h:1/0", "redis://h:1/0"),
        (f"rediss://:{SECRET}@h?ssl_ca_certs=/ca.pem&ssl_password={SECRET}", "rediss://h?ssl_ca_certs=/ca.pem"),
        (f"redis://h/2?db=3&password={SECRET}", "redis://h/2?db=3"),
        (f"unix://:{SECRET}@/run/redis.sock?db=2&password={SECRET}", "unix:///run/redis.sock?db=2"),
        (
            f"redis+sentinel://u:{SECRET}@a:1,b:2/pool/0?sentinel_username=u&sentinel_password={SECRET}",
            "redis+sentinel://a:1,b:2/pool/0?sentinel_username=u",
        ),
        (f"rediss+cluster://u:{SECRET}@a:1,[::1]:2", "rediss+cluster://a:1,[::1]:2"),
        (f"u:{SECRET}@h:1", "h:1"),
        ("localhost:6379", "localhost:6379"),
        (f"redis://u:a@{SECRET}@h:1", "redis://…"),
        (f"redis://u:{SECRET}/x@h:1", "redis://…"),
        (f"redis://h/0?password=a@{SECRET}", "redis://…"),
    ],
)
def test_a_url_is_shown_without_passwords(url: str, shown: str) -> None:
    assert without_password(url) == shown


@given(
    before=st.text("ab:/?#@%&=+,[] \n"),
    after=st.text("ab:/?#@%&=+,[] \n"),
    form=st.sampled_from(
        [
            "redis://user:{}@host:1/0",
            "rediss://:{}@host",
            "unix://:{}@/run/redis.sock",
            "redis+sentinel://user:{}@a:1,b:2/pool/0?sentinel_password={}",
            "redis+cluster://:{}@a:1",
            "redis://host/0?password={}",
            "user:{}@host:1",
        ]
    ),
)
def test_a_password_that_was_not_encoded_is_not_shown_either(before: str, after: str, form: str) -> None:
    url = form.replace("{}", f"{before}{SECRET}{after}")
    assert SECRET not in without_password(url)
    assert SECRET not in complaint(url)


@pytest.mark.parametrize("form", ["redis://host/0?password=a&{}", "redis+sentinel://a/b?sentinel_password=&{}=b"])
def test_what_may_be_the_rest_of_a_password_is_not_shown(form: str) -> None:
    assert SECRET not in without_password(form.replace("{}", SECRET))


def complaint(url: str) -> str:
    try:
        parse_address(url)
    except SettingsError as error:
        return str(error)
    return ""


# Which are understood


@pytest.mark.parametrize(
    ("url", "kind", "tls", "nodes", "service"),
    [
        ("redis://h", Kind.SERVER, False, (Node("h", 6379),), ""),
        ("rediss://[::1]:1/2", Kind.SERVER, True, (Node("::1", 1),), ""),
        ("unix:///run/redis.sock", Kind.SERVER, False, (), ""),
        ("redis+sentinel://a,b:2/pool", Kind.SENTINEL, False, (Node("a", 26379), Node("b", 2)), "pool"),
        ("rediss+sentinel://u:p@[::1]:1/my%2Fpool/3", Kind.SENTINEL, True, (Node("::1", 1),), "my/pool"),
        ("redis+cluster://a:1,b", Kind.CLUSTER, False, (Node("a", 1), Node("b", 6379)), ""),
        ("rediss+cluster://a/0", Kind.CLUSTER, True, (Node("a", 6379),), ""),
    ],
)
def test_every_form_is_understood(url: str, kind: Kind, tls: bool, nodes: tuple[Node, ...], service: str) -> None:
    address = parse_address(url)
    assert (address.kind, address.tls, address.nodes, address.service) == (kind, tls, nodes, service)
    connect(url).close()


def test_login_database_and_options_reach_the_connection() -> None:
    with connect("redis+sentinel://user:p%40s%2Fs@a:1/pool/3?client_name=me&sentinel_password=h%26h") as client:
        options = client.connection_pool.connection_kwargs
    assert {name: options[name] for name in ("username", "password", "db", "client_name")} == {
        "username": "user",
        "password": "p@s/s",
        "db": 3,
        "client_name": "me",
    }
    assert options["guide"].options["password"] == "h&h"
    assert "username" not in options["guide"].options


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("", "knows no such URL; a URL is redis://"),
        ("localhost:6379", "knows no such URL; a URL is redis://"),
        ("http://h", "knows no such URL; a URL is redis://"),
        ("redis://h:0", "host and port are not understood"),
        ("redis://h:70000", "host and port are not understood"),
        ("redis://h:port", "host and port are not understood"),
        ("redis://a:1,b:2/0", "only Sentinels and cluster nodes may be several"),
        ("redis://h/pool", "its database is no number"),
        ("redis+sentinel://h:1", "it does not name the service"),
        ("redis+sentinel:///pool", "it names no Sentinel"),
        ("redis+sentinel://h/pool/0/1", "its database is no number"),
        ("redis+cluster://", "it names no node"),
        ("redis+cluster://h/1", "a cluster has database 0 alone"),
        ("redis://h?color=red", "it has no option 'color'"),
        ("redis://h?socket_timeout=soon", "Invalid value for 'socket_timeout'"),
        ("rediss://h?ssl_cert_reqs=perhaps", "Invalid SSL Certificate Requirements Flag: perhaps"),
        ("rediss://h?ssl_ca_certs=/no/such.pem", "ssl_ca_certs names /no/such.pem, which is not a file"),
    ],
)
def test_what_is_wrong_with_a_url_is_told_before_anything_is_sent(url: str, told: str) -> None:
    for make in (connect, connect_async):
        with pytest.raises(SettingsError) as error:
            make(url)
        assert told in str(error.value)
        assert f"url {without_password(url)!r}: " in str(error.value)


# What is tried again


def attempts(error: Exception) -> int:
    """How often a command that ends so is tried, by a client with two retries."""
    count = 0

    def fails() -> None:
        nonlocal count
        count += 1
        raise error

    class NoPause:
        def reset(self) -> None: ...

        def compute(self, failures: int) -> float:
            return 0.0

    retry: Any = PatientRetry
    with pytest.raises(type(error)):
        retry(NoPause(), 2, tls=False).call_with_retry(fails, lambda _: None)
    return count


def test_a_lost_connection_is_tried_again_and_a_wrong_login_is_not() -> None:
    assert attempts(ConnectionError("reset by peer")) == 3
    assert attempts(AuthenticationError("WRONGPASS")) == 1


def caused(error: Exception, by: BaseException) -> Exception:
    """As redis-py chains them."""
    try:
        try:
            raise by
        except BaseException:
            raise error  # noqa: B904
    except Exception as chained:
        return chained


def test_tls_that_is_refused_is_final_and_tls_that_was_cut_is_not() -> None:
    refused = final_error(caused(ConnectionError("no"), ssl.SSLCertVerificationError(1, "certificate verify failed")))
    assert isinstance(refused, TlsRefused)
    assert isinstance(refused, RollpoolError)
    assert final_error(caused(ConnectionError("no"), ssl.SSLEOFError(8, "EOF occurred"))) is None


def test_what_was_handled_before_the_attempt_is_not_its_reason() -> None:
    earlier = SettingsError("another matter")
    error = caused(ConnectionError("reset by peer"), earlier)
    assert final_error(error) is earlier
    assert final_error(error, outer=earlier) is None


# Whom a client asks


def told(guide: Guide, replies: dict[Node, Any]) -> Node:
    """Where the guide finds the server when it is answered so."""
    search = guide.search()
    node = next(search)
    try:
        while True:
            node = search.send(replies[node])
    except StopIteration as found:
        answer: Node = found.value
        return answer


A, B, C, MASTER = Node("a", 1), Node("b", 2), Node("c", 3), Node("m", 6379)
KNOWS = [b"m", b"6379"]


def sentinels() -> SentinelGuide:
    return SentinelGuide(parse_address("redis+sentinel://a:1,b:2,c:3/pool"), {})


def test_a_sentinel_that_is_down_is_passed_over_and_the_one_that_answered_is_asked_first_next() -> None:
    guide = sentinels()
    assert told(guide, {A: ConnectionError("down"), B: None, C: KNOWS}) == MASTER
    assert guide.nodes == [C, A, B]


def test_what_may_pass_is_no_wrong_setting() -> None:
    with pytest.raises(ConnectionError, match=r"a:1: down"):
        told(sentinels(), {A: ConnectionError("down"), B: None, C: None})
    with pytest.raises(SettingsError, match=r"the master of 'pool': a:1 does not know it"):
        told(sentinels(), {A: None, B: None, C: None})


@pytest.mark.parametrize("kind", [AuthenticationError, NoPermissionError])
def test_a_sentinel_that_refuses_is_named(kind: type[Exception]) -> None:
    with pytest.raises(kind, match="b:2: who are you"):
        told(sentinels(), {A: ConnectionError("down"), B: kind("who are you")})


SLOTS = [[0, 8191, [b"a", 1, b"id"]], [8192, 16383, [b"", 2, b"id"], [b"c", 3, b"id"]]]


def nodes(slot_key: str | None) -> ClusterGuide:
    return ClusterGuide(parse_address("redis+cluster://a:1"), {}, slot_key)


def test_the_owner_of_the_slot_is_found_and_every_node_is_learnt() -> None:
    guide = nodes("{foo}")  # slot 12182
    assert told(guide, {A: SLOTS}) == Node("a", 2), "an empty host is that of the node that was asked"
    assert guide.nodes == [A, Node("a", 2), C]
    assert told(nodes("{bar}"), {A: SLOTS}) == A  # slot 5061


def test_a_slot_without_an_owner_may_have_one_later() -> None:
    with pytest.raises(ConnectionError, match="who owns the pool's slot: a:1 does not know it"):
        told(nodes("{foo}"), {A: SLOTS[:1]})


def test_the_slot_is_learnt_from_the_node_that_does_not_own_it() -> None:
    guide = nodes(None)
    assert told(guide, {A: SLOTS}) == A
    guide.learn(MovedError("12182 b:2"), said_by=A)
    assert guide.slot == 12182
    assert guide.nodes[0] == B, "who owns it knows best"


@pytest.mark.parametrize(
    ("error", "elsewhere"),
    [
        (MovedError("1 b:2"), True),
        (ResponseError("NOREPLICAS Not enough good replicas to write."), True),
        (ResponseError("UNBLOCKED force unblock from blocking operation, instance state changed"), True),
        (ResponseError("UNBLOCKED the stream key no longer exists"), False),
        (ResponseError("NOGROUP No such key"), False),
    ],
)
def test_only_what_another_server_can_mend_leads_to_another_server(error: ResponseError, elsewhere: bool) -> None:
    assert moved(error) is elsewhere


def test_a_guide_is_asked_over_tls_with_the_files_of_the_url() -> None:
    with connect(f"rediss+sentinel://a:1/pool?ssl_ca_certs={Path(__file__)}") as client:
        guide = client.connection_pool.connection_kwargs["guide"]
    assert guide.tls
    assert guide.options["ssl_ca_certs"] == str(Path(__file__))
