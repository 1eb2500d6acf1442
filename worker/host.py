"""Wires the parts of one host together and owns their life.

Invariants: one engine at a time, serving one policy version; every job this host holds is in `_held` and leased until
the server confirmed its fate; however an engine ends, what it had is given back before the next one starts.
"""

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from rollpool.schemas import (
    Ack,
    AckState,
    EngineUnavailable,
    Keys,
    Policy,
    WorkerState,
    WorkerStatus,
)
from rollpool.schemas.connection import connect, connect_async, runs_of
from rollpool.schemas.scripts import Entry, Settled
from rollpool.schemas.wire import check_msgpack
from rollpool.worker.clock import ServerClock
from rollpool.worker.credits import concurrency_target
from rollpool.worker.engines.protocol import Engine, EngineOwner
from rollpool.worker.generator import Generator
from rollpool.worker.heartbeat import Heartbeat, anyone_serves, works
from rollpool.worker.held import HeldJob
from rollpool.worker.leases import RENEWALS_PER_LEASE, Incarnation, LeaseKeeper
from rollpool.worker.policy import ChangeTurn, PolicyFollower, Target, acknowledge, failures_of
from rollpool.worker.puller import Budgets, Puller
from rollpool.worker.saturation import Saturation
from rollpool.worker.settings import WorkerSettings
from rollpool.worker.settler import Settler
from rollpool.worker.tokenizer import PromptEncoder

log = logging.getLogger(__name__)

#: Seconds before an engine that failed is started again, doubled with each failure in a row up to the second value.
BACKOFF_S, BACKOFF_MOST_S = 1.0, 30.0

