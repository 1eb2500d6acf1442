"""How tables look, and what of them is left out where the terminal is narrow."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

#: Wider than any table: what one would like to have.
_UNBOUND = 10_000


def table(title: str, *columns: str) -> Table:
    """The first column to the left, figures to the right."""
    made = Table(title=title, title_justify="left", title_style="bold", pad_edge=False)
    for number, column in enumerate(columns):
        made.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    return made


def prose(made: Table, column: str) -> None:
    """Add a column of words, which are broken over lines where the terminal is narrow."""
    made.add_column(column, justify="left", no_wrap=False, overflow="fold")


@dataclass
class FittingTable:
    """A table that goes without whole columns where the terminal is too narrow, rather than cut all of them off.

    Under it stands which ones it goes without, and what was in those that are moved there.
    """

    title: str
    columns: Sequence[str]
    #: Columns that can be missed, the first ones first.
    dispensable: Sequence[str] = ()
    #: Columns that go under the table, row by row, once nothing more can be missed.
    movable: Sequence[str] = ()
    rows: list[Sequence[str]] = field(default_factory=list)

    def add_row(self, *cells: str) -> None:
        """One cell a column; the first one names the row."""
        self.rows.append(cells)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        left_out: list[str] = []
        rest = [column for column in (*self.dispensable, *self.movable) if column in self.columns]
        while _width(self._without(left_out), console, options) > options.max_width and rest:
            left_out.append(rest.pop(0))
        yield self._without(left_out)
        if missed := [column for column in left_out if column in self.dispensable]:
            yield Text(f"not shown, for want of width: {', '.join(missed)}", style="dim")
        for column in (column for column in self.movable if column in left_out):
            yield from self._lines(column)

    def _without(self, left_out: Sequence[str]) -> Table:
        shown = [at for at, column in enumerate(self.columns) if column not in left_out]
        made = table(self.title, *(self.columns[at] for at in shown))
        for row in self.rows:
            made.add_row(*(Text(row[at]) for at in shown))
        return made

    def _lines(self, column: str) -> list[Text]:
        at = self.columns.index(column)
        return [Text(f"{row[0]}: {column} {row[at]}") for row in self.rows if row[at]]


def _width(made: Table, console: Console, options: ConsoleOptions) -> int:
    return Measurement.get(console, options.update(max_width=_UNBOUND), made).maximum
