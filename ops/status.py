"""`rollpool status`: the pool as tables.

Invariant: every figure comes from `read_status`; here it is only drawn.
"""

import json
import time
from collections.abc import Callable

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from rollpool.ops.cli.asking import asking
from rollpool.ops.cli.tables import FittingTable, table
from rollpool.ops.inspect import PoolStatus, read_status
from rollpool.schemas import Keys, WorkerStatus

_MIB = 2**20

#: Characters of a worker's error, some lines, and of what it says while it stages: what is fetched and how much of
#: it is there fits, and why it waits for its turn begins so. `--json` has the whole.
_ERROR_CHARS = 400
_STAGING_CHARS = 36


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
    changing = f", changing: {status.changing}" if status.changing else ""
    waiting = f"delayed {status.delayed:,}, parked {status.parked:,}, exact {status.exact:,}, dead {status.dead:,}"
    head = Text(f"pool {status.pool}: {policy}{changing}; {waiting}")
    return Group(head, _lanes(status), _runs(status), _workers(status.workers), *_errors(status.workers))


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


#: Columns of the workers that a narrow terminal goes without, the first ones first.
_DISPENSABLE = ("engine", "restarts", "tokens", "settled", "jobs")

#: Columns that are there while any host has something in them, and that a narrower one has under the table.
_AT_TIMES = ("staging", "adapters")


def _workers(workers: list[WorkerStatus]) -> FittingTable:
    """What a host serves beside its checkpoint, or fetches, has a column while any host does so."""
    cells: dict[str, Callable[[WorkerStatus], str]] = {
        "worker": lambda worker: worker.name,
        "state": lambda worker: worker.state,
        "policy": policy_of,
        "adapters": lambda worker: worker.adapters,
        "staging": lambda worker: _cut(worker.staging, _STAGING_CHARS),
        "in engine": lambda worker: f"{worker.samples_in_flight}/{worker.target} (runs {worker.max_running_requests})",
        "jobs": lambda worker: f"{worker.jobs_in_flight:,}",
        "settled": lambda worker: f"{worker.jobs_settled:,}",
        "tokens": lambda worker: f"{worker.tokens_made:,}",
        "restarts": lambda worker: str(worker.engine_restarts),
        "engine": lambda worker: worker.engine,
    }
    shown = {
        name: cell for name, cell in cells.items() if name not in _AT_TIMES or any(cell(worker) for worker in workers)
    }
    made = FittingTable("workers", tuple(shown), _DISPENSABLE, _AT_TIMES)
    for worker in workers:
        made.add_row(*(cell(worker) for cell in shown.values()))
    return made


def _errors(workers: list[WorkerStatus]) -> list[Text]:
    """Under the table, where they have room: in it they would push everything else out."""
    return [Text(f"{worker.name}: {_cut(worker.error, _ERROR_CHARS)}") for worker in workers if worker.error]


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def policy_of(worker: WorkerStatus) -> str:
    """The version that a worker serves, and where it is going: `12 → 13`.

    With its generation where the lineage ever went back: `12 g1`.
    """
    serving = "" if worker.policy is None else str(worker.policy)
    generation = f"g{worker.generation}" if worker.generation else ""
    heading = f"→ {worker.heading}" if worker.heading not in (None, worker.policy) else ""
    return " ".join(part for part in (serving, generation, heading) if part)
