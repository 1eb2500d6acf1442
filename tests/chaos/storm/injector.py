"""Does the faults.

Invariant: what a fault takes away it brings back, also when the storm is over in the middle of it; no two faults have
one victim at a time, and what was done is counted when it was done.
"""

import contextlib
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import psutil
from redis.exceptions import RedisError

from rollpool.schemas import RollpoolError
from storm.faults import Fault
from storm.recovery import Recovery
from storm.stage import Pool, Stage
from storm.wire import Pending

#: What becomes of the work in flight over a change.
MODES = ("drain", "requeue", "resume")

#: Seconds between stopping a worker and reading what it holds: what it had sent arrives.
SETTLE_DOWN_S = 0.03


class Injector:
    """Runs each fault on a thread of its own.

    Args:
        stage: what they are done to.
        pool: whose workers and trainers are the victims.
        trainers: names of its trainers.
        recovery: is told what a killed worker held.
        say: takes a line for people.
    """

    def __init__(
        self, stage: Stage, pool: Pool, trainers: Sequence[str], recovery: Recovery, say: Callable[[str], None]
    ) -> None:
        self._stage = stage
        self._pool = pool
        self._trainers = list(trainers)
        self._recovery = recovery
        self._pending = Pending(stage.direct, pool.name)
        self._say = say
        self._over = threading.Event()
        self._busy: set[str] = set()
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(max_workers=16, thread_name_prefix="storm-fault")
        self._running: list[Future[None]] = []
        self.done: Counter[str] = Counter()
        #: Processes that ended though nobody killed them, and were started again.
        self.ended_alone: Counter[str] = Counter()

    # What the storm calls.

    def begin(self, fault: Fault) -> None:
        """Begin a fault; it ends by itself."""
        self._running = [running for running in self._running if not running.done()]
        self._running.append(self._threads.submit(self._do, fault))

    def mend(self) -> None:
        """Cut short what is going on, and wait until it is brought back."""
        self._over.set()
        for running in self._running:
            running.result()
        self._threads.shutdown()
        self.revive()

    def revive(self) -> None:
        """Start again whatever ended though nobody killed it, as a process manager would."""
        for name in self._pool.workers:
            with self._taken([name]) as free:
                if free and self._pool.hosts.workers[name].poll() is not None:
                    log = self._pool.hosts.log(name).read_text(errors="replace")
                    self._tell_end(name, self._pool.hosts.workers[name].returncode, log)
                    self._pool.hosts.start(name)
        for name in self._trainers:
            with self._taken([name]) as free:
                if free and self._stage.children.ended(name) not in (None, 0):
                    log = self._stage.children.log(name).read_text(errors="replace")
                    self._tell_end(name, self._stage.children.ended(name), log)
                    self._stage.children.start(name)

    def _tell_end(self, name: str, status: int | None, log: str) -> None:
        self.ended_alone[name] += 1
        self._say(f"{name} ended by itself with status {status}; its log ends:\n{log[-1500:]}")

    # Faults.

    def _do(self, fault: Fault) -> None:
        try:
            getattr(self, f"_{fault.kind}")(fault)
        except (psutil.Error, RedisError, RollpoolError, ProcessLookupError) as error:
            self._say(f"{fault.kind}: {type(error).__name__}: {error}")

    def _worker_kill(self, fault: Fault) -> None:
        with self._victim(self._live_workers(), fault) as name:
            if name is None:
                return
            worker = self._pool.hosts.workers[name]
            # Stopped first: what it holds is read of a worker that can settle no more of it.
            worker.send_signal(signal.SIGSTOP)
            time.sleep(SETTLE_DOWN_S)
            held = []
            with contextlib.suppress(RedisError):
                held = [each for each in self._pending.read() if each.consumer.startswith(f"{name}:")]
            worker.kill()
            self._recovery.killed(held, time.monotonic())
            worker.wait()
            self._count(fault, f"{name}, which held {len(held)} jobs")
            self._over.wait(fault.seconds)
            self._pool.hosts.start(name)

    def _engine_kill(self, fault: Fault) -> None:
        self._kill_part(fault, lambda engine: engine[0])

    def _scheduler_kill(self, fault: Fault) -> None:
        def scheduler(engine: list[psutil.Process]) -> psutil.Process:
            named = (part for part in engine[1:] if "scheduler" in " ".join(part.cmdline()))
            return next(named, engine[-1])

        self._kill_part(fault, scheduler)

    def _kill_part(self, fault: Fault, part: Callable[[list[psutil.Process]], psutil.Process]) -> None:
        with self._victim(self._live_workers(), fault) as name:
            engine = self._stage.engine(self._pool, name) if name else []
            if engine:
                part(engine).kill()
                self._count(fault, str(name))

    def _worker_stop(self, fault: Fault) -> None:
        with self._victim(self._live_workers(), fault) as name:
            if name is None:
                return
            worker = self._pool.hosts.workers[name]
            worker.send_signal(signal.SIGSTOP)
            self._count(fault, f"{name} for {fault.seconds:.1f} s")
            self._over.wait(fault.seconds)
            worker.send_signal(signal.SIGCONT)

    def _trainer_kill(self, fault: Fault) -> None:
        live = [name for name in self._trainers if self._stage.children.ended(name) is None]
        with self._victim(live, fault) as name:
            if name is None:
                return
            self._stage.children.kill(name)
            self._count(fault, name)
            self._over.wait(fault.seconds)
            self._stage.children.start(name)

    def _server_kill(self, fault: Fault) -> None:
        with self._stage.server_lock:
            self._stage.server.kill()
            self._stage.proxy.refuse()
            try:
                self._count(fault, f"for {fault.seconds:.1f} s")
                self._over.wait(fault.seconds)
                self._stage.server.restart()
            finally:
                self._stage.proxy.accept()

    def _cut(self, fault: Fault) -> None:
        cut = self._stage.proxy.cut(fault.share, int(fault.victim * 1e9))
        self._count(fault, f"{cut} connections")

    def _refuse(self, fault: Fault) -> None:
        self._stage.proxy.refuse()
        self._count(fault, f"for {fault.seconds:.1f} s")
        self._over.wait(fault.seconds)
        self._stage.proxy.accept()

    def _stall(self, fault: Fault) -> None:
        self._stage.proxy.stall()
        self._count(fault, f"for {fault.seconds:.1f} s")
        self._over.wait(fault.seconds)
        self._stage.proxy.flow()

    def _lose_replies(self, fault: Fault) -> None:
        self._stage.proxy.mute()
        self._over.wait(fault.seconds)
        cut = self._stage.proxy.cut_muted()
        self._count(fault, f"{cut} connections, for {fault.seconds:.1f} s")

    def _policy(self, fault: Fault) -> None:
        with self._taken([f"policies of {self._pool.name}"]) as free:
            if free and self._pool.policies.left:
                mode = MODES[int(fault.victim * len(MODES))]
                way = "restart" if fault.share < 0.5 else "auto"
                version = self._stage.publish(self._pool, mode=mode, way=way)
                self._count(fault, f"version {version}, {mode} ({way})")

    def _adapter(self, fault: Fault) -> None:
        with self._taken([f"policies of {self._pool.name}"]) as free:
            if free and self._pool.policies.left:
                run = self._trainers[int(fault.victim * len(self._trainers))]
                self._count(fault, f"version {self._stage.publish_adapter(self._pool, run)} of {run}")

    def _back(self, fault: Fault) -> None:
        """In the middle of a roll-out, or after it."""
        with self._taken([f"policies of {self._pool.name}"]) as free:
            if free and self._pool.policies.left:
                version = self._stage.publish(self._pool)
                self._over.wait(fault.seconds)
                self._count(fault, f"from {version} to {self._stage.go_back(self._pool)}")

    # Victims.

    def _live_workers(self) -> list[str]:
        return [name for name in self._pool.workers if self._pool.hosts.workers[name].poll() is None]

    def _count(self, fault: Fault, what: str) -> None:
        with self._lock:
            self.done[fault.kind] += 1
        self._say(f"{fault.at:6.1f} s  {fault.kind}: {what}")

    @contextlib.contextmanager
    def _victim(self, candidates: Sequence[str], fault: Fault) -> Iterator[str | None]:
        """One of the candidates that no other fault has; None where there is none."""
        with self._lock:
            free = [name for name in candidates if name not in self._busy]
            name = free[int(fault.victim * len(free))] if free else None
            self._busy.update([name] if name else [])
        try:
            yield name
        finally:
            with self._lock:
                self._busy.discard(name or "")

    @contextlib.contextmanager
    def _taken(self, names: Sequence[str]) -> Iterator[bool]:
        """All of these, when no fault has any of them."""
        with self._lock:
            free = not self._busy.intersection(names)
            self._busy.update(names if free else [])
        try:
            yield free
        finally:
            if free:
                with self._lock:
                    self._busy.difference_update(names)
