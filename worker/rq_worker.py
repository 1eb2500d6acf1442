"""RQ's side of a host: `rq worker --worker-class rollpool.worker.RolloutWorker POOL`.

Invariant: to RQ this is a worker like any other (listed, suspended, resumed, stopped, counted), while its queues carry
no jobs: those come from the pool's streams. RQ has no asyncio worker, so only `work()` is ours, and everything RQ's own
client does runs on a thread, since it blocks.
"""

import asyncio
import contextlib
import logging
import signal
import socket
import time
from typing import Any
from urllib.parse import quote, urlencode

from redis import Redis
from redis.connection import ConnectionPool, SSLConnection
from redis.exceptions import RedisError
from redis.sentinel import SentinelConnectionPool
from rq import SimpleWorker, worker_registration
from rq.logutils import setup_loghandlers
from rq.serializers import JSONSerializer
from rq.suspension import is_suspended
from rq.utils import utcparse
from rq.worker import DequeueStrategy, WorkerStatus

from rollpool.schemas import RollpoolError, SettingsError
from rollpool.worker.engines.owner import owner_for
from rollpool.worker.host import Host
from rollpool.worker.incarnation import process_ended
from rollpool.worker.settings import PREFIX, load_settings
from rollpool.worker.sources import Sources

#: Seconds between looks at what RQ wants: its own worker looks as often.
TICK_S = 1.0

#: Seconds between heartbeats in RQ's books; its own worker beats as often while it works.
RQ_HEARTBEAT_S = 15.0

#: What of RQ's own TLS settings a URL can carry on.
_TLS_OPTIONS = ("ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname")

#: A second signal within this is the same one: a terminal and a process manager both send it (as in RQ).
SAME_SIGNAL_S = 1.0


class RolloutWorker(SimpleWorker):
    """Serves one pool with one engine; the name of its one queue is the pool's."""

    def __init__(self, queues: Any, *args: Any, **kwargs: Any) -> None:
        # Never pickle: what anyone can write to Redis must not become code here.
        super().__init__(queues, *args, **{**kwargs, "serializer": JSONSerializer})

    def register_birth(self) -> None:
        """Register, in place of a predecessor of this name that is known to have ended.

        RQ keeps a killed worker's key for minutes and refuses its name meanwhile.
        """
        if self._predecessor_ended():
            self.connection.delete(self.key)
        super().register_birth()  # type: ignore[no-untyped-call]

    def work(
        self,
        burst: bool = False,
        logging_level: str | None = None,
        date_format: str = "%H:%M:%S",
        log_format: str = "%(asctime)s %(message)s",
        max_jobs: int | None = None,
        max_idle_time: int | None = None,
        with_scheduler: bool = False,
        dequeue_strategy: DequeueStrategy = DequeueStrategy.DEFAULT,
    ) -> bool:
        """Serve the pool until told to stop, or until `burst`, `max_jobs` or `max_idle_time` say so.

        `with_scheduler` and `dequeue_strategy` are of RQ's queues, which carry no jobs here.
        """
        del with_scheduler, dequeue_strategy
        setup_loghandlers(logging_level or "INFO", date_format, log_format, name="rollpool")
        try:
            host = self._host()
            self.bootstrap(logging_level or "INFO", date_format, log_format)
            try:
                asyncio.run(self._serve(host, burst=burst, max_jobs=max_jobs, max_idle_time=max_idle_time))
            finally:
                self.teardown()  # type: ignore[no-untyped-call]
        except RollpoolError as error:  # says what to do; a traceback would only hide it
            self.log.error("Worker %s: %s", self.name, error)
            raise SystemExit(1) from None
        return bool(host.settled + host.failed)

    def _host(self) -> Host:
        names = self.queue_names()
        if len(names) != 1:
            raise SettingsError(f"one worker serves one pool, not {len(names)}: rq worker … POOL (got {names})")
        settings = load_settings()
        sources = Sources(
            settings.stage_dir, roots=settings.model_roots, budget_bytes=int(settings.stage_gib * (1 << 30))
        )
        owner = owner_for(settings.engine, settings.log_dir / f"engine-{self.name}.log", sources)
        return Host(settings.url or _url_of(self.connection), names[0], self.name, settings, owner)

    async def _serve(self, host: Host, *, burst: bool, max_jobs: int | None, max_idle_time: int | None) -> None:
        self._install_async_signal_handlers(host)
        books = asyncio.create_task(self._keep_books(host))
        limits = asyncio.create_task(_stop_at_limits(host, burst, max_jobs, max_idle_time))
        for task in (books, limits):
            task.add_done_callback(lambda ended: _tell_bug(host, ended))
        try:
            await host.run()
        finally:
            for task in (books, limits):
                task.cancel()
            with contextlib.suppress(RedisError):
                await asyncio.to_thread(self._count, host)

    def _install_async_signal_handlers(self, host: Host) -> None:
        """First signal: warm stop; second: cold. RQ's `shutdown` command arrives here too, as SIGINT."""
        first: float | None = None

        def on_signal() -> None:
            nonlocal first
            if first is None:
                first = time.monotonic()
                self.log.info("Worker %s: warm stop; once more to stop at once", self.name)
                host.stop()
            elif time.monotonic() - first > SAME_SIGNAL_S:
                self.log.warning("Worker %s: cold stop", self.name)
                host.stop_now()

        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, on_signal)

    async def _keep_books(self, host: Host) -> None:
        """What RQ knows of this worker: state, heartbeat, counts, and whether RQ is suspended."""
        suspended = False
        host.paused = lambda: suspended
        beaten = 0.0
        while True:
            try:
                suspended = await asyncio.to_thread(is_suspended, self.connection, self)
                await asyncio.to_thread(self._show_state, host, suspended)
                await asyncio.to_thread(self._count, host)
                if time.monotonic() - beaten >= RQ_HEARTBEAT_S:
                    beaten = time.monotonic()
                    await asyncio.to_thread(self._beat)
            except RedisError as error:
                self.log.warning("Worker %s: RQ's books: %s; trying again", self.name, error)
            await asyncio.sleep(TICK_S)

    def _show_state(self, host: Host, suspended: bool) -> None:
        state = WorkerStatus.SUSPENDED if suspended else WorkerStatus.BUSY if host.busy else WorkerStatus.IDLE
        if self.get_state() != state:
            self.set_state(state)

    def _beat(self) -> None:
        with self.connection.pipeline() as pipeline:
            self.heartbeat(pipeline=pipeline)
            key_was_new = pipeline.execute()[0]
        if key_was_new:  # it expired or was flushed: be listed again
            self.log.warning("Worker %s: registered again, its key was gone", self.name)
            with self.connection.pipeline() as pipeline:
                pipeline.hset(self.key, mapping={**self.serialize(), "state": self.get_state()})
                worker_registration.register(self, pipeline)
                pipeline.execute()
        if self.should_run_maintenance_tasks:
            self.run_maintenance_tasks()  # type: ignore[no-untyped-call]

    def _count(self, host: Host) -> None:
        """Bring RQ's counts up to ours."""
        for field, ours, attribute in (
            ("successful_job_count", host.settled, "successful_job_count"),
            ("failed_job_count", host.failed, "failed_job_count"),
        ):
            if delta := ours - getattr(self, attribute):
                self.connection.hincrby(self.key, field, delta)
                setattr(self, attribute, ours)

    def _predecessor_ended(self) -> bool:
        known: Any = self.connection.hmget(self.key, "hostname", "pid", "birth")
        hostname, pid, birth = (value.decode() if value else "" for value in known)
        if hostname != socket.gethostname() or not pid.isdecimal() or not birth:
            return False
        return int(pid) == self.pid or process_ended(int(pid), alive_at=utcparse(birth).timestamp())


