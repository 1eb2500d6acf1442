"""How tables look."""

from rich.table import Table


def table(title: str, *columns: str) -> Table:
    """The first column to the left, figures to the right."""
    made = Table(title=title, title_justify="left", title_style="bold", pad_edge=False)
    for number, column in enumerate(columns):
        made.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    return made
