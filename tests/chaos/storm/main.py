"""The storm, from the first process to the last line.

Invariant: it ends by itself, whatever state the pool is in, and nothing it started outlives it; the last line of its
output is one JSON object, and its exit status is 0 only when the promise was kept and there was enough to break it.
"""

import contextlib
import heapq
import json
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from redis.exceptions import RedisError

from storm import checker, everysec, real
from storm.faults import Fault, faults
from storm.injector import Injector
from storm.models import Judges
from storm.options import LONGER, Options, from_environment
from storm.policies import Policies, make_policies
from storm.recovery import Recovery
from storm.stage import LEASE_S, ORDERS, Pool, Stage, build, sim_pool, start_hosts
from storm.wire import Pending, direct

POOL = "storm"

#: Prompts a batch. Small enough that a run of a minute has many.
BATCH = 40

#: Seconds between two lines of progress.
SAY_S = 5.0

#: Seconds between two looks at what is to be done.
LOOK_S = 0.1

#: Seconds between two looks for processes that ended by themselves.
REVIVE_S = 1.0

#: A storm of fewer seconds of faults is short: poison comes in its first steps alone, and none that an engine forgets.
SHORT_S, SHORT_STEPS = 120.0, 4

#: The slowest recoveries are named.
SLOWEST = 5

#: Versions prepared: over one a fault of that kind, in the longest storm.
POLICIES = 60


