"""The verbs of the command line, one file each: `main(arguments) -> exit status`.

Everything that is not one of these words is Hydra's. The modules are imported when their verb is typed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import cast

COMMANDS = {
    "verify-resume": "lmtrain.commands.verify_resume",
}
"""Word → module."""


def load_command(word: str) -> Callable[[list[str]], int]:
    """The function behind a word of `COMMANDS`."""
    return cast(Callable[[list[str]], int], importlib.import_module(COMMANDS[word]).main)
