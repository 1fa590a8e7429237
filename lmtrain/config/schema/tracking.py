"""Settings of trackers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lmtrain.config.schema.rules import require, require_positive


@dataclass(kw_only=True)
class TrackingConfig:
    """Where a run is mirrored, in several places if wanted. `metrics.jsonl` is written whatever is chosen."""

    mlflow: bool = False  # a database file, or a server
    tensorboard: bool = False  # event files in the run folder
    wandb: bool = False  # Weights & Biases
    uri: str | None = None  # of MLflow. None: MLFLOW_TRACKING_URI if set, else sqlite:///mlflow.db in this folder
    experiment: str = "lmtrain"  # MLflow experiment, and project of Weights & Biases, that the run goes to
    run_name: str | None = None  # None: the run folder's name
    log_model: bool = True  # MLflow: also the best checkpoint, as a model; of a multirun that of its best run
    wandb_mode: Literal["online", "offline"] | None = None  # None: WANDB_MODE if set, else online
    system_metrics_every: float | None = 10.0  # seconds between looks at CPU, memory and GPUs; None: never
    close_timeout: float = 60.0  # seconds the end of a run waits at most for a mirror that is busy

    def __post_init__(self) -> None:
        require_positive("tracking.", close_timeout=self.close_timeout, system_metrics_every=self.system_metrics_every)
        require(self.mlflow or self.uri is None, "tracking.uri is the address of MLflow: add tracking.mlflow=true")
        require(
            self.wandb or self.wandb_mode is None,
            "tracking.wandb_mode is for Weights & Biases: add tracking.wandb=true",
        )
