"""Changes what an engine serves while it serves: weights, adapters; and tells when only a restart will do.

Invariant: what is pulled for is never more than what the engine serves at that moment; a change that fails leaves the
engine as it was and is answered as failed; and a restart is asked for only with everything staged and this host's turn
taken.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from rollpool.schemas import ChangeMode, EngineUnavailable, Policy
from rollpool.worker.engines.protocol import Adapter, EngineOwner, WeightsRefused
from rollpool.worker.held import HeldJob
from rollpool.worker.holdings import Holdings
from rollpool.worker.opening import CannotServe, Opening, Staged
from rollpool.worker.policy.choice import PolicyChoice
from rollpool.worker.policy.offer import Offer
from rollpool.worker.policy.orders import Orders, Target
from rollpool.worker.policy.plan import (
    Load,
    Relabel,
    Restart,
    Setup,
    Step,
    Swap,
    Unload,
    Wanted,
    crowding,
    next_step,
    returning,
)
from rollpool.worker.policy.turn import ChangeTurn
from rollpool.worker.session import Session
from rollpool.worker.shown import Shown
from rollpool.worker.tasks import first_of

log = logging.getLogger(__name__)

#: Seconds between looks whether the last request that uses an adapter has ended.
LOOK_AGAIN_S = 0.5

#: Seconds before a source that could not be reached is tried again, and after which it counts as failed: the others
#: must not wait for a mount that is missing here.
FETCH_AGAIN_S, FETCH_PATIENCE_S = 5.0, 120.0

#: Seconds that an engine may take to notice that requests were given up: it looks every second or two.
GIVEN_UP_S = 10.0


@dataclass(slots=True)
class Changes:
    """The changes of one host.

    Args:
        owner: of the engine.
        choice: which policies the host is to serve.
        opening: has sources on this host.
        holdings: where jobs go that leave the engine.
        turn: of this host.
        shown: what the host shows.
        default_mode: for commands that do not say.
        drain_s: seconds that work in flight may take to finish, in mode `drain`.
        show: beats now.
    """

    owner: EngineOwner
    choice: PolicyChoice
    opening: Opening
    holdings: Holdings
    turn: ChangeTurn
    shown: Shown
    default_mode: ChangeMode
    drain_s: float
    show: Callable[[], Awaitable[None]]
    #: Commands whose sources could not be reached, and since when.
    unreachable: dict[str, float] = field(default_factory=dict)

    async def until_restart(self, session: Session) -> Setup:
        """Keep the engine at what is wanted; return what it has to be started anew for, with the turn taken."""
        while True:
            orders, step = self.choice.orders, self._step(session)
            # What is abandoned makes no more tokens, however long the turn to leave it takes.
            session.holding_back = _leads_back(session.setup, step)
            match step:
                case None if not await self._made_room(session):
                    await self._something_new(orders, session)
                case Relabel() as relabel:
                    await self._relabel(session, relabel.target)
                case Load() as load:
                    await self._load(session, load.target)
                case Unload() as unload:
                    await self._unload(session, unload.policy)
                case Swap() as swap if staged := await self._ready(session, swap, Setup(swap.target)):
                    await self._swap_in_turn(session, staged)
                case Restart() as restart if await self._ready(session, restart, restart.setup):
                    return restart.setup

    def mode_of(self, session: Session, setup: Setup) -> ChangeMode:
        """What becomes of the work in flight over this change."""
        if goes_back(session.setup, setup):
            return "requeue"
        changed = [target for target in setup.targets if target not in session.setup.targets]
        asked = next((target.mode for target in changed if target.mode is not None), None)
        return asked or self.default_mode

    def _step(self, session: Session) -> Step | None:
        if not self.owner.controls_weights:
            return self._step_of_attached(session)
        wanted = self.choice.wanted
        if wanted is None:
            return None
        return next_step(
            session.setup,
            session.loaded,
            wanted,
            session.engine.facts,
            busy=self.holdings.adapters,
            restart_only=self.choice.restart_only,
        )

    def _step_of_attached(self, session: Session) -> Step | None:
        """Its weights change when its owner says so; once it serves what was published, it is attached to anew."""
        newest = self.choice.orders.target
        named = newest is not None and newest.policy.checkpoint == session.engine.facts.model_path
        if newest is not None and named and self._is_news(newest, session):
            return Restart(Setup(newest))
        if session.engine.facts.lora != "runtime":
            return None
        serving = Target(session.policy, session.setup.checkpoint.command)
        step = next_step(
            Setup(serving),
            session.loaded,
            self.choice.on_checkpoint(serving),
            session.engine.facts,
            busy=self.holdings.adapters,
            restart_only=(),
        )
        return step if isinstance(step, Load | Unload) else None

    def _is_news(self, target: Target, session: Session) -> bool:
        return not self.choice.refuses(target) and not target.policy.same_source(session.policy)

    async def _something_new(self, orders: Orders, session: Session) -> None:
        wanted = self.choice.wanted
        waits = wanted is not None and len(wanted.adapters) > len(session.offer.loaded)
        await first_of(self.choice.changed(orders), timeout=LOOK_AGAIN_S if waits else None)

    # Before a change of the checkpoint.

    async def _ready(self, session: Session, step: Step, setup: Setup) -> Staged | None:
        """Everything is staged and it is this host's turn; None where it is not to be done, or not now."""
        if not self.owner.controls_weights:  # the engine serves it already: nobody has to wait
            return await self.opening.stage(setup)
        if await self._failed_before(session, setup):
            return None
        staged = await self._staged(setup)
        if staged is None:
            return None
        # A swap takes nobody away: it goes in turn only so that one that fails is tried on no other host.
        await self.turn.take(None if isinstance(step, Swap) else setup.checkpoint.min_serving)
        # Waiting takes as long as the changes of the others: by now it may be another, or have failed there.
        if self._step(session) == step and not await self._failed_before(session, setup):
            return staged
        await self.turn.release()
        return None

    async def _failed_before(self, session: Session, setup: Setup) -> bool:
        """True when a new checkpoint failed on another host; found out here, it would cost the engine that serves."""
        if setup.checkpoint == session.setup.checkpoint:
            return False
        reason = await self.choice.failed_elsewhere(setup.checkpoint)
        self.shown.error = reason or self.shown.error
        return reason is not None

    async def _staged(self, setup: Setup) -> Staged | None:
        try:
            return await self.opening.stage(setup)
        except CannotServe as error:
            await self._cannot(error)
            return None

    async def _cannot(self, error: CannotServe) -> None:
        target = error.target
        self.shown.error = f"policy {target.policy.version} is not tried: {error}"
        log.error("%s", self.shown.error)
        began = self.unreachable.setdefault(target.command, time.monotonic())
        if error.for_ever or time.monotonic() - began > FETCH_PATIENCE_S:
            del self.unreachable[target.command]
            await self.choice.failed(target, str(error))
        else:
            await first_of(self.choice.changed(self.choice.orders), timeout=FETCH_AGAIN_S)

    # Weights.

    async def _swap_in_turn(self, session: Session, staged: Staged) -> None:
        target = staged.setup.checkpoint
        self.shown.heading = target.policy.version
        try:
            await self._make_way(session, staged.setup)
            started = time.monotonic()
            await session.engine.swap(staged.checkpoint, target.policy.version)
            assert staged.encoder is not None, "staged for a swap"
            session.changed_to(target, staged.encoder)
            self.opening.settled_on(staged)
            self.choice.last_good, self.shown.error = session.setup, ""
            await self.choice.applied((target,), f"swapped while serving, {time.monotonic() - started:.2f} s")
            log.info("serving policy %d: swapped while serving", target.policy.version)
        except WeightsRefused as error:
            await self._not_taken(target, error)
        except EngineUnavailable as error:
            # Which weights it has is not known: whoever watches it ends it, or a restart does.
            log.error("policy %d: %s; the engine is to be restarted", target.policy.version, error)
            self.choice.restart_only.add(target.command)
        finally:
            session.holding_back = False
            session.puller.nudge()
            self.shown.heading = None
            await self.turn.release()
            await self.show()

    async def _make_way(self, session: Session, setup: Setup) -> None:
        """What may not go on under the new weights leaves the engine, and what the mode says does."""
        mode = self.mode_of(session, setup)
        loaded, session.leaving = session.loaded, ()
        session.serve(Offer(session.policy))
        # Jobs of adapters that leave would be pulled again at once, for the checkpoint that leaves too.
        session.holding_back = mode != "resume" or bool(loaded)
        if mode == "drain":
            await first_of(session.generator.drain(), timeout=self.drain_s)
        leaving = session.generator.abandon(which=None if mode == "requeue" else _must_leave)
        self.holdings.return_all(leaving)
        for policy in loaded:
            await self._unload_in_the_end(session, policy)

    async def _relabel(self, session: Session, target: Target) -> None:
        """The weights are those that are wanted; what their lineage abandoned meanwhile never came here."""
        session.relabelled(target)
        self.choice.last_good = session.setup
        await self.choice.applied((target,), "served already")
        await self.show()

    async def _not_taken(self, target: Target, error: WeightsRefused) -> None:
        self.shown.error = f"policy {target.policy.version} is not served: {error}"
        log.error("%s", self.shown.error)
        if error.restart_may_help:
            log.info("policy %d: the running engine does not take it; it is restarted on it", target.policy.version)
            self.choice.restart_only.add(target.command)
        else:
            await self.choice.failed(target, str(error))

    # Adapters.

    async def _load(self, session: Session, target: Target) -> None:
        policy, started = target.policy, time.monotonic()
        try:
            path = await self.opening.fetch(target)
            await session.engine.load_adapter(Adapter(policy.adapter_name, path))
        except CannotServe as error:
            await self._cannot(error)
        except WeightsRefused as error:
            await self._cannot(CannotServe(target, str(error), for_ever=True))
        except EngineUnavailable as error:
            await self._cannot(CannotServe(target, str(error), for_ever=False))
        else:
            session.serve(session.offer.with_adapter(policy))
            await self.choice.applied((target,), f"loaded while serving, {time.monotonic() - started:.2f} s")
            await self.show()

    async def _made_room(self, session: Session) -> bool:
        """See to it that one adapter more leaves, where another waits for its slot; False where nothing was to do."""
        slots, wanted = session.engine.facts.adapter_slots, self._wanted_beside(session)
        if wanted is None or session.engine.facts.lora != "runtime":
            return False
        if (policy := returning(wanted, slots, session.leaving)) is not None:
            session.readmit(policy)
            return True
        if (crowd := crowding(session.loaded, wanted, slots, session.leaving)) is None:
            return False
        policy, target = crowd
        try:
            await self.opening.fetch(target)  # what is not whole is not worth a slot
        except CannotServe as error:
            await self._cannot(error)
        else:
            session.withdraw(policy)
        return True

    def _wanted_beside(self, session: Session) -> Wanted | None:
        """The adapters wanted beside the weights that there are."""
        if self.owner.controls_weights:
            return self.choice.wanted
        return self.choice.on_checkpoint(Target(session.policy, session.setup.checkpoint.command))

    async def _unload(self, session: Session, policy: Policy) -> None:
        offered = policy in session.offer.loaded
        session.withdraw(policy)
        if policy.adapter_name in self.holdings.adapters:  # pulled at this moment
            if offered:
                session.readmit(policy)
            return
        try:
            await self._unload_in_the_end(session, policy)
            session.unloaded(policy)
        except EngineUnavailable as error:  # it takes up its slot, and is to be tried again
            log.warning("%s", error)
            session.readmit(policy)
        await self.show()

    async def _unload_in_the_end(self, session: Session, policy: Policy) -> None:
        """Free its slot, once the engine has noticed that the last request for it is gone. Raises EngineUnavailable."""
        over = time.monotonic() + GIVEN_UP_S
        while True:
            try:
                return await session.engine.unload_adapter(policy.adapter_name)
            except WeightsRefused as error:
                if time.monotonic() > over:
                    raise EngineUnavailable(f"adapter {policy.adapter_name} cannot be unloaded: {error}") from error
                await asyncio.sleep(LOOK_AGAIN_S)


def goes_back(serving: Setup, setup: Setup) -> bool:
    """True when a lineage went back to an earlier version: what the abandoned ones began is not gone on with."""
    generations = {target.policy.lineage: target.policy.generation for target in serving.targets}
    return any(
        target.policy.generation > generations.get(target.policy.lineage, target.policy.generation)
        for target in setup.targets
    )


def _leads_back(serving: Setup, step: Step | None) -> bool:
    match step:
        case Swap(target=target):
            return goes_back(serving, Setup(target))
        case Restart(setup=setup):
            return goes_back(serving, setup)
        case _:
            return False


def _must_leave(held: HeldJob) -> bool:
    """An exact job's tokens are all of one policy, and an adapter's of the checkpoint that it belongs on."""
    return held.job.exact or held.adapter is not None
