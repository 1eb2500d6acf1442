"""Wires the parts of one host together and owns their life.

Invariants: one engine at a time; however an engine ends, what it had is given back before
the next one starts; a stop is heard at every moment.
"""

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from enum import Enum

from redis.asyncio import Redis
from redis.exceptions import RedisError

from rollpool.schemas import ChangeMode, EngineUnavailable, Keys, Policy, WorkerState, WorkerStatus
from rollpool.schemas.connection import connect_async
from rollpool.schemas.wire import check_msgpack
from rollpool.worker.clock import ServerClock
from rollpool.worker.credits import concurrency_target
from rollpool.worker.engines.protocol import Engine, EngineKilled, EngineOwner, LoraSupport
from rollpool.worker.generator import Generator
from rollpool.worker.heartbeat import Heartbeat, Neighbours
from rollpool.worker.held import HeldJob
from rollpool.worker.holdings import Holdings
from rollpool.worker.incarnation import Incarnation
from rollpool.worker.opening import CannotServe, Opening, offer_of
from rollpool.worker.policy.acks import Answers
from rollpool.worker.policy.change import Changes
from rollpool.worker.policy.choice import PolicyChoice
from rollpool.worker.policy.duties import Duties
from rollpool.worker.policy.follow import ControlFollower
from rollpool.worker.policy.offer import Offer
from rollpool.worker.policy.orders import Orders, Target
from rollpool.worker.policy.plan import INITIAL, Setup, Wanted
from rollpool.worker.policy.turn import ChangeTurn
from rollpool.worker.puller import Puller
from rollpool.worker.saturation import Saturation
from rollpool.worker.session import Session
from rollpool.worker.settings import WorkerSettings
from rollpool.worker.shown import Shown
from rollpool.worker.tasks import cancelled, first_of, unless
from rollpool.worker.tokenizer import PromptEncoder
from rollpool.worker.triage import Budgets

log = logging.getLogger(__name__)

#: Seconds before an engine that failed is started again, doubled with each failure in a row up to the second value.
BACKOFF_S, BACKOFF_MOST_S = 1.0, 30.0

#: Seconds a stopping host waits for the server to confirm its last outcomes; what is not confirmed by then is
#: returned by the other hosts when the leases end.
FAREWELL_S = 10.0


class Ending(Enum):
    """Why a host stopped serving with an engine."""

    STOP = "stop"
    CHANGE = "policy change"
    DEAD = "engine dead"


