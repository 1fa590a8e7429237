"""What Hydra is told about our sweeper: `hydra/sweeper=study` and the options of `hydra/sweeper/pruner`.

Samplers are those of hydra-optuna-sweeper (`hydra/sweeper/sampler`). No Optuna is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

from hydra.core.config_store import ConfigStore
from hydra_plugins.hydra_optuna_sweeper.config import Direction, SamplerConfig
from omegaconf import MISSING, DictConfig, OmegaConf

from lmtrain.errors import ConfigError

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler

TRUSTED = ("hydra_plugins.hydra_optuna_sweeper.*", "optuna.*")
"""What a sampler's or pruner's `_target_` may name."""


@dataclass
class PrunerConfig:
    """A pruner of Optuna. Its steps are tokens; null stands for what follows from budget and evaluations."""

    _target_: str = MISSING


@dataclass
class NoPrunerConfig(PrunerConfig):
    """Every trial goes to its end."""

    _target_: str = "optuna.pruners.NopPruner"


@dataclass
class MedianPrunerConfig(PrunerConfig):
    """Ends a trial whose best value is worse than the median of the others at the same tokens."""

    _target_: str = "optuna.pruners.MedianPruner"
    n_startup_trials: int = 4
    n_warmup_steps: int = 0  # tokens
    interval_steps: int = 1  # tokens
    n_min_trials: int = 1


@dataclass
class AshaPrunerConfig(PrunerConfig):
    """Asynchronous successive halving: at each rung only the best 1/reduction_factor go on. Li et al. 2020."""

    _target_: str = "optuna.pruners.SuccessiveHalvingPruner"
    min_resource: int | None = None  # tokens of the first rung; null: the first evaluation
    reduction_factor: int = 2  # of two dozen trials, 4 would train one or two to their end
    min_early_stopping_rate: int = 0
    bootstrap_count: int = 0


@dataclass
class HyperbandPrunerConfig(PrunerConfig):
    """Several successive halvings of different haste side by side. Li et al. 2018."""

    _target_: str = "optuna.pruners.HyperbandPruner"
    min_resource: int | None = None  # tokens; null: the first evaluation
    max_resource: int | None = None  # tokens; null: the whole budget
    reduction_factor: int = 3
    bootstrap_count: int = 0


@dataclass
class PatientPrunerConfig(PrunerConfig):
    """As its wrapped pruner, but only after `patience` evaluations without gain."""

    _target_: str = "optuna.pruners.PatientPruner"
    wrapped_pruner: MedianPrunerConfig = field(default_factory=MedianPrunerConfig)
    patience: int = 2
    min_delta: float = 0.0


@dataclass
class WilcoxonPrunerConfig(PrunerConfig):
    """Ends a trial that is significantly worse than the best one over the evaluations so far."""

    _target_: str = "optuna.pruners.WilcoxonPruner"
    p_threshold: float = 0.1
    n_startup_steps: int = 2  # evaluations


PRUNERS: dict[str, type[PrunerConfig]] = {
    "none": NoPrunerConfig,
    "median": MedianPrunerConfig,
    "asha": AshaPrunerConfig,
    "hyperband": HyperbandPrunerConfig,
    "patient": PatientPrunerConfig,
    "wilcoxon": WilcoxonPrunerConfig,
}


@dataclass
class StudySweeperConfig:
    """`hydra.sweeper` of a study. The keys that hydra-optuna-sweeper has mean the same."""

    _target_: str = "lmtrain.sweep.sweeper.StudySweeper"
    defaults: list[Any] = field(default_factory=lambda: [{"sampler": "tpe"}, {"pruner": "asha"}])

    sampler: SamplerConfig = MISSING
    pruner: PrunerConfig = MISSING
    direction: Any = Direction.minimize  # one, or one for each objective
    storage: Any | None = None  # database URL; null: study.journal in the sweep's folder
    study_name: str | None = None  # null: sweep.name
    n_trials: int = 20  # in all: the same command with more goes on
    n_jobs: int | None = None  # workers; null: 1, or hydra.launcher.n_jobs of joblib
    params: dict[str, str] | None = None  # setting → what to choose from, as on the command line
    custom_search_space: str | None = None  # dotted name of a function (config, trial) that suggests more


def register_sweeper() -> None:
    """Make sweeper and pruners known to Hydra. Safe to call again."""
    store = ConfigStore.instance()
    store.store(group="hydra/sweeper", name="study", node=StudySweeperConfig, provider="lmtrain", replace=True)
    for name, pruner in PRUNERS.items():
        store.store(group="hydra/sweeper/pruner", name=name, node=pruner, provider="lmtrain", replace=True)


def is_grid(sampler: DictConfig) -> bool:
    """Whether the points are to be every combination, in order."""
    return str(sampler._target_) == "optuna.samplers.GridSampler"


def build_sampler(config: DictConfig, seed: int, number: int) -> BaseSampler:
    """The sampler of one trial, seeded by the study's seed and the trial's number.

    Raises ConfigError if it cannot be made of its settings.
    """
    from optuna.samplers import RandomSampler

    own_seed = _mixed(seed, number)
    if is_grid(config):
        return RandomSampler(seed=own_seed)  # all points are given
    if str(config._target_) == "optuna.samplers.QMCSampler":
        # One sequence, scrambled alike, for all trials; what it cannot give is drawn by trial.
        sampler = _build(config, "sampler", seed=seed, independent_sampler=RandomSampler(seed=own_seed))
        # Optuna counts the points in the storage, where two workers may find the same count.
        sampler._find_sample_id = lambda study, search_space: number
        return cast("BaseSampler", sampler)
    return cast("BaseSampler", _build(config, "sampler", seed=own_seed))


def build_pruner(config: DictConfig, *, first: int, budget: int) -> BasePruner:
    """The pruner, its missing steps filled in: tokens of the first evaluation and of a whole run.

    Raises ConfigError if it cannot be made of its settings.
    """
    missing = {"min_resource": first, "max_resource": max(budget, first)}
    filled = {name: value for name, value in missing.items() if name in config and config[name] is None}
    return cast("BasePruner", _build(config, "pruner", **filled))


def directions_of(direction: Any) -> tuple[Literal["minimize", "maximize"], ...]:
    """`hydra.sweeper.direction` as Optuna names them, one for each objective."""
    several = list(direction) if OmegaConf.is_list(direction) or isinstance(direction, list | tuple) else [direction]
    names = [one.name if isinstance(one, Direction) else str(one) for one in several]
    for name in names:
        if name not in ("minimize", "maximize"):
            raise ConfigError(f"hydra.sweeper.direction must be minimize or maximize, got {name}")
    return tuple(names)  # type: ignore[arg-type]


def _mixed(seed: int, number: int) -> int:
    import numpy as np

    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def _build(config: DictConfig, kind: str, **settings: Any) -> Any:
    import warnings

    from hydra.utils import instantiate
    from optuna.exceptions import ExperimentalWarning

    own = cast("dict[str, Any]", OmegaConf.to_container(config, resolve=True))  # without all that is around it: 10 ms
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            return instantiate(own, **settings, _execution_whitelist_=TRUSTED)
    except Exception as error:
        cause = error.__cause__ or error
        raise ConfigError(f"hydra.sweeper.{kind}: {str(cause).splitlines()[0]}") from error
