"""The judge: was every job settled exactly once, by a policy that its tag allows?

It shares nothing with the code under test: it reads what trainers wrote down, what the tap saw on the streams, and what
the server's books say at the end, and judges tokens by an independent model of who can have made them. Pure but for
`gather`.

Invariant: every job that a server acknowledged is judged, on all evidence there is of it; where two witnesses do not
say the same, that counts against the pool.
"""

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from redis import Redis

from storm import journal, policies, wire
from storm.work import digest

#: Pool, run, batch and index of a job.
Job = tuple[str, str, str, int]

#: Says whether the policies of a pool that a sample's spans name made it, for this prompt.
MadeBy = Callable[[str, list[int], dict[str, Any]], bool]

#: The ways in which a job can end.
OUTCOMES = ("ok", "failed", "stale", "expired", "cancelled")


@dataclass(frozen=True)
class Asked:
    """What a job was enqueued with."""

    prompt: str
    n: int
    #: Samples with which it may be `ok`.
    least: int
    tag: int
    max_staleness: int | None
    exact: bool
    poison: str | None
    #: Its trainer may have cancelled it, and need not have trained it.
    cut: bool
    deadline: bool
    #: Its prompt travels as token ids, so the result must give the same ones back.
    ids: bool

    def allows(self, version: int) -> bool:
        """Whether the tag allows this version."""
        if self.exact:
            return version == self.tag
        return self.max_staleness is None or version >= self.tag - self.max_staleness


@dataclass
class Evidence:
    """All there is to judge by."""

    asked: dict[Job, Asked] = field(default_factory=dict)
    #: Batches a trainer meant to enqueue and was not told of: their jobs may have been settled or not.
    unsure: set[tuple[str, str, str]] = field(default_factory=set)
    #: Entries of results streams, as the tap saw them.
    results: dict[Job, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))
    #: What trainers were handed, in all of their lives: the digest of the tokens.
    got: dict[Job, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))
    #: What trainers read as dropped.
    dropped: dict[Job, set[str]] = field(default_factory=lambda: defaultdict(set))
    #: How often each job is in the chain of checkpoints that survived.
    trained: Counter[Job] = field(default_factory=Counter)
    #: The server's own book.
    states: dict[Job, str] = field(default_factory=dict)
    #: Runs whose trainer came to its end.
    finished: set[str] = field(default_factory=set)
    runs: set[str] = field(default_factory=set)
    #: What was published.
    known: policies.Known = field(default_factory=policies.Known)


@dataclass
class Verdict:
    """What was found; lists name the jobs."""

    enqueued: int = 0
    settled: int = 0
    lost: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)
    wrong_policy: list[str] = field(default_factory=list)
    #: Results that are not of the prompt, not whole, or not what the trainer was handed; and those nobody asked for.
    altered: list[str] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    innocent_dead: list[str] = field(default_factory=list)
    poison_not_dead: list[str] = field(default_factory=list)
    poison: Counter[str] = field(default_factory=Counter)

    def line(self) -> dict[str, Any]:
        """Its part of the last line."""
        return {
            "enqueued": self.enqueued,
            "settled": self.settled,
            "lost": len(self.lost),
            "twice": len(self.twice),
            "wrong_policy": len(self.wrong_policy),
            "altered": len(self.altered),
            "outcomes": {name: self.outcomes[name] for name in OUTCOMES if self.outcomes[name]},
            "innocent_dead": len(self.innocent_dead),
            "poison": dict(sorted(self.poison.items())),
            "poison_not_dead": len(self.poison_not_dead),
        }

    def words(self, at_most: int = 12) -> list[str]:
        """What is wrong, for people."""
        kinds = ("lost", "twice", "wrong_policy", "altered", "innocent_dead", "poison_not_dead")
        return [f"{kind}: {what}" for kind in kinds for what in getattr(self, kind)[:at_most]]

    @property
    def kept(self) -> bool:
        """Whether the promise was kept."""
        return not (self.lost or self.twice or self.wrong_policy or self.altered)


# Judging.


def judge(evidence: Evidence, made_by: MadeBy) -> Verdict:
    """Judge every job that was enqueued, and every result that there is."""
    verdict = Verdict(enqueued=len(evidence.asked))
    for job, asked in evidence.asked.items():
        _judge_job(verdict, evidence, job, asked)
    for job, results in evidence.results.items():
        if job in evidence.asked:
            for result in results:
                _judge_result(verdict, evidence.known, job, evidence.asked[job], result, made_by)
        elif job[:3] not in evidence.unsure:
            verdict.altered.append(f"{_name(job)}: a result that nobody asked for")
    for run in sorted(evidence.runs - evidence.finished):
        # Whatever it was not handed is counted as lost above; this says why.
        verdict.altered.append(f"{run}: its trainer did not come to its end")
    return verdict


