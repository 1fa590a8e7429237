"""Settings of trackers."""

from __future__ import annotations

from dataclasses import dataclass

from lmtrain.config.schema.rules import require_positive


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
