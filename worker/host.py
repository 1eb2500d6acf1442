"""Wires the parts of one host together and owns their life.

Invariants: one engine at a time, serving one policy version; however an engine ends, what it had is given back before
the next one starts; a stop is heard at every moment.
"""

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum

from redis.asyncio import Redis
from redis.exceptions import RedisError

from rollpool.schemas import EngineUnavailable, Keys, Policy, WorkerState, WorkerStatus
from rollpool.schemas.connection import connect_async
from rollpool.schemas.wire import check_msgpack
from rollpool.worker.clock import ServerClock
from rollpool.worker.credits import concurrency_target
from rollpool.worker.engines.protocol import Engine, EngineOwner
from rollpool.worker.generator import Generator
from rollpool.worker.heartbeat import Heartbeat, Neighbours
from rollpool.worker.held import HeldJob
from rollpool.worker.holdings import Holdings
from rollpool.worker.incarnation import Incarnation
from rollpool.worker.policy import ChangeTurn, PolicyChoice, Target
from rollpool.worker.puller import Puller
from rollpool.worker.saturation import Saturation
from rollpool.worker.settings import WorkerSettings
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


@dataclass
class Session:
    """One engine serving one policy."""

    engine: Engine
    policy: Policy
    generator: Generator
    puller: Puller
    #: Samples kept in the engine.
    target: int


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
        self._state: WorkerState = "starting"
        self._error = ""
        self._session: Session | None = None
        self._failures = self._deaths = self._restarts = 0
        self._samples_before = self._tokens_before = 0
        self._turn = ChangeTurn(self._client, self._keys, name)
        self._choice = PolicyChoice(self._client, self._connect(), self._keys, name, initial=self._initial())
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

    def _initial(self) -> Policy | None:
        """What to serve until a policy is published."""
        checkpoint = self._settings.engine.model_path
        if checkpoint is None:
            if self._owner.controls_weights:
                return None
            checkpoint = self._owner.url  # it says what it serves once it is attached
        return Policy(version=self._settings.initial_version, checkpoint=checkpoint, run="initial")

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
        return WorkerStatus(
            name=self._name,
            host=socket.gethostname(),
            pid=os.getpid(),
            state=self._shown_state(),
            policy=session.policy.version if session else None,
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
            error=self._error,
        )

    def _shown_state(self) -> WorkerState:
        return "suspended" if self._state == "serving" and self.paused() else self._state

    # Its life.

    async def run(self) -> None:
        """Serve until told to stop. Raises SettingsError on what no retry can mend."""
        parts = (self._holdings.settler.run(), self._holdings.listen(), self._heartbeat.run())
        background = [asyncio.create_task(part) for part in parts]
        try:
            await self._choice.follower.catch_up()
            background.append(asyncio.create_task(self._choice.follower.run()))
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
        self._state = "stopping"
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
        """Start an engine on the wanted policy, or on the last good one; None once told to stop."""
        while not self._stop.is_set():
            wanted = self._choice.wanted
            if wanted is None:
                self._error = "no policy was published, and engine.model_path is not set"
                log.info("waiting for a policy: %s", self._error)
                await self._until_another_target()
                continue
            if self._choice.last_good is None and await self._choice.failed_elsewhere(wanted):
                continue  # the others serve what was there before it
            try:
                return await unless(self._stop, self._open(wanted))
            except EngineUnavailable as error:
                await self._could_not_start(wanted, error)
            except RedisError as error:  # nothing is wrong with the policy
                log.warning("policy %d: %s; trying again", wanted.policy.version, error)
                await self._owner.close()
                await first_of(self._stop.wait(), timeout=BACKOFF_S)
        return None

    async def _open(self, wanted: Target) -> Session:
        changing = self._choice.last_good not in (None, wanted)
        self._state = "changing" if changing else "starting"
        engine = await self._owner.open(wanted.policy.checkpoint)
        policy = wanted.policy
        if not self._owner.controls_weights:
            policy = await self._choice.policy_of(engine.facts.model_path, self._owner.url)
        encoder = await asyncio.to_thread(_encoder_of, engine.facts.model_path)
        session = self._session_of(engine, policy, encoder)
        self._session, self._state = session, "serving"
        self._failures, self._error = 0, ""
        await self._choice.applied(wanted, policy)
        await self._show()
        log.info(
            "serving policy %d with %s %s: %d requests at once, target %d samples",
            policy.version,
            engine.facts.version,
            engine.facts.model_path,
            engine.facts.max_running_requests,
            session.target,
        )
        return session

    def _session_of(self, engine: Engine, policy: Policy, encoder: PromptEncoder) -> Session:
        target = concurrency_target(engine.facts.max_running_requests, self._settings.oversubscription)
        generator = Generator(
            engine,
            version=policy.version,
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
            version=policy.version,
            budgets=Budgets(attempts=self._settings.max_attempts, faults=self._settings.max_faults),
            unread_bound=self._settings.unread_mib << 20,
            encoder=encoder,
            generator=generator,
            settler=self._holdings.settler,
            server_clock=self._server_clock,
            hold=self._holdings.hold,
            neighbours=self._neighbours,
            paused=lambda: self.paused(),
            on_backlog=self._observe,
        )
        return Session(engine, policy, generator, puller, target)

    async def _could_not_start(self, wanted: Target, error: EngineUnavailable) -> None:
        self._failures += 1
        self._error = str(error)
        await self._owner.close()
        log.error("policy %d: the engine does not start: %s", wanted.policy.version, error)
        # An attached engine is not ours to start, and a restart on the policy that served before answers no command.
        answers = self._owner.controls_weights and wanted != self._choice.last_good
        if answers and await self._choice.failed(wanted, str(error)):
            return  # at once: the policy before served well
        self._state = "broken"
        await self._show()
        await self._turn.release()  # it may be broken for long, and the others can change meanwhile
        await self._until_another_target(_backoff(self._failures))

    async def _after_death(self, session: Session) -> None:
        """Restart an engine that worked at once; one that dies before it makes a sample, after a pause that grows."""
        self._restarts += 1
        self._deaths = 0 if session.generator.samples_made else self._deaths + 1
        if self._deaths:
            await first_of(self._stop.wait(), timeout=_backoff(self._deaths))

    async def _until_another_target(self, timeout: float | None = None) -> None:
        await first_of(self._choice.follower.changed(self._choice.newest), self._stop.wait(), timeout=timeout)

    # Serving.

    async def _serve(self, session: Session) -> Ending:
        pulling = asyncio.create_task(session.puller.run())
        dead = asyncio.create_task(self._until_dead(session))
        turn = asyncio.create_task(self._turn_to_change(session))
        stop = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait([pulling, dead, turn, stop], return_when=asyncio.FIRST_COMPLETED)
            session.puller.stop()
            if dead.done():
                self._state, self._error = "starting", dead.result()
                log.error("the engine died: %s", self._error)
                self._return_from_dead(session, self._error)
                ending = Ending.DEAD
            else:
                self._state = "stopping" if stop.done() else "changing"
                ending = Ending.STOP if stop.done() else Ending.CHANGE
                await self._wind_down(session, dead)
            await pulling  # its error, if it ended by one, is a bug that ends the host
            self._holdings.return_all(session.generator.abandon())  # what its last pull brought
            if ending is Ending.CHANGE:
                turn.result()  # as above
            return ending
        finally:
            await cancelled([pulling, dead, turn, stop])

    async def _until_dead(self, session: Session) -> str:
        """Return the reason once the engine is dead, or answers but makes nothing."""
        dead, sick = asyncio.create_task(self._owner.watch()), asyncio.create_task(session.generator.sick.wait())
        try:
            await asyncio.wait([dead, sick], return_when=asyncio.FIRST_COMPLETED)
            return dead.result() if dead.done() else "it answers, but lost one job after the other and made nothing"
        finally:
            await cancelled([dead, sick])

    async def _turn_to_change(self, session: Session) -> None:
        """Return once another policy is wanted and it is this host's turn; serving goes on meanwhile."""
        while True:
            target = self._choice.newest
            if target is None or not self._is_change(target, session):
                await self._choice.follower.changed(target)
            elif not self._owner.controls_weights:
                return  # the engine serves it already: nobody has to wait
            else:
                await self._turn.take()
                # Waiting takes as long as the changes of the others: by now it may be another, or have failed there.
                if self._choice.newest == target and await self._may_try(target):
                    return
                await self._turn.release()

    def _is_change(self, target: Target, session: Session) -> bool:
        """True when the engine has to change for `target`, or, attached, is known to serve it by now."""
        known = self._owner.controls_weights or target.policy.checkpoint == session.engine.facts.model_path
        return known and self._choice.is_change(target, session.policy)

    async def _may_try(self, target: Target) -> bool:
        """False when `target` is known not to start; found out here, it costs the engine that serves nothing."""
        if reason := await self._choice.failed_elsewhere(target):
            self._error = reason
            return False
        try:
            await self._owner.check(target.policy.checkpoint)
        except EngineUnavailable as error:
            self._error = f"policy {target.policy.version} is not tried: {error}"
            log.error("%s", self._error)
            await self._choice.failed(target, str(error))
            return False
        return True

    async def _wind_down(self, session: Session, dead: asyncio.Task[str]) -> None:
        """Let what was started finish, for a while; the rest goes to other hosts now."""
        self._holdings.return_all(session.generator.abandon(started=False))
        drained = asyncio.create_task(session.generator.drain())
        cut_short = asyncio.create_task(self._cut_short.wait())
        try:
            await asyncio.wait(
                [drained, cut_short, dead], timeout=self._settings.drain_s, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            await cancelled([drained, cut_short])
        if dead.done():
            self._return_from_dead(session, dead.result())
        self._holdings.return_all(session.generator.abandon())

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


def _encoder_of(model_path: str) -> PromptEncoder:
    try:
        return PromptEncoder(model_path)
    except Exception as error:  # whatever is wrong with its files, the policy cannot be served
        raise EngineUnavailable(
            f"the tokenizer of {model_path} does not load ({type(error).__name__}: {error}); publish a checkpoint "
            "whose tokenizer.json, tokenizer_config.json, chat_template.jinja and config.json are whole"
        ) from error
