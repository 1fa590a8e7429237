"""The report of a study: a page that needs nothing beside itself, pictures, tables, and the best setting.

Reads a study and its run folders; may be written at any time, and again.
"""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import os
import shlex
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from lmtrain.config.saved import dump_yaml
from lmtrain.config.schema import TrackingConfig
from lmtrain.errors import Interrupted
from lmtrain.inference.serving import save_mlflow_model
from lmtrain.run_dir import RunDir, write_atomically
from lmtrain.sweep.advice import advise
from lmtrain.sweep.confirmation import Confirmation, read_confirmation, write_confirmation
from lmtrain.sweep.page import data_uri, fill_page
from lmtrain.sweep.pictures import Picture, draw_study
from lmtrain.sweep.reading import KINDS, ReadStudy, kind_of, reader_of, seconds_of, status_of
from lmtrain.sweep.study import StudyPlan, attempts_of, outcome_of
from lmtrain.sweep.tables import summary
from lmtrain.sweep.wording import short_count, short_names, short_score, short_value
from lmtrain.tracking.background import one_line
from lmtrain.tracking.mlflow.mirror import finish_sweep
from lmtrain.tracking.run_info import SweepEnding

log = logging.getLogger(__name__)

REPORT, TRIALS, BEST, RESULTS = "report.html", "trials.csv", "best.yaml", "optimization_results.yaml"
"""The files of a report, in the sweep folder; the pictures are in `plots/`."""


def write_report(study: ReadStudy, confirmation: Confirmation | None = None) -> list[Path]:
    """Write the report into the sweep folder; returns its files, the page first.

    While no trial is completed there is no `best.yaml` and no `optimization_results.yaml`.
    """
    confirmed = [] if confirmation is None else write_confirmation(confirmation, study.folder)
    pictures = draw_study(study, study.folder / "plots")
    texts = {REPORT: _page(study, pictures, confirmation, confirmed), TRIALS: _trials_csv(study)}
    if study.ranked:
        texts[BEST] = dump_yaml(_best(study))
        texts[RESULTS] = dump_yaml(_results_as_upstream(study))
    for name, text in texts.items():
        write_atomically(study.folder / name, text)
    return [*(study.folder / name for name in texts), *(p.path for p in pictures if p.path is not None), *confirmed]


@contextlib.contextmanager
def reported(plan: StudyPlan, tracking: TrackingConfig) -> Iterator[None]:
    """Write the report of a study, and end the MLflow parent run with it, when left, however that happens.

    A report that cannot be written is warned about: how the study ended matters more.
    """
    status = "failed"
    try:
        yield
        status = "completed"
    except (Interrupted, KeyboardInterrupt):
        status = "interrupted"
        raise
    finally:
        try:
            study = reader_of(plan).read()
            files = write_report(study, read_confirmation(plan.folder, plan.storage)) if study.ended else []
            if files:
                log.info("report %s", RunDir(files[0]))
            best = None if study.best is None else study.folder_of(study.best)
            ending = SweepEnding(status=status, time=time.time(), metrics=_numbers(study), files=files, best=best)
            finish_sweep(tracking, study.folder, ending, save_mlflow_model)
        except Exception as error:
            log.warning("the report cannot be written (%s); again with: lmtrain sweep report DIR", one_line(error))


def _numbers(study: ReadStudy) -> dict[str, float]:
    """What the MLflow parent run shows of a study. Zeros too: they replace what it showed before."""
    counts = {f"trials {kind}": float(count) for kind, count in study.counts.items()}
    best = study.best
    if best is None:
        return counts
    values = {f"best {name}": value for name, value in zip(study.objectives, best.values or (), strict=True)}
    return counts | values | {"best trial": float(best.number)}


def repeat_command(study: ReadStudy, trial: FrozenTrial) -> str:
    """What to type to train a trial again, to the same number."""
    folder = RunDir(study.folder_of(trial))
    return f"python -m lmtrain --config-dir {shlex.quote(str(folder))} --config-name config"


def _overrides(study: ReadStudy, trial: FrozenTrial) -> list[str]:
    """The words that made a trial."""
    result = RunDir(study.folder_of(trial)).read_result()
    return (
        list(result["overrides"]) if result is not None else [f"{name}={value}" for name, value in trial.params.items()]
    )


def _best(study: ReadStudy) -> dict[str, Any]:
    """The best trial for people; with several objectives the whole front."""
    described = [
        {
            "trial": trial.number,
            "values": dict(zip(study.objectives, trial.values or (), strict=True)),
            "params": dict(trial.params),
            "folder": os.path.relpath(study.folder_of(trial), study.folder),
            "overrides": _overrides(study, trial),
        }
        for trial in (study.ranked[:1] if len(study.objectives) == 1 else study.pareto)
    ]
    return described[0] if len(study.objectives) == 1 else {"pareto": described}


