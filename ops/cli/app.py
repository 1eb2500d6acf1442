"""The commands, each a thin wrapper of a module that does the work."""

import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from rollpool.ops.cli.asking import AsJson, Pool, Url
from rollpool.ops.cli.control import control
from rollpool.ops.cli.dead import dead
from rollpool.schemas import RollpoolError
from rollpool.schemas.connection import DEFAULT_POOL, DEFAULT_URL

#: Exit status after Ctrl-C, as shells have it: 128 + SIGINT.
INTERRUPTED = 130


class _Group(typer.core.TyperGroup):
    """Turns our errors into one line; a traceback is for what we did not foresee."""

    def invoke(self, ctx: Any) -> Any:
        # What a service manager sends ends things in the same order as what a terminal sends.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored when started in a script's background
        try:
            return super().invoke(ctx)
        except RollpoolError as error:
            print(f"rollpool: {error}", file=sys.stderr)
            raise typer.Exit(1) from None
        except ModuleNotFoundError as error:
            print(f"rollpool: this command needs {error.name}: pip install 'rollpool[local]'", file=sys.stderr)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            print("rollpool: interrupted; everything that was started has ended", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A Redis-Streams rollout worker pool for reinforcement learning on TPUs with sglang-jax.",
)


@app.command()
def status(
    url: Url = DEFAULT_URL,
    pool: Pool = DEFAULT_POOL,
    watch: Annotated[float | None, typer.Option(help="Show it again every so many seconds.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the backlog by run, lane and policy, what is in flight, the workers and their engines."""
    from rollpool.ops.status import show_status

    show_status(url, pool, watch=watch, as_json=as_json)


@app.command()
def doctor(
    url: Url = DEFAULT_URL,
    pool: Pool = DEFAULT_POOL,
    quiescent: Annotated[
        bool, typer.Option("--quiescent", help="Nothing is open and everything committed: tell what was left behind.")
    ] = False,
    named: Annotated[int, typer.Option(min=1, help="Of each kind of trouble, name so many at most.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Check that every job is in exactly one place and the counters are right; exit status 1 when something is wrong.

    The server does nothing else meanwhile: one to two seconds for 100,000 jobs of 2 KB.
    """
    from rollpool.ops.cli.doctor import show_report

    show_report(url, pool, quiescent=quiescent, named=named, as_json=as_json)


@app.command()
def policies(
    url: Url = DEFAULT_URL,
    pool: Pool = DEFAULT_POOL,
    acks: Annotated[bool, typer.Option("--acks", help="Also what each live host answered last.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show every published policy, which ones are current, and how many hosts serve each.

    Example: rollpool policies --acks
    """
    from rollpool.ops.cli.policies import show_policies

    show_policies(url, pool, acks=acks, as_json=as_json)


app.add_typer(control, name="control")
app.add_typer(dead, name="dead")


@app.command()
def local(
    workers: Annotated[int, typer.Option(min=1, help="Hosts, each with an engine of its own (1.2 GB).")] = 1,
    model: Annotated[Path | None, typer.Option(help="Checkpoint to serve; none: a tiny random model.")] = None,
    url: Annotated[str | None, typer.Option(help="Server of the pool; none: one is started.")] = None,
    pool: Pool = DEFAULT_POOL,
) -> None:
    """Run a whole pool on this machine, with real engines on CPU, until Ctrl-C."""
    from rollpool.ops.local.run import run_local

    run_local(workers=workers, model=model, url=url, pool=pool)


@app.command()
def demo() -> None:
    """Run the main job: two hosts, 64 groups, a new policy midway, every log-prob checked. Ends with a line of JSON."""
    from rollpool.ops.demo import run_demo

    run_demo()
