"""`rollpool status`: the pool as tables.

Invariant: every figure comes from `read_status`; here it is only drawn.
"""

import json
import time

from redis.exceptions import RedisError
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from rollpool.ops.inspect import PoolStatus, read_status
from rollpool.schemas import Keys, RollpoolError, WorkerStatus
from rollpool.schemas.connection import connect, without_password


def show_status(url: str, pool: str, *, watch: float | None, as_json: bool) -> None:
    """Print the status once, or again and again until interrupted.

    Raises:
        RollpoolError: the server cannot be reached.
    """
    keys = Keys(pool)
    with connect(url, retries=0) as client:
        try:
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
        except RedisError as error:
            raise RollpoolError(
                f"the server at {without_password(url)} cannot be reached ({error}); set --url or ROLLPOOL_URL"
            ) from error


def draw(status: PoolStatus) -> Group:
    """The whole status."""
    policy = "none published" if status.policy is None else f"policy {status.policy}"
    changing = f", {status.changing} is changing" if status.changing else ""
    waiting = f"parked {status.parked}, delayed {status.delayed}, dead {status.dead}"
    head = Text(f"pool {status.pool}: {policy}{changing}; {waiting}")
    return Group(head, _lanes(status), _runs(status), _workers(status.workers))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    return table


def _lanes(status: PoolStatus) -> Table:
    table = _table("backlog (jobs)", "run", "lane", "backlog", "in flight", "by policy")
    for lane in status.lanes:
        policies = ", ".join(f"{version}: {count}" for version, count in lane.by_policy.items())
        table.add_row(lane.run, lane.lane, f"{lane.backlog:,}", f"{lane.in_flight:,}", policies)
    return table


def _runs(status: PoolStatus) -> Table:
    table = _table("runs", "run", "enqueued", "open", "settled", "samples", "tokens")
    for run in status.runs:
        settled = ", ".join(f"{outcome} {count:,}" for outcome, count in sorted(run.outcomes.items()))
        table.add_row(run.run, f"{run.enqueued:,}", f"{run.open:,}", settled, f"{run.samples:,}", f"{run.tokens:,}")
    return table


def _workers(workers: list[WorkerStatus]) -> Table:
    table = _table(
        "workers", "worker", "state", "policy", "in engine", "jobs", "settled", "tokens", "restarts", "engine"
    )
    for worker in workers:
        table.add_row(
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
    return table
