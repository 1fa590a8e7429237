"""One run, for notebooks and scripts: what the command that trains does, from settings that Python has.

Owns what a command has from Hydra and a notebook lacks: the run folder, messages, and where the run comes from. The
rest of the Python API is imported from where it is; `lmtrain` names all of it.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lmtrain import run
from lmtrain.config.changed import changed_values
from lmtrain.config.compose import default_run_dir
from lmtrain.config.schema import ExperimentConfig
from lmtrain.origin import Origin
from lmtrain.run_dir import RunDir


@dataclass(frozen=True, kw_only=True)
class RunResult(run.RunResult):
    """How a run ended, and where it is."""

    folder: Path  # for read_run, load_model and resume=


def run_experiment(config: ExperimentConfig, run_dir: Path | str | None = None) -> RunResult:
    """Train as `config` says, as `python -m lmtrain` does, and return how that ended.

    What it tells goes to stdout unless the program has set up logging. Ctrl-C, or interrupting a notebook's kernel,
    ends the run after the step at hand with a checkpoint, and a second time at once.

    Args:
        config: from `compose`.
        run_dir: a new run folder, or one to continue. Default: that of the command, `outputs/DATE/TIME` in the working
            folder, or the run that `config.resume` names.

    Raises:
        UsageError: the request cannot be met; nothing is written then.
        Interrupted: it was asked to stop and has saved where it was.
        RunError: the disk is full.
    """
    folder = _default_folder(config) if run_dir is None else RunDir(Path(run_dir).expanduser())
    if config.resume not in (None, "auto") and not config.force:
        folder.require_no_trial()
    with _messages_shown():
        result = run.run_experiment(config, folder.path, Origin(changed=changed_values(config)))
    return RunResult(**vars(result), folder=folder.path)


def _default_folder(config: ExperimentConfig) -> RunDir:
    """That of the command; where short runs follow each other, of the next second that has none."""
    while True:
        folder = RunDir(default_run_dir(config.resume))
        if config.resume not in (None, "auto") or not folder.is_run():
            return folder
        time.sleep(0.1)


@contextmanager
def _messages_shown() -> Iterator[None]:
    """While entered, messages of runs go to stdout as those of a command do, unless somebody listens already."""
    logger = logging.getLogger("lmtrain")
    if logger.hasHandlers():
        yield
        return
    handler, level = logging.StreamHandler(sys.stdout), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
