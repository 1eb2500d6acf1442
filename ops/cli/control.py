"""`rollpool control`: publish policies and command the hosts, and see what became of it.

Invariant: what takes work away from the whole pool is done only after somebody agreed. Exit status 0: every host did
it; 1: a host failed; 3: the time was over before all had answered, and they go on with it.
"""

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from rollpool.ops import control as work
from rollpool.ops.cli.asking import Pool, Url, asking, told
from rollpool.ops.cli.tables import prose, table
from rollpool.ops.control import Sent
from rollpool.producer import AsyncRolloutPool
from rollpool.producer.control import Heard, wait_for_acks
from rollpool.producer.server import DEFAULT_RUN, Server
from rollpool.schemas import (
    Ack,
    ChangeMode,
    Command,
    Keys,
    Policy,
    PoolTimeout,
    RollpoolError,
    SettingsError,
    WorkerStatus,
)
from rollpool.schemas.connection import DEFAULT_POOL, DEFAULT_URL

#: Exit statuses beside 0.
FAILED = 1
TIME_OVER = 3
INTERRUPTED = 130

#: Seconds that a change of policy may take: a cold restart of an engine compiles for long.
POLICY_S = 1800.0

#: Seconds for everything else: hosts hear a command at once, and look whether jobs have left several times a second.
ORDER_S = 120.0

#: After Ctrl-C.
_LEFT = "no longer waiting; what was sent stays on the log, see `rollpool policies --acks`"

control = typer.Typer(
    no_args_is_help=True,
    help="Publish policies and command the hosts; shows what each host answers, and ends when all have.\n\n"
    "Exit status 0: all hosts did it, 1: some failed, 3: the time was over first.",
)

