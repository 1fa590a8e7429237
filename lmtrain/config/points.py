"""What the points of a multirun compose to, asked before any of them is run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from lmtrain.config import compose
from lmtrain.config.explain import COMPOSITION_ERRORS, explain
from lmtrain.config.schema import ExperimentConfig
from lmtrain.errors import ConfigError, LmtrainError

Composed = Callable[[int, Mapping[str, Any]], DictConfig]
"""Makes the config of a trial from its number and parameters; raises what Hydra raises."""


def settings_or_reason(composed: Composed, number: int, point: Mapping[str, Any]) -> ExperimentConfig | str:
    """The checked settings of a trial, or why it cannot be run."""
    try:
        return compose.parse_config(compose.without_hydra(composed(number, point)))
    except (LmtrainError, *COMPOSITION_ERRORS) as error:
        return explain(error)


def first_settings(composed: Composed, points: Iterable[Mapping[str, Any]]) -> ExperimentConfig:
    """The settings of the first of the points that can be run. Raises ConfigError if none can."""
    reasons = []
    for point in points:
        found = settings_or_reason(composed, 0, point)
        if not isinstance(found, str):
            return found
        reasons.append(found)
    if len(set(reasons)) == 1:  # nothing that is searched has to do with it
        raise ConfigError(reasons[0])
    raise ConfigError(f"none of {len(reasons)} settings drawn from this space can be run; the first: {reasons[0]}")


def grid_of(config: DictConfig) -> list[tuple[list[str], ExperimentConfig | str]]:
    """The runs of a grid in order: the overrides of each, and its settings or why it cannot be run.

    Raises ConfigError if the multirun of this config is none.
    """
    sweeper = config.hydra.sweeper
    if str(sweeper._target_) != f"{BasicSweeper.__module__}.{BasicSweeper.__name__}":
        raise ConfigError(f"a dry run is of a grid or of hydra/sweeper=study, not of {sweeper._target_}")
    loader = GlobalHydra.instance().config_loader()
    given = [f"{name}={value}" for name, value in (sweeper.params or {}).items()]
    words = [*given, *cast("list[str]", OmegaConf.to_container(config.hydra.overrides.task))]
    overrides = OverridesParser.create(config_loader=loader).parse_overrides(words)
    (runs,) = BasicSweeper.split_arguments(overrides, max_batch_size=None)

    def composed(number: int, point: Mapping[str, Any]) -> DictConfig:
        return loader.load_sweep_config(config, runs[number])

    return [(run, settings_or_reason(composed, number, {})) for number, run in enumerate(runs)]