def _judge_job(verdict: Verdict, evidence: Evidence, job: Job, asked: Asked) -> None:
    results, got, dropped = evidence.results.get(job, []), evidence.got.get(job, []), evidence.dropped.get(job, set())
    name = _name(job)
    outcomes = {result["outcome"] for result in results} | dropped | ({"ok"} if got else set())
    state = evidence.states.get(job)
    if not outcomes:
        verdict.lost.append(f"{name}: no result; its batch says {state or 'nothing'}")
        return
    verdict.settled += 1
    outcome = results[0]["outcome"] if results else sorted(outcomes)[0]
    verdict.outcomes[outcome] += 1
    if len(results) > 1:
        verdict.twice.append(f"{name}: {len(results)} results, {[result['outcome'] for result in results]}")
    elif len(outcomes) > 1:
        verdict.twice.append(f"{name}: settled as {sorted(outcomes)}")
    if state not in outcomes:
        verdict.lost.append(f"{name}: settled {outcome}, but its batch says {state or 'nothing'}")
    _judge_training(verdict, evidence, job, asked, outcome)
    _judge_poison(verdict, name, asked, outcome, results)


def _judge_training(verdict: Verdict, evidence: Evidence, job: Job, asked: Asked, outcome: str) -> None:
    times = evidence.trained[job]
    if times > 1:
        verdict.twice.append(f"{_name(job)}: trained {times} times")
    if outcome == "ok" and not times and not asked.cut:
        verdict.lost.append(f"{_name(job)}: settled ok and never trained")
    seen = {digest([sample["ids"] for sample in result["samples"]]) for result in evidence.results.get(job, [])}
    for got in evidence.got.get(job, []):
        if seen and got["digest"] not in seen:
            verdict.altered.append(f"{_name(job)}: its trainer was handed other tokens than its results stream has")


def _judge_poison(
    verdict: Verdict, name: str, asked: Asked, outcome: str, results: Iterable[Mapping[str, Any]]
) -> None:
    why = next((result["error"] for result in results), "")
    if asked.poison is None:
        if outcome == "failed":
            verdict.innocent_dead.append(f"{name}: {why}")
        return
    verdict.poison[asked.poison] += 1
    if outcome == "ok":
        verdict.poison_not_dead.append(f"{name}: {asked.poison} ended {outcome}")


def _judge_result(
    verdict: Verdict, known: policies.Known, job: Job, asked: Asked, result: Mapping[str, Any], made_by: MadeBy
) -> None:
    name = _name(job)
    if result["outcome"] == "stale" and not asked.exact and (job[0], asked.tag) not in known.abandoned:
        verdict.wrong_policy.append(f"{name}: stale, though its tag {asked.tag} is not exact, and was not abandoned")
    if result["outcome"] == "cancelled" and not asked.cut:
        verdict.altered.append(f"{name}: cancelled, and nobody asked for that")
    if result["outcome"] == "expired" and not asked.deadline:
        verdict.altered.append(f"{name}: expired, and it has no deadline")
    if result["outcome"] != "ok":
        return
    if not asked.least <= len(result["samples"]) <= asked.n:
        verdict.altered.append(f"{name}: {len(result['samples'])} samples of {asked.n}")
    if asked.ids and digest([result["prompt"]]) != asked.prompt:
        verdict.altered.append(f"{name}: it is of another prompt")
    for sample in result["samples"]:
        if problem := _problem(known, job, asked, result["prompt"], sample, made_by):
            verdict.wrong_policy.append(f"{name}: {problem}")
            return


def _problem(
    known: policies.Known, job: Job, asked: Asked, prompt: list[int], sample: dict[str, Any], made_by: MadeBy
) -> str:
    """What is wrong with who made a sample; empty when nothing is."""
    pool, run = job[:2]
    spans = sample["spans"]
    ends = [0, *(span[2] for span in spans)]
    if [span[1] for span in spans] != ends[:-1] or ends[-1] != len(sample["ids"]) or not sample["ids"]:
        return f"its version spans {spans} do not cover its {len(sample['ids'])} tokens"
    for version, _, _ in spans:
        if not asked.allows(version):
            return f"made by policy {version}, which its tag {asked.tag} forbids"
        if (owner := known.owners.get((pool, version), run)) != run:
            return f"made by policy {version}, an adapter of {owner}"
    if not made_by(pool, prompt, sample):
        return f"its tokens are not those of {spans}"
    return ""


def _name(job: Job) -> str:
    return f"{job[0]}:{job[1]}:{job[2]}/{job[3]}"


# Gathering.


