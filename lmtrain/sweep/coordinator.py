"""A study from its start to its report: defined, filled, worked on until nothing is left, summed up.

Knows neither Hydra nor how workers are launched: `launch` does that.
"""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Callable, Mapping, Sequence

import psutil
from optuna.trial import TrialState

from lmtrain.errors import ConfigError, Interrupted, RunError, RunFolderError
from lmtrain.run_dir import RunDir
from lmtrain.sweep.reading import reader_of, write_description
from lmtrain.sweep.study import SharedStudy, StudyPlan, lease_of
from lmtrain.sweep.view import StudyView
from lmtrain.tracking.background import one_line
from lmtrain.training.interrupt import StopRequest

log = logging.getLogger(__name__)

MAX_LAUNCHES_WITHOUT_PROGRESS = 2
"""Workers that die at once, again and again, will not do better the next time."""


def open_study(plan: StudyPlan, definition: Mapping[str, str], *, force: bool) -> SharedStudy:
    """The study, new or found. Raises RunFolderError if another one is there."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    try:
        study = SharedStudy(plan)
    except ConfigError:
        RunDir(plan.folder).discard_if_unused()
        raise
    differences = study.define(definition)
    if differences and not force:
        raise RunFolderError(
            f"{plan.folder} holds another study: {'; '.join(differences)}\n"
            "give this one a name of its own with sweep.name=NAME, or add force=true to go on all the same"
        )
    if study.stopped is not None:
        log.info("going on with a study that was stopped: %s", study.stopped)
        study.stop(None)  # whoever starts it again has seen why
    write_description(plan)
    return study


def run_workers(study: SharedStudy, launch: Callable[[], Sequence[int]]) -> None:
    """Launch workers until every trial has ended; a worker that died is replaced, its trial goes on.

    `launch` returns for each worker the signal that stopped it, or 0. Raises Interrupted if a signal asked to stop,
    RunError if the study was stopped or workers keep dying.
    """
    fruitless = 0
    view = StudyView(lambda: reader_of(study.plan), min_workers=1)
    with StopRequest(on_signal=lambda: _tell_workers(study)) as stop, view:
        while study.stopped is None and study.has_work():
            before = _state(study)
            worker_stopped_by = _launched(launch)
            stopped_by = stop.signal or worker_stopped_by
            if stopped_by:
                name = signal.Signals(stopped_by).name
                raise Interrupted(f"stopped by {name}; the same command goes on with the study", stopped_by)
            fruitless = fruitless + 1 if _state(study) == before else 0
            if fruitless >= MAX_LAUNCHES_WITHOUT_PROGRESS:
                raise RunError("the workers end without having done anything; see the log files in the sweep's folder")
    if study.stopped is not None:
        raise RunError(f"the study was stopped: {study.stopped}")


def _launched(launch: Callable[[], Sequence[int]]) -> int:
    """Launch once; returns the signal that stopped a worker, or 0. A pool that broke has lost a worker."""
    try:
        return max(launch(), default=0)
    except Exception as error:
        log.warning("a worker died (%s); its trial goes on from its checkpoint", one_line(error))
        return 0


def _state(study: SharedStudy) -> list[tuple[TrialState, int]]:
    return [(trial.state, len(trial.intermediate_values)) for trial in study.trials()]


def _tell_workers(study: SharedStudy) -> None:
    """Ask the workers this process has started to stop as well."""
    children = {child.pid: child for child in psutil.Process().children(recursive=True)}
    for trial in study.trials(TrialState.RUNNING):
        lease = lease_of(trial)
        if lease is not None and lease.pid in children and lease.is_of_this_machine():
            with contextlib.suppress(psutil.NoSuchProcess):
                children[lease.pid].terminate()
