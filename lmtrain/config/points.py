"""What the points of a multirun compose to: to be run, or asked before any of them is."""

from __future__ import annotations

import copy
import dataclasses
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from lmtrain.config import compose
from lmtrain.config.corners import corners, is_of_size
from lmtrain.config.explain import COMPOSITION_ERRORS, explain, nearest
from lmtrain.config.schema import ExperimentConfig
from lmtrain.config.search_space import SearchSpace, override_word
from lmtrain.errors import ConfigError, LmtrainError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Composed = Callable[[int, Mapping[str, Any]], DictConfig]
"""Makes the config of a trial from its number and parameters; raises what Hydra raises."""


@dataclass(frozen=True)
class TrialConfigs:
    """Makes the settings of a trial, as a launcher of Hydra does."""

    config: DictConfig  # of the multirun
    hydra_context: HydraContext
    space: SearchSpace
    known: dict[tuple[str, ...], DictConfig] = field(default_factory=dict)  # composed before, by the words

    def __call__(self, number: int, params: Mapping[str, Any]) -> DictConfig:
        """The whole config, Hydra's part included. Raises what Hydra raises for settings that do not compose."""
        words = self.space.words(params)
        plain = {name: value for name, value in params.items() if self._is_plain(name)}
        others = {name: value for name, value in params.items() if name not in plain}
        # Composing takes Hydra a tenth of a second; most trials differ in plain settings only.
        config = copy.deepcopy(self._composed(tuple(self.space.words(others))))
        parser = OverridesParser.create()
        try:
            for name, value in plain.items():
                override = parser.parse_override(override_word(name, value))
                OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
        except OmegaConfBaseException:
            config = copy.deepcopy(self._composed(tuple(words)))  # Hydra says what is wrong
        with open_dict(config):
            config.hydra.job.id, config.hydra.job.num = str(number), number
            config.hydra.overrides.task = [word for word in words if not word.startswith("hydra.")]
        return config

    def _composed(self, words: tuple[str, ...]) -> DictConfig:
        if words not in self.known:
            self.known[words] = self.hydra_context.config_loader.load_sweep_config(self.config, list(words))
        return self.known[words]

    def _is_plain(self, name: str) -> bool:
        """Whether a parameter is a setting that no choice of options depends on."""
        return name.replace(".", "").isidentifier() and name not in self.config.hydra.runtime.choices

    def settings_of(self, point: Mapping[str, Any]) -> ExperimentConfig | str:
        """The checked settings of a point, or why it cannot be run."""
        return settings_or_reason(self, 0, point)

    @property
    def corners(self) -> list[tuple[list[str], ExperimentConfig | str]]:
        """The ends of what is chosen from, as words and settings."""
        found = corners(self.space.distributions)
        return [([override_word(*one) for one in point.items()], self.settings_of(point)) for point in found]

    def folder(self, number: int) -> Path:
        """The run folder of a trial."""
        return Path(self.config.hydra.sweep.dir).absolute() / f"{number:04d}"


def settings_or_reason(composed: Composed, number: int, point: Mapping[str, Any]) -> ExperimentConfig | str:
    """The checked settings of a trial, or why it cannot be run."""
    try:
        return _settings(composed(number, point))
    except (LmtrainError, *COMPOSITION_ERRORS) as error:
        return explain(error)


def require_options(config: DictConfig, distributions: Mapping[str, BaseDistribution]) -> None:
    """Raise ConfigError if a choice among the options of a config group names one that is not there."""
    loader = GlobalHydra.instance().config_loader()
    for group, among in distributions.items():
        if group in config.hydra.runtime.choices:
            options = [name for name in loader.get_group_options(group) if not name.startswith("_")]
            for option in getattr(among, "choices", ()):
                if str(option) not in options:
                    raise ConfigError(f"{group} has no option {str(option)!r}{nearest(str(option), options)}")


