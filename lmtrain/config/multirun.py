"""Words of `--multirun`, composed for the commands that are not Hydra's: a grid, or the request of a study."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig

from lmtrain.config.compose import composing_from, config_dir, refuse_groups, register
from lmtrain.config.saved import PRIMARY_CONFIG
from lmtrain.config.study_sweeper import StudySweeperConfig

SWEEPS = ("sweep", "hydra/sweeper", "hydra.sweeper", "hydra/launcher", "hydra.launcher", "hydra.sweep")
"""What only a multirun heeds."""


@dataclass(frozen=True)
class Multirun:
    """A composed multirun; to be used while `composing_multirun` is entered."""

    config: DictConfig

    @property
    def is_study(self) -> bool:
        return str(self.config.hydra.sweeper._target_) == StudySweeperConfig._target_

    @property
    def words(self) -> list[str]:
        """Those of the runs, as Hydra hands them to its sweeper."""
        return [str(word) for word in self.config.hydra.overrides.task]

    def sweeper(self) -> Sweeper:
        """The sweeper that Hydra would start."""

        def nothing(config: DictConfig) -> None:
            raise AssertionError("nothing is run")

        context = HydraContext(config_loader=GlobalHydra.instance().config_loader(), callbacks=Callbacks())
        return Plugins.instance().instantiate_sweeper(hydra_context=context, task_function=nothing, config=self.config)


def is_multirun(words: Sequence[str]) -> bool:
    """Whether words ask for several runs, or for what only several heed."""
    parser = OverridesParser.create()
    for word in words:
        if word.lstrip("+").startswith(tuple(f"{name}{end}" for name in SWEEPS for end in "=./")):
            return True
        try:
            if parser.parse_override(word).is_sweep_override():
                return True
        except HydraException:
            continue  # told when it is composed
    return False


@contextlib.contextmanager
def composing_multirun(words: Sequence[str]) -> Iterator[Multirun]:
    """What `--multirun` with these words composes to.

    Raises LmtrainError, or an error that `explain` puts into words.
    """
    register()
    refuse_groups(words, saved=False)
    with composing_from(str(config_dir())):
        loader = GlobalHydra.instance().config_loader()
        yield Multirun(loader.load_configuration(PRIMARY_CONFIG, list(words), RunMode.MULTIRUN))
