"""Runs mirrored to MLflow while they go on: by a thread, which asks a process of its own."""

from __future__ import annotations

from functools import partial

from lmtrain.config.schema import TrackingConfig
from lmtrain.redaction import redact
from lmtrain.tracking.background import BackgroundTracker, one_line
from lmtrain.tracking.mlflow.connection import require_known_scheme, tracking_uri
from lmtrain.tracking.mlflow.process import DistantMirror, MlflowError, end_mlflow_process
from lmtrain.tracking.tracker import ModelWriter


class MlflowTracker(BackgroundTracker):
    """Mirrors one run to MLflow in the background."""

    def __init__(self, config: TrackingConfig, write_model: ModelWriter | None) -> None:
        """`write_model` makes the MLflow model of the best checkpoint; None: none is sent."""
        require_known_scheme(uri := tracking_uri(config))
        super().__init__(
            server=f"MLflow at {redact(uri)}",
            open_mirror=partial(DistantMirror, config, write_model),
            is_transient=lambda error: isinstance(error, MlflowError) and error.transient,
            explain=lambda error: str(error) if isinstance(error, MlflowError) else one_line(error),
            close_timeout=config.close_timeout,
            remedy="; later, lmtrain track sync RUN makes MLflow complete",
            abandon=end_mlflow_process,
        )
