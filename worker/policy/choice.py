"""Which policies this host is to serve, and which commands it refuses because their policies failed.

Invariant: the newest checkpoint wins unless it failed, here or on a host that works otherwise; then the last one that
served well does. An adapter that failed here is wanted no more; the others of its run are.
"""

import logging

from redis.asyncio import Redis
from redis.exceptions import RedisError

from rollpool.schemas import EngineUnavailable, Keys, Policy
from rollpool.worker.heartbeat import works
from rollpool.worker.policy.acks import Answers
from rollpool.worker.policy.follow import ControlFollower
from rollpool.worker.policy.orders import Orders, Target
from rollpool.worker.policy.plan import INITIAL, Setup, Wanted, wanted_adapters

log = logging.getLogger(__name__)


class PolicyChoice:
    """One host's choice.

    Args:
        client: the host's client.
        keys: of the pool.
        follower: of the control log.
        answers: to the commands.
        initial: what to serve until a policy is published; None: nothing.
    """

    def __init__(
        self, client: Redis, keys: Keys, follower: ControlFollower, answers: Answers, *, initial: Policy | None
    ) -> None:
        self._client = client
        self._keys = keys
        self._follower = follower
        self._answers = answers
        self._initial = Target(initial, command="") if initial else None
        self._refused: set[str] = set()
        #: Commands for checkpoints that a running engine did not take, and a new one may.
        self.restart_only: set[str] = set()
        #: The last setup that an engine of this host served.
        self.last_good: Setup | None = None

    @property
    def orders(self) -> Orders:
        """What the control log says, whether it is refused here or not."""
        return self._follower.orders

    @property
    def wanted(self) -> Wanted | None:
        """What this host is to serve; None while nothing is known to serve."""
        checkpoint = self._checkpoint()
        return None if checkpoint is None else self.on_checkpoint(checkpoint)

    def on_checkpoint(self, checkpoint: Target) -> Wanted:
        """The same for an engine whose weights are not ours to choose."""
        return Wanted(checkpoint, wanted_adapters(self.orders, checkpoint.policy, self._refused))

    async def changed(self, since: Orders) -> None:
        """Wait until the orders are others than `since`."""
        await self._follower.changed(since)

    def refuses(self, target: Target) -> bool:
        """True when its policy failed."""
        return target.command in self._refused

    def _checkpoint(self) -> Target | None:
        newest = self.orders.target
        if newest is not None and not self.refuses(newest):
            return newest
        return (
            (self.last_good.checkpoint if self.last_good else None) or self._before(newest) or self._initial or newest
        )

    def _before(self, newest: Target | None) -> Target | None:
        """For a host that has served nothing yet: the newest of what the others may be serving."""
        open_to_try = (target for target in reversed(self.orders.checkpoints) if not self.refuses(target))
        return next((target for target in open_to_try if target is not newest), None)

    async def applied(self, targets: tuple[Target, ...], detail: str) -> None:
        """An engine serves these."""
        for target in targets:
            if self._answers.about(target.command, target.policy.version):
                await self._answers.applied(target.command, detail)

    async def failed(self, target: Target, error: str) -> bool:
        """Nothing serves `target`; True when there is something else to serve."""
        await self._fail(target, error)
        goes_on = self.last_good is not None or target.policy.lora_path is not None
        if goes_on:
            self._refused.add(target.command)
        return goes_on

    async def _fail(self, target: Target, error: str) -> None:
        if self._answers.about(target.command, target.policy.version):
            await self._answers.failed(target.command, error)

    async def failed_elsewhere(self, target: Target) -> str | None:
        """Why `target` is not tried here: it failed on a host that works otherwise, and that ends its roll-out."""
        if not target.command:  # the settings' own model
            return None
        try:
            for worker, error in await self._answers.failed_on(target.command):
                if await works(self._client, self._keys, worker):
                    reason = f"policy {target.policy.version} is not tried here, since it failed on {worker}: {error}"
                    log.error("%s", reason)
                    await self._fail(target, reason)
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
        checkpoints = [policy for policy in policies if policy.checkpoint is not None]
        if same := [policy for policy in checkpoints if policy.checkpoint == model_path]:
            return max(same, key=lambda policy: (policy.generation, policy.version))
        if checkpoints:
            newest = max(checkpoints, key=lambda policy: policy.version)
            raise EngineUnavailable(
                f"the engine at {url} serves {model_path}, which no published policy names: restart it on "
                f"{newest.checkpoint}, or publish its checkpoint"
            )
        version = self._initial.policy.version if self._initial else 0
        return Policy(version=version, checkpoint=model_path, run=INITIAL)