class Storm:
    """One storm."""

    def __init__(self, options: Options, directory: Path) -> None:
        self._options = options
        self._directory = directory
        self._began = time.monotonic()
        self._said = 0.0

    def run(self) -> tuple[dict[str, Any], bool]:
        """Run it; the last line, and whether it passed."""
        options = self._options
        self.say(f"seed {options.seed}; journals and logs in {self._directory}")
        with build(self._directory, "always", options.broken) as stage:
            line, ok = self._on(stage)
        if options.everysec_s:
            self.say(f"the leg at appendfsync everysec, for {options.everysec_s:.0f} s")
            leg = everysec.run(options.seed, options.everysec_s, self._directory / "everysec", self.say)
            line["everysec"] = leg
            ok = ok and not leg["unmended"] and not leg["trained_twice"]
        line["seconds"] = round(time.monotonic() - self._began, 1)
        line["seed"] = options.seed
        return line, ok

    def say(self, text: str) -> None:
        """A line for people."""
        print(f"[{time.monotonic() - self._began:6.1f}] {text}", file=sys.stderr, flush=True)

    def _on(self, stage: Stage) -> tuple[dict[str, Any], bool]:
        options = self._options
        policies = Policies(self._directory, POOL, make_policies(self._directory, POOL, POLICIES))
        pool = sim_pool(stage, POOL, options.workers, policies)
        real_one, real_models = self._real(stage)
        stage.add_tap()
        pools = [pool, *([real_one] if real_one else [])]
        for each in pools:
            stage.publish(each)
            start_hosts(each)
        self.say(f"starting {sum(len(each.workers) for each in pools)} hosts")
        for each in pools:
            stage.until_serving(each)
        self._start_trainers(stage, pool, real_one)
        with self._recovery(stage, pool) as recovery:
            injectors = [Injector(stage, pool, pool.runs, recovery, self.say)]
            if real_one:
                injectors.append(Injector(stage, real_one, real_one.runs, recovery, self.say))
            try:
                self._storm(stage, injectors)
                self.say("the faults are over; waiting until everything is settled")
            finally:
                for injector in injectors:
                    injector.mend()
            stage.publish(pool)  # what is tagged with a version that no host has taken, or has left, needs a newer one
            (self._directory / "stop").touch()
            self._until_settled(stage, injectors)
            stage.stop_tap()
            return self._verdict(stage, injectors, recovery, real_models)

    def _real(self, stage: Stage) -> tuple[Pool | None, dict[str, dict[int, Path]]]:
        wanted = real.installed() if self._options.real is None else self._options.real
        if not wanted:
            self.say("without the real engine")
            return None, {}
        models = real.checkpoints()
        return real.real_pool(stage, models), {real.NAME: dict(enumerate(models, start=1))}

    def _start_trainers(self, stage: Stage, pool: Pool, real_one: Pool | None) -> None:
        common = {"seed": self._options.seed}
        runs = [f"run-{number}" for number in range(self._options.trainers)]
        # Poison is tried again and again, with pauses that grow: the end of a short storm should not wait for that.
        short = self._options.seconds < SHORT_S
        kinds = [kind for kind in ORDERS if self._options.poison and not (short and kind == "forget")]
        poison = {kind: ORDERS[kind] for kind in kinds}
        mine = {"kind": "sim", "size": BATCH, "ahead": 3 * BATCH, "pause_s": 0.0}
        mine |= {"orders": poison, "last_poison": SHORT_STEPS if short else None}
        stage.add_trainers(pool, runs, common | mine)
        if real_one:
            # Few: each token of the real engine costs what hundreds of the others do.
            theirs = {"kind": "text", "size": 4, "ahead": 1, "pause_s": 3.0}
            stage.add_trainers(real_one, ["run-real"], common | theirs)

    @contextlib.contextmanager
    def _recovery(self, stage: Stage, pool: Pool) -> Iterator[Recovery]:
        recovery = Recovery(Pending(direct(stage.server.port), pool.name))
        recovery.start()
        try:
            yield recovery
        finally:
            recovery.finish()

    # The faults.

    def _storm(self, stage: Stage, injectors: list[Injector]) -> None:
        """Do the faults, for as long as was asked for, and on until there were enough jobs and faults."""
        options, begin, revived = self._options, time.monotonic(), 0.0
        coming = self._faults(injectors)
        fault, injector = next(coming)
        while True:
            now = time.monotonic() - begin
            if now >= options.seconds and (self._enough(stage, injectors) or now >= LONGER * options.seconds):
                return
            if now >= fault.at:
                injector.begin(fault)
                fault, injector = next(coming)
            if now - revived >= REVIVE_S:
                revived = now
                for each in injectors:
                    each.revive()
            self._progress(stage, injectors)
            time.sleep(LOOK_S)

    def _faults(self, injectors: list[Injector]) -> Iterator[tuple[Fault, Injector]]:
        options = self._options
        mine = faults(options.seed, lease_s=LEASE_S, every_s=options.every_s, kinds=options.kinds)
        streams = [((fault, injectors[0]) for fault in mine)]
        if len(injectors) > 1:
            streams.append((fault, injectors[1]) for fault in real.real_faults(options.seconds))
        return heapq.merge(*streams, key=lambda pair: pair[0].at)

    def _enough(self, stage: Stage, injectors: list[Injector]) -> bool:
        enqueued, _ = stage.counts()
        done = sum(sum(injector.done.values()) for injector in injectors)
        return enqueued >= self._options.jobs and done >= self._options.faults

    def _progress(self, stage: Stage, injectors: list[Injector]) -> None:
        now = time.monotonic()
        if now - self._said < SAY_S:
            return
        self._said = now
        enqueued, open_jobs = stage.counts()
        done = sum(sum(injector.done.values()) for injector in injectors)
        self.say(f"{enqueued} jobs enqueued, {enqueued - open_jobs} settled, {done} faults")

    # The end.

    def _until_settled(self, stage: Stage, injectors: list[Injector]) -> None:
        until = time.monotonic() + self._options.settle_s
        runs = [run for pool in stage.pools.values() for run in pool.runs]
        while any(stage.children.ended(run) != 0 for run in runs):
            if time.monotonic() > until:
                left = [run for run in runs if stage.children.ended(run) != 0]
                self.say(f"not everything was settled within {self._options.settle_s:.0f} s; still at work: {left}")
                for pool in stage.pools:
                    for place in Pending(stage.direct, pool).places():
                        self.say(place)
                return
            with contextlib.suppress(RedisError):
                for injector in injectors:
                    injector.revive()
            self._progress(stage, injectors)
            time.sleep(LOOK_S)

    def _verdict(
        self, stage: Stage, injectors: list[Injector], recovery: Recovery, real_models: dict[str, dict[int, Path]]
    ) -> tuple[dict[str, Any], bool]:
        options = self._options
        evidence = checker.gather(self._directory, stage.direct, stage.pools)
        verdict = checker.judge(evidence, Judges(evidence.known.signatures, real_models).made_by)
        for words in verdict.words():
            self.say(words)
        for name, seconds in sorted(recovery.seconds, key=lambda each: -each[1])[:SLOWEST]:
            self.say(f"recovered after {seconds:.1f} s: {name}")
        done: Counter[str] = sum((injector.done for injector in injectors), Counter())
        ended_alone: Counter[str] = sum((injector.ended_alone for injector in injectors), Counter())
        line = verdict.line() | {
            "faults": dict(sorted(done.items())),
            "faults_total": done.total(),
            "ended_alone": dict(sorted(ended_alone.items())),
            "recovery_seconds": checker.recovery(evidence, recovery.seconds),
            "not_recovered": len(recovery.missing),
        }
        ok = checker.passed(verdict, done.total(), jobs_least=options.jobs, faults_least=options.faults)
        if verdict.kept and not ok:
            self.say(f"too little to mean anything: {options.jobs} jobs and {options.faults} faults were asked for")
        return line, ok


def main() -> int:
    """Run one storm; returns the exit status."""
    options = from_environment()
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell starts what runs in the background deaf to the first
        signal.signal(number, _interrupt)
    directory = Path(options.directory or tempfile.mkdtemp(prefix="rollpool-storm-")).absolute()
    if (directory / "stop").exists():
        raise SystemExit(f"CHAOS_DIR={directory} holds another storm; name an empty folder")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "options.json").write_text(json.dumps(asdict(options)))
    try:
        line, ok = Storm(options, directory).run()
    except KeyboardInterrupt:
        print(f"interrupted; journals and logs are in {directory}", file=sys.stderr)
        return 130
    if ok and options.directory is None:
        shutil.rmtree(directory, ignore_errors=True)
    else:
        print(f"journals and logs are in {directory}", file=sys.stderr)
    print(json.dumps(line), flush=True)
    return 0 if ok else 1


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
