"""Settings from words, for programs: what the command line makes of its words, with its errors."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lmtrain.config.compose import compose_config
from lmtrain.config.explain import REQUEST_ERRORS, explain
from lmtrain.config.schema import ExperimentConfig
from lmtrain.errors import ConfigError, LmtrainError


def compose(*overrides: str | Iterable[str], run: Path | str | None = None) -> ExperimentConfig:
    """The settings that `python -m lmtrain` would train with, given these words; checked.

    May be called any number of times, also inside a Hydra application. To change a setting afterwards, compose again,
    or take `dataclasses.replace`, which checks as well.

    Args:
        overrides: `"model=tiny", "lr=1e-3", …`, or a list of such words.
        run: a run folder; its settings, changed by the words.

    Raises:
        LmtrainError: the words cannot be used; the message is the command's, one or two lines.
    """
    words = [word for words in overrides for word in ([words] if isinstance(words, str) else words)]
    for word in words:
        if word.startswith(("hydra.", "hydra/")) and not word.startswith("hydra.searchpath="):
            raise ConfigError(f"{word} is for the command line: run_experiment has its folder as run_dir")
    try:
        return compose_config(words, None if run is None else Path(run).expanduser())
    except LmtrainError:
        raise
    except REQUEST_ERRORS as error:
        raise ConfigError(explain(error)) from None
