"""How many workers a multirun has, and where, by the Hydra launcher that is chosen."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf, read_write

from lmtrain.config.schema import ExperimentConfig
from lmtrain.errors import ConfigError
from lmtrain.machine import available_cores, count_gpus

log = logging.getLogger(__name__)

ALL_CORES = -1
"""What hydra.launcher.n_jobs of joblib is if nobody says otherwise."""


@dataclass(frozen=True)
class Workers:
    """Processes that make the runs of a multirun."""

    number: int
    share_machine: bool  # as processes of their own, on this machine
    undecided: bool = False  # fewer with more threads each may be faster: `number` is the most there can be


def runs_here(config: DictConfig) -> bool:
    """Whether the launcher of a multirun runs its jobs on this machine."""
    return _launcher(config) in ("basic", "joblib")


def count_workers(config: DictConfig, wanted: int | None, run: ExperimentConfig | None) -> Workers:
    """How many workers to launch.

    Args:
        config: of the multirun.
        wanted: `hydra.sweeper.n_jobs`.
        run: the settings of one of its runs. A GPU has one worker, and a run its threads, if nothing else is wanted.

    Raises ConfigError for a number that is none.
    """
    if wanted is not None and wanted < 1:
        raise ConfigError(f"hydra.sweeper.n_jobs must be at least 1, got {wanted}")
    if _launcher(config) == "basic":
        if wanted is not None and wanted > 1:
            log.warning("hydra/launcher=basic has one worker; for %d add hydra/launcher=joblib", wanted)
        return Workers(1, share_machine=False)
    if _launcher(config) != "joblib":
        return Workers(int(wanted or 1), share_machine=False)
    from joblib import effective_n_jobs

    at_once = effective_n_jobs(config.hydra.launcher.n_jobs)
    if wanted is not None:
        return Workers(min(wanted, at_once), share_machine=True)
    if run is not None and run.device in ("auto", "cuda") and count_gpus():
        return Workers(min(count_gpus(), at_once), share_machine=True)
    if run is None or config.hydra.launcher.n_jobs != ALL_CORES or _says_how_many(config):
        return Workers(at_once, share_machine=True)
    if (threads := run.parallel.asked_threads) is not None:
        return Workers(min(at_once, max(1, available_cores() // threads)), share_machine=True)
    return Workers(at_once, share_machine=True, undecided=at_once > 1 and run.device in ("auto", "cpu"))


def settle_workers(config: DictConfig, choose: Callable[[], int]) -> None:
    """Write the number of processes of a grid into its config, where the launcher and its jobs find it."""
    if _launcher(config) != "joblib":
        return
    number = choose()
    with read_write(config.hydra):
        config.hydra.launcher.n_jobs = number
        # What the config of each job is composed from.
        config.hydra.overrides.hydra = [*_words(config), f"hydra.launcher.n_jobs={number}"]


def processes_of(hydra: Any) -> int:
    """How many processes share the machine with the job at hand, itself included; of a job's `hydra` config."""
    return max(1, int(hydra.launcher.n_jobs)) if hydra.runtime.choices["hydra/launcher"] == "joblib" else 1


def _says_how_many(config: DictConfig) -> bool:
    return any(word.lstrip("+").startswith("hydra.launcher.n_jobs=") for word in _words(config))


def _words(config: DictConfig) -> list[str]:
    return cast("list[Any]", OmegaConf.to_container(config.hydra.overrides.hydra))


def _launcher(config: DictConfig) -> str:
    return str(config.hydra.runtime.choices["hydra/launcher"])
