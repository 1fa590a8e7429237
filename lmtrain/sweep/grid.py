"""One run of a plain multirun: found done, continued, or made.

Knows no Hydra. The trials of a study are made by `worker`.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from lmtrain.config.saved import UNSEEN_IN_RESULTS, resume_differences, with_choices_of
from lmtrain.config.schema import ExperimentConfig
from lmtrain.data.prepare import prepare
from lmtrain.errors import Interrupted, RunFolderError
from lmtrain.origin import Origin
from lmtrain.places import ALONE, Places
from lmtrain.run import RunResult, ended_for_good, run_experiment
from lmtrain.run_dir import RunDir
from lmtrain.sweep.retention import keep_best_checkpoints
from lmtrain.training.interrupt import leave_to_batch_system

log = logging.getLogger(__name__)


def run_in_grid(config: ExperimentConfig, run_dir: Path, origin: Origin, places: Places = ALONE) -> RunResult:
    """The run of these settings in this folder, which is not made again where it is there already.

    `places` are those of the processes that make the runs of the grid.

    Raises RunFolderError if the folder holds a run of other settings, and what `run_experiment` raises.
    """
    places.take()
    folder = RunDir(run_dir)
    result = None
    if places.number > 1 and not folder.is_run():
        config = places.seat(config)
    if folder.is_run() and _is_same_run(folder, config):
        result = ended_for_good(folder)
        config = dataclasses.replace(config, resume="auto")
    if result is not None:
        log.info("%s is there already: %s at step %d", folder, result.status, result.step)
    else:
        try:
            result = run_experiment(config, run_dir, origin)
        except Interrupted as error:
            leave_to_batch_system(error.signal_number)
            raise
    if config.sweep.keep_checkpoints is not None:
        keep_best_checkpoints(run_dir.parent, config.sweep.keep_checkpoints)
    return result


def _is_same_run(folder: RunDir, config: ExperimentConfig) -> bool:
    """Whether the run there is the one asked for; raises RunFolderError if not, unless it may be resumed otherwise."""
    text = folder.config.read_text(encoding="utf-8")
    differences = resume_differences(text, with_choices_of(text, config), UNSEEN_IN_RESULTS)
    result = folder.read_result()
    if not differences and result is not None:
        fingerprint = prepare(config.data, config.tokenizer, on_progress=log.info).fingerprint
        if fingerprint != result["data_fingerprint"]:
            differences = ["the text is not the same"]
    if differences and config.resume is None:
        raise RunFolderError(
            f"{folder} already holds a run of other settings: {'; '.join(differences)}\n"
            "choose another sweep.name; with resume=auto its runs go on with another budget"
        )
    return not differences
