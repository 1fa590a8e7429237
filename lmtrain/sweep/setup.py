"""From the settings of a sweep to the plan of its study, and everything that can be refused before it starts.

Knows no Hydra: composed settings, the space and the makers of sampler and pruner are handed in.
"""

from __future__ import annotations

import itertools
import logging
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from lmtrain.config.saved import study_settings
from lmtrain.config.schema import ExperimentConfig
from lmtrain.config.search_space import describe, matching_choice
from lmtrain.data.prepare import prepare
from lmtrain.errors import ConfigError
from lmtrain.hardware import choose_device, require_format
from lmtrain.sweep import storage
from lmtrain.sweep.storage import journal_path
from lmtrain.sweep.study import StudyPlan

log = logging.getLogger(__name__)

MATTERS_TO_DATA = ("data", "tokenizer", "device", "precision", "experiment")

POINTS_TO_TRY = 20

MAX_GRID = 100_000
"""Points of a grid sampler beyond which one did not mean it."""


def plan_study(
    settings: Mapping[str, Any],
    base: ExperimentConfig,
    distributions: Mapping[str, BaseDistribution],
    defaults: Mapping[str, Any],
    folder: Path,
    *,
    directions: Sequence[str],
    grid: bool,
    make_sampler: Callable[[int], optuna.samplers.BaseSampler],
    make_pruner: Callable[[], optuna.pruners.BasePruner],
    extend: Callable[[optuna.Trial], None] | None,
) -> StudyPlan:
    """The plan of a study. Raises ConfigError for settings that cannot be one.

    Args:
        settings: `hydra.sweeper`.
        base: the settings of a trial before anything is chosen.
        defaults: of each parameter, where it lies within its range.
    """
    _require_directions(base, directions, settings["sampler"])
    if not distributions and extend is None:
        raise ConfigError(
            "nothing is searched: give a setting a range, such as 'lr=tag(log,interval(1e-3,1e-2))' or "
            "'batch_size=choice(4,8)', or choose an option of sweep that does"
        )
    num_trials = int(settings["n_trials"])
    if num_trials < 1:
        raise ConfigError(f"hydra.sweeper.n_trials must be at least 1, got {num_trials}")
    if grid:
        points = grid_points(distributions)
        num_trials = min(num_trials, len(points))
    else:
        points = [dict(defaults), *(_enqueued(point, distributions) for point in base.sweep.enqueue)]
    return StudyPlan(
        name=str(settings["study_name"] or base.sweep.name),
        storage=str(settings["storage"] or journal_path(folder)),
        folder=folder,
        directions=tuple(directions),  # type: ignore[arg-type]
        space=dict(distributions),
        num_trials=num_trials,
        starting_points=points,
        make_sampler=make_sampler,
        make_pruner=make_pruner,
        extend=extend,
        objectives=base.objectives,
        budget_tokens=token_budget(base),
    )


def require_data(swept: Iterable[str], base: ExperimentConfig) -> bool:
    """Prepare the text here, once for all workers; returns False if it is another one in each run.

    Raises UsageError for what every run would be refused for.
    """
    if any(name.partition(".")[0] in MATTERS_TO_DATA for name in swept):
        return False
    require_format(base.precision.format, choose_device(base.device))
    prepare(base.data, base.tokenizer, on_progress=log.info)
    return True


def define_study(
    plan: StudyPlan,
    base: ExperimentConfig,
    *,
    sampler: Mapping[str, Any],
    pruner: Mapping[str, Any],
    custom: str | None,
) -> dict[str, str]:
    """What must stay the same for trials of one study to compare, as words."""
    searched = {f"search {name}": describe(distribution) for name, distribution in plan.space.items()}
    chosen = tuple(name.lstrip("+") for name in plan.space)
    settings = {
        key: value
        for key, value in study_settings(base).items()
        if not any(key == name or key.startswith(f"{name}.") for name in chosen) and "experiment" not in chosen
    }
    how = {
        f"{kind} {key.lstrip('_')}": str(value)
        for kind, option in (("sampler", sampler), ("pruner", pruner))
        for key, value in option.items()
        if value is not None
    }
    return searched | {"direction": ", ".join(plan.directions), "search function": str(custom)} | how | settings


