"""Settings of trackers and of sweeps."""

from __future__ import annotations

from dataclasses import dataclass

from lmtrain.config.schema.rules import REQUIRED, require, require_positive


@dataclass(kw_only=True)
class TrackingConfig:
    """Base of every tracker. `metrics.jsonl` is always written; a tracker mirrors it."""


@dataclass(kw_only=True)
class NoTrackingConfig(TrackingConfig):
    """No mirror."""


@dataclass(kw_only=True)
class MlflowConfig(TrackingConfig):
    """MLflow: a database file, or a server."""

    uri: str | None = None  # None: MLFLOW_TRACKING_URI if set, else sqlite:///mlflow.db in this folder
    experiment: str = "lmtrain"  # MLflow experiment the run goes to
    run_name: str | None = None  # None: the run folder's name
    close_timeout: float = 60.0  # seconds the end of a run waits for a slow server

    def __post_init__(self) -> None:
        require_positive("tracking.", close_timeout=self.close_timeout)


@dataclass(kw_only=True)
class SweepConfig:
    """The runs of one multirun."""

    name: str = REQUIRED  # folder under multirun/ and name of the MLflow parent run

    def __post_init__(self) -> None:
        require(bool(self.name.strip()), "sweep.name must not be empty")
        inside = not self.name.startswith("/") and ".." not in self.name.split("/")
        require(inside, f"sweep.name must stay inside multirun/, got {self.name}; hydra.sweep.dir=PATH goes elsewhere")
