"""What does a change of policy cost? A host's own part of it, a hot swap, and what the pool makes meanwhile.

`restart_ratio`: a host with a real engine works at a backlog that keeps it saturated, its trainer publishes the next
checkpoint (mode `requeue`, by restart), and the seconds count from its last result of the old policy to its first of
the new one. Samples end by chance, at any token, so that with sixteen running results tell when there are tokens; what
they cannot tell counts against rollpool. Against it stands the engine's own restart: the very same command, taken from
the host's engine, with nothing else running; SIGTERM to the idle engine until its processes have ended, then launched
on the other checkpoint until the first token of a `/generate` is there. The two in turn, and the median of their
ratios. Both have a warm JIT cache: one change before the first pair does not count.

`hot_swap_seconds` and `hot_swap_stall_seconds`, on an engine of the main line under the same load: from the publication
until the host said it serves the new weights, and for how long the engine stood still for it by its own account. Beside
it the longest time without a result around the change, and in as long a time without one: on busy cores those differ by
little. None where there is no such engine: name its Python in ROLLPOOL_BENCH_MAIN_PYTHON.

`pool_share`: tokens a second of four simulated hosts from the publication of a checkpoint until the last of them serves
it, over those of the time before. They are real `rq worker` processes; a restart of their engines takes 10 s of
loading, and three of four go on serving. `pool_share_real` is the same of two real engines, for the record: on one
machine they take the cores from each other.

All times of results and answers are by the server's clock. The last line is JSON.
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import signal
import statistics
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from redis import Redis
from rich.console import Console

from rollpool.ops.local.child import spawn
from rollpool.ops.local.engine_env import ensure_engine_env
from rollpool.ops.local.hosts import LocalHosts, cpu_engine
from rollpool.ops.local.run import START_S, cache_dir, engine_line, wait_until_served
from rollpool.ops.local.server import LocalServer
from rollpool.ops.local.tiny_model import make_tiny_model
from rollpool.ops.sim import make_sim_model, sim_engine
from rollpool.producer import RolloutPool, SamplingParams
from rollpool.schemas import Keys
from rollpool.schemas.connection import connect
from rollpool.schemas.control_log import ack_of, order_of
from rollpool.schemas.result_entry import group_of
from rollpool.worker.engines.process import LIFELINE_ENV, free_port

POOL, RUN = "policy", "bench"
MAIN_PYTHON_ENV = "ROLLPOOL_BENCH_MAIN_PYTHON"

#: How real engines are asked for samples: one token in sixteen ends one.
BY_CHANCE = SamplingParams(max_new_tokens=64, stop_token_ids=tuple(range(0, 512, 16)))
#: Jobs of a backlog for a real host: more than it makes while it is measured.
JOBS = 6000

#: Seconds that load runs before a change, and results of the new policy that must come before it counts as over.
STEADY_S, RESULTS_AFTER = 8.0, 40

#: Seconds between two hot swaps.
SWAP_STEADY_S = 8.0

#: Seconds that a bare engine is given to end by SIGTERM; it took 4 to 13.
TERM_S = 120.0

#: Seconds between questions to an engine that starts.
LOOK_S = 0.05

#: The simulated pool: hosts, seconds that an engine loads, and of the time before that its roll-out is compared with.
SIM_HOSTS, SIM_START_S, SHARE_STEADY_S = 4, 10.0, 20.0

console = Console(stderr=True)


@dataclass(frozen=True)
class Result:
    """A settled job."""

    #: Seconds of the server's clock.
    at: float
    tokens: int
    #: The newest of the policies that made it.
    version: int


class Load:
    """A backlog that keeps hosts saturated, and the results that came of it."""

    def __init__(self, pool: RolloutPool, client: Redis, jobs: int, n: int, sampling: SamplingParams) -> None:
        ids = [[3 + index % 400, 3 + index // 400 % 400, 7] for index in range(jobs)]
        # Any policy may run it.
        self._batch = pool.enqueue_prompts(ids, policy_version=0, n=n, sampling=sampling)
        self._client = client
        self._seen = "-"
        self.results: list[Result] = []

    def read(self) -> list[Result]:
        """All results so far, in their order."""
        entries: Any = self._client.xrange(Keys(POOL).results(RUN, self._batch.id), self._seen, "+")
        for entry, fields in entries:
            group = group_of(RUN, self._batch.id, fields)
            assert group.outcome == "ok", f"{group.id}: {group.outcome}, {group.error}"
            version = max(version for sample in group.samples for version in sample.versions)
            self.results.append(Result(seconds_of(entry), group.tokens, version))
            self._seen = f"({entry.decode()}"
        assert len(self.results) < len(self._batch), "the backlog ran out, so nothing was saturated"
        return self.results

    def of(self, version: int) -> list[Result]:
        """Results that this policy made, or finished."""
        return [result for result in self.read() if result.version == version]

    def rate(self, begin: float, end: float) -> float:
        """Tokens a second of the results between two times."""
        return sum(result.tokens for result in self.results if begin < result.at <= end) / (end - begin)

    def end(self) -> None:
        """Take the rest of the backlog away."""
        self._batch.cancel()


def seconds_of(entry: bytes) -> float:
    """When an entry was added, by the server's clock."""
    return order_of(entry.decode())[0] / 1000


