"""What a sweep would do, told before it starts: space, first points, time, memory. Runs nothing, writes nothing.

Knows no Hydra: the plan and what its points compose to are handed in. What is doubtful about a plan is told by `setup`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lmtrain.config.schema import ExperimentConfig
from lmtrain.config.search_space import describe
from lmtrain.errors import LmtrainError
from lmtrain.planning.duration import Machine, duration_text
from lmtrain.planning.estimate import estimate
from lmtrain.redaction import redact
from lmtrain.sweep.reading import read_study
from lmtrain.sweep.sampling import SamplerPerTrial
from lmtrain.sweep.setup import first_evaluation, random_points, token_budget
from lmtrain.sweep.storage import is_url
from lmtrain.sweep.study import ENDED, StudyPlan
from lmtrain.sweep.terminal import WIDTH_OF_A_LOG

MAX_POINTS = 5
"""First points of a study that are shown; all go into the estimates."""

MAX_RUNS = 40
"""Runs of a grid that are shown."""

Settings = ExperimentConfig | str
"""Of a point; a text says why it cannot be run."""


def show_study(
    plan: StudyPlan,
    settings_of: Callable[[Mapping[str, Any]], Settings],
    base: ExperimentConfig,
    *,
    sampler: Mapping[str, Any],
    pruner: Mapping[str, Any],
    workers: int,
    local: bool,
) -> None:
    """Print what a study would do.

    Args:
        settings_of: what a point composes to.
        base: the settings of one of its trials.
        sampler: `hydra.sweeper.sampler`; `pruner` likewise.
        local: whether the workers run on this machine.
    """
    points = first_points(plan, min(MAX_POINTS, plan.num_trials, random_points(sampler)))
    settings = [settings_of(point) for point in points]
    trials = f"{plan.num_trials} by {workers} worker{'s' if workers > 1 else ''}{_budget(base)}{_ended(plan)}"
    objectives = (f"{direction} {name}" for direction, name in zip(plan.directions, plan.objectives, strict=True))
    rows = [
        ("study", f"{plan.name}: {', '.join(objectives)}"),
        ("space", "\n".join(_space(plan))),
        ("sampler", _class_and_settings(sampler)),
        ("pruner", _class_and_settings(pruner)),
        ("trials", trials),
        ("folder", os.path.relpath(plan.folder)),
        ("storage", redact(plan.storage) if is_url(plan.storage) else os.path.relpath(plan.storage)),
        ("first", "\n".join(_line(number, _words(points[number]), found) for number, found in enumerate(settings))),
        *_estimates([found for found in settings if not isinstance(found, str)], plan.num_trials, workers, local),
    ]
    _show(rows, "nothing was run, nothing written; the same command without --dry-run starts the study")


def show_grid(runs: Sequence[tuple[Sequence[str], Settings]], folder: Path) -> None:
    """Print the runs of a grid: their overrides, and the settings of each or why it cannot be run."""
    swept = [{word for word in words if any(word not in other for other, _ in runs)} for words, _ in runs]
    lines = [
        _line(number, " ".join(word for word in words if word in own), settings)
        for number, ((words, settings), own) in enumerate(zip(runs, swept, strict=True))
    ]
    if len(lines) > MAX_RUNS:
        lines[MAX_RUNS:] = [f"… and {len(lines) - MAX_RUNS} more"]
    able = [settings for _, settings in runs if not isinstance(settings, str)]
    rows = [
        ("grid", f"{len(runs)} runs{_budget(able[0]) if able else ''}"),
        ("folder", os.path.relpath(folder)),
        ("runs", "\n".join(lines)),
        *_estimates(able, len(able), 1, local=True),
    ]
    _show(rows, "nothing was run, nothing written; the same command without --dry-run starts the runs")


def first_points(plan: StudyPlan, count: int) -> list[dict[str, Any]]:
    """The first points a new study of this plan would ask, in a study that is in memory only."""
    study = optuna.create_study(
        study_name=plan.name,
        directions=plan.directions,
        sampler=SamplerPerTrial(plan.make_sampler),
        pruner=plan.make_pruner(),
    )
    for point in plan.starting_points[:count]:
        study.enqueue_trial(dict(point))
    points = []
    for _ in range(count):
        trial = study.ask(dict(plan.space))
        if plan.extend is not None:
            plan.extend(trial)
        points.append(dict(trial.params))
    return points


def _space(plan: StudyPlan) -> Iterable[str]:
    default = plan.starting_points[0] if plan.starting_points else {}
    width = max(map(len, plan.space), default=0)
    for name, distribution in plan.space.items():
        lies = f", default {default[name]}" if name in default else ", default outside"
        yield f"{name:<{width}}  {describe(distribution)}{lies}"
    if plan.extend is not None:
        yield "and what the function of hydra.sweeper.custom_search_space suggests"


def _ended(plan: StudyPlan) -> str:
    """What is there already of a study kept in a file."""
    if is_url(plan.storage) or not Path(plan.storage).is_file():
        return ""
    try:
        ended = sum(trial.state in ENDED for trial in read_study(plan.folder).trials)
    except LmtrainError:
        return ""
    return f"; the study is there, {ended} of them have ended"


def _budget(config: ExperimentConfig) -> str:
    tokens = token_budget(config)
    whole = f"{config.trainer.max_epochs:g} passes over the text" if tokens is None else f"{tokens:,} tokens"
    return f", {whole} each, evaluated every {first_evaluation(config):,}"


def _class_and_settings(option: Mapping[str, Any]) -> str:
    given = {key: value for key, value in option.items() if key[0] != "_" and value not in (None, False)}
    name = str(option["_target_"]).rpartition(".")[2].removeprefix("create_")
    return ", ".join([name, *(f"{key} {value}" for key, value in given.items() if not isinstance(value, dict))])


def _words(point: Mapping[str, Any]) -> str:
    short = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in point.values())
    return " ".join(f"{name}={value}" for name, value in zip(point, short, strict=True))


def _line(number: int, words: str, settings: Settings) -> str:
    return f"{number:04d}  {words}" + (f"  cannot be run: {settings}" if isinstance(settings, str) else "")


def _estimates(settings: Sequence[ExperimentConfig], runs: int, workers: int, local: bool) -> Iterable[tuple[str, str]]:
    """Time and memory by arithmetic, with what they rest on."""
    if not settings:
        return
    machine = Machine.measure(settings[0])
    found = [estimate(config, machine=machine) for config in settings]
    known = [one.duration.seconds for one in found if one.duration is not None]
    if known:
        each = sum(known) / len(known)
        whole = runs * each / (machine.at_once(workers) if local else workers)
        place = machine.name if local else f"{machine.name} of a machine like this one"
        time = f"about {duration_text(whole)} if all {runs} go to the end: {duration_text(each)} each on {place}, "
        time += machine.basis
    else:
        time = "not known before the text is read: the budget is in passes over it"
    yield "time", time
    memory = max(one.peak for one in found)
    free = f"; {machine.free_memory / 2**30:.1f} GiB are free here" if local else ""
    needed_for = "weights, gradients, optimizer state, a microbatch, and what is beside them"
    yield "memory", f"about {memory / 2**30:.1f} GiB for each worker: {needed_for}{free}"


def _show(rows: Sequence[tuple[str, str]], end: str) -> None:
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = WIDTH_OF_A_LOG
    table = Table.grid(padding=(0, 2))
    for heading, text in rows:
        table.add_row(heading, escape(text))
    console.print(table)
    console.print(f"\n{end}")