def _results_as_upstream(study: ReadStudy) -> dict[str, Any]:
    """What hydra-optuna-sweeper writes at the end of a study."""
    if len(study.objectives) == 1:
        best = study.ranked[0]
        return {"name": "optuna", "best_params": dict(best.params), "best_value": study.score_of(best)}
    front = sorted(study.pareto, key=lambda trial: trial.number)
    return {"name": "optuna", "solutions": [{"params": dict(t.params), "values": list(t.values or ())} for t in front]}


def _trials_csv(study: ReadStudy) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    counts = ("tokens", "step", "seconds", "begun", "ended", "workers", "folder", "reason")
    writer.writerow(["number", "state", "status", *study.parameters, *study.objectives, *counts])
    for trial in study.trials:
        outcome, attempts = outcome_of(trial), attempts_of(trial)
        begun = attempts[0]["begun"] if attempts else None
        ended = attempts[-1]["ended"] if attempts and trial.state.is_finished() else None
        writer.writerow(
            [
                *(trial.number, trial.state.name, status_of(trial)),
                *(trial.params.get(name) for name in study.parameters),
                *_values(study, trial),
                *(study.tokens_of(trial) or None, outcome.get("step"), round(seconds_of(trial), 2) or None),
                *(_instant(begun), _instant(ended), " ".join(_workers(trial))),
                *(study.folder_of(trial).name, outcome.get("reason")),
            ]
        )
    return text.getvalue()


def _values(study: ReadStudy, trial: FrozenTrial) -> list[float | None]:
    """A value or None for each objective; of a trial that was pruned the last one reported."""
    values: list[float | None] = list(trial.values or [study.score_of(trial)])
    return [*values, *[None] * (len(study.objectives) - len(values))]


def _workers(trial: FrozenTrial) -> list[str]:
    return list(dict.fromkeys(f"{attempt['host']}:{attempt['worker']}" for attempt in attempts_of(trial)))


def _instant(seconds: float | None) -> str | None:
    """ISO 8601 with the offset of this machine."""
    return None if seconds is None else datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")


def _page(
    study: ReadStudy, pictures: Sequence[Picture], confirmation: Confirmation | None, confirmed: Sequence[Path]
) -> str:
    names = short_names(study.parameters)
    return fill_page(
        "report.html.j2",
        study=study,
        names=names,
        summary=summary(study),
        budget=None if study.budget_tokens is None else short_count(study.budget_tokens),
        winners=[_winner(study, trial) for trial in study.pareto],
        advice=advise(study, is_confirmed=confirmation is not None),
        conclusions=[] if confirmation is None else confirmation.conclusions(),
        confirmed=[data_uri(path) for path in confirmed if path.suffix == ".png"],
        rows=[_row(study, trial) for trial in sorted(study.trials, key=lambda trial: _order(study, trial))],
        pictures=[(picture, data_uri(picture.path)) for picture in pictures if picture.path is not None],
        missing=[picture for picture in pictures if picture.path is None],
    )


def _winner(study: ReadStudy, trial: FrozenTrial) -> dict[str, Any]:
    words = [word for word in _overrides(study, trial) if not word.startswith("sweep.")]
    return {
        "number": trial.number,
        "values": [short_score(value) for value in trial.values or ()],
        "params": {name: short_value(value) for name, value in trial.params.items()},
        "command": repeat_command(study, trial),
        "words": shlex.join(["python", "-m", "lmtrain", *words]),
        "export": f"python -m lmtrain sweep export {shlex.quote(str(RunDir(study.folder)))} --trial {trial.number}",
    }


def _order(study: ReadStudy, trial: FrozenTrial) -> tuple[int, int]:
    """Completed trials by objective, then each other kind by number."""
    kind = kind_of(trial)
    return KINDS.index(kind), study.ranked.index(trial) if kind == "completed" else trial.number


def _row(study: ReadStudy, trial: FrozenTrial) -> dict[str, Any]:
    """A row of the page's table: of each cell what is shown, and what it is sorted by."""
    tokens, seconds = study.tokens_of(trial), seconds_of(trial)
    settings = [trial.params.get(name) for name in study.parameters]
    values = _values(study, trial)
    return {
        "kind": kind_of(trial),
        "cells": [
            (str(trial.number), trial.number),
            (status_of(trial).replace("_", " "), status_of(trial)),
            *(("" if value is None else short_value(value), value) for value in settings),
            *(("" if value is None else short_score(value), value) for value in values),
            (short_count(tokens) if tokens else "", tokens),
            (f"{seconds:,.1f}" if seconds else "", seconds),
            (str(outcome_of(trial).get("reason") or ""), outcome_of(trial).get("reason")),
        ],
    }
