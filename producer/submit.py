"""Sending a batch to the server, and waiting until it is let in.

Invariant: a batch is on the server whole or not at all, and under one name there is one batch; so sending may be
repeated after any failure, a lost reply included. A batch is sent again only when there may be room for it.
"""

import asyncio
import math
import time
from dataclasses import dataclass
from typing import Any

from rollpool.producer.admission import COUNTERS, Limits, Load
from rollpool.producer.enqueue import Draft
from rollpool.producer.server import Server
from rollpool.schemas import scripts
from rollpool.schemas.errors import BacklogFull, InvalidPrompt, SettingsError
from rollpool.schemas.staleness import StalenessRule

#: Seconds between two looks whether there is room.
_ROOM_POLL_S = 0.1

#: A run's weight, at least and at most: virtual times stay far from the ends of floating point.
_WEIGHTS = (1e-6, 1e6)

#: More versions than any run has: a batch that was admitted before is admitted again, and counted.
_ANY_STALENESS = 10**9


@dataclass(frozen=True, slots=True)
class Order:
    """A batch as it was sent: enough to send it again."""

    draft: Draft
    #: Server time in milliseconds; None: never.
    deadline_ms: int | None


class Submitter:
    """Sends the batches of one run, within its limits."""

    def __init__(self, server: Server, limits: Limits, weight: float | None) -> None:
        """Raises SettingsError when a limit or the weight cannot be."""
        if limits.backlog < 0:
            raise SettingsError(f"backlog_limit: expected 0 (none) or more jobs, got {limits.backlog}")
        if limits.rule is not None and not isinstance(limits.rule, StalenessRule):
            raise SettingsError(f"staleness_rule: expected a StalenessRule, got {limits.rule!r}")
        self.server = server
        self._limits = limits
        self._weight = _checked_weight(weight)

    async def send(self, draft: Draft, timeout: float | None) -> tuple[scripts.Enqueued, Order]:
        """Send a batch, waiting for room up to `timeout` seconds.

        Raises:
            BacklogFull: There was no room in time.
            InvalidPrompt: Another batch has its name.
        """
        with self.server.doing(f"enqueue of batch {draft.batch}"):
            order = Order(draft, await self._deadline_ms(draft.deadline_s))
            until = math.inf if timeout is None else time.monotonic() + timeout
            while (enqueued := await self._enqueue(order, self._limits)).answer in ("full", "stale"):
                await self._wait_for_room(draft.size, until)
            return enqueued, order

    async def send_again(self, order: Order) -> None:
        """Send a batch that the server lost: it had been let in, so no limit holds it back."""
        rule = self._limits.rule
        counted = None if rule is None else StalenessRule(_ANY_STALENESS, rule.batch_size)
        with self.server.doing(f"enqueue of batch {order.draft.batch}, which the server lost"):
            await self._enqueue(order, Limits(backlog=0, rule=counted))

    async def _enqueue(self, order: Order, limits: Limits) -> scripts.Enqueued:
        draft, server = order.draft, self.server
        enqueued = await scripts.enqueue(
            server.client,
            server.keys,
            run=server.run,
            batch=draft.batch,
            lane=draft.shared["lane"],
            content=draft.content,
            policy=draft.shared["policy_version"],
            n=draft.shared["n"],
            previews_and_bodies=draft.previews_and_bodies(order.deadline_ms),
            parts=draft.parts,
            backlog_limit=limits.backlog,
            deadline_ms=order.deadline_ms,
            weight=self._weight,
            rule=limits.rule,
        )
        if enqueued.answer == "other":
            raise InvalidPrompt(
                f"batch_id: {draft.batch!r} names a batch of run {server.run!r} with other content; give this one "
                "another name"
            )
        return enqueued

    async def _deadline_ms(self, deadline_s: float | None) -> int | None:
        """A deadline is a time of the server: the clocks of trainer and hosts may differ."""
        if deadline_s is None:
            return None
        seconds, microseconds = await self.server.client.time()
        return int(seconds * 1000 + microseconds // 1000 + deadline_s * 1000)

    async def _wait_for_room(self, size: int, until: float) -> None:
        """Return when the batch may fit; asking is cheaper than sending it again."""
        while self._limits.refusal(load := await self._load(), size):
            if time.monotonic() >= until or self._limits.too_large(size):
                raise BacklogFull(self._limits.reason(self.server.run, load, size))
            await asyncio.sleep(_ROOM_POLL_S)

    async def _load(self) -> Load:
        server = self.server
        async with server.client.pipeline(transaction=False) as pipe:
            pipe.mget(server.keys.run_policy(server.run), server.keys.policy)
            pipe.hmget(server.keys.run(server.run), list(COUNTERS))
            replies: list[Any] = await pipe.execute()
        (adapter, checkpoint), counters = replies
        return Load.of(checkpoint if adapter is None else adapter, counters)


def _checked_weight(weight: float | None) -> float | None:
    least, most = _WEIGHTS
    if weight is None:
        return None
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not least <= weight <= most:
        raise SettingsError(
            f"weight: expected a number from {least:g} to {most:g}, 1 being the default, got {weight!r}"
        )
    return float(weight)
