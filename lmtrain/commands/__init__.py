"""The verbs of the command line, one file each: `main(arguments) -> exit status`.

Everything that is not one of these words is Hydra's. The modules are imported when their verb is typed.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Mapping
from typing import NoReturn, cast

from lmtrain.errors import ConfigError

COMMANDS = {
    "compare": "lmtrain.commands.compare",
    "data": "lmtrain.commands.data",
    "evaluate": "lmtrain.commands.evaluate",
    "export": "lmtrain.commands.export",
    "generate": "lmtrain.commands.generate",
    "models": "lmtrain.commands.models",
    "plan": "lmtrain.commands.plan",
    "sweep": "lmtrain.commands.sweep",
    "track": "lmtrain.commands.track",
    "verify-resume": "lmtrain.commands.verify_resume",
}
"""Word → module."""


def load_command(word: str) -> Callable[[list[str]], int]:
    """The function behind a word of `COMMANDS`."""
    return cast(Callable[[list[str]], int], importlib.import_module(COMMANDS[word]).main)


def run_verb(
    word: str, description: str | None, verbs: Mapping[str, Callable[[list[str]], None]], arguments: list[str]
) -> int:
    """Run that of the verbs of a command which its first argument names; exit status 0. Raises what the verb raises."""
    parser = CommandParser(word, description)
    parser.add_argument("verb", choices=verbs, nargs="?", help="each has a --help of its own")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="its words")
    options = parser.parse_args(arguments)
    if options.verb is None:
        parser.error(f"name one of {', '.join(verbs)}")
    verbs[options.verb](options.rest)
    return 0


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