def sample_points(
    distributions: Mapping[str, BaseDistribution], extend: Callable[[optuna.Trial], None] | None
) -> Iterator[dict[str, Any]]:
    """Random points of a space, always the same ones: as many as are tried before it is given up as impossible."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(POINTS_TO_TRY):
        trial = study.ask(dict(distributions))
        if extend is not None:
            extend(trial)
        yield dict(trial.params)


def random_points(sampler: Mapping[str, Any]) -> int:
    """How many points of `hydra.sweeper.sampler` are asked before anything has been learnt."""
    learns = ("n_startup_trials", "population_size")
    return next((int(sampler[name]) for name in learns if sampler.get(name) is not None), sys.maxsize)


def warn_of_doubts(
    plan: StudyPlan, base: ExperimentConfig, *, sampler: Mapping[str, Any], pruner: Mapping[str, Any], workers: int
) -> None:
    """Tell what a user should know before the night, with what to do about it."""
    kind, prunes = str(sampler["_target_"]).rpartition(".")[2], not str(pruner["_target_"]).endswith("NopPruner")
    choices = [name for name, found in plan.space.items() if isinstance(found, CategoricalDistribution)]
    found = [unfair_budget(base, list(plan.space)), storage.doubts(plan.storage, workers=workers)]
    if plan.num_trials <= (asked := random_points(sampler)) < sys.maxsize:
        found.append(
            f"{kind} draws its first {asked} points at random: all of hydra.sweeper.n_trials={plan.num_trials}"
        )
    if kind == "CmaEsSampler" and choices:
        found.append(
            f"{kind} searches numbers only, {', '.join(choices)} is drawn at random: hydra/sweeper/sampler=tpe"
        )
    if prunes and len(plan.directions) > 1:
        found.append("trials of several objectives are never pruned")
    elif prunes and kind not in ("TPESampler", "RandomSampler", "GridSampler", "QMCSampler"):
        found.append(
            f"{kind} learns from completed trials only, not from pruned ones nor from those out of memory: "
            "hydra/sweeper/pruner=none, or hydra/sweeper/sampler=tpe"
        )
    for doubt in found:
        if doubt is not None:
            log.warning("warning: %s", doubt)


def token_budget(config: ExperimentConfig) -> int | None:
    """Tokens of a whole run; None if the budget is in passes over a text not read yet."""
    trainer = config.trainer
    if trainer.max_tokens is not None:
        return trainer.max_tokens
    return None if trainer.max_steps is None else trainer.max_steps * _tokens_a_step(config)


def first_evaluation(config: ExperimentConfig) -> int:
    """Tokens seen at the first evaluation."""
    trainer = config.trainer
    return trainer.eval_every_tokens or (trainer.eval_every or 1) * _tokens_a_step(config)


def unfair_budget(config: ExperimentConfig, names: Sequence[str]) -> str | None:
    """Why trials of this space would not compare at equal tokens, with the remedy; None if they do."""
    sizes = [name for name in names if name in ("batch_size", "data.seq_len")]
    if not sizes:
        return None
    if config.trainer.max_steps is not None:
        tokens = token_budget(config)
        return (
            f"{' and '.join(sizes)} changes how many tokens trainer.max_steps={config.trainer.max_steps} are, so that "
            f"trials do not compare: give the budget in tokens, trainer.max_steps=null trainer.max_tokens={tokens}"
        )
    if config.trainer.eval_every is not None:
        return (
            f"{' and '.join(sizes)} changes after how many tokens trials are evaluated, so that few can be pruned: "
            f"trainer.eval_every=null trainer.eval_every_tokens={first_evaluation(config)}"
        )
    return None


def _tokens_a_step(config: ExperimentConfig) -> int:
    return config.batch_size * config.data.seq_len


def _require_directions(base: ExperimentConfig, directions: Sequence[str], sampler: Mapping[str, Any]) -> None:
    names = base.objectives
    if len(directions) != len(names):
        raise ConfigError(
            f"hydra.sweeper.direction gives {len(directions)} for {len(names)} objective(s): {', '.join(names)}"
        )
    if len(names) > 1 and str(sampler["_target_"]).endswith("CmaEsSampler"):
        raise ConfigError("CmaEsSampler knows one objective only: hydra/sweeper/sampler=tpe or nsgaii")
    if directions[0] != "minimize":
        raise ConfigError(f"{names[0]} is a loss: its hydra.sweeper.direction must be minimize")


def grid_points(distributions: Mapping[str, BaseDistribution]) -> list[dict[str, Any]]:
    """Every combination of the values of each parameter. Raises ConfigError for an interval, or for too many."""
    values = {name: _grid_values(name, distribution) for name, distribution in distributions.items()}
    total = math.prod(len(choices) for choices in values.values())
    if total > MAX_GRID:
        raise ConfigError(f"a grid of {total:,} points is too large, at most {MAX_GRID:,}: choose another sampler")
    return [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]


def _grid_values(name: str, distribution: BaseDistribution) -> list[Any]:
    match distribution:
        case CategoricalDistribution():
            return list(distribution.choices)
        case IntDistribution(log=False):
            return list(range(distribution.low, distribution.high + 1, distribution.step))
        case FloatDistribution(step=float() as step):
            low, each = Decimal(str(distribution.low)), Decimal(str(step))  # 0.3, not 0.1 + 0.1 + 0.1
            return [float(low + number * each) for number in range(round((distribution.high - float(low)) / step) + 1)]
    raise ConfigError(f"a grid needs values, not an interval: {name}=choice(...) or {name}=range(...)")


def _enqueued(point: Mapping[str, Any], distributions: Mapping[str, BaseDistribution]) -> dict[str, Any]:
    given = {}
    for name, value in point.items():
        if name not in distributions:
            raise ConfigError(
                f"sweep.enqueue: {name} is not searched; there are {', '.join(distributions) or 'no parameters'}"
            )
        given[name] = matching_choice(distributions[name], value)
        if given[name] is None:
            raise ConfigError(f"sweep.enqueue: {name}={value} lies outside {describe(distributions[name])}")
    return given
