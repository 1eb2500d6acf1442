"""`rollpool dead`: list, show, replay and drop dead letters.

Invariant: nothing is replayed or dropped that was not named, by ids, by conditions or by `--all`; and not before it was
said what will be done and somebody agreed.
"""

import asyncio
import json
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from rollpool.ops.cli.asking import AsJson, Pool, Url, asking, told
from rollpool.ops.cli.tables import table
from rollpool.ops.dead import DeadLetter, Replayed, Selection, drop, find, plain, replay, seconds_of, select
from rollpool.schemas import Keys, SchemaMismatch, SettingsError
from rollpool.schemas.connection import DEFAULT_POOL, DEFAULT_URL, connect_async

#: Dead letters listed when nobody says how many: a screen.
LISTED = 50

#: Characters of an error in a table, and token ids of a prompt in `show`: the rest is in `--json`.
_ERROR_CHARS = 160
_IDS_SHOWN = 20

#: What is going to be done is told one by one up to so many.
_TOLD = 10

dead = typer.Typer(no_args_is_help=True, help="Dead letters: list, show, replay and drop them.")

Run = Annotated[str | None, typer.Option(help="Of this run.")]
BatchName = Annotated[str | None, typer.Option(help="Of this batch.")]
ErrorText = Annotated[str | None, typer.Option(help="With this text in their error.")]
Policy = Annotated[int | None, typer.Option(help="Tagged with this policy version.")]
Since = Annotated[str | None, typer.Option(help="Not older than this, as 90s, 2h or 1d12h.")]
Before = Annotated[str | None, typer.Option(help="Older than this.")]
Limit = Annotated[int | None, typer.Option(min=1, help="The newest so many of them.")]
Ids = Annotated[list[str] | None, typer.Argument(help="Ids, as `rollpool dead list` shows them.")]
All = Annotated[bool, typer.Option("--all", help="All of them; without it, name ids or conditions.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def _selection(
    run: str | None,
    batch: str | None,
    error: str | None,
    policy: int | None,
    since: str | None,
    before: str | None,
    limit: int | None,
) -> Selection:
    return Selection(
        run=run,
        batch=batch,
        error=error,
        policy=policy,
        since_s=None if since is None else seconds_of("--since", since),
        before_s=None if before is None else seconds_of("--before", before),
        limit=limit,
    )


@dead.command("list")
def list_(
    url: Url = DEFAULT_URL,
    pool: Pool = DEFAULT_POOL,
    run: Run = None,
    batch: BatchName = None,
    error: ErrorText = None,
    policy: Policy = None,
    since: Since = None,
    before: Before = None,
    limit: Annotated[int, typer.Option(min=1, help="The newest so many of them.")] = LISTED,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON list instead of a table.")] = False,
) -> None:
    """List dead letters, the newest first."""
    selection = _selection(run, batch, error, policy, since, before, limit)
    keys = Keys(pool)
    with asking(url, keys) as client:
        letters = list(select(client, keys, selection))
        total: Any = client.xlen(keys.dead)
    if as_json:
        print(json.dumps([letter.as_dict() for letter in letters]))
    elif not letters:
        print(_none(pool, total))
    else:
        _print_list(letters)
        print(f"{len(letters)} shown of {total} in pool {pool}")


def _none(pool: str, total: int) -> str:
    if total == 0:
        return f"pool {pool} has no dead letters"
    return f"none of the {total} dead letters of pool {pool} meets these conditions"


def _print_list(letters: Sequence[DeadLetter]) -> None:
    made = table("dead letters", "id", "died (UTC)", "run", "job", "policy", "losses", "error")
    made.columns[-1].justify = "left"
    made.columns[-1].no_wrap = False
    for letter in letters:
        cells = (
            letter.id,
            f"{letter.at:%Y-%m-%d %H:%M:%S}",
            letter.run,
            letter.job,
            letter.policy,
            str(letter.record.losses),
            _short(letter.error),
        )
        made.add_row(*map(escape, cells))
    Console().print(made)


def _short(error: str) -> str:
    return error if len(error) <= _ERROR_CHARS else f"{error[:_ERROR_CHARS]}…"


@dead.command()
def show(
    letter: Annotated[str, typer.Argument(metavar="ID", help="As `rollpool dead list` shows it.")],
    url: Url = DEFAULT_URL,
    pool: Pool = DEFAULT_POOL,
    as_json: AsJson = False,
) -> None:
    """Show one dead letter: its error, its history, and the job itself."""
    keys = Keys(pool)
    with asking(url, keys) as client:
        (found,) = find(client, keys, [letter])
    job, why = _job(found)
    if as_json:
        print(json.dumps({**found.as_dict(), "payload": job, "undecodable": why}, default=plain))
    else:
        print("\n".join(_lines(found, job, why)))


def _job(letter: DeadLetter) -> tuple[dict[str, Any] | None, str | None]:
    try:
        return letter.decoded().model_dump(), None
    except SchemaMismatch as error:
        return None, str(error)


def _lines(letter: DeadLetter, job: dict[str, Any] | None, why: str | None) -> list[str]:
    record = letter.record
    facts = (
        f"attempts {record.attempts}, faults {record.faults}, losses {record.losses}"
        f"{'' if record.company is None else f', company {record.company}'}"
    )
    history = record.history.splitlines() or ["none"]
    return [
        f"dead letter {letter.id}, {letter.at:%Y-%m-%d %H:%M:%S} UTC, by {letter.worker or 'the server'}",
        f"error    {letter.error}",
        f"job      {letter.job} of run {letter.run}, policy {letter.policy}, n {letter.n}",
        f"counts   {facts}",
        *(f"{'history ' if at == 0 else '        '} {line}" for at, line in enumerate(history)),
        f"prompt   {letter.preview}",
        *(_payload(job) if job is not None else [f"payload  is no job and cannot be replayed: {why}"]),
    ]


def _payload(job: dict[str, Any]) -> list[str]:
    lines = ["payload"]
    for name, value in job.items():
        text = json.dumps(value, default=_shortly, ensure_ascii=False)
        lines.append(f"  {name:<16} {text}")
    return lines


def _shortly(value: Any) -> Any:
    made = plain(value)
    if isinstance(made, list) and len(made) > _IDS_SHOWN:
        return f"{len(made)} values: {' '.join(map(str, made[:_IDS_SHOWN]))} …"
    return made


@dead.command("replay")
def replay_(
    ids: Ids = None,
    url: Url = DEFAULT_URL,
    pool: Pool = DEFAULT_POOL,
    run: Run = None,
    batch: BatchName = None,
    error: ErrorText = None,
    policy: Policy = None,
    since: Since = None,
    before: Before = None,
    limit: Limit = None,
    everything: All = False,
    yes: Yes = False,
) -> None:
    """Enqueue dead jobs again, each as a batch replay-ID of its run, and remove the dead letters."""
    selection = _selection(run, batch, error, policy, since, before, limit)
    letters = _chosen(url, pool, ids or [], selection, everything)
    if _agreed(letters, pool, "enqueue again", yes):
        with told(url):
            _tell(asyncio.run(_replay(url, Keys(pool), letters)))


async def _replay(url: str, keys: Keys, letters: Sequence[DeadLetter]) -> list[Replayed]:
    client = connect_async(url, slot_key=keys.runs)
    try:
        return [await replay(client, keys, letter) for letter in letters]
    finally:
        await client.aclose()


def _tell(done: Sequence[Replayed]) -> None:
    for each in done:
        if each.outcome == "replayed":
            print(f"{each.letter.id}: {each.letter.job} of run {each.letter.run} is now batch {each.letter.replay}")
        else:
            print(f"{each.letter.id}: not replayed: {each.why}", file=sys.stderr)
    replayed = sum(each.outcome == "replayed" for each in done)
    print(f"replayed {replayed} of {len(done)}; trainers find them in pool.batches after RolloutPool.resume")
    if any(each.outcome == "cannot" for each in done):
        raise typer.Exit(1)


@dead.command("drop")
def drop_(
    ids: Ids = None,
    url: Url = DEFAULT_URL,
    pool: Pool = DEFAULT_POOL,
    run: Run = None,
    batch: BatchName = None,
    error: ErrorText = None,
    policy: Policy = None,
    since: Since = None,
    before: Before = None,
    limit: Limit = None,
    everything: All = False,
    yes: Yes = False,
) -> None:
    """Remove dead letters for good; their jobs stay settled as failed."""
    selection = _selection(run, batch, error, policy, since, before, limit)
    letters = _chosen(url, pool, ids or [], selection, everything)
    if _agreed(letters, pool, "drop for good", yes):
        keys = Keys(pool)
        with asking(url, keys) as client:
            print(f"dropped {drop(client, keys, letters)}")


def _chosen(url: str, pool: str, ids: Sequence[str], selection: Selection, everything: bool) -> list[DeadLetter]:
    """What is meant, the oldest first."""
    ways = [bool(ids), selection.narrows, everything]
    if sum(ways) != 1 or (ids and selection.limit is not None):
        raise SettingsError(
            "say which dead letters: either ids, or conditions (--run, --batch, --error, --policy, --since, --before), "
            "or --all; --limit goes with conditions and --all"
        )
    keys = Keys(pool)
    with asking(url, keys) as client:
        letters = find(client, keys, ids) if ids else list(select(client, keys, selection))
        total: Any = client.xlen(keys.dead)
    if not letters:
        print(f"{_none(pool, total)}; nothing was done")
    return letters[::-1] if not ids else letters


def _agreed(letters: Sequence[DeadLetter], pool: str, what: str, yes: bool) -> bool:
    if not letters:
        return False
    for letter in letters[:_TOLD]:
        print(f"{letter.id}  run {letter.run}  job {letter.job}  {_short(letter.error)}")
    if len(letters) > _TOLD:
        print(f"… and {len(letters) - _TOLD} more")
    if yes or typer.confirm(f"{what} {len(letters)} dead letter{'s' if len(letters) > 1 else ''} of pool {pool}?"):
        return True
    print("nothing was done")
    return False
