"""`rollpool status`: the pool as tables.

Invariant: every figure comes from `read_status`; here it is only drawn.
"""

import json
import time

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from rollpool.ops.cli.asking import asking
from rollpool.ops.cli.tables import table
from rollpool.ops.inspect import PoolStatus, read_status
from rollpool.schemas import Keys, WorkerStatus

_MIB = 2**20


def show_status(url: str, pool: str, *, watch: float | None, as_json: bool) -> None:
    """Print the status once, or again and again until interrupted.

    Raises:
        RollpoolError: the server cannot be reached.
    """
    keys = Keys(pool)
    with asking(url, keys) as client:
        first = read_status(client, keys)
        if as_json:
            print(json.dumps(first.as_dict()))
        elif watch is None:
            Console().print(draw(first))
        else:
            with Live(draw(first), auto_refresh=False) as live:
                while True:
                    time.sleep(watch)
                    live.update(draw(read_status(client, keys)), refresh=True)


def draw(status: PoolStatus) -> Group:
    """The whole status."""
    policy = "none published" if status.policy is None else f"policy {status.policy}"
    changing = f", {status.changing} is changing" if status.changing else ""
    waiting = f"delayed {status.delayed:,}, parked {status.parked:,}, exact {status.exact:,}, dead {status.dead:,}"
    head = Text(f"pool {status.pool}: {policy}{changing}; {waiting}")
    return Group(head, _lanes(status), _runs(status), _workers(status.workers))


def _lanes(status: PoolStatus) -> Table:
    made = table("backlog (entries)", "run", "lane", "backlog", "in flight", "ready", "by policy")
    for lane in status.lanes:
        policies = ", ".join(f"{version}: {count}" for version, count in lane.by_policy.items())
        made.add_row(lane.run, lane.lane, f"{lane.backlog:,}", f"{lane.in_flight:,}", f"{lane.ready:,}", policies)
    return made


def _runs(status: PoolStatus) -> Table:
    made = table(
        "runs (jobs)", "run", "weight", "enqueued", "open", "settled", "samples", "tokens", "unread results (MiB)"
    )
    for run in status.runs:
        settled = ", ".join(f"{outcome} {count:,}" for outcome, count in sorted(run.outcomes.items()))
        made.add_row(
            run.run,
            f"{run.weight:g}",
            f"{run.enqueued:,}",
            f"{run.open:,}",
            settled,
            f"{run.samples:,}",
            f"{run.tokens:,}",
            f"{run.unread_bytes / _MIB:,.1f}",
        )
    return made


def _workers(workers: list[WorkerStatus]) -> Table:
    made = table("workers", "worker", "state", "policy", "in engine", "jobs", "settled", "tokens", "restarts", "engine")
    for worker in workers:
        made.add_row(
            worker.name,
            f"{worker.state}: {worker.error:.60}" if worker.error else worker.state,
            "" if worker.policy is None else str(worker.policy),
            f"{worker.samples_in_flight}/{worker.target} (runs {worker.max_running_requests})",
            str(worker.jobs_in_flight),
            f"{worker.jobs_settled:,}",
            f"{worker.tokens_made:,}",
            str(worker.engine_restarts),
            worker.engine,
        )
    return made
