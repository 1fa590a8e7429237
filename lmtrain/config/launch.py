"""How many workers a study has, and where, by the Hydra launcher that is chosen."""

from __future__ import annotations

import logging

from omegaconf import DictConfig

from lmtrain.errors import ConfigError
from lmtrain.machine import count_gpus

log = logging.getLogger(__name__)


def runs_here(config: DictConfig) -> bool:
    """Whether the launcher of a multirun runs its jobs on this machine."""
    return _launcher(config) in ("basic", "joblib")


def count_workers(config: DictConfig, wanted: int | None, device: str) -> tuple[int, bool]:
    """How many workers to launch, and whether they share this machine as processes of their own.

    Args:
        config: of the multirun.
        wanted: `hydra.sweeper.n_jobs`.
        device: of a trial; a GPU has one worker if nothing else is wanted.

    Raises ConfigError for a number that is none.
    """
    if wanted is not None and wanted < 1:
        raise ConfigError(f"hydra.sweeper.n_jobs must be at least 1, got {wanted}")
    if _launcher(config) == "basic":
        if wanted is not None and wanted > 1:
            log.warning("hydra/launcher=basic has one worker; for %d add hydra/launcher=joblib", wanted)
        return 1, False
    if _launcher(config) != "joblib":
        return int(wanted or 1), False
    from joblib import effective_n_jobs

    at_once = effective_n_jobs(config.hydra.launcher.n_jobs)
    if wanted is None and device in ("auto", "cuda"):
        wanted = count_gpus()  # none: as many as the launcher runs
    return min(int(wanted or at_once), at_once), True


def _launcher(config: DictConfig) -> str:
    return str(config.hydra.runtime.choices["hydra/launcher"])
