"""A progress bar on request.

Invariant: without a request nothing is imported and nothing is drawn; a request that cannot be met is refused when
it is made, not at the first group.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from rollpool.schemas.errors import SettingsError

#: Draws jobs settled, jobs dropped, and jobs in all.
Show = Callable[[int, int, int], None]


def _silent(settled: int, dropped: int, total: int) -> None:
    """Draw nothing."""


def progress_bar(progress: bool | str, label: str) -> AbstractContextManager[Show]:
    """A bar on stderr while its context lasts; `progress` is True, False, or the label to show.

    Raises:
        SettingsError: `rich` is not installed.
    """
    if not progress:
        return nullcontext(_silent)
    try:
        import rich.progress  # noqa: F401
    except ImportError as error:
        raise SettingsError(
            "progress: the bar is drawn by `rich`, which is not installed; pip install 'rollpool[ops]'"
        ) from error
    return _rich_bar(label if progress is True else progress)


@contextmanager
def _rich_bar(label: str) -> Iterator[Show]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[dropped]} dropped"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=None, dropped=0)

        def show(settled: int, dropped: int, total: int) -> None:
            bar.update(task, completed=settled, total=total, dropped=dropped)

        yield show