def gather(directory: Path, client: Redis | None, pools: Iterable[str]) -> Evidence:
    """Read all journals of a storm, and the server's books where there is a server."""
    evidence = Evidence(known=policies.read(directory))
    for path in sorted(directory.glob("trainer-*.jsonl")):
        _read_trainer(evidence, path, directory / f"state-{path.stem.removeprefix('trainer-')}.json")
    for fact in journal.read(directory / "tap.jsonl"):
        evidence.results[fact["pool"], fact["run"], fact["batch"], fact["index"]].append(fact)
    _only_once(evidence)
    if client is not None:
        for pool in pools:
            evidence.states.update(states(client, pool))
    return evidence


def _only_once(evidence: Evidence) -> None:
    """One entry of a stream is one result, however often the tap was started."""
    for job, results in evidence.results.items():
        evidence.results[job] = list({result["entry"]: result for result in results}.values())


def _read_trainer(evidence: Evidence, path: Path, state: Path) -> None:
    run = path.stem.removeprefix("trainer-")
    evidence.runs.add(run)
    intents: dict[str, dict[str, Any]] = {}
    saves: dict[str, dict[str, Any]] = {}
    sure: set[str] = set()
    for fact in journal.read(path):
        match fact["fact"]:
            case "intent":
                intents[fact["batch"]] = fact
            case "enqueued":
                sure.add(fact["batch"])
            case "got":
                evidence.got[_job(intents, fact)].append(fact)
            case "ended":
                for index, (outcome, _) in fact["dropped"].items():
                    evidence.dropped[_job(intents, {**fact, "index": int(index)})].add(outcome)
            case "saved":
                saves[fact["save"]] = fact
            case "finished":
                evidence.finished.add(run)
    for batch, intent in intents.items():
        if batch in sure:
            evidence.asked.update(_asked(intent))
        else:
            evidence.unsure.add((intent["pool"], run, batch))
    if state.is_file():
        for batch, index in _lineage(saves, json.loads(state.read_text())["save"]):
            evidence.trained[_job(intents, {"batch": batch, "index": index})] += 1


def _job(intents: Mapping[str, Mapping[str, Any]], fact: Mapping[str, Any]) -> Job:
    intent = intents[fact["batch"]]
    return intent["pool"], intent["run"], fact["batch"], fact["index"]


def _asked(intent: Mapping[str, Any]) -> dict[Job, Asked]:
    return {
        (intent["pool"], intent["run"], intent["batch"], index): Asked(
            prompt=prompt,
            n=intent["n"],
            least=intent["least"],
            deadline=intent["deadline"],
            tag=intent["tag"],
            max_staleness=intent["max_staleness"],
            exact=intent["exact"],
            poison=intent["poison"].get(str(index)),
            cut=intent["cut"],
            ids=intent.get("ids", True),
        )
        for index, prompt in enumerate(intent["prompts"])
    }


def _lineage(saves: Mapping[str, Mapping[str, Any]], last: str | None) -> Iterable[tuple[str, int]]:
    """What the chain of checkpoints from the last one back to the first trained: what was trained after a checkpoint
    that did not survive was not trained."""
    while last is not None:
        yield from ((batch, index) for batch, index in saves[last]["trained"])
        last = saves[last]["parent"]


def states(client: Redis, pool: str) -> dict[Job, str]:
    """What the server's own book says of each job."""
    states: dict[Job, str] = {}
    for key in wire.keys(client, pool, "batches"):
        run, _, batch = key.removeprefix(f"{wire.prefix(pool)}batches:").partition(":")
        fields: Any = client.hgetall(key)
        states.update(
            {(pool, run, batch, int(name)): state.decode() for name, state in fields.items() if name.isdigit()}
        )
    return states


# The last line.


def recovery(evidence: Evidence, watched: Iterable[tuple[str, float]]) -> dict[str, Any]:
    """Median and worst of what it took until a killed worker's job was in other hands.

    Without poison: what was lost again and again is meant to wait before it is tried once more.

    Args:
        evidence: knows which jobs are poison.
        watched: jobs `RUN:BATCH/INDEX`, and the seconds each took.
    """
    poison = {f"{run}:{batch}/{index}" for (_, run, batch, index), asked in evidence.asked.items() if asked.poison}
    seconds = [each for name, each in watched if name not in poison]
    if not seconds:
        return {"jobs": 0, "median": None, "worst": None}
    return {
        "jobs": len(seconds),
        "median": round(statistics.median(seconds), 2),
        "worst": round(max(seconds), 2),
    }


def passed(verdict: Verdict, faults: int, *, jobs_least: int, faults_least: int) -> bool:
    """The exit status: the promise was kept, and there was enough to break it."""
    return verdict.kept and verdict.enqueued >= jobs_least and faults >= faults_least
