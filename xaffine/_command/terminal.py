"""Tables and progress bars: with rich where it is installed, else plain text and no bar."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from xaffine.testing._progress import progress_lines

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["print_table", "progress_bar"]


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], styles: Sequence[str]) -> None:
    """Print a table to standard output.

    Parameters
    ----------
    header : sequence of str
    rows : sequence of sequence of str
    styles : sequence of str
        How rich is to show each row, such as ``"bold red"``.
    """
    try:
        from rich.console import Console
        from rich.table import Column, Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        for row in (header, *rows):
            print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
        return
    columns = (Column(text, overflow="fold") for text in header)
    table = Table(*columns, box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold underline")
    for row, style in zip(rows, styles, strict=True):
        table.add_row(*row, style=style)
    console = Console()
    with console.capture() as captured:  # where a pipe is broken, rich itself would exit with 1, which is "wrong"
        console.print(table)
    print(captured.get(), end="")


@contextmanager
def progress_bar(total: int) -> Iterator[Callable[[str, float], Any]]:
    """Show a bar on standard error, or lines off a terminal; hand out what moves it to ``(text, completed)``."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        console = None
    else:
        console = Console(stderr=True)
    if console is None or not console.is_terminal:
        with progress_lines(total) as show:
            yield show
        return
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda text, completed: progress.update(task, description=text, completed=completed)