def until(condition: Callable[[], object], hosts: LocalHosts, what: str, timeout: float = START_S) -> None:
    """Wait for it, as long as the hosts are well."""
    end = time.monotonic() + timeout
    while not condition():
        hosts.check()
        assert time.monotonic() < end, f"not within {timeout:.0f} s: {what}"
        time.sleep(0.2)


def published_at(client: Redis) -> float:
    """When the last command was given."""
    newest: Any = client.xrevrange(Keys(POOL).control, count=1)
    return seconds_of(newest[0][0])


def applied_at(client: Redis, version: int) -> dict[str, tuple[float, str]]:
    """When each host said that it serves a policy, and how it came to it; raises on one that failed."""
    acks: Any = client.xrange(Keys(POOL).acks)
    applied: dict[str, tuple[float, str]] = {}
    for entry, fields in acks:
        ack = ack_of(fields)
        if ack is not None and ack.version == version and ack.state != "received":
            assert ack.state == "applied", f"{ack.worker} failed on policy {version}: {ack.error}"
            applied[ack.worker] = seconds_of(entry), ack.detail
    return applied


@dataclass
class Bench:
    """A pool with its server, one after another of whose hosts are measured."""

    url: str
    pool: RolloutPool
    client: Redis
    directory: Path
    #: Makes a checkpoint that no policy had before.
    make_checkpoint: Callable[[int], Path]
    version: int = 0

    def publish(self, **how: Any) -> int:
        """Publish the next version."""
        self.version += 1
        self.pool.publish_policy(self.version, checkpoint=str(self.make_checkpoint(self.version)), **how)
        return self.version

    @contextlib.contextmanager
    def hosts(self, engine: dict[str, Any], *names: str) -> Iterator[LocalHosts]:
        """Hosts that serve the current policy; ended afterwards."""
        with LocalHosts(self.url, POOL, self.directory / "logs", engine, {"drain_s": 1.0}) as hosts:
            for name in names:
                hosts.start(name)
            wait_until_served(self.pool, hosts, self.version)
            yield hosts

    @contextlib.contextmanager
    def load(
        self, hosts: LocalHosts, steady_s: float, *, jobs: int = JOBS, n: int = 1, sampling: SamplingParams = BY_CHANCE
    ) -> Iterator[Load]:
        """Load that has run for a while."""
        load = Load(self.pool, self.client, jobs, n, sampling)
        until(lambda: len(load.read()) >= RESULTS_AFTER, hosts, "the first results")
        time.sleep(steady_s)
        load.read()
        yield load
        load.end()


