"""A pool of real workers with simulated engines, whose policies are changed while parts of it are killed.

Invariant: everything started here ends with the `Scene`; what the hosts show is looked at past all of our own code that
is under test but the names of keys; and a scene that a test left in order can be used by the next one.
"""

import contextlib
import functools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
from change_load import Book, Load, again
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry
from storm.policies import add_tokenizer
from storm.wire import Pending
from waiting import until_blocking

from rollpool.ops.doctor import examine
from rollpool.ops.local.hosts import LocalHosts
from rollpool.ops.local.server import LocalServer
from rollpool.ops.sim import adapted, make_sim_adapter, make_sim_model, sim_engine
from rollpool.ops.sim.model import SimFault
from rollpool.producer import RolloutPool
from rollpool.schemas import GROUP, Ack, Keys, WorkerStatus
from rollpool.schemas.connection import connect
from rollpool.schemas.control_log import ack_of

POOL, RUN = "changes", "trainer"

#: Seconds that a turn is kept by a host that died in its change; real ones have thirty.
TURN_S = 2.5

#: Seconds until a wait of a scene fails: a dozen processes that are killed and started share two cores.
PATIENCE_S = 150.0

#: Jobs that are open all the time: the hosts have their hands full.
OPEN = 28

#: Seconds between two looks of a monitor.
LOOK_S = 0.05

#: Short, so that many faults fit into a minute.
SETTINGS: dict[str, Any] = {"lease_s": 1, "heartbeat_s": 0.3, "drain_s": 2, "max_attempts": 20, "sample_timeout_s": 30}

#: Folder of what makes workers hurry.
_HASTEN = Path(__file__).parent / "hasten"