Run = Annotated[str, typer.Option(envvar="ROLLPOOL_RUN", help="The training run it is done for.")]
Workers = Annotated[
    list[str] | None,
    typer.Option("--worker", help="Only this host; may be repeated. Else all, and those to come."),
]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for the hosts' answers.")]
Timeout = Annotated[float, typer.Option(min=0.0, help="Seconds to wait for them.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


# Policies.


@control.command()
def publish(
    version: Annotated[int, typer.Argument(min=0, help="Higher than those before.")],
    url: Url = DEFAULT_URL,
    pool: Pool = DEFAULT_POOL,
    checkpoint: Annotated[str | None, typer.Option(help="Hugging Face directory or URL, as the hosts see it.")] = None,
    lora: Annotated[str | None, typer.Option(help="Adapter in peft's layout, likewise.")] = None,
    base: Annotated[
        str | None, typer.Option(help="Checkpoint that the adapter belongs on; without it the current one.")
    ] = None,
    run: Run = DEFAULT_RUN,
    mode: Annotated[
        ChangeMode | None, typer.Option(help="What becomes of work in flight; without it as each host is set.")
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Restart engines also where they could swap.")] = False,
    min_serving: Annotated[
        int | None, typer.Option(min=0, help="Hosts that go on serving meanwhile; without it three quarters.")
    ] = None,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Look at the source from here first.")] = True,
    wait: Wait = True,
    timeout: Timeout = POLICY_S,
) -> None:
    """Publish a checkpoint or an adapter, and follow the hosts to it.

    Example: rollpool control publish 13 --checkpoint /mnt/checkpoints/13 --run grpo-7
    """
    if (checkpoint is None) == (lora is None):
        raise SettingsError("give one of --checkpoint and --lora")

    _as_trainer(
        url,
        pool,
        lambda trainer: trainer.publish_policy(
            version,
            checkpoint=checkpoint,
            lora_path=lora,
            base=base,
            mode=mode,
            way="restart" if restart else "auto",
            min_serving=min_serving,
            check=check,
        ),
        run=run,
        wait=wait,
        timeout=timeout,
    )


@control.command()
def rollback(
    version: Annotated[
        int | None, typer.Argument(min=0, help="Go back to this one; without it to the one before the current.")
    ] = None,
    url: Url = DEFAULT_URL,
    pool: Pool = DEFAULT_POOL,
    run: Run = DEFAULT_RUN,
    wait: Wait = True,
    timeout: Timeout = POLICY_S,
) -> None:
    """Go back to an earlier policy: those after it are abandoned, and their open jobs settle as stale.

    Example: rollpool control rollback 11 --run grpo-7
    """
    _as_trainer(url, pool, lambda trainer: trainer.rollback_policy(version), run=run, wait=wait, timeout=timeout)


# Commands.


@control.command()
def pause(
    url: Url = DEFAULT_URL,
    pool: Pool = DEFAULT_POOL,
    worker: Workers = None,
    wait: Wait = True,
    timeout: Timeout = ORDER_S,
) -> None:
    """Pull no more jobs; those in hand are finished. `resume` ends it.

    Example: rollpool control pause --worker vm-3
    """
    _order(url, pool, Command(kind="pause"), worker, wait=wait, timeout=timeout)


@control.command()
def resume(
    url: Url = DEFAULT_URL,
    pool: Pool = DEFAULT_POOL,
    worker: Workers = None,
    wait: Wait = True,
    timeout: Timeout = ORDER_S,
) -> None:
    """Pull jobs again, after `pause` or `drain`.

    Example: rollpool control resume
    """
    _order(url, pool, Command(kind="resume"), worker, wait=wait, timeout=timeout)


@control.command()
def drain(
    url: Url = DEFAULT_URL,
    pool: Pool = DEFAULT_POOL,
    within: Annotated[
        float | None,
        typer.Option(min=0.0, help="Seconds, after which the rest goes back. Else as each host is set."),
    ] = None,
    worker: Workers = None,
    wait: Wait = True,
    timeout: Annotated[float, typer.Option(min=0.0, help="Seconds to wait for them, after --within.")] = ORDER_S,
    yes: Yes = False,
) -> None:
    """Pull no more jobs, finish those in hand or give them back, and stay idle. `resume` ends it.

    Example: rollpool control drain --within 60 --worker vm-3
    """
    question = None if worker or yes else f"drain every host of pool {pool}, so that nothing is made until `resume`?"
    command = Command(kind="drain", within_s=within)
    _order(url, pool, command, worker, question, wait=wait, timeout=timeout + (within or 0.0))


@control.command()
def concurrency(
    samples: Annotated[str, typer.Argument(metavar="N|default", help="Samples in each engine at most.")],
    url: Url = DEFAULT_URL,
    pool: Pool = DEFAULT_POOL,
    worker: Workers = None,
    wait: Wait = True,
    timeout: Timeout = ORDER_S,
) -> None:
    """Keep so many samples in each engine; `default`: as many as the host's settings say.

    Example: rollpool control concurrency 24 --worker vm-3
    """
    command = Command(kind="concurrency", concurrency=_samples(samples))
    _order(url, pool, command, worker, wait=wait, timeout=timeout)


def _samples(text: str) -> int | None:
    if text == "default":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise SettingsError(f"concurrency {text}: expected a number of samples from 1 on, or `default`")
    return int(text)


@control.command()
def cancel(
    run: Annotated[str, typer.Option(help="The run whose jobs.")],
    url: Url = DEFAULT_URL,
    pool: Pool = DEFAULT_POOL,
    policy: Annotated[int | None, typer.Option(min=0, help="Only jobs tagged with this version.")] = None,
    worker: Workers = None,
    wait: Wait = True,
    timeout: Timeout = ORDER_S,
    yes: Yes = False,
) -> None:
    """Settle the open jobs of a run as cancelled, and have the hosts drop them.

    Example: rollpool control cancel --run grpo-7
    """
    keys = Keys(pool)
    with asking(url, keys) as client:
        workers, _ = work.whom(client, keys, worker or [])
        count = work.open_jobs(client, keys, run)
    tagged = "" if policy is None else f" that are tagged with policy {policy}"
    if not _agreed(None if yes else f"cancel the open jobs of run {run}{tagged} ({count:,} are open in all)?"):
        return

    async def cancel_them(server: Server) -> Sent:
        cancelled, sent = await work.cancel(server, policy, workers)
        print(f"{cancelled:,} jobs of run {run} are settled as cancelled")
        return sent

    _do(url, pool, cancel_them, run=run, wait=wait, timeout=timeout)


@control.command()
def flush(
    url: Url = DEFAULT_URL,
    pool: Pool = DEFAULT_POOL,
    worker: Workers = None,
    wait: Wait = True,
    timeout: Timeout = ORDER_S,
) -> None:
    """Empty the engines' prefix caches. An engine that runs requests may refuse: drain it first.

    Example: rollpool control flush --worker vm-3
    """
    _order(url, pool, Command(kind="flush"), worker, wait=wait, timeout=timeout)


@control.command()
def shutdown(
    url: Url = DEFAULT_URL,
    pool: Pool = DEFAULT_POOL,
    worker: Workers = None,
    wait: Wait = True,
    timeout: Timeout = ORDER_S,
    yes: Yes = False,
) -> None:
    """End the workers as SIGTERM does: they finish or give back what they have. A service manager may start them anew.

    Example: rollpool control shutdown --worker vm-3
    """
    whose = ", ".join(worker or []) or f"every worker of pool {pool}"
    question = None if yes else f"end {whose}?"
    _order(url, pool, Command(kind="shutdown"), worker, question, wait=wait, timeout=timeout)


# Sending, and following.


def _order(
    url: str,
    pool: str,
    command: Command,
    names: list[str] | None,
    question: str | None = None,
    *,
    wait: bool,
    timeout: float,
) -> None:
    keys = Keys(pool)
    with asking(url, keys) as client:
        workers, live = work.whom(client, keys, names or [])
    if command.kind in ("flush", "shutdown") and not live:
        raise RollpoolError(f"pool {pool} has no live host, so nobody would hear it; nothing was sent")
    if _agreed(question):
        meant = command.model_copy(update={"workers": workers})
        _do(url, pool, lambda server: work.order(server, meant), wait=wait, timeout=timeout)


def _as_trainer(
    url: str, pool: str, act: Callable[[AsyncRolloutPool], Awaitable[Policy]], *, run: str, wait: bool, timeout: float
) -> None:
    with asking(url, Keys(pool)) as client:
        client.ping()  # a trainer's client would try for long; a person waits
    _do(url, pool, lambda server: work.as_trainer(server, act), run=run, wait=wait, timeout=timeout)


def _agreed(question: str | None) -> bool:
    if question is None or typer.confirm(question):
        return True
    print("nothing was done")
    return False


def _do(
    url: str, pool: str, act: Callable[[Server], Awaitable[Sent]], *, run: str | None = None, wait: bool, timeout: float
) -> None:
    """Act, and follow what was sent; raises Exit where not all hosts did it."""
    try:
        with told(url):
            status = asyncio.run(_sent(url, pool, run, act, timeout if wait else None))
    except KeyboardInterrupt:
        print(
            "rollpool: no longer waiting; what was sent stays on the log, see `rollpool policies --acks`",
            file=sys.stderr,
        )
        status = INTERRUPTED
    if status:
        raise typer.Exit(status)


async def _sent(
    url: str, pool: str, run: str | None, act: Callable[[Server], Awaitable[Sent]], timeout: float | None
) -> int:
    async with work.server_of(url, pool, run) as server:
        sent = await act(server)
        print(f"{sent.name}: command {sent.entry}", flush=True)
        if timeout is None:
            return 0
        try:
            heard = await _follow(server, sent, timeout)
        except PoolTimeout as error:
            print(f"rollpool: {error}", file=sys.stderr)
            return TIME_OVER
    print(_summary(sent, heard))
    return FAILED if heard.failed or (heard.gone and not heard.applied) else 0


async def _follow(server: Server, sent: Sent, timeout: float) -> Heard:
    """Show the answers as they come; the last look."""
    heard = Heard((), {}, (), (), {})
    with _shown(Console(), sent) as show:
        async for heard in wait_for_acks(server, sent.entry, sent.command, timeout):
            show(heard)
    return heard


@contextmanager
def _shown(console: Console, sent: Sent) -> Iterator[Callable[[Heard], None]]:
    """In a terminal a table of the hosts; else, where a log or a pipe reads them, a line for each answer."""
    if not console.is_terminal:
        yield _print_new
        return
    with Live(console=console, auto_refresh=False) as live:
        yield lambda heard: live.update(rows(sent, heard), refresh=True)


def _print_new(heard: Heard) -> None:
    for ack in heard.new:
        print(line_of(ack), flush=True)


def line_of(ack: Ack) -> str:
    """One answer."""
    more = ack.error if ack.state == "failed" else ack.detail
    took = "" if ack.state == "received" else f" after {ack.seconds:.1f} s"
    return f"{ack.worker}: {ack.state}{took}{f': {more}' if more else ''}"


def rows(sent: Sent, heard: Heard) -> Table:
    """What every host said, or is doing instead."""
    made = table(f"{sent.name}: command {sent.entry}", "host", "answer", "seconds")
    prose(made, "how")
    for name in sorted({*heard.latest, *heard.gone, *heard.voided, *(worker.name for worker in heard.waiting)}):
        made.add_row(*map(escape, _row(name, heard)))
    return made


def _row(name: str, heard: Heard) -> tuple[str, str, str, str]:
    ack = heard.latest.get(name)
    if ack is not None and ack.state != "received":
        return name, ack.state, f"{ack.seconds:.1f}", (ack.error or "") if ack.state == "failed" else ack.detail
    if name in heard.voided:
        return name, "overtaken", "", f"by command {heard.voided[name]}"
    if name in heard.gone:
        return name, "gone", "", "its heartbeat ended before it answered"
    doing = next((_doing(worker) for worker in heard.waiting if worker.name == name), "")
    return name, ack.state if ack else "sent", "", doing


def _doing(worker: WorkerStatus) -> str:
    return "; ".join(part for part in (worker.state, worker.staging, worker.error) if part)


def _summary(sent: Sent, heard: Heard) -> str:
    counts = {
        "applied": len(heard.applied),
        "failed": len(heard.failed),
        "overtaken by a later command": len(heard.voided),
        "gone without an answer": len(heard.gone),
    }
    said = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    return f"{sent.name}: {said or 'no host is alive; those that start later do it'}"
