"""Which policy this host is to serve, and what it has answered to the commands that said so.

Invariant: the newest command wins unless it failed, here or on a host that works otherwise; then the last policy that
served well does. Each command is answered once as received, and once as applied or failed.
"""

import logging
import time
from collections.abc import Callable

from redis.asyncio import Redis
from redis.exceptions import RedisError

from rollpool.schemas import Ack, AckState, EngineUnavailable, Keys, Policy
from rollpool.worker.heartbeat import works
from rollpool.worker.policy.acks import acknowledge, failures_of
from rollpool.worker.policy.follow import PolicyFollower, Target

log = logging.getLogger(__name__)


class PolicyChoice:
    """One host's choice.

    Args:
        client: the host's client.
        reader: one of its own, which blocks on the control log.
        keys: of the pool.
        worker: the name to answer under.
        initial: what to serve until a policy is published; None: nothing.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        client: Redis,
        reader: Redis,
        keys: Keys,
        worker: str,
        *,
        initial: Policy | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._keys = keys
        self._worker = worker
        self._initial = Target(initial, command="") if initial else None
        self._clock = clock
        self._refused: set[str] = set()
        self._received: dict[str, float] = {}
        self._answers: dict[str, AckState] = {}
        self.follower = PolicyFollower(reader, keys, self._heard)
        #: The last one that an engine of this host served.
        self.last_good: Target | None = None

    @property
    def newest(self) -> Target | None:
        """What the control log says, whether it is refused here or not."""
        return self.follower.target

    @property
    def wanted(self) -> Target | None:
        """What an engine that starts now is to serve; None while nothing is known to serve."""
        newest = self.newest
        if newest is not None and newest.command not in self._refused:
            return newest
        return self.last_good or self._before(newest) or self._initial or newest

    def _before(self, newest: Target | None) -> Target | None:
        """For a host that has served nothing yet: the newest of what the others may be serving."""
        open_to_try = (target for target in reversed(self.follower.targets) if target.command not in self._refused)
        return next((target for target in open_to_try if target is not newest), None)

    def is_change(self, target: Target, serving: Policy) -> bool:
        """True when a host that serves `serving` is to change for `target`: for its source, not only its version."""
        return target.command not in self._refused and not target.policy.same_source(serving)

    async def applied(self, target: Target, serving: Policy) -> None:
        """An engine started for `target` and serves `serving`."""
        self.last_good = target
        if target.policy.same_source(serving):
            await self._answer(target, "applied")

    async def failed(self, target: Target, error: str) -> bool:
        """No engine starts on `target`; True when there is a policy to go back to."""
        await self._answer(target, "failed", error)
        if self.last_good is not None:
            self._refused.add(target.command)
        return self.last_good is not None

    async def failed_elsewhere(self, target: Target) -> str | None:
        """Why `target` is not tried here: it failed on a host that works otherwise, and that ends its roll-out."""
        if not target.command:  # the settings' own model
            return None
        try:
            for worker, error in await failures_of(self._client, self._keys, target.command):
                if await works(self._client, self._keys, worker):
                    reason = f"policy {target.policy.version} is not tried here, since it failed on {worker}: {error}"
                    log.error("%s", reason)
                    await self._answer(target, "failed", reason)
                    self._refused.add(target.command)
                    return reason
        except RedisError as error:
            log.warning("looking for hosts on which policy %d failed: %s", target.policy.version, error)
        return None

    async def policy_of(self, model_path: str, url: str) -> Policy:
        """The newest published policy whose source is what an attached engine says it serves.

        Raises:
            EngineUnavailable: policies were published, but none from there.
        """
        records = await self._client.hgetall(self._keys.policies)
        policies = [Policy.model_validate_json(record) for record in records.values()]
        if same := [policy for policy in policies if policy.checkpoint == model_path]:
            return max(same, key=lambda policy: policy.version)
        if policies:
            newest = max(policies, key=lambda policy: policy.version)
            raise EngineUnavailable(
                f"the engine at {url} serves {model_path}, which no published policy names: restart it on "
                f"{newest.checkpoint}, or publish its checkpoint"
            )
        version = self._initial.policy.version if self._initial else 0
        return Policy(version=version, checkpoint=model_path, run="initial")

    async def _heard(self, target: Target) -> None:
        self._received[target.command] = self._clock()
        await self._answer(target, "received")

    async def _answer(self, target: Target, state: AckState, error: str | None = None) -> None:
        if not target.command or self._answers.get(target.command) == state:
            return  # the settings' own model, which nobody asked for; or said before
        self._answers[target.command] = state
        now = self._clock()
        ack = Ack(
            worker=self._worker,
            command=target.command,
            version=target.policy.version,
            state=state,
            seconds=round(now - self._received.get(target.command, now), 3),
            error=error,
        )
        await acknowledge(self._client, self._keys, ack)
