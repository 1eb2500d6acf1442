"""The policies of a pool, read with plain commands: lineage by lineage, who serves each, and what hosts answered.

Invariant: nothing here changes anything; a record or an answer that somebody made up is skipped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError
from redis import Redis

from rollpool.ops.inspect import read_workers
from rollpool.producer.control import STANDING, named
from rollpool.producer.lineages import fits
from rollpool.schemas import CHECKPOINTS, Ack, Command, Keys, Policy, WorkerStatus
from rollpool.schemas.control_log import ack_of, command_of, order_of

#: Answers looked at, the newest first: some hundred changes of some ten hosts.
ANSWERS = 10_000


@dataclass(frozen=True)
class PolicyRow:
    """One published policy."""

    policy: Policy
    #: Its lineage went back to an earlier one.
    abandoned: bool
    #: An adapter on another checkpoint than the current: hosts that serve the current one do not serve it.
    misplaced: bool
    #: Hosts that serve it now.
    hosts: int


@dataclass(frozen=True)
class Lineage:
    """Policies whose versions follow one another."""

    #: `checkpoints`, or `lora:RUN`.
    name: str
    #: The version that hosts are to serve.
    current: int | None
    #: How often it went back.
    generation: int
    #: Versions rising, of one version the oldest generation first.
    rows: list[PolicyRow] = field(default_factory=list)

    def is_current(self, row: PolicyRow) -> bool:
        """True for the one that hosts are to serve."""
        return row.policy.version == self.current and not row.abandoned


@dataclass(frozen=True)
class Answer:
    """The last answer of one host to one command."""

    ack: Ack
    #: Of which the host is asked, in a few words; the entry's id where the command is on the log no more.
    command: str
    #: Server time of the answer, milliseconds.
    at_ms: int


@dataclass(frozen=True)
class PoolPolicies:
    """Everything `rollpool policies` shows."""

    pool: str
    #: The run that alone may publish checkpoints now.
    publisher: str | None
    lineages: list[Lineage]
    answers: list[Answer]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for `--json`; the files of the sources are counted."""
        return {
            "pool": self.pool,
            "publisher": self.publisher,
            "lineages": [
                {
                    "name": lineage.name,
                    "current": lineage.current,
                    "generation": lineage.generation,
                    "policies": [_row(lineage, row) for row in lineage.rows],
                }
                for lineage in self.lineages
            ],
            "acks": [
                {**answer.ack.model_dump(), "asked": answer.command, "at_ms": answer.at_ms} for answer in self.answers
            ],
        }


def _row(lineage: Lineage, row: PolicyRow) -> dict[str, Any]:
    policy = row.policy
    return {
        **policy.model_dump(exclude={"files"}),
        "files": len(policy.files),
        "bytes": sum(file.size for file in policy.files),
        "current": lineage.is_current(row),
        "abandoned": row.abandoned,
        "misplaced": row.misplaced,
        "hosts": row.hosts,
    }


def read_policies(client: Redis, keys: Keys, *, acks: bool) -> PoolPolicies:
    """Read the policies of one pool, and with `acks` what its hosts answered last."""
    records: Any = client.hgetall(keys.policies)
    policies = _policies(records)
    runs = sorted({policy.run for policy, _ in policies if policy.lineage != CHECKPOINTS})
    with client.pipeline(transaction=True) as pipe:
        pipe.get(keys.policy)
        pipe.hgetall(keys.generations)
        pipe.get(keys.publisher)
        for run in runs:
            pipe.get(keys.run_policy(run))
        current, generations, publisher, *of_runs = pipe.execute()
    names = [CHECKPOINTS, *(f"lora:{run}" for run in runs)]
    workers = read_workers(client, keys)
    current_of = dict(zip(names, map(_number, (current, *of_runs)), strict=True))
    rows = _rows(policies, current_of[CHECKPOINTS], workers)
    lineages = [
        Lineage(
            name,
            version,
            _number(generations.get(name.encode())) or 0,
            [row for row in rows if row.policy.lineage == name],
        )
        for name, version in current_of.items()
    ]
    return PoolPolicies(
        pool=keys.pool,
        publisher=None if publisher is None else publisher.decode(errors="replace"),
        lineages=[lineage for lineage in lineages if lineage.rows],
        answers=read_answers(client, keys, {worker.name for worker in workers}) if acks else [],
    )


def _policies(records: Mapping[bytes, bytes]) -> list[tuple[Policy, bool]]:
    """Each with whether its lineage went back from it: then its field ends in its generation."""
    found = []
    for name, record in records.items():
        try:
            found.append((Policy.model_validate_json(record), b"@" in name))
        except ValidationError:
            continue
    return sorted(found, key=lambda each: (each[0].version, each[0].generation))


def _number(text: bytes | None) -> int | None:
    # So short because Python refuses to read numbers of thousands of digits.
    return int(text) if text is not None and text.isdigit() and len(text) < 16 else None


def _rows(
    policies: Sequence[tuple[Policy, bool]], current: int | None, workers: Sequence[WorkerStatus]
) -> list[PolicyRow]:
    checkpoints = [policy for policy, abandoned in policies if policy.lineage == CHECKPOINTS and not abandoned]
    checkpoint = next((policy for policy in checkpoints if policy.version == current), None)
    return [
        PolicyRow(
            policy,
            abandoned,
            misplaced=policy.lineage != CHECKPOINTS and not fits(policy, checkpoint),
            hosts=0 if abandoned else sum(serves(worker, policy) for worker in workers),
        )
        for policy, abandoned in policies
    ]


def serves(worker: WorkerStatus, policy: Policy) -> bool:
    """True when this worker's engine has the policy's weights, as its heartbeat says."""
    if policy.lineage != CHECKPOINTS:
        return policy.version in worker.versions_for(policy.run) and policy.version != worker.policy
    return worker.policy == policy.version and worker.generation == policy.generation


def read_answers(client: Redis, keys: Keys, workers: set[str]) -> list[Answer]:
    """What each of these workers answered last to each kind of command, and to the policies of each lineage.

    Workers by name, for each the oldest command first.
    """
    entries: Any = client.xrevrange(keys.acks, count=ANSWERS)
    acks = [(entry.decode(), ack_of(fields)) for entry, fields in entries]
    mine = [(entry, ack) for entry, ack in acks if ack is not None and ack.worker in workers]
    commands = _commands(client, keys, sorted({ack.command for _, ack in mine}))
    last: dict[tuple[str, str], Answer] = {}
    for entry, ack in mine:
        command = commands.get(ack.command)
        said = Answer(ack, named(command) if command else f"command {ack.command}", order_of(entry)[0])
        last.setdefault((ack.worker, _about(ack, command)), said)
    return sorted(last.values(), key=lambda answer: (answer.ack.worker, answer.ack.command, answer.at_ms))


def _about(ack: Ack, command: Command | None) -> str:
    """Of answers about one thing only the last is news."""
    if command is not None and command.policy is not None:
        return command.policy.lineage
    if command is None:
        return ack.command
    return "standing" if command.kind in STANDING else command.kind


def _commands(client: Redis, keys: Keys, entries: Sequence[str]) -> dict[str, Command]:
    with client.pipeline(transaction=False) as pipe:
        for entry in entries:
            pipe.xrange(keys.control, min=entry, max=entry)
        found = pipe.execute() if entries else []
    commands = [(entry, command_of(fields)) for reply in found for entry, fields in reply]
    return {entry.decode(): command for entry, command in commands if command is not None}
