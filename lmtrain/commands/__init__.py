"""The verbs of the command line, one file each: `main(arguments) -> exit status`.

Everything that is not one of these words is Hydra's. The modules are imported when their verb is typed.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from typing import NoReturn, cast

from lmtrain.errors import ConfigError

COMMANDS = {
    "data": "lmtrain.commands.data",
    "sweep": "lmtrain.commands.sweep",
    "verify-resume": "lmtrain.commands.verify_resume",
}
"""Word → module."""


def load_command(word: str) -> Callable[[list[str]], int]:
    """The function behind a word of `COMMANDS`."""
    return cast(Callable[[list[str]], int], importlib.import_module(COMMANDS[word]).main)


class CommandParser(argparse.ArgumentParser):
    """Reads the words of a verb; a wrong one is told like every other error, in a line."""

    def __init__(self, verb: str, description: str | None) -> None:
        """`verb` as typed after `lmtrain`; `description`: the docstring of its module."""
        super().__init__(
            prog=f"lmtrain {verb}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError, where argparse would print its usage and exit."""
        raise ConfigError(f"{message}; {self.prog} --help tells what it takes")
