"""The console that tables of tools are printed on."""

from __future__ import annotations

from rich.console import Console

WIDTH = 160
"""Characters of a line where there is no terminal: the widest table (of `data stats`) has no cell cut short in 140."""


def stdout() -> Console:
    """Returns the console of stdout: as wide as the terminal, `WIDTH` in a file or pipe, where rich takes 80."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)