@contextlib.contextmanager
def bench(directory: Path, make_checkpoint: Callable[[int], Path]) -> Iterator[Bench]:
    """Start the server, and publish the first policy."""
    directory.mkdir(parents=True)
    with (
        LocalServer() as server,
        RolloutPool(server.url, pool=POOL, run=RUN) as pool,
        connect(server.url) as client,
    ):
        made = Bench(server.url, pool, client, directory, make_checkpoint)
        made.publish()
        yield made


def tiny_models(directory: Path) -> Callable[[int], Path]:
    """Makes a checkpoint of each version's own."""
    return lambda version: make_tiny_model(directory / f"tiny-{version}", seed=version)


# The restart.


@dataclass(frozen=True)
class Pair:
    """A change and a bare restart, seconds."""

    host: float
    end: float
    launch: float
    detail: str

    @property
    def bare(self) -> float:
        return self.end + self.launch

    @property
    def ratio(self) -> float:
        return self.host / self.bare


def changed_by_restart(made: Bench, hosts: LocalHosts) -> tuple[float, str]:
    """Seconds without a result of a saturated host that changes to the next checkpoint."""
    with made.load(hosts, STEADY_S) as load:
        version = made.publish(mode="requeue", way="restart")
        until(lambda: len(load.of(version)) >= RESULTS_AFTER, hosts, f"results of policy {version}")
        last = max(result.at for result in load.results if result.version < version)
        first = min(result.at for result in load.results if result.version == version)
        ((_, detail),) = applied_at(made.client, version).values()
        return first - last, detail


class BareEngine:
    """The engine of a host, by the same command, without its worker."""

    def __init__(self, worker: int, log: Path) -> None:
        (server,) = (child for child in psutil.Process(worker).children() if "--model-path" in child.cmdline())
        self._command = server.cmdline()
        self._env = {name: value for name, value in server.environ().items() if name != LIFELINE_ENV}
        self._log = log
        self._port = 0

    def _with(self, flag: str, value: str) -> None:
        self._command[self._command.index(flag) + 1] = value

    @contextlib.contextmanager
    def running(self, checkpoint: Path) -> Iterator[tuple[Callable[[], float], float]]:
        """Launch it; how to end it, and the seconds until its first token."""
        self._port = free_port("127.0.0.1")
        self._with("--port", str(self._port))
        self._with("--model-path", str(checkpoint))
        begin = time.monotonic()
        with self._log.open("ab") as log:
            process = spawn(self._command, log, self._env)
        try:
            self._first_token(process.poll)
            took = time.monotonic() - begin
            yield lambda: self._terminated(process.pid), took
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _first_token(self, ended: Callable[[], int | None]) -> None:
        body = {
            "input_ids": [3, 4, 5],
            "return_logprob": True,
            "sampling_params": {"max_new_tokens": 1, "ignore_eos": True},
        }
        url, until_s = f"http://127.0.0.1:{self._port}/generate", time.monotonic() + START_S
        while True:
            assert ended() is None, f"the engine ended; see {self._log}"
            assert time.monotonic() < until_s, f"the engine made no token within {START_S:.0f} s; see {self._log}"
            request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
            try:
                with urllib.request.urlopen(request, timeout=START_S) as reply:
                    assert json.load(reply)["meta_info"]["completion_tokens"] == 1
                return
            except urllib.error.HTTPError:
                raise
            except OSError:  # it does not listen yet
                time.sleep(LOOK_S)

    def _terminated(self, pid: int) -> float:
        """SIGTERM; seconds until it and its children have ended."""
        begin = time.monotonic()
        process = psutil.Process(pid)
        all_of_it = [process, *process.children(recursive=True)]
        process.terminate()
        _, alive = psutil.wait_procs(all_of_it, TERM_S)
        assert not alive, f"{alive} did not end by SIGTERM within {TERM_S:.0f} s"
        return time.monotonic() - begin


def restarted_bare(engine: BareEngine, checkpoints: Sequence[Path]) -> tuple[float, float]:
    """Seconds to end an idle engine on the first checkpoint, and to launch it on the second until its first token."""
    before, after = checkpoints
    with engine.running(before) as (terminate, _):
        end_s = terminate()
    with engine.running(after) as (_, launch_s):
        return end_s, launch_s