class Host:
    """One TPU host at work for one pool.

    Args:
        url: of the pool's server.
        pool: the pool's name.
        name: this worker's name.
        settings: of this host.
        owner: launches, watches and ends the engine.
    """

    def __init__(self, url: str, pool: str, name: str, settings: WorkerSettings, owner: EngineOwner) -> None:
        check_msgpack()
        self._settings = settings
        self._name = name
        self._owner = owner
        self._keys = Keys(pool)
        self._url = url
        self._me = Incarnation.current(name)
        self._clients: list[Redis] = []
        self._client = self._connect()
        self._reader = self._connect()
        self._server_clock = ServerClock()
        self._saturation = Saturation(time.monotonic)
        self._stop = asyncio.Event()
        self._cut_short = asyncio.Event()
        self._bug: BaseException | None = None
        self._shown = Shown()
        self._session: Session | None = None
        self._failures = self._deaths = self._restarts = 0
        self._samples_before = self._tokens_before = 0
        #: Commands for policies on which an engine was killed as it started, by whomever: they are tried once more.
        self._killed: set[str] = set()
        #: How engines of this host come to adapters, as the last one showed: nothing is known of the first.
        self._lora: tuple[LoraSupport, int] = ("runtime", 0)
        self._holdings = Holdings(
            url,
            self._client,
            self._keys,
            self._me,
            lease_s=settings.lease_s,
            server_clock=self._server_clock,
            on_change=self._nudge,
            on_gone=self._drop,
            on_bug=self.fail,
        )
        self._heartbeat = Heartbeat(
            self._client, self._keys, self._server_clock, every_s=settings.heartbeat_s, status=self.status
        )
        self._neighbours = Neighbours(self._client, self._keys, every_s=settings.heartbeat_s)
        self.paused: Callable[[], bool] = lambda: False
        self._wire_policies()

    def _wire_policies(self) -> None:
        """The parts that decide which policies are served."""
        settings = self._settings
        answers = Answers(self._client, self._keys, self._name)
        self._duties = Duties(answers, self._holdings, settings.drain_s, lambda: self._session, self.stop)
        self._follower = ControlFollower(self._connect(), self._keys, self._name, self._duties.hear)
        self._duties.follower = self._follower
        self._choice = PolicyChoice(self._client, self._keys, self._follower, answers, initial=self._initial())
        self._opening = Opening(self._owner, self._choice, self._shown, self._session_of)
        self._turn = ChangeTurn(self._client, self._keys, self._name)
        self._changes = Changes(
            owner=self._owner,
            choice=self._choice,
            opening=self._opening,
            holdings=self._holdings,
            turn=self._turn,
            shown=self._shown,
            default_mode=settings.change_mode,
            drain_s=settings.drain_s,
            show=self._show,
        )

    def _initial(self) -> Policy | None:
        """What to serve until a policy is published."""
        checkpoint = self._settings.engine.model_path
        if checkpoint is None:
            if self._owner.controls_weights:
                return None
            checkpoint = self._owner.url  # it says what it serves once it is attached
        return Policy(version=self._settings.initial_version, checkpoint=checkpoint, run=INITIAL)

    # What RQ's side asks.

    @property
    def busy(self) -> bool:
        """True while it holds jobs."""
        return len(self._holdings) > 0

    @property
    def settled(self) -> int:
        """Jobs this host settled as other than failed."""
        return self._holdings.settled

    @property
    def failed(self) -> int:
        """Jobs this host settled as failed."""
        return self._holdings.failed

    def idle_seconds(self) -> float:
        """Seconds since the pool last had anything for this host; 0 while it has, or while no engine serves."""
        since = self._session.puller.idle_since if self._session else None
        return 0.0 if since is None or self.busy else time.monotonic() - since

    def stop(self) -> None:
        """Warm: finish what is in flight, for `drain_s` at most, give back the rest, end the engine."""
        self._stop.set()

    def stop_now(self) -> None:
        """Cold: give everything back at once."""
        self._cut_short.set()
        self._stop.set()

    def status(self) -> WorkerStatus:
        """What the heartbeat says."""
        session, facts = self._session, self._session.engine.facts if self._session else None
        base = session.offer.checkpoint if session else None
        return WorkerStatus(
            name=self._name,
            host=socket.gethostname(),
            pid=os.getpid(),
            state=self._shown_state(),
            policy=base.version if base else None,
            generation=base.generation if base else 0,
            adapters=session.offer.shown() if session else self._shown.adapters,
            heading=self._shown.heading,
            staging=self._shown.staging or self._turn.waiting_for,
            engine=facts.version if facts else "",
            engine_url=self._owner.url,
            max_running_requests=facts.max_running_requests if facts else 0,
            target=session.target if session else 0,
            jobs_in_flight=len(self._holdings),
            samples_in_flight=session.generator.in_flight if session else 0,
            jobs_settled=self.settled + self.failed,
            samples_made=self._samples_before + (session.generator.samples_made if session else 0),
            tokens_made=self._tokens_before + (session.generator.tokens_made if session else 0),
            engine_restarts=self._restarts,
            backlog_seconds=self._saturation.backlog_seconds,
            underfull_seconds=self._saturation.underfull_seconds,
            error=self._shown.error,
        )

    def _shown_state(self) -> WorkerState:
        if self._shown.state != "serving":
            return self._shown.state
        return "suspended" if self.paused() else "paused" if self._duties.paused else "serving"

    # Its life.

    async def run(self) -> None:
        """Serve until told to stop. Raises SettingsError on what no retry can mend."""
        parts = (self._holdings.settler.run(), self._holdings.listen(), self._heartbeat.run())
        background = [asyncio.create_task(part) for part in parts]
        try:
            await self._follower.catch_up()
            background += [asyncio.create_task(part) for part in (self._follower.run(), self._duties.run())]
            await self._turn.forget()
            await self._holdings.start()
            await self._until_stopped(background)
        finally:
            await self._end(background)

    async def _until_stopped(self, background: Sequence[asyncio.Task[None]]) -> None:
        """Serve; a background part that ends is a bug and ends the host with its error."""
        serving = asyncio.create_task(self._serve_policies())
        try:
            done, _ = await asyncio.wait([serving, *background], return_when=asyncio.FIRST_COMPLETED)
        finally:
            await cancelled([serving])
        for task in done:
            task.result()
        if self._bug is not None:
            raise self._bug

    async def _end(self, background: Sequence[asyncio.Task[None]]) -> None:
        self._shown.state = "stopping"
        self._stop.set()
        try:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._holdings.settler.flushed(), FAREWELL_S)
        finally:
            await cancelled(background)
            await self._holdings.stop()
            await self._owner.close()
            with suppress(RedisError):
                await self._heartbeat.end(self._name)
            for client in self._clients:
                await client.aclose()

    async def _serve_policies(self) -> None:
        """One engine after another, until told to stop."""
        session = await self._start()
        while session is not None:
            ending = await self._serve(session)
            log.info("policy %d: serving ended (%s)", session.policy.version, ending.value)
            self._session = None
            self._saturation.pause()
            self._samples_before += session.generator.samples_made
            self._tokens_before += session.generator.tokens_made
            try:
                await self._owner.close()
                if ending is Ending.DEAD:
                    await self._after_death(session)
                session = await self._start()
            finally:  # however serving ended: the turn may have come at the same moment
                await self._turn.release()

    # Starting an engine.

    async def _start(self) -> Session | None:
        """Start an engine on what is wanted, or on the last good setup; None once told to stop."""
        failed: Setup | None = None
        while not self._stop.is_set():
            orders, wanted = self._choice.orders, self._choice.wanted
            if wanted is None:
                self._shown.error = "no policy was published, and engine.model_path is not set"
                log.info("waiting for a policy: %s", self._shown.error)
                await self._until_other_orders(orders)
                continue
            if self._choice.last_good is None and await self._choice.failed_elsewhere(wanted.checkpoint):
                continue  # the others serve what was there before it
            setup = self._setup_now(wanted, failed)
            try:
                return await unless(self._stop, self._open(setup))
            except CannotServe as error:
                failed = setup
                await self._could_not_start(orders, error.target if error.for_ever else None, str(error))
            except EngineUnavailable as error:
                await self._owner.close()
                suspect = self._suspect(setup)
                if isinstance(error, EngineKilled) and suspect and suspect.command not in self._killed:
                    log.warning("policy %d: %s; once more", suspect.policy.version, error)
                    self._killed.add(suspect.command)
                    continue
                failed = setup
                await self._could_not_start(orders, suspect, str(error))
            except RedisError as error:  # nothing is wrong with the policy
                log.warning("policy %d: %s; trying again", setup.checkpoint.policy.version, error)
                await self._owner.close()
                await first_of(self._stop.wait(), timeout=BACKOFF_S)
        return None

    def _setup_now(self, wanted: Wanted, failed: Setup | None) -> Setup:
        """What to start on: what is not here yet is fetched while the last good one serves, unless that just failed."""
        setup, before = wanted.setup(*self._lora), self._choice.last_good
        if before in (None, failed) or not self._owner.controls_weights or self._opening.has(setup):
            return setup
        return before

    async def _open(self, setup: Setup) -> Session:
        changing = self._choice.last_good not in (None, setup)
        self._shown.state = "changing" if changing else "starting"
        self._shown.heading = None if setup.merged else setup.checkpoint.policy.version
        self._shown.adapters = offer_of(setup).shown()
        session = await self._opening.open(setup)
        facts = session.engine.facts
        self._lora = facts.lora, facts.adapter_slots
        self._session, self._shown.state = session, "serving"
        self._failures, self._shown.error, self._shown.heading = 0, "", None
        self._choice.last_good = setup
        applied = [target for target in setup.targets if target is not setup.checkpoint]
        if setup.checkpoint.policy.same_source(session.policy):  # an attached engine may serve another
            applied.append(setup.checkpoint)
        await self._choice.applied(tuple(applied), self._owner.opened)
        await self._show()
        log.info(
            "serving policy %d with %s %s: %d requests at once, target %d samples",
            session.policy.version,
            facts.version,
            facts.model_path,
            facts.max_running_requests,
            session.target,
        )
        return session

    def _session_of(self, engine: Engine, setup: Setup, offer: Offer, encoder: PromptEncoder) -> Session:
        usual = concurrency_target(engine.facts.max_running_requests, self._settings.oversubscription)
        target = self._choice.orders.limit.samples or usual
        generator = Generator(
            engine,
            policy=offer.weights,
            decode=encoder.decode,
            target=target,
            outlet=self._holdings,
            on_change=self._nudge,
            seconds_to=self._server_clock.seconds_to,
            sample_timeout_s=self._settings.sample_timeout_s,
        )
        puller = Puller(
            client=self._client,
            reader=self._reader,
            keys=self._keys,
            consumer=self._me.consumer,
            offer=offer,
            budgets=Budgets(attempts=self._settings.max_attempts, faults=self._settings.max_faults),
            unread_bound=self._settings.unread_mib << 20,
            encoder=encoder,
            generator=generator,
            settler=self._holdings.settler,
            server_clock=self._server_clock,
            hold=self._holdings.hold,
            neighbours=self._neighbours,
            paused=lambda: self.paused() or self._duties.paused or session.holding_back,
            on_backlog=self._observe,
        )
        session = Session(engine, setup, offer, generator, puller, usual, target)
        return session

    def _suspect(self, setup: Setup) -> Target | None:
        """Which policy is new in a setup that does not start; None: all of it served before."""
        before = self._choice.last_good.targets if self._choice.last_good else ()
        new = [target for target in setup.targets if target not in before]
        return new[0] if new else None

    async def _could_not_start(self, orders: Orders, target: Target | None, reason: str) -> None:
        self._failures += 1
        self._shown.error = reason
        await self._owner.close()
        what = f"policy {target.policy.version}" if target else "the policy that served before"
        log.error("%s: the engine does not start: %s", what, reason)
        # An attached engine is not ours to start, and a restart on what served before answers no command.
        if self._owner.controls_weights and target is not None and await self._choice.failed(target, reason):
            return  # at once: the policy before served well
        self._shown.state = "broken"
        await self._show()
        await self._turn.release()  # it may be broken for long, and the others can change meanwhile
        await self._until_other_orders(orders, _backoff(self._failures))

    async def _after_death(self, session: Session) -> None:
        """Restart an engine that worked at once; one that dies before it makes a sample, after a pause that grows."""
        self._restarts += 1
        self._deaths = 0 if session.generator.samples_made else self._deaths + 1
        if self._deaths:
            await first_of(self._stop.wait(), timeout=_backoff(self._deaths))

    async def _until_other_orders(self, orders: Orders, timeout: float | None = None) -> None:
        await first_of(self._choice.changed(orders), self._stop.wait(), timeout=timeout)

    # Serving.

    async def _serve(self, session: Session) -> Ending:
        pulling = asyncio.create_task(session.puller.run())
        dead = asyncio.create_task(self._until_dead(session))
        change = asyncio.create_task(self._changes.until_restart(session))
        stop = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait([pulling, dead, change, stop], return_when=asyncio.FIRST_COMPLETED)
            session.puller.stop()
            if dead.done():
                self._shown.state, self._shown.error = "starting", dead.result()
                self._shown.heading = session.policy.version
                log.error("the engine died: %s", self._shown.error)
                self._return_from_dead(session, self._shown.error)
                ending = Ending.DEAD
            elif stop.done():
                self._shown.state, ending = "stopping", Ending.STOP
                await self._wind_down(session, dead, "drain")
            else:
                ending = Ending.CHANGE
                await self._leave_for(session, dead, change)
            await pulling  # its error, if it ended by one, is a bug that ends the host
            self._holdings.return_all(session.generator.abandon())  # what its last pull brought
            if ending is Ending.CHANGE:
                change.result()  # as above
            return ending
        finally:
            await cancelled([pulling, dead, change, stop])

    async def _leave_for(self, session: Session, dead: asyncio.Task[str], change: asyncio.Task[Setup]) -> None:
        """Wind down for another setup; or because pulling ended, which it never may."""
        self._shown.state = "changing"
        if not change.done() or change.exception() is not None:
            await self._wind_down(session, dead, "drain")
            return
        setup = change.result()
        self._shown.heading = setup.checkpoint.policy.version
        await self._show()
        await self._wind_down(session, dead, self._changes.mode_of(session, setup))

    async def _until_dead(self, session: Session) -> str:
        """Return the reason once the engine is dead, or answers but makes nothing."""
        dead, sick = asyncio.create_task(self._owner.watch()), asyncio.create_task(session.generator.sick.wait())
        try:
            await asyncio.wait([dead, sick], return_when=asyncio.FIRST_COMPLETED)
            return dead.result() if dead.done() else "it answers, but lost one job after the other and made nothing"
        finally:
            await cancelled([dead, sick])

    async def _wind_down(self, session: Session, dead: asyncio.Task[str], mode: ChangeMode) -> None:
        """Have the work in flight leave, as the mode says."""
        self._holdings.return_all(session.generator.abandon(started=False))
        if mode == "drain":
            await self._drained(session, dead)
        if dead.done():
            self._return_from_dead(session, dead.result())
        keeps = mode != "requeue" and not self._cut_short.is_set()
        leaving = await session.generator.interrupt() if keeps else session.generator.abandon()
        self._holdings.return_all(leaving)

    async def _drained(self, session: Session, dead: asyncio.Task[str]) -> None:
        drained = asyncio.create_task(session.generator.drain())
        cut_short = asyncio.create_task(self._cut_short.wait())
        try:
            await asyncio.wait(
                [drained, cut_short, dead], timeout=self._settings.drain_s, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            await cancelled([drained, cut_short])

    def _return_from_dead(self, session: Session, reason: str) -> None:
        self._holdings.return_all(session.generator.abandon(started=False))
        # What a sick engine had was charged as it was lost; the rest is innocent.
        if not session.generator.sick.is_set():
            company = session.generator.company
            self._holdings.return_from_dead(session.generator.abandon(), reason, company=company)

    # What the parts tell.

    def _drop(self, held: HeldJob) -> None:
        if self._session is not None:
            self._session.generator.drop(held)

    def fail(self, bug: BaseException) -> None:
        """A part of this worker ended that never may: stop at once, and let it be seen."""
        self._bug = self._bug or bug
        self.stop_now()

    def _nudge(self) -> None:
        if self._session is not None:
            self._session.puller.nudge()
        self._observe()

    def _observe(self) -> None:
        if (session := self._session) is None:
            return
        self._saturation.observe(
            in_flight=session.generator.in_flight,
            full=session.engine.facts.max_running_requests,
            backlog=session.puller.backlog or session.generator.waiting > 0,
        )

    async def _show(self) -> None:
        """Beat now: others decide by this state. Where that fails, the next beat is soon."""
        with suppress(RedisError):
            await self._heartbeat.beat()

    def _connect(self) -> Redis:
        client = connect_async(self._url, slot_key=self._keys.runs)
        self._clients.append(client)
        return client


def _backoff(failures: int) -> float:
    """Seconds to wait after so many failures in a row."""
    return float(min(BACKOFF_S * 2 ** min(failures - 1, 16), BACKOFF_MOST_S))