class Store:
    """An HTTP server over a directory; weights are sent while its gate is open."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.gate = threading.Event()
        self.gate.set()
        #: Transfers of weights that were begun.
        self.begun = 0
        store = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self._answer(body=False)

            def do_GET(self) -> None:
                self._answer(body=True)

            def _answer(self, *, body: bool) -> None:
                file = store.directory / self.path.lstrip("/")
                if not file.is_file():
                    self.send_error(404)
                    return
                content = file.read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if not body:
                    return
                with contextlib.suppress(OSError):  # whoever asked was killed
                    half = len(content) // 2
                    self.wfile.write(content[:half])
                    self.wfile.flush()
                    if file.suffix == ".safetensors":
                        store.begun += 1
                        store.gate.wait(60.0)
                    self.wfile.write(content[half:])

            def log_message(self, format: str, *args: Any) -> None:
                del format, args

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(LOOK_S,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        """End it."""
        self.gate.set()
        self._server.shutdown()
        self._server.server_close()


@dataclass
class Watch:
    """What a monitor saw of the hosts."""

    #: The fewest that served at once, as their heartbeats say.
    fewest: int = 10**6
    #: The most that had a turn at once.
    most_turns: int = 0
    looks: int = 0
    #: When the fewest served: state and policy of each.
    then: dict[str, str] = field(default_factory=dict)


class Scene:
    """One pool.

    Args:
        directory: for all that is written.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.models = directory / "models"
        self.models.mkdir(parents=True)
        self.server = LocalServer(directory=directory / "server", appendonly=True, appendfsync="always")
        self.store = Store(self.models)
        self.keys = Keys(POOL)
        self._hosts: dict[str, LocalHosts] = {}
        self._pools: dict[str, RolloutPool] = {}
        self.book = Book()
        self.books: dict[str, Book] = {RUN: self.book}
        self.loads: dict[str, Load] = {}
        self._signature = 1000
        self._highest = 0
        self._width = 8
        #: Set by a test that did not come to its end.
        self.spoiled = False

    def __enter__(self) -> Self:
        self._environ = {name: os.environ.get(name) for name in ("PYTHONPATH", "CHANGE_TURN_LEASE_S")}
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(_HASTEN), os.environ.get("PYTHONPATH"))))
        os.environ["CHANGE_TURN_LEASE_S"] = str(TURN_S)
        self.server.start()
        self.client: Redis = Redis(
            port=self.server.port, socket_timeout=5.0, retry=Retry(NoBackoff(), 0), decode_responses=False, protocol=2
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.store.gate.set()
        self.server.start()
        for load in self.loads.values():
            load.close()
        for hosts in self._hosts.values():
            for worker in hosts.workers.values():
                with contextlib.suppress(psutil.Error):
                    _signal_all(worker.pid, signal.SIGCONT)
                worker.kill()  # nothing of theirs is needed any more, and their engines end with them
            hosts.stop()
        for pool in self._pools.values():
            pool.close()
        self.client.close()
        self.store.close()
        self.server.stop()
        for name, value in self._environ.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})

    # Hosts.

    @property
    def names(self) -> list[str]:
        """All hosts that were started."""
        return list(self._hosts)

    def add_host(self, name: str, engine: Mapping[str, Any], **settings: Any) -> None:
        """Start a host."""
        given = {
            **SETTINGS,
            "stage_dir": str(self.directory / "staged" / name),
            "model_roots": json.dumps([str(self.models), self.store.url]),
            **settings,
        }
        own = {"start_timeout_s": 30.0, "stall_timeout_s": 60.0, **engine}
        self._hosts[name] = LocalHosts(self.server.url, POOL, self.directory / "hosts", own, given)
        self._hosts[name].start(name)

    @contextlib.contextmanager
    def lone_host(self, pool: str, name: str, engine: Mapping[str, Any]) -> Iterator[None]:
        """A host of another pool on this server."""
        with LocalHosts(self.server.url, pool, self.directory / "hosts", dict(engine), SETTINGS) as hosts:
            hosts.start(name)
            yield

    def restart(self, name: str) -> None:
        """Start a worker that was killed, under its name."""
        self._hosts[name].start(name)

    def kill_worker(self, name: str) -> None:
        """SIGKILL."""
        worker = self._hosts[name].workers[name]
        worker.kill()
        worker.wait()

    def forget(self, name: str) -> None:
        """End a host for good."""
        self.kill_worker(name)
        until_blocking(lambda: not self.client.exists(self.keys.worker(name)), f"{name} is listed no more")
        del self._hosts[name]

    def engine(self, name: str) -> list[psutil.Process]:
        """The engine of a worker: its server, then the server's children; empty while it has none."""
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self._hosts[name].workers[name].pid).children():
                if any(part.endswith("launch.py") for part in child.cmdline()):
                    return [child, *child.children(recursive=True)]
        return []

    def engines(self) -> dict[str, int]:
        """Process of each host's engine."""
        return {name: parts[0].pid for name in self.names if (parts := self.engine(name))}

    def kill_engine(self, name: str) -> None:
        """SIGKILL its server, now that there is one."""
        until_blocking(lambda: bool(self.engine(name)), f"{name} has an engine")
        self.engine(name)[0].kill()

    def kill_server(self, seconds: float = 0.5) -> None:
        """SIGKILL, and start it again on its data."""
        self.server.kill()
        time.sleep(seconds)
        self.server.restart()

    def freeze_scheduler(self, name: str) -> None:
        """SIGSTOP what makes tokens: the engine lets go of nothing from now on."""
        for part in self.engine(name)[1:]:
            part.send_signal(signal.SIGSTOP)

    def log(self, name: str) -> str:
        """What a worker wrote."""
        return self._hosts[name].log(name).read_text(errors="replace")

    # What they show.

    def status(self, name: str) -> WorkerStatus | None:
        """A host's heartbeat; None while there is none, or no server."""
        with contextlib.suppress(RedisError):
            fields: Any = self.client.hgetall(self.keys.worker(name))
            return WorkerStatus.from_fields(fields) if fields else None
        return None

    def statuses(self) -> dict[str, WorkerStatus]:
        """All that there are."""
        return {name: status for name in self.names if (status := self.status(name)) is not None}

    def turns(self) -> list[str]:
        """The hosts that have a turn now: one whose lease is over is there until another host asks."""
        with contextlib.suppress(RedisError):
            found: Any = self.client.zrangebyscore(self.keys.rollout, 1000 * time.time(), "+inf")
            return [name.decode() for name in found]
        return []

    def acks(self, version: int, state: str = "") -> list[Ack]:
        """Answers about a version, in order; none while the server is away."""
        with contextlib.suppress(RedisError):
            found: Any = self.client.xrange(self.keys.acks)
            answers = (ack_of(fields) for _, fields in found)
            return [ack for ack in answers if ack and ack.version == version and state in ("", ack.state)]
        return []

    def failed(self, version: int) -> dict[str, str]:
        """What each host said on which a version failed."""
        return {ack.worker: ack.error or "" for ack in self.acks(version, "failed")}

    def first(self, condition: Callable[[str], object], what: str, among: Sequence[str] | None = None) -> str:
        """Wait until a host meets a condition; its name."""
        found: list[str] = []

        def look() -> bool:
            found[:] = [name for name in among or self.names if condition(name)]
            return bool(found)

        self.until(look, what)
        return found[0]

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Wait; a failure tells what the hosts say."""
        try:
            until_blocking(condition, what, within_s=PATIENCE_S)
        except AssertionError as error:
            said = "\n".join(map(str, self.statuses().values()))
            said += "".join(f"\n{run}: {load.broken!r} {load.troubles[-3:]}" for run, load in self.loads.items())
            places = "\n".join(Pending(self.client, POOL).places())
            logs = "\n".join(f"--- {name}\n{self.log(name)[-1500:]}" for name in self.names)
            raise AssertionError(f"{error}\nturns: {self.turns()}\n{said}\n{places}\n{logs}") from None

    def is_waiting(self, name: str) -> bool:
        """True while a host waits for its turn."""
        status = self.status(name)
        return status is not None and status.staging.startswith("its turn")

    def is_staging(self, name: str, version: int) -> bool:
        """True while it fetches a policy."""
        status = self.status(name)
        return status is not None and status.staging.startswith(f"policy {version}")

    def is_changing(self, name: str) -> bool:
        """True while it serves nothing for its change."""
        status = self.status(name)
        return status is not None and status.state == "changing"

    def starts_another_engine(self, name: str, before: Mapping[str, int]) -> bool:
        """True while it changes, and its new engine is there already."""
        parts = self.engine(name)
        return self.is_changing(name) and bool(parts) and parts[0].pid != before[name]

    def swaps_to(self, name: str, version: int) -> bool:
        """True while its engine changes to these weights."""
        status = self.status(name)
        return status is not None and status.heading == version and name in self.turns()

    def all_serve(self, version: int, generation: int = 0, among: Sequence[str] | None = None) -> bool:
        """True once all of them serve it and none is on its way elsewhere."""
        statuses = [self.status(name) for name in among or self.names]
        return all(
            status is not None
            and (status.state, status.policy, status.generation, status.heading)
            == ("serving", version, generation, None)
            for status in statuses
        )

    def until_all_serve(self, version: int, generation: int = 0, among: Sequence[str] | None = None) -> None:
        """Wait for it."""
        self.until(lambda: self.all_serve(version, generation, among), f"all serve {version} ({generation})")

    @contextlib.contextmanager
    def watched(self) -> Iterator[Watch]:
        """Look at all hosts every 50 ms meanwhile."""
        watch, over = Watch(), threading.Event()
        names = self.names
        seen: dict[str, list[bytes | None]] = {}
        client = Redis(port=self.server.port, socket_timeout=5.0, retry=Retry(NoBackoff(), 0), protocol=2)

        def look() -> None:
            with contextlib.suppress(RedisError), client.pipeline(transaction=True) as pipe:
                for name in names:
                    pipe.hmget(self.keys.worker(name), "state", "policy", "heading")
                pipe.zcard(self.keys.rollout)
                *hosts, turns = pipe.execute()
                # A heartbeat that comes late on a busy machine says nothing new.
                seen.update({name: host for name, host in zip(names, hosts, strict=True) if host[0] is not None})
                serving = sum(host[0] == b"serving" for host in seen.values())
                if serving < watch.fewest:
                    watch.fewest, watch.then = serving, {name: str(host) for name, host in seen.items()}
                watch.most_turns = max(watch.most_turns, turns)
                watch.looks += 1

        def run() -> None:
            while not over.wait(LOOK_S):
                look()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            yield watch
        finally:
            over.set()
            thread.join()
            client.close()
        assert watch.looks > 5, "nobody looked"

    # Policies.

    def trainer(self, run: str = RUN) -> RolloutPool:
        """A client of this run."""
        if run not in self._pools:
            self._pools[run] = RolloutPool(self.server.url, pool=POOL, run=run)
        return self._pools[run]

    def model(self, name: str, *, fault: SimFault | None = None) -> tuple[str, int]:
        """A checkpoint of its own signature; where it is, and who."""
        self._signature += 1
        make_sim_model(self.models / name, signature=self._signature, fault=fault, hidden_size=self._width)
        add_tokenizer(self.models / name)
        return str(self.models / name), self._signature

    def wider(self) -> None:
        """Models are of another shape from now on."""
        self._width *= 2

    def publish(self, version: int, checkpoint: str, signature: int, **options: Any) -> None:
        """Publish a checkpoint, as often as it takes, and tag jobs with it from now on."""
        self._published(self.trainer(), version, checkpoint=checkpoint, **options)
        self.book.published(version, signature)
        for load in self.loads.values():
            load.tag = version

    def publish_broken(self, version: int, checkpoint: str, **options: Any) -> None:
        """Publish what nothing will serve; jobs are tagged with what was before."""
        self._published(self.trainer(), version, checkpoint=checkpoint, **{"check": False, **options})

    def publish_adapter(self, run: str, version: int, name: str) -> None:
        """Publish an adapter of a run on the current checkpoint; the run's jobs are tagged with it from now on."""
        self._signature += 1
        make_sim_adapter(self.models / name, self._signature)
        self._published(self.trainer(run), version, lora_path=str(self.models / name))
        self.books[run].published(version, adapted(self.book.eras[-1][self.version], self._signature))
        self.loads[run].tag = version

    def publish_broken_adapter(self, run: str, version: int, name: str) -> None:
        """Publish an adapter that is not whole."""
        make_sim_adapter(self.models / name, 1)
        cut_short(self.models / name / "adapter_model.safetensors")
        self._published(self.trainer(run), version, lora_path=str(self.models / name), check=False)

    def publish_base(self, version: int, name: str) -> None:
        """Publish a checkpoint for the jobs of all runs."""
        path, signature = self.model(name)
        self._published(self.trainer(), version, checkpoint=path)
        for book in self.books.values():
            book.published(version, signature)
        for load in self.loads.values():
            load.tag = version

    def adapters(self, name: str) -> str:
        """The adapters that a host serves, as its heartbeat says them."""
        status = self.status(name)
        return status.adapters if status is not None and status.state == "serving" else "?"

    def until_adapters(self, adapters: str, among: Sequence[str]) -> None:
        """Wait until these hosts serve these and no others."""
        self.until(
            lambda: all(self.adapters(name) == adapters for name in among), f"{', '.join(among)}: {adapters or 'none'}"
        )

    def versions_made(self) -> dict[str, set[int]]:
        """By which versions the jobs of each run were made, so far."""
        return {
            run: {
                version
                for groups in load.groups().values()
                for group in groups
                for sample in group.samples
                for version in sample.versions
            }
            for run, load in self.loads.items()
        }

    def go_back(self, version: int) -> None:
        """Have all checkpoints after `version` abandoned."""
        for load in self.loads.values():
            load.tag = version
        self.book.went_back(version)
        self._highest = version
        again(lambda: self.trainer().rollback_policy(version))

    def _published(self, pool: RolloutPool, version: int, **options: Any) -> None:
        self._highest = max(self._highest, version)
        again(functools.partial(pool.publish_policy, version, **options))

    @property
    def version(self) -> int:
        """The last one that was published to be served."""
        return max(self.book.eras[-1])

    @property
    def generation(self) -> int:
        """Of the checkpoints."""
        return self.book.era

    def next_version(self) -> int:
        """One over all that were published."""
        return self._highest + 1

    def move_out(self, path: Path) -> Path:
        """Move a checkpoint to where no host may read one."""
        outside = self.directory / "outside" / path.name
        outside.parent.mkdir(exist_ok=True)
        return path.rename(outside)

    # The end.

    def begin_load(self, *runs: str) -> None:
        """Ask for jobs from now on."""
        runs = runs or (RUN,)
        for run in runs:
            book = self.books.setdefault(run, Book())
            self.loads[run] = Load(self.server.url, POOL, run, book, most_open=OPEN // len(runs))
            self.loads[run].tag = max(self.books[run].eras[-1])
            self.loads[run].start()

    def outcomes_of(self, run: str, batch: str) -> list[str]:
        """Outcomes of the jobs of one batch, once all are settled."""
        load = self.loads[run]
        self.until(lambda: not any(job.startswith(f"{batch}/") for job in load.unsettled()), f"{batch} is settled")
        found = load.groups()
        return [group.outcome for (name, _), groups in found.items() if name == batch for group in groups]

    def pause_load(self) -> None:
        """Ask for nothing more for now."""
        for load in self.loads.values():
            load.pause()

    def check(self) -> dict[str, int]:
        """Let everything settle, and prove it; the loads go on afterwards. Jobs by outcome."""
        self.pause_load()
        for load in self.loads.values():
            settled = functools.partial(lambda load: load.broken or not load.unsettled(), load)
            self.until(settled, f"the jobs of {load.run_name} are settled")
        outcomes: dict[str, int] = {}
        for load in self.loads.values():
            if load.broken is not None:
                raise load.broken
            for outcome, count in load.judged().items():
                outcomes[outcome] = outcomes.get(outcome, 0) + count
        self.until(lambda: self._held() == 0, "nobody holds an entry")
        with connect(self.server.url) as client:
            report = examine(client, self.keys)
        assert report.healthy, [str(finding) for finding in report.findings]
        for load in self.loads.values():
            load.resume()
        return outcomes

    def _held(self) -> int:
        count = 0
        for stream in self.keys.streams(self.loads):
            if self.client.exists(stream):
                pending: Any = self.client.xpending(stream, GROUP)
                count += pending["pending"]
        return count


def _signal_all(pid: int, number: int) -> None:
    process = psutil.Process(pid)
    for each in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            each.send_signal(number)


def engine(**settings: Any) -> dict[str, Any]:
    """Engines of these scenes."""
    shape = {"max_running_requests": 6, "step_ms": 20.0, "start_s": 0.5}
    return sim_engine(**{**shape, **settings})


def cut_short(file: Path) -> None:
    """Half of it is there."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