def restart_pairs(directory: Path, python: Path, pairs: int) -> list[Pair]:
    """The two in turn."""
    found = list[Pair]()
    engine = cpu_engine(python, cache_dir(), engine_line(python))
    with bench(directory, tiny_models(directory)) as made:
        for number in range(1, pairs + 1):
            with made.hosts(engine, "host") as hosts:
                if number == 1:
                    changed_by_restart(made, hosts)
                host_s, detail = changed_by_restart(made, hosts)
                bare = BareEngine(hosts.workers["host"].pid, directory / "bare.log")
            both = [made.make_checkpoint(version) for version in (made.version - 1, made.version)]
            pair = Pair(host_s, *restarted_bare(bare, both), detail)
            found.append(pair)
            bare_s = f"{pair.end:.1f} + {pair.launch:.1f} s"
            console.print(f"pair {number}: host {pair.host:.1f} s ({detail}), bare {bare_s}: {pair.ratio:.2f}")
    return found


# Hot swap.


def main_python(default: Path) -> Path | None:
    """The Python of an engine that can change its weights while it serves, where there is one."""
    # Taken away: hosts refuse settings that they do not know.
    if named := os.environ.pop(MAIN_PYTHON_ENV, None):
        return Path(named)
    return default if engine_line(default) == "main" else None


@dataclass(frozen=True)
class HotSwap:
    """One change, seconds."""

    #: From the publication until the host said that it serves it.
    applied: float
    #: For which the engine made no token, as it says.
    stall: float
    #: The longest without a result, from the publication until it was applied and there were results of it.
    pause: float
    #: The same of as long a time before.
    pause_before: float


def hot_swaps(directory: Path, python: Path, count: int) -> dict[str, Any]:
    """Change a saturated host's weights so many times; medians, in seconds."""
    engine = cpu_engine(python, cache_dir(), "main")
    swaps = list[HotSwap]()
    with contextlib.ExitStack() as stack:
        made = stack.enter_context(bench(directory, tiny_models(directory)))
        hosts = stack.enter_context(made.hosts(engine, "swap"))
        load = stack.enter_context(made.load(hosts, STEADY_S, jobs=4 * JOBS))
        for _ in range(count):
            swaps.append(hot_swap(made, hosts, load))
            console.print(f"hot swap: {swaps[-1]}")
    return {
        "hot_swap_seconds": middle([swap.applied for swap in swaps]),
        "hot_swap_stall_seconds": middle([swap.stall for swap in swaps]),
        "hot_swap_pause_seconds": middle([swap.pause for swap in swaps]),
        "pause_seconds_without": middle([swap.pause_before for swap in swaps]),
        "hot_swaps": len(swaps),
    }


def hot_swap(made: Bench, hosts: LocalHosts, load: Load) -> HotSwap:
    """Publish the next checkpoint, and see that the engine changes to it while it serves."""
    time.sleep(SWAP_STEADY_S)
    version = made.publish(mode="resume")
    asked = published_at(made.client)
    until(lambda: len(load.of(version)) >= RESULTS_AFTER, hosts, f"results of policy {version}")
    ((applied, detail),) = applied_at(made.client, version).values()
    assert "swapped" in detail, f"the engine was not changed while it served: {detail}"
    times = [result.at for result in load.results]
    first = min(result.at for result in load.results if result.version == version)
    said = re.search(rf"as version {version}: .* after (\S+) s", hosts.log("swap").read_text())
    assert said is not None, "the worker's log does not tell for how long the engine stood still"
    return HotSwap(
        applied=applied - asked,
        stall=float(said[1]),
        pause=longest_pause(times, asked, max(applied, first)),
        pause_before=longest_pause(times, asked - (max(applied, first) - asked), asked),
    )


def longest_pause(times: Sequence[float], begin: float, end: float) -> float:
    """Between two results, the first and the last included."""
    inside = [begin, *(moment for moment in times if begin < moment <= end), end]
    return max(after - before for before, after in itertools.pairwise(inside))


