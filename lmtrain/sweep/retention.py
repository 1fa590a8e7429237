"""Which runs of a sweep keep their checkpoints. Everything else in a run folder stays."""

from __future__ import annotations

import logging
import math
from pathlib import Path

from filelock import FileLock

from lmtrain.errors import RunFolderError
from lmtrain.run import RunResult, ended_for_good
from lmtrain.run_dir import RunDir
from lmtrain.training.checkpoint import CheckpointFolder

log = logging.getLogger(__name__)

TRAINED = ("completed", "early_stopped")
"""How runs end that came to their end; others that have ended for good were given up."""


def keep_best_checkpoints(sweep_dir: Path, count: int) -> list[Path]:
    """Delete the checkpoints of all runs of a folder that have ended for good, but for the best `count` so far.

    Best by the first objective; a run that was given up comes after those that were trained to their end. May be
    called by several processes at once, at any time: what another process works on is left alone.

    Returns:
        The run folders that lost their checkpoints.
    """
    with FileLock(sweep_dir / ".retention.lock"):
        ended = []
        for config in sweep_dir.glob("*/config.yaml"):
            folder = RunDir(config.parent)
            # First the cheap look: in a long sweep most runs have lost theirs.
            if not CheckpointFolder(folder.checkpoints).has_any():
                continue
            result = ended_for_good(folder)
            if result is not None:
                ended.append((_rank(result), folder.path.name, folder))
        worse = [folder for _, _, folder in sorted(ended, key=lambda entry: entry[:2])[count:]]
        return [folder.path for folder in worse if _removed(folder, count)]


def _rank(result: RunResult) -> tuple[bool, float]:
    """Lower is better."""
    return result.status not in TRAINED, math.inf if result.objective is None else result.objective


def _removed(folder: RunDir, count: int) -> bool:
    try:
        folder.lock()
    except RunFolderError:  # it is being continued
        return False
    try:
        why = f"sweep.keep_checkpoints={count} keeps those of the best runs of {folder.path.parent.name}"
        CheckpointFolder(folder.checkpoints).remove_all(why)
    except OSError as error:
        log.warning("cannot delete the checkpoints of %s: %s", folder, error)
        return False
    finally:
        folder.unlock()
    return True
