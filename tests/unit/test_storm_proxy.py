"""The proxy of the storm fails as a network does, and otherwise not at all."""

import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from waiting import until_blocking

sys.path.append(str(Path(__file__).parents[1] / "chaos"))

from storm.proxy import Proxy


class Echo:
    """Answers each line with itself, and remembers what it was sent."""

    def __init__(self) -> None:
        self.heard = b""
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(1 << 16):
                    self.heard += data
                    connection.sendall(data)
            except OSError:
                return

    def close(self) -> None:
        # Else a thread that waits in accept keeps the port.
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.close()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[Proxy]:
    with Proxy(echo.port) as running:
        yield running


def client(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=10)


def ask(connection: socket.socket, data: bytes) -> bytes:
    connection.sendall(data)
    answer = b""
    while len(answer) < len(data):
        more = connection.recv(1 << 16)
        if not more:
            break
        answer += more
    return answer


def is_cut(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


def test_what_it_forwards_arrives_whole(proxy: Proxy) -> None:
    data = bytes(range(256)) * 4000
    with client(proxy) as connection:
        connection.settimeout(10)
        sender = threading.Thread(target=connection.sendall, args=(data,))
        sender.start()
        answer = b""
        while len(answer) < len(data):
            answer += connection.recv(1 << 16)
        sender.join()
    assert answer == data


def test_it_cuts_the_connections_there_are_and_takes_new_ones(proxy: Proxy) -> None:
    with client(proxy) as first, client(proxy) as second:
        assert ask(first, b"one") == b"one"
        assert ask(second, b"two") == b"two"
        assert proxy.cut(1.0, seed=1) == 2
        assert is_cut(first)
        assert is_cut(second)
    with client(proxy) as third:
        assert ask(third, b"three") == b"three"


def test_it_cuts_a_share(proxy: Proxy) -> None:
    connections = [client(proxy) for _ in range(20)]
    for connection in connections:
        assert ask(connection, b"x") == b"x"
    assert 0 < proxy.cut(0.5, seed=3) < 20
    for connection in connections:
        connection.close()


def test_it_refuses_until_it_accepts_again(proxy: Proxy) -> None:
    proxy.refuse()
    proxy.refuse()
    with client(proxy) as connection:
        assert is_cut(connection)
    proxy.accept()
    with client(proxy) as connection:
        assert is_cut(connection)
    proxy.accept()
    with client(proxy) as connection:
        assert ask(connection, b"again") == b"again"


def test_while_it_stalls_nothing_passes_and_nothing_is_lost(proxy: Proxy, echo: Echo) -> None:
    with client(proxy) as connection:
        assert ask(connection, b"before") == b"before"
        proxy.stall()
        connection.sendall(b"held")
        connection.settimeout(0.3)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        assert echo.heard == b"before"
        proxy.flow()
        connection.settimeout(10)
        assert connection.recv(4) == b"held"


def test_a_lost_reply_was_a_request_that_arrived(proxy: Proxy, echo: Echo) -> None:
    with client(proxy) as connection:
        assert ask(connection, b"before") == b"before"
        proxy.mute()
        connection.sendall(b"deed")
        until_blocking(lambda: echo.heard == b"beforedeed", "the request arrives")
        with client(proxy) as other:  # a new connection is heard
            assert ask(other, b"other") == b"other"
            assert proxy.cut_muted() == 1
            assert ask(other, b"still") == b"still"
        assert is_cut(connection)


def test_where_the_server_is_gone_a_connection_is_cut(proxy: Proxy, echo: Echo) -> None:
    echo.close()
    with client(proxy) as connection:
        assert is_cut(connection)
    echo._socket = socket.create_server(("127.0.0.1", 0))  # for the fixture to close
