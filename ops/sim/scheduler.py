"""The scheduler of a simulated engine: a process of its own, as in the real one, that does the batching.

Run by path, with a socket to the server; messages are lines of JSON. It needs the standard library alone, so that it
starts in a few milliseconds.

Invariant: it ends with its server; and what ends it or stops it otherwise, a signal from outside included, does to the
server what it does to a real one, since nothing is answered without it.
"""

import contextlib
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

# The folder of a script run by path is on `sys.path`, but not that of a module imported by name.
_HERE = str(Path(__file__).resolve().parent)
if _HERE not in sys.path:
    sys.path.insert(0, _HERE)

if TYPE_CHECKING:
    from rollpool.ops.sim.batching import Batch, Costs, Ended, Request
else:
    from batching import Batch, Costs, Ended, Request

Json = dict[str, Any]

#: Decode steps after which a request that brings the engine down does.
STEPS_UNTIL_FAULT = 3

_CHUNK = 1 << 16


class CrashError(Exception):
    """What ends a real scheduler, and its server with it."""


class Scheduler:
    """What the server asks, and what it is told; no I/O of its own.

    Args:
        options: the scheduler's part of the arguments.
        tell: hands a message to the server.
        now: the time.
    """

    def __init__(self, options: Json, tell: Callable[[list[Any]], None], now: float) -> None:
        costs = Costs(
            step_s=options["step_s"], request_s=options["request_s"], prompt_token_s=options["prompt_token_s"]
        )
        self._batch = Batch(options["max_running_requests"], costs, now)
        self._tell = tell
        #: Of the requests that are here: whether each asked for log-probs.
        self._logprobs: dict[int, bool] = {}
        self._faults: dict[int, str] = {}
        #: Steps when the prefix cache was last flushed, from which they are counted, as in the real one.
        self._steps_flushed = 0
        #: True once it stands still for good.
        self.hung = False

    def next_event(self) -> float | None:
        """When to call `advance` next, whatever the server says."""
        return self._batch.next_event()

    def advance(self, now: float) -> None:
        """Let time pass, and tell what ended.

        Raises:
            CrashError: a request brought the engine down.
        """
        for ended in self._batch.advance(now):
            if self._faults.get(ended.key) == "kill":
                raise CrashError(f"request {ended.key} was sent to bring the engine down")
            if self._faults.get(ended.key) == "hang":
                self.hung = True
                return
            self._over(ended)

    def handle(self, message: list[Any], now: float) -> None:
        """Do what the server asks; call `advance` first.

        Raises:
            CrashError: as a real one dies, of requests with and without log-probs together.
        """
        what, number = message[0], message[1]
        if what == "submit":
            self._submit(number, message[2], now)
        elif what == "abort":
            self._abort(number, now)
        elif what == "pause":
            self._batch.pause(retract=message[2] == "retract")
            self._tell(["reply", number, {}])
        elif what == "resume":
            self._batch.resume(now)
            self._tell(["reply", number, {}])
        elif what == "state":
            self._tell(["reply", number, self._state()])
        elif what == "change":
            self._tell(["reply", number, self._change(now, **message[2])])
        elif what == "flush":
            self._tell(["reply", number, {"flushed": self._flush()}])

    def _submit(self, key: int, asked: Json, now: float) -> None:
        if next(iter(self._logprobs.values()), asked["logprobs"]) is not asked["logprobs"]:
            raise CrashError("requests with and without return_logprob are in flight together")
        self._logprobs[key] = asked["logprobs"]
        tokens = asked["tokens"]
        if fault := asked.get("fault"):
            self._faults[key] = fault
            tokens = STEPS_UNTIL_FAULT
        self._batch.submit(now, Request(key, asked["prompt_tokens"], tokens))

    def _abort(self, key: int, now: float) -> None:
        queued = key in self._batch.waiting
        if (ended := self._batch.abort(now, key)) is not None:
            self._over(ended, queued=queued)

    def _change(self, now: float, *, stall_s: float, flush: bool) -> Json:
        """Stop at a boundary while the weights are changed: the requests that ran, and the tokens of all."""
        ran = len(self._batch.running)
        made = self._batch.retract(now, stall_s)
        if flush:
            self._steps_flushed = self._batch.steps
        return {"ran": ran, "made": list(made.items())}

    def _flush(self) -> bool:
        """Forget the prefixes, unless somebody uses them."""
        idle = not self._batch.running and not self._batch.waiting
        if idle:
            self._steps_flushed = self._batch.steps
        return idle

    def _over(self, ended: Ended, *, queued: bool = False) -> None:
        self._logprobs.pop(ended.key, None)
        self._faults.pop(ended.key, None)
        self._tell(["ended", ended.key, {"tokens": ended.tokens, "aborted": ended.aborted, "queued": queued}])

    def _state(self) -> Json:
        return {
            "running": self._batch.running,
            "waiting": self._batch.waiting,
            "paused": self._batch.paused,
            "steps": self._batch.steps - self._steps_flushed,
            "tokens": self._batch.tokens,
            "kv_tokens": self._batch.kv_tokens,
        }


def serve(connection: socket.socket, options: Json) -> None:
    """Work until the server is gone."""

    def tell(message: list[Any]) -> None:
        connection.sendall(json.dumps(message, separators=(",", ":")).encode() + b"\n")

    scheduler = Scheduler(options, tell, time.monotonic())
    unread = b""
    while not scheduler.hung:
        event = scheduler.next_event()
        timeout = None if event is None else max(0.0, event - time.monotonic())
        readable, _, _ = select.select([connection], [], [], timeout)
        scheduler.advance(time.monotonic())
        if readable and not scheduler.hung:
            chunk = connection.recv(_CHUNK)
            if not chunk:
                return
            *lines, unread = (unread + chunk).split(b"\n")
            now = time.monotonic()
            scheduler.advance(now)
            for line in lines:
                scheduler.handle(json.loads(line), now)
    stand_still(connection)


def stand_still(connection: socket.socket) -> None:
    """Do nothing, for ever, but end with the server."""
    poll = select.poll()
    poll.register(connection, 0)  # that the other end closed is told without being asked for
    poll.poll()


def main() -> int:
    """Work; when a request brings the scheduler down, have the server end too, as the real one does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C in the terminal is for the server
    connection, server = socket.socket(fileno=int(sys.argv[1])), os.getppid()
    with contextlib.suppress(ConnectionError):
        try:
            serve(connection, json.loads(sys.argv[2]))
        except CrashError as error:
            print(f"Scheduler hit an exception: {error}", file=sys.stderr, flush=True)
            if os.getppid() == server:  # else it is gone, and another process is our parent now
                os.kill(server, signal.SIGQUIT)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