#: Milliseconds before a job that its engine lost runs again: about the time the host takes to see that its engine is
#: dead and to stop pulling.
LOST_DELAY_MS = 1000

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
        # A renewal that hangs must fail, and be tried again, well within its lease.
        self._lease_client = connect(url, timeout_s=max(1.0, settings.lease_s / RENEWALS_PER_LEASE), retries=1)
        self._server_clock = ServerClock()
        self._saturation = Saturation(time.monotonic)
        self._held: dict[tuple[str, str], HeldJob] = {}
        self._stop = asyncio.Event()
        self._bug: BaseException | None = None
        self._cut_short = asyncio.Event()
        self._state: WorkerState = "starting"
        self._error = ""
        self._session: Session | None = None
        self._turn = ChangeTurn(self._client, self._keys, name)
        self._failures = 0
        self._deaths = 0
        self._refused: set[str] = set()
        self._last_good: Target | None = None
        self._received: dict[str, float] = {}
        self._answers: dict[str, AckState] = {}
        self._samples_before = self._tokens_before = 0
        self._settled = self._failed = self._restarts = 0
        self._follower = PolicyFollower(self._connect(), self._keys, self._heard)
        self._settler = Settler(
            self._client, self._keys, consumer=self._me.consumer, on_done=self._done, on_settled=self._count
        )
        self._heartbeat = Heartbeat(
            self._client, self._keys, self._server_clock, every_s=settings.heartbeat_s, status=self.status
        )
        self._reader = self._connect()
        self._leases: LeaseKeeper | None = None
        self.paused: Callable[[], bool] = lambda: False

    # What RQ's side asks.

    @property
    def busy(self) -> bool:
        """True while it holds jobs."""
        return bool(self._held)

    @property
    def settled(self) -> int:
        """Jobs this host settled as other than failed."""
        return self._settled

    @property
    def failed(self) -> int:
        """Jobs this host settled as failed."""
        return self._failed

    def idle_seconds(self) -> float:
        """Seconds since the pool last had anything for this host; 0 while it has, or while no engine serves."""
        since = self._session.puller.idle_since if self._session else None
        return 0.0 if since is None or self._held else time.monotonic() - since

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
            target=self._target(session.engine) if session else 0,
            jobs_in_flight=len(self._held),
            samples_in_flight=session.generator.in_flight if session else 0,
            jobs_settled=self._settled + self._failed,
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
        """Serve until told to stop. Raises SettingsError and EngineUnavailable on what no retry can mend."""
        loop = asyncio.get_running_loop()

        def tell_lost(entries: list[Entry]) -> None:
            loop.call_soon_threadsafe(self._lost, entries)

        self._leases = LeaseKeeper(
            self._lease_client,
            self._me,
            lease_s=self._settings.lease_s,
            on_lost=tell_lost,
        )
        background = [asyncio.create_task(part) for part in (self._settler.run(), self._heartbeat.run())]
        try:
            await self._follower.catch_up()
            background.append(asyncio.create_task(self._follower.run()))
            await self._take_over()
            self._leases.start()
            await self._until_stopped(background)
        finally:
            await self._end(background)

    async def _until_stopped(self, background: Sequence[asyncio.Task[None]]) -> None:
        """Serve; a background part that ends is a bug and ends the host with its error."""
        serving = asyncio.create_task(self._serve_policies())
        try:
            done, _ = await asyncio.wait([serving, *background], return_when=asyncio.FIRST_COMPLETED)
        finally:
            await _cancelled([serving])
        for task in done:
            task.result()
        if self._bug is not None:
            raise self._bug

    async def _end(self, background: Sequence[asyncio.Task[None]]) -> None:
        self._state = "stopping"
        self._stop.set()
        try:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._settler.flushed(), FAREWELL_S)
        finally:
            await _cancelled(background)
            if self._leases:
                await asyncio.to_thread(self._leases.stop)
            await self._owner.close()
            with suppress(RedisError):
                await self._heartbeat.end(self._name)
            self._lease_client.close()
            for client in self._clients:
                await client.aclose()

    async def _take_over(self) -> None:
        """Return at once what an ended predecessor of this name on this host had."""
        assert self._leases is not None
        runs = await runs_of(self._client, self._keys)
        self._leases.watch([stream for run in runs for stream in self._keys.lanes(run)])
        count = await asyncio.to_thread(self._leases.take_over)
        if count:
            log.info("returned %d jobs that this worker held before it was restarted", count)

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

    async def _after_death(self, session: Session) -> None:
        """Restart an engine that worked at once; one that dies before it makes a sample, after a pause that grows."""
        self._restarts += 1
        self._deaths = 0 if session.generator.samples_made else self._deaths + 1
        if self._deaths:
            await self._first(self._stop.wait(), timeout=_backoff(self._deaths))

    async def _start(self) -> Session | None:
        """Start an engine on the wanted policy, or on the last good one; None once told to stop."""
        while not self._stop.is_set():
            wanted = self._wanted()
            if wanted is None:
                self._error = "no policy was published, and engine.model_path is not set"
                log.info("waiting for a policy: %s", self._error)
                await self._first(self._follower.changed(self._follower.target), self._stop.wait())
                continue
            try:
                return await self._unless_stopped(self._open(wanted))
            except EngineUnavailable as error:
                await self._could_not_start(wanted, error)
            except RedisError as error:  # nothing is wrong with the policy
                log.warning("policy %d: %s; trying again", wanted.policy.version, error)
                await self._owner.close()
                await self._first(self._stop.wait(), timeout=BACKOFF_S)
        return None

    def _wanted(self) -> Target | None:
        target = self._follower.target
        if target is not None and target.command not in self._refused:
            return target
        if self._last_good is not None:
            return self._last_good
        checkpoint = self._settings.engine.model_path
        if checkpoint is None:
            if self._owner.controls_weights:
                return None
            checkpoint = self._owner.url  # it says what it serves once it is attached
        return Target(Policy(version=self._settings.initial_version, checkpoint=checkpoint, run="initial"), command="")

    async def _open(self, wanted: Target) -> Session:
        self._state = "changing" if self._last_good and self._last_good != wanted else "starting"
        engine = await self._owner.open(wanted.policy.checkpoint)
        policy = wanted.policy if self._owner.controls_weights else await self._policy_of(engine)
        encoder = await asyncio.to_thread(_encoder_of, engine.facts.model_path)
        session = self._session_of(engine, policy, encoder)
        self._last_good, self._session, self._state = wanted, session, "serving"
        self._failures, self._error = 0, ""
        if policy.version == wanted.policy.version:
            await self._answer(wanted, "applied")
        await self._show()
        log.info(
            "serving policy %d with %s %s: %d requests at once, target %d samples",
            policy.version,
            engine.facts.version,
            engine.facts.model_path,
            engine.facts.max_running_requests,
            self._target(engine),
        )
        return session

    async def _policy_of(self, engine: Engine) -> Policy:
        """The newest published policy whose source is what an attached engine says it serves."""
        path = engine.facts.model_path
        records = await self._client.hgetall(self._keys.policies)
        policies = [Policy.model_validate_json(record) for record in records.values()]
        if same := [policy for policy in policies if policy.checkpoint == path]:
            return max(same, key=lambda policy: policy.version)
        if policies:
            raise EngineUnavailable(
                f"the engine at {self._owner.url} serves {path}, which no published policy names: restart it on "
                f"{max(policies, key=lambda policy: policy.version).checkpoint}, or publish its checkpoint"
            )
        return Policy(version=self._settings.initial_version, checkpoint=path, run="initial")

    async def _could_not_start(self, wanted: Target, error: EngineUnavailable) -> None:
        self._failures += 1
        self._error = str(error)
        await self._owner.close()
        log.error("policy %d: the engine does not start: %s", wanted.policy.version, error)
        # An attached engine is not ours to start, and a restart on the policy that served before answers no command.
        if self._owner.controls_weights and wanted != self._last_good:
            await self._answer(wanted, "failed", str(error))
            if self._last_good is not None:
                self._refused.add(wanted.command)
                return  # at once: the policy before served well
        self._state = "broken"
        await self._show()
        await self._turn.release()  # it may be broken for long, and the others can change meanwhile
        pause = _backoff(self._failures)
        await self._first(self._follower.changed(self._follower.target), self._stop.wait(), timeout=pause)

    async def _show(self) -> None:
        """Beat now: others decide by this state. Where that fails, the next beat is soon."""
        with suppress(RedisError):
            await self._heartbeat.beat()

    def _target(self, engine: Engine) -> int:
        return concurrency_target(engine.facts.max_running_requests, self._settings.oversubscription)

    def _session_of(self, engine: Engine, policy: Policy, encoder: PromptEncoder) -> Session:
        generator = Generator(
            engine, version=policy.version, target=self._target(engine), outlet=self, on_change=self._nudge
        )
        puller = Puller(
            client=self._client,
            reader=self._reader,
            keys=self._keys,
            consumer=self._me.consumer,
            version=policy.version,
            budgets=Budgets(attempts=self._settings.max_attempts, faults=self._settings.max_faults),
            encoder=encoder,
            generator=generator,
            settler=self._settler,
            server_clock=self._server_clock,
            hold=self._hold,
            know_streams=self._know_streams,
            anyone_serves=lambda version: anyone_serves(self._client, self._keys, version),
            paused=lambda: self.paused(),
            on_backlog=self._observe,
        )
        return Session(engine, policy, generator, puller)

    # Serving.

    async def _serve(self, session: Session) -> Ending:
        pulling = asyncio.create_task(session.puller.run())
        dead = asyncio.create_task(self._owner.watch())
        turn = asyncio.create_task(self._turn_to_change(session))
        stop = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait([pulling, dead, turn, stop], return_when=asyncio.FIRST_COMPLETED)
            session.puller.stop()
            if dead.done():
                self._state, self._error = "starting", dead.result()
                log.error("the engine died: %s", self._error)
                self._return_all(session, lost=True)
                ending = Ending.DEAD
            else:
                self._state = "stopping" if stop.done() else "changing"
                ending = Ending.STOP if stop.done() else Ending.CHANGE
                await self._wind_down(session, dead)
            await pulling  # its error, if it ended by one, is a bug that ends the host
            self._return_all(session, lost=False)  # what its last pull brought
            if ending is Ending.CHANGE:
                turn.result()  # as above
            return ending
        finally:
            await _cancelled([pulling, dead, turn, stop])

    async def _turn_to_change(self, session: Session) -> None:
        """Return once another policy is wanted and it is this host's turn; serving goes on meanwhile."""
        while True:
            target = self._follower.target
            if target is None or not self._is_change(target, session):
                await self._follower.changed(target)
            elif not self._owner.controls_weights:
                return  # the engine serves it already: nobody has to wait
            else:
                await self._turn.take()
                # Waiting takes as long as the changes of the others: by now it may be another, or have failed there.
                if self._follower.target == target and not await self._failed_elsewhere(target):
                    return
                await self._turn.release()

    def _is_change(self, target: Target, session: Session) -> bool:
        """True when the engine has to change for `target`, or, attached, is known to serve it by now."""
        if target.command in self._refused or target.policy.version == session.policy.version:
            return False
        return self._owner.controls_weights or target.policy.checkpoint == session.engine.facts.model_path

    async def _failed_elsewhere(self, target: Target) -> bool:
        """True, and the policy is refused here too, when it failed on another host: that ends its roll-out."""
        try:
            for worker, error in await failures_of(self._client, self._keys, target.command):
                if not await works(self._client, self._keys, worker):
                    continue  # it failed on any policy: that says nothing of this one
                self._refused.add(target.command)
                self._error = f"policy {target.policy.version} is not tried here, since it failed on {worker}: {error}"
                log.error("%s", self._error)
                await self._answer(target, "failed", self._error)
                return True
        except RedisError as error:
            log.warning("looking for hosts on which policy %d failed: %s", target.policy.version, error)
        return False

    async def _wind_down(self, session: Session, dead: asyncio.Task[str]) -> None:
        """Let what was started finish, for a while; the rest goes to other hosts now."""
        for held in session.generator.abandon(started=False):
            self._settler.give_back(held)
        drained = asyncio.create_task(session.generator.drain())
        cut_short = asyncio.create_task(self._cut_short.wait())
        await asyncio.wait(
            [drained, cut_short, dead], timeout=self._settings.drain_s, return_when=asyncio.FIRST_COMPLETED
        )
        drained.cancel()
        cut_short.cancel()
        self._return_all(session, lost=dead.done())

    def _return_all(self, session: Session, *, lost: bool) -> None:
        for held in session.generator.abandon():
            self._settler.give_back(held, lost=lost)

    async def _unless_stopped(self, opening: Coroutine[Any, Any, Session]) -> Session | None:
        """Starting an engine takes minutes; a stop does not wait for it."""
        task = asyncio.create_task(opening)
        stop = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait([task, stop], return_when=asyncio.FIRST_COMPLETED)
        finally:
            await _cancelled([task, stop])
        return None if task.cancelled() else task.result()

    async def _first(self, *waits: Coroutine[Any, Any, Any], timeout: float | None = None) -> None:
        tasks = [asyncio.create_task(wait) for wait in waits]
        try:
            await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await _cancelled(tasks)

    # What the parts tell.

    def finished(self, held: HeldJob) -> None:
        """Outlet: every sample is there."""
        self._settler.settle(held, held.group("ok", worker=self._name, now=time.monotonic()))

    def refused(self, held: HeldJob, error: str) -> None:
        """Outlet: the job is at fault, and would be on every host."""
        group = held.group("failed", worker=self._name, now=time.monotonic(), error=error)
        self._settler.settle(held, group, dead=error)

    def lost(self, held: HeldJob, error: str) -> None:
        """Outlet: the engine failed it; later, so that a dying engine does not burn its attempts."""
        log.warning("job %s goes back: %s", held.job.id, error)
        self._settler.give_back(held, lost=True, delayed_until_ms=self._server_clock.now_ms() + LOST_DELAY_MS)

    def broken(self, bug: BaseException) -> None:
        """Outlet: a bug; stop at once, and let it be seen."""
        self._bug = self._bug or bug
        self.stop_now()

    def _hold(self, jobs: Sequence[HeldJob]) -> None:
        assert self._leases is not None
        self._held.update({(held.entry.stream, held.entry.id): held for held in jobs})
        self._leases.hold([held.entry for held in jobs])

    def _done(self, entry: Entry) -> None:
        assert self._leases is not None
        self._held.pop((entry.stream, entry.id), None)
        self._leases.release(entry)
        self._nudge()

    def _lost(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            held = self._held.get((entry.stream, entry.id))
            if held is None or held.left or self._session is None:
                continue  # on its way to the server: the scripts know whose it is
            log.warning("job %s is held by another host by now; dropping it here", held.job.id)
            del self._held[entry.stream, entry.id]
            self._session.generator.drop(held)

    def _count(self, replies: Sequence[Settled]) -> None:
        for reply in replies:
            self._settled += reply.now and reply.outcome != "failed"
            self._failed += reply.now and reply.outcome == "failed"

    def _know_streams(self, streams: Sequence[str]) -> None:
        assert self._leases is not None
        self._leases.watch(streams)

    def _nudge(self) -> None:
        if (session := self._session) is None:
            return
        session.puller.nudge()
        self._observe()

    def _observe(self) -> None:
        if (session := self._session) is None:
            return
        self._saturation.observe(
            in_flight=session.generator.in_flight,
            full=session.engine.facts.max_running_requests,
            backlog=session.puller.backlog or session.generator.waiting > 0,
        )

    async def _heard(self, target: Target) -> None:
        self._received[target.command] = time.monotonic()
        await self._answer(target, "received")

    async def _answer(self, target: Target, state: AckState, error: str | None = None) -> None:
        if not target.command or self._answers.get(target.command) == state:
            return  # the settings' own model, which nobody asked for; or said before
        self._answers[target.command] = state
        seconds = time.monotonic() - self._received.get(target.command, time.monotonic())
        await acknowledge(
            self._client,
            self._keys,
            Ack(
                worker=self._name,
                command=target.command,
                version=target.policy.version,
                state=state,
                seconds=round(seconds, 3),
                error=error,
            ),
        )

    def _connect(self) -> Redis:
        client = connect_async(self._url)
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


async def _cancelled(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancel tasks, and return when they have ended; those that ended before keep their results."""
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)