# The pool meanwhile.


def share_of(made: Bench, engine: dict[str, Any], names: Sequence[str], **load_of: Any) -> dict[str, Any]:
    """What a pool makes while it moves to the next checkpoint, over what it made before."""
    with made.hosts(engine, *names) as hosts, made.load(hosts, SHARE_STEADY_S, **load_of) as load:
        version = made.publish(way="restart")
        asked = published_at(made.client)
        until(lambda: len(applied_at(made.client, version)) == len(names), hosts, f"policy {version} on all")
        done = max(at for at, _ in applied_at(made.client, version).values())
        time.sleep(1.0)  # results that were on their way
        load.read()
        before, meanwhile = load.rate(asked - SHARE_STEADY_S, asked), load.rate(asked, done)
        found = {
            "hosts": len(names),
            "seconds": round(done - asked, 1),
            "tokens_per_s_before": round(before, 1),
            "tokens_per_s_meanwhile": round(meanwhile, 1),
            "share": round(meanwhile / before, 4),
        }
        console.print(f"{len(names)} hosts: {found}")
        return found


def simulated_share(directory: Path) -> dict[str, Any]:
    """Of engines that make tokens by the clock."""
    engine = sim_engine(max_running_requests=16, step_ms=20.0, median_tokens=32, start_s=SIM_START_S)
    names = [f"sim-{number}" for number in range(1, SIM_HOSTS + 1)]
    with bench(directory, lambda version: make_sim_model(directory / f"sim-{version}", signature=version)) as made:
        return share_of(made, engine, names, jobs=12_000, n=2, sampling=SamplingParams(max_new_tokens=128))


def real_share(directory: Path, python: Path) -> dict[str, Any]:
    """Of two real engines on the cores that there are."""
    engine = cpu_engine(python, cache_dir(), engine_line(python))
    with bench(directory, tiny_models(directory)) as made:
        return share_of(made, engine, ["real-1", "real-2"])


def middle(values: Sequence[float]) -> float:
    """Their median, shortly."""
    return round(statistics.median(values), 3)


def summary(pairs: Sequence[Pair]) -> dict[str, Any]:
    """What the last line says of the restarts."""
    ratios = [pair.ratio for pair in pairs]
    return {
        "restart_ratio": middle(ratios),
        "restart_ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "pairs": len(pairs),
        "restart_seconds": {
            "host": middle([pair.host for pair in pairs]),
            "bare": middle([pair.bare for pair in pairs]),
            "bare_end": middle([pair.end for pair in pairs]),
            "bare_launch": middle([pair.launch for pair in pairs]),
        },
        # Against a launch alone, as if ending an engine cost nothing.
        "host_over_bare_launch": middle([pair.host / pair.launch for pair in pairs]),
    }


def run(directory: Path, pairs: int, swaps: int) -> dict[str, Any]:
    """The whole of it; what the last line shows."""
    python = ensure_engine_env(echo=console.print)
    for_swaps = main_python(python)
    found: dict[str, Any] = summary(restart_pairs(directory / "restart", python, pairs))
    found |= {"engine": engine_line(python), "hot_swap_seconds": None, "hot_swap_stall_seconds": None}
    if for_swaps is None:
        console.print(f"no hot swap: this engine has none; set {MAIN_PYTHON_ENV} to the Python of one that has")
    else:
        found |= hot_swaps(directory / "swap", for_swaps, swaps)
    simulated = simulated_share(directory / "sim")
    return found | {
        "pool_share": simulated["share"],
        "pool_share_detail": simulated,
        "pool_share_real": real_share(directory / "real", python),
        "cores": psutil.cpu_count(),
    }


def main() -> None:
    """Read the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="of a host's change and a bare restart")
    parser.add_argument("--swaps", type=int, default=5, help="hot swaps")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rollpool-policy-") as directory:
        print(json.dumps(run(Path(directory), options.pairs, options.swaps)))


if __name__ == "__main__":
    main()
