"""`rollpool policies`: what was published, what is served, and what the hosts said to it.

Invariant: every figure comes from `read_policies`; here it is only drawn.
"""

import json
import time
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rollpool.ops.cli.asking import asking
from rollpool.ops.cli.tables import prose, table
from rollpool.ops.policies import Answer, Lineage, PolicyRow, PoolPolicies, read_policies
from rollpool.schemas import CHECKPOINTS, Keys


def show_policies(url: str, pool: str, *, acks: bool, as_json: bool) -> None:
    """Print the policies of a pool, and with `acks` the answers of its hosts.

    Raises:
        RollpoolError: the server cannot be reached.
    """
    keys = Keys(pool)
    with asking(url, keys) as client:
        found = read_policies(client, keys, acks=acks)
    if as_json:
        print(json.dumps(found.as_dict()))
        return
    console = Console()
    print(_head(found))
    for lineage in found.lineages:
        console.print(_rows(lineage))
    if acks:
        console.print(_answers(found.answers, time.time()))
        for answer in found.answers:
            if answer.ack.state == "failed":  # not through the console, which would wrap it
                print(f"{answer.ack.worker} failed at {answer.command}: {answer.ack.error or 'no error given'}")


def _head(found: PoolPolicies) -> str:
    if not found.lineages:
        return f"pool {found.pool}: no policy was published"
    publisher = f"; run {found.publisher} publishes its checkpoints" if found.publisher else ""
    return f"pool {found.pool}{publisher}"


def _rows(lineage: Lineage) -> Table:
    made = table(_title(lineage), "version", "generation", "state", "run", "hosts")
    prose(made, "source")
    for row in lineage.rows:
        policy = row.policy
        source = policy.source if policy.base is None else f"{policy.source} on {policy.base}"
        cells = (str(policy.version), str(policy.generation), _state(lineage, row), policy.run, str(row.hosts), source)
        made.add_row(*map(escape, cells))
    return made


def _title(lineage: Lineage) -> str:
    title = "checkpoints" if lineage.name == CHECKPOINTS else f"adapters of run {lineage.name.partition(':')[2]}"
    times = "once" if lineage.generation == 1 else f"{lineage.generation} times"
    return f"{title}, went back {times}" if lineage.generation else title


def _state(lineage: Lineage, row: PolicyRow) -> str:
    if row.abandoned:
        return "abandoned"
    words = ("current" if lineage.is_current(row) else "", "other base" if row.misplaced else "")
    return ", ".join(word for word in words if word)


def _answers(answers: Sequence[Answer], now_s: float) -> Table:
    made = table("last answers of the hosts", "host", "to", "answer", "seconds", "ago")
    prose(made, "how")
    for answer in answers:
        ack = answer.ack
        ago = max(0.0, now_s - answer.at_ms / 1000)
        how = "see below" if ack.state == "failed" else ack.detail
        made.add_row(*map(escape, (ack.worker, answer.command, ack.state, f"{ack.seconds:.1f}", _ago(ago), how)))
    return made


def _ago(seconds: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
