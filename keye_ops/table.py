"""Tables for the terminal, with rich where it is installed."""

from __future__ import annotations

from collections.abc import Sequence


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows under a title; plain columns of text without rich."""
    text = [[str(cell) for cell in row] for row in rows]
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        lines = [list(columns), *text]
        widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
        print(title)
        for line in lines:
            print("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip())
        return
    table = Table(title=title, title_justify="left", show_header=any(columns))
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in text:
        table.add_row(*map(Text, row))
    console = Console()
    # A pipe has no width: let rows be as long as they are, so that nothing is cut.
    if not console.is_terminal:
        cells = zip(columns, *text, strict=True)
        console = Console(width=max(100, sum(max(map(len, column)) + 3 for column in cells) + 1))
    console.print(table)
