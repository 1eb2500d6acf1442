"""The leg at `appendfsync everysec`: what a server loses when its machine fails, and what becomes of it.

A process that is killed loses nothing that it wrote; a machine that fails loses what the system had not put on the
disk. So here the server is killed and its append-only file is cut back to what it was a second before, which is what
`everysec` stands for.

Invariant: what was lost is told from the server's own books, read just before and just after, with nobody connected in
between; what was mended is told from what trainers trained.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from storm import checker
from storm.checker import Job
from storm.models import Judges
from storm.policies import Policies, make_policies
from storm.stage import Pool, Stage, build, sim_pool, start_hosts

NAME = "everysec"

#: Seconds of the append-only file that a failing machine loses.
LOST_S = 1.0

#: Seconds between two failures, and between two looks at the file's size.
EVERY_S, LOOK_S = 9.0, 0.05

#: Seconds until everything must be settled in the end.
SETTLE_S = 90.0


class FileSizes(threading.Thread):
    """Remembers how long the append-only files were, for the last seconds."""

    def __init__(self, directory: Path) -> None:
        super().__init__(name="storm-sizes", daemon=True)
        self._directory = directory
        self._seen: deque[tuple[float, dict[Path, int]]] = deque(maxlen=int(10 * LOST_S / LOOK_S))
        self._ended = threading.Event()

    def run(self) -> None:
        """The thread."""
        while not self._ended.wait(LOOK_S):
            self._seen.append((time.monotonic(), self._now()))

    def cut_back(self) -> int:
        """Cut the files to what they were `LOST_S` ago; returns how many bytes are gone."""
        until = time.monotonic() - LOST_S
        then = next((sizes for at, sizes in reversed(self._seen) if at <= until), {})
        lost = 0
        for path, size in self._now().items():
            if path in then and size > then[path]:
                lost += size - then[path]
                with path.open("r+b") as file:
                    file.truncate(then[path])
        return lost

    def finish(self) -> None:
        """Look no more."""
        self._ended.set()
        self.join()

    def _now(self) -> dict[Path, int]:
        return {path: path.stat().st_size for path in self._directory.rglob("*.incr.aof")}


def run(seed: int, seconds: float, directory: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Run the leg; its part of the last line."""
    with build(directory, "everysec", None) as stage:
        pool = sim_pool(stage, NAME, 2, Policies(directory, NAME, make_policies(directory, NAME, 1)))
        stage.add_tap()
        stage.publish(pool)
        start_hosts(pool)
        stage.until_serving(pool)
        # Without poison: its many tries would only make the end late.
        settings = {
            "seed": seed,
            "kind": "sim",
            "size": 20,
            "ahead": 60,
            "pause_s": 0.0,
            "orders": {},
            "last_poison": None,
        }
        stage.add_trainers(pool, ["run-a", "run-b"], settings | {"orders": {}, "last_poison": None})
        sizes = FileSizes(directory / "server")
        sizes.start()
        try:
            lost, bytes_lost, failures = _fail_again_and_again(stage, pool, sizes, seconds, say)
        finally:
            sizes.finish()
        (directory / "stop").touch()
        _until_settled(stage, pool, say)
        stage.stop_tap()
        evidence = checker.gather(directory, stage.direct, stage.pools)
        verdict = checker.judge(evidence, Judges(evidence.known.signatures, {}).made_by)
    return _summary(evidence, verdict, lost, bytes_lost, failures)


def _fail_again_and_again(
    stage: Stage, pool: Pool, sizes: FileSizes, seconds: float, say: Callable[[str], None]
) -> tuple[dict[str, set[Job]], int, int]:
    lost: dict[str, set[Job]] = {"enqueued": set(), "settled": set()}
    begin, failures, bytes_lost = time.monotonic(), 0, 0
    while (left := begin + seconds - time.monotonic()) > 0:
        time.sleep(min(left, EVERY_S))
        # Every other time a trainer dies with it: what was lost is then unknown to everybody but its checkpoint.
        victim = pool.runs[failures // 2 % len(pool.runs)] if failures % 2 else None
        gone, size = _machine_fails(stage, pool, sizes, victim)
        failures, bytes_lost = failures + 1, bytes_lost + size
        for kind, jobs in gone.items():
            lost[kind] |= jobs
        say(f"machine failure: {size} bytes, {len(gone['enqueued'])} jobs, {len(gone['settled'])} outcomes are gone")
        _revive(stage, pool, say)
    return lost, bytes_lost, failures


def _machine_fails(stage: Stage, pool: Pool, sizes: FileSizes, trainer: str | None) -> tuple[dict[str, set[Job]], int]:
    """Kill the server, and a trainer, and cut the server's file; what its books had before and have no more."""
    with stage.server_lock:
        stage.proxy.refuse()
        try:
            if trainer:
                stage.children.kill(trainer)
            before = checker.states(stage.direct, pool.name)
            stage.server.kill()
            size = sizes.cut_back()
            stage.server.restart()
            after = checker.states(stage.direct, pool.name)
        finally:
            stage.proxy.accept()
            if trainer:
                stage.children.start(trainer)
    enqueued = {job for job in before if job not in after}
    settled = {job for job, state in before.items() if state != "open" and after.get(job) == "open"}
    return {"enqueued": enqueued, "settled": settled}, size


def _revive(stage: Stage, pool: Pool, say: Callable[[str], None]) -> None:
    """Start again what ended by itself."""
    for worker in pool.workers:
        if pool.hosts.workers[worker].poll() is not None:
            say(f"{worker} ended by itself")
            pool.hosts.start(worker)
    for run in pool.runs:
        if stage.children.ended(run) not in (None, 0):
            say(f"{run} ended by itself: {stage.children.log(run).read_text(errors='replace')[-1500:]}")
            stage.children.start(run)


def _until_settled(stage: Stage, pool: Pool, say: Callable[[str], None]) -> None:
    until = time.monotonic() + SETTLE_S
    while any(stage.children.ended(run) != 0 for run in pool.runs):
        if time.monotonic() > until:
            say(f"not everything was settled within {SETTLE_S:.0f} s")
            return
        _revive(stage, pool, say)
        time.sleep(0.2)


def _summary(
    evidence: checker.Evidence,
    verdict: checker.Verdict,
    lost: dict[str, set[Job]],
    bytes_lost: int,
    failures: int,
) -> dict[str, Any]:
    """A job is mended when in the end its trainer has trained it once, or knows why it was dropped."""
    gone = {job for job in lost["enqueued"] | lost["settled"] if job in evidence.asked}
    unmended = {
        job
        for job in gone
        if not evidence.trained[job] and not evidence.dropped.get(job) and not evidence.asked[job].cut
    }
    never_trained = [job for job in evidence.asked if not evidence.trained[job] and not evidence.dropped.get(job)]
    return {
        "failures": failures,
        "enqueued": verdict.enqueued,
        "lost_by_server": len(gone),
        "lost_enqueued": len(lost["enqueued"] & gone),
        "lost_settled": len(lost["settled"] & gone),
        "mended": len(gone) - len(unmended),
        "unmended": len(unmended),
        "never_trained": len([job for job in never_trained if not evidence.asked[job].cut]),
        "trained_twice": sum(times > 1 for times in evidence.trained.values()),
        "wrong_policy": len(verdict.wrong_policy),
        "bytes_lost": bytes_lost,
    }