def search_function(name: str) -> Callable[..., None]:
    """The function that `hydra.sweeper.custom_search_space` names. Raises ConfigError if it is not there."""
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"hydra.sweeper.custom_search_space={name} is not there: {error}") from error
    if not callable(found):
        raise ConfigError(f"hydra.sweeper.custom_search_space={name} is no function")
    return cast("Callable[..., None]", found)


def first_settings(composed: Composed, points: Iterable[Mapping[str, Any]]) -> ExperimentConfig:
    """The settings of the first of the points that can be run.

    Raises ConfigError if none can, or if one cannot even be composed: a rule may part good settings from bad ones, a
    name or a type that is wrong is a mistake.
    """
    reasons = []
    for point in points:
        try:
            return _settings(composed(0, point))
        except LmtrainError as error:
            reasons.append(str(error))
        except COMPOSITION_ERRORS as error:
            raise ConfigError(explain(error)) from error
    if len(set(reasons)) == 1:  # nothing that is searched has to do with it
        raise ConfigError(reasons[0])
    raise ConfigError(f"none of {len(reasons)} settings drawn from this space can be run; the first: {reasons[0]}")


def _settings(config: DictConfig) -> ExperimentConfig:
    return compose.parse_config(compose.without_hydra(config))


@dataclass(frozen=True)
class GridRuns:
    """The runs of a grid, in order, as words."""

    config: DictConfig  # of the multirun
    words: list[list[str]]

    @property
    def swept(self) -> set[str]:
        """The settings in which the runs differ."""
        every = [word for run in self.words for word in run]
        return {word.partition("=")[0].lstrip("+~") for word in every if every.count(word) < len(self.words)}

    def settings(self) -> Iterator[ExperimentConfig | str]:
        """The settings of each, or why it cannot be run."""
        loader = GlobalHydra.instance().config_loader()

        def composed(number: int, point: Mapping[str, Any]) -> DictConfig:
            return loader.load_sweep_config(self.config, self.words[number])

        return (settings_or_reason(composed, number, {}) for number in range(len(self.words)))

    def by_size(self) -> list[tuple[list[str], ExperimentConfig | str]]:
        """The words of each and its settings, or why it cannot be run.

        Runs that differ in no setting of size share those of the first of them: composing takes a tenth of a second.
        """
        keys = [tuple(filter(is_of_size, run)) for run in self.words]
        firsts = {key: number for number, key in reversed(list(enumerate(keys)))}
        alike = dataclasses.replace(self, words=[self.words[number] for number in firsts.values()])
        known = dict(zip(firsts, alike.settings(), strict=True))
        return [(run, known[key]) for run, key in zip(self.words, keys, strict=True)]

    def first_settings(self) -> ExperimentConfig | None:
        """The settings of the first run; None if it cannot be run, which it will say itself."""
        first = next(self.settings())
        return None if isinstance(first, str) else first


def runs_of_grid(config: DictConfig) -> GridRuns | None:
    """The runs of a multirun; None if it is no grid."""
    sweeper = config.hydra.sweeper
    if str(sweeper._target_) != f"{BasicSweeper.__module__}.{BasicSweeper.__name__}":
        return None
    loader = GlobalHydra.instance().config_loader()
    given = [f"{name}={value}" for name, value in (sweeper.params or {}).items()]
    words = [*given, *cast("list[str]", OmegaConf.to_container(config.hydra.overrides.task))]
    overrides = OverridesParser.create(config_loader=loader).parse_overrides(words)
    (runs,) = BasicSweeper.split_arguments(overrides, max_batch_size=None)
    return GridRuns(config, runs)


def grid_of(config: DictConfig) -> list[tuple[list[str], ExperimentConfig | str]]:
    """The runs of a grid in order: the overrides of each, and its settings or why it cannot be run.

    Raises ConfigError if the multirun of this config is none.
    """
    runs = runs_of_grid(config)
    if runs is None:
        raise ConfigError(f"a dry run is of a grid or of hydra/sweeper=study, not of {config.hydra.sweeper._target_}")
    return list(zip(runs.words, runs.settings(), strict=True))