def _tell_bug(host: Host, ended: "asyncio.Task[None]") -> None:
    if not ended.cancelled() and (bug := ended.exception()) is not None:
        host.fail(bug)


async def _stop_at_limits(host: Host, burst: bool, max_jobs: int | None, max_idle_time: int | None) -> None:
    idle_limit = 0.0 if burst else max_idle_time
    while True:
        await asyncio.sleep(TICK_S / 4)
        idle = host.idle_seconds()
        if idle_limit is not None and idle > idle_limit:
            logging.getLogger(__name__).info("nothing left to do for %.1f s: stopping", idle)
            return host.stop()
        if max_jobs is not None and host.settled + host.failed >= max_jobs:
            logging.getLogger(__name__).info("%d jobs done: stopping", max_jobs)
            return host.stop()


def _url_of(connection: "Redis") -> str:
    """The URL of RQ's own connection; rollpool opens its own, since RQ forces long timeouts on that one."""
    pool = connection.connection_pool
    options = pool.connection_kwargs
    user, password = (quote(options.get(name) or "", safe="") for name in ("username", "password"))
    login = f"{user}:{password}@" if user or password else ""
    db = options.get("db") or 0
    if path := options.get("path"):
        return f"unix://{login}{path}?db={db}"
    scheme = "rediss" if _speaks_tls(pool) else "redis"
    query = {name: value for name in _TLS_OPTIONS if (value := options.get(name)) is not None}
    if isinstance(pool, SentinelConnectionPool):
        sentinels = [sentinel.connection_pool for sentinel in pool.sentinel_manager.sentinels]
        if any(_speaks_tls(sentinel) != _speaks_tls(pool) for sentinel in sentinels):
            raise SettingsError(
                f"{PREFIX}URL: RQ speaks TLS to the Sentinels or to the master alone, rollpool to both or neither; "
                "set SSL and SENTINEL_KWARGS alike, or name another server here"
            )
        asking = sentinels[0].connection_kwargs
        query |= {f"sentinel_{name}": value for name in ("username", "password") if (value := asking.get(name))}
        places = ",".join(_place(sentinel.connection_kwargs) for sentinel in sentinels)
        url = f"{scheme}+sentinel://{login}{places}/{quote(pool.service_name, safe='')}/{db}"
    else:
        url = f"{scheme}://{login}{_place(options)}/{db}"
    return f"{url}?{urlencode(query)}" if query else url


def _speaks_tls(pool: ConnectionPool) -> bool:
    return issubclass(pool.connection_class, SSLConnection)


def _place(options: dict[str, Any]) -> str:
    host = options.get("host") or "localhost"
    return f"[{host}]:{options.get('port', 6379)}" if ":" in host else f"{host}:{options.get('port', 6379)}"
