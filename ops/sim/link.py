"""The server's side of its scheduler: starts that process, and talks with it.

Invariant: what the scheduler does not answer is never answered: a question hangs, as the real server's do, while the
scheduler is dead or stands still.
"""

import asyncio
import itertools
import json
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Json = dict[str, Any]

_SCRIPT = Path(__file__).with_name("scheduler.py")


class SchedulerLink:
    """One scheduler; make it with `start`.

    Attributes:
        heard_at: When it last said anything, by the monotonic clock.
    """

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        ended: Callable[[int, Json], None],
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self._ended = ended
        self._numbers = itertools.count()
        self._questions: dict[int, asyncio.Future[Json]] = {}
        self._at_once: dict[int, Callable[[Json], None]] = {}
        self._gone = False
        self.heard_at = time.monotonic()
        self._listening = asyncio.create_task(self._listen())

    @classmethod
    async def start(cls, options: Json, ended: Callable[[int, Json], None]) -> "SchedulerLink":
        """Start the process.

        Args:
            options: what it needs to know.
            ended: called with each request that is over, and how.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                # Without site-packages: it needs none, and starts in a third of the time.
                *(sys.executable, "-S", str(_SCRIPT), str(theirs.fileno()), json.dumps(options)),
                pass_fds=(theirs.fileno(),),
            )
        reader, writer = await asyncio.open_connection(sock=ours)
        return cls(process, reader, writer, ended)

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def submit(self, *, prompt_tokens: int, tokens: int, logprobs: bool, fault: str | None = None) -> int:
        """Put a request into its queue; the number by which it will be known."""
        number = next(self._numbers)
        asked: Json = {"prompt_tokens": prompt_tokens, "tokens": tokens, "logprobs": logprobs}
        self._say(["submit", number, asked if fault is None else {**asked, "fault": fault}])
        return number

    def abort(self, number: int) -> None:
        """End a request."""
        self._say(["abort", number])

    async def ask(self, what: str, *details: Any, at_once: Callable[[Json], None] | None = None) -> Json:
        """Its answer to `state`, `pause`, `resume`, `change` or `flush`.

        Args:
            what: the question.
            details: what belongs to it.
            at_once: called with the answer before anything is heard that the scheduler said after it.
        """
        number = next(self._numbers)
        self._questions[number] = asyncio.get_running_loop().create_future()
        if at_once is not None:
            self._at_once[number] = at_once
        self._say([what, number, *details])
        try:
            return await self._questions[number]
        finally:
            del self._questions[number]

    async def close(self) -> None:
        """End the process."""
        self._listening.cancel()
        self._writer.close()
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()

    def kill(self) -> None:
        """End the process at once, from within a signal handler."""
        if self._process.returncode is None:
            self._process.kill()

    def _say(self, message: list[Any]) -> None:
        if not self._gone:
            self._writer.write(json.dumps(message, separators=(",", ":")).encode() + b"\n")

    async def _listen(self) -> None:
        try:
            while line := await self._reader.readline():
                self.heard_at = time.monotonic()
                what, number, told = json.loads(line)
                if what == "ended":
                    self._ended(number, told)
                else:
                    self._answered(number, told)
        except ConnectionError:
            pass
        self._gone = True

    def _answered(self, number: int, told: Json) -> None:
        """Hand on an answer; what is to be done at once is done even when whoever asked is gone."""
        if (at_once := self._at_once.pop(number, None)) is not None:
            at_once(told)
        if (question := self._questions.get(number)) is not None and not question.done():
            question.set_result(told)
