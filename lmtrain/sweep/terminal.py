"""Where the tables of sweeps and comparisons are printed."""

from __future__ import annotations

import sys

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDTH_OF_A_LOG = 120
"""Columns of a table that goes to a file."""


def output() -> Console:
    """Standard output, wide enough for a table if it is a file."""
    console = Console()
    if not sys.stdout.isatty():  # FORCE_COLOR, which notebooks set, makes rich call a pipe a terminal of 80 columns
        console.width = WIDTH_OF_A_LOG
    return console


def new_table(title: str) -> Table:
    """An empty table in the look they all share."""
    return Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD)
