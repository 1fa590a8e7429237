"""Settings of sweeps that are ours; those of Hydra's sweeper and launcher are under `hydra`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lmtrain.config.schema.rules import REQUIRED, require, require_positive


@dataclass(kw_only=True)
class ConfirmConfig:
    """Running the best settings of a study again with other seeds, the same for each."""

    top: int = 0  # so many of the best trials; 0: none
    seeds: int = 5  # runs of each

    def __post_init__(self) -> None:
        require(self.top == 0 or self.top >= 2, f"sweep.confirm.top must be 0 or at least 2 to compare, got {self.top}")
        require(self.seeds >= 2, f"sweep.confirm.seeds must be at least 2 for an interval, got {self.seeds}")


@dataclass(kw_only=True)
class SweepConfig:
    """The runs of one multirun."""

    name: str = REQUIRED  # folder under multirun/ and name of the MLflow parent run
    enqueue: list[dict[str, Any]] = field(default_factory=list)  # settings a study tries first, after the defaults
    start_from: str | None = None  # sweep folder of an earlier study whose trials the sampler learns from
    confirm: ConfirmConfig = field(default_factory=ConfirmConfig)
    max_retries: int = 1  # further attempts at a trial that failed
    stop_after_failures: int = 3  # a study whose first trials, so many, fail alike stops
    keep_checkpoints: int | None = None  # checkpoints stay for so many of the best runs; None: for all
    dry_run: bool = False  # say what would be run, run nothing

    def __post_init__(self) -> None:
        require(bool(self.name.strip()), "sweep.name must not be empty")
        inside = not self.name.startswith("/") and ".." not in self.name.split("/")
        require(inside, f"sweep.name must stay inside multirun/, got {self.name}; hydra.sweep.dir=PATH goes elsewhere")
        require(self.max_retries >= 0, f"sweep.max_retries must not be negative, got {self.max_retries}")
        require_positive("sweep.", stop_after_failures=self.stop_after_failures, keep_checkpoints=self.keep_checkpoints)
