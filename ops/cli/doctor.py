"""`rollpool doctor`: the invariant of a pool as a table, and what breaks it, a line each.

Invariant: every figure comes from `examine`; here it is only drawn. Exit status 0: healthy, 1: something was found.
"""

import json

import typer
from rich.console import Console
from rich.table import Table

from rollpool.ops.cli.asking import asking
from rollpool.ops.cli.tables import table
from rollpool.ops.doctor import Report, examine
from rollpool.schemas import Keys


def show_report(url: str, pool: str, *, quiescent: bool, named: int, as_json: bool) -> None:
    """Examine a pool and print what was found; raises Exit with status 1 when there was something."""
    keys = Keys(pool)
    with asking(url, keys) as client:
        report = examine(client, keys, quiescent=quiescent, named=named)
    if as_json:
        print(json.dumps(report.as_dict()))
    else:
        Console().print(_rows(report))
        print(_notes(report))
        for finding in report.findings:
            print(finding)  # not through the console, which would wrap it
    if not report.healthy:
        raise typer.Exit(1)


def _rows(report: Report) -> Table:
    made = table(
        f"pool {report.pool}: enqueued = settled + open, open = backlog + in flight + waiting",
        *("run", "enqueued", "settled", "open", "in parts", "backlog", "in flight", "waiting", "holds"),
    )
    for row in report.rows:
        figures = (row.enqueued, row.settled, row.open, row.pieces, row.backlog, row.in_flight, row.waiting)
        made.add_row(row.run, *(f"{figure:,}" for figure in figures), "yes" if row.holds else "NO")
    return made


def _notes(report: Report) -> str:
    counts, found = report.counts, len(report.findings)
    parts = [
        "healthy" if report.healthy else f"{found} finding{'s' if found > 1 else ''}",
        f"{counts.get('keys', 0):,} keys",
        f"{counts.get('dead', 0):,} dead letters",
    ]
    if tombstones := counts.get("tombstones", 0):
        parts.append(f"{tombstones:,} entries of settled jobs, which hosts discard")
    if foreign := counts.get("foreign", 0):
        parts.append(f"{foreign:,} entries that are no jobs, which hosts bury")
    return "; ".join(parts)
