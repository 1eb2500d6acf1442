"""Does what commands ask that is not about policies: pause, drain, resume, concurrency, cancel, flush, shut down.

Invariant: commands are obeyed in the order of the log, each is answered, and none is waited for so long that a later
one that makes it void is not heard.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from rollpool.schemas import Command, EngineUnavailable
from rollpool.worker.engines.protocol import WeightsRefused
from rollpool.worker.holdings import Holdings
from rollpool.worker.policy.acks import Answers
from rollpool.worker.policy.follow import ControlFollower
from rollpool.worker.session import Session

log = logging.getLogger(__name__)

#: Seconds between looks whether jobs have left.
LOOK_S = 0.1

#: Seconds that a cancelled job may take to leave: the server tells at once which jobs are still open.
CANCEL_S = 30.0


@dataclass(slots=True)
class Duties:
    """The duties of one host.

    Args:
        answers: to commands.
        holdings: the jobs of this host.
        drain_s: seconds that a drain may take, where the command does not say.
        session: the engine at work, if there is one.
        stop: ends the host, warm.
    """

    answers: Answers
    holdings: Holdings
    drain_s: float
    session: Callable[[], Session | None]
    stop: Callable[[], None]
    follower: ControlFollower = field(init=False)
    _heard: "asyncio.Queue[tuple[str, Command]]" = field(default_factory=asyncio.Queue)

    @property
    def paused(self) -> bool:
        """True while nothing is to be pulled."""
        return self.follower.orders.standing.what != "pull"

    async def hear(self, entry: str, command: Command) -> None:
        """A command came."""
        await self.answers.received(entry, command)
        if command.kind != "policy":
            self._heard.put_nowait((entry, command))

    async def run(self) -> None:
        """Obey until cancelled."""
        while True:
            entry, command = await self._heard.get()
            log.info("command %s: %s", entry, command.kind)
            if error := await self._obey(entry, command):
                log.error("command %s: %s: %s", entry, command.kind, error)
                await self.answers.failed(entry, error)

    async def _obey(self, entry: str, command: Command) -> str | None:
        """Do it and answer; or why it cannot be done."""
        match command.kind:
            case "pause" | "resume":
                self._nudge()
                await self.answers.applied(entry)
            case "concurrency":
                await self.answers.applied(entry, self._retarget(command.concurrency))
            case "drain":
                await self.answers.applied(entry, await self._drain(entry, command.within_s))
            case "cancel":
                return await self._cancel(entry, command.run or "")
            case "flush":
                return await self._flush(entry)
            case "shutdown":
                await self.answers.applied(entry, "stopping")
                self.stop()
        return None

    def _nudge(self) -> None:
        if session := self.session():
            session.puller.nudge()

    def _retarget(self, samples: int | None) -> str:
        session = self.session()
        if session is None:
            return "when its engine serves"
        session.retarget(samples)
        return f"{session.target} samples"

    async def _drain(self, entry: str, within_s: float | None) -> str:
        """Wait until every job has left, give back the rest when the time is over; what was done."""
        self._nudge()
        over = time.monotonic() + (self.drain_s if within_s is None else within_s)
        while len(self.holdings) and time.monotonic() < over:
            if self.follower.orders.standing.command != entry:
                return "ended by a later command"
            await asyncio.sleep(LOOK_S)
        if (session := self.session()) is None or not len(self.holdings):
            return "nothing was given back"
        given_back = await session.generator.interrupt()
        self.holdings.return_all(given_back)
        session.generator.go_on()
        return f"{len(given_back)} jobs were given back"

    async def _cancel(self, entry: str, run: str) -> str | None:
        self.holdings.look_again()
        over = time.monotonic() + CANCEL_S
        while self.holdings.holds_any_of(run):
            if time.monotonic() > over:
                return f"jobs of run {run} are still here after {CANCEL_S:.0f} s: they are open on the server"
            await asyncio.sleep(LOOK_S)
        await self.answers.applied(entry)
        return None

    async def _flush(self, entry: str) -> str | None:
        if (session := self.session()) is None:
            return "no engine serves"
        try:
            await session.engine.flush_cache()
        except (WeightsRefused, EngineUnavailable) as error:
            return str(error)
        await self.answers.applied(entry)
        return None
