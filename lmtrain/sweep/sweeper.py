"""What Hydra calls around a multirun."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from lmtrain.config import compose
from lmtrain.config.schema import TrackingConfig
from lmtrain.run_dir import RunDir

log = logging.getLogger(__name__)


class SweepSummary(Callback):
    """Compares the runs of a multirun at its end: a table here, files and pictures in the sweep folder."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra when all runs have ended, also when one of them raised."""
        from lmtrain.sweep.comparison import compare, print_table, write_files
        from lmtrain.tracking.mlflow import finish_parent

        sweep_dir = Path(config.hydra.sweep.dir).absolute()
        comparison = compare(sweep_dir)
        if not comparison.rows:
            _discard_if_unused(sweep_dir)
            return
        objective = str(config.objective)
        print_table(comparison, objective)
        files = write_files(comparison, sweep_dir, objective)
        log.info("sweep folder %s: comparison.csv and plots/", sweep_dir)
        best = comparison.rows[0]
        finish_parent(
            cast(TrackingConfig, OmegaConf.to_object(config.tracking)),
            sweep_dir,
            artifacts=files,
            metrics={} if best.result["objective"] is None else {f"best {objective}": best.objective},
            failed=all(row.result["status"] == "failed" for row in comparison.rows),
        )


def _discard_if_unused(sweep_dir: Path) -> None:
    """Remove what Hydra wrote of a multirun in which no run was started."""
    if sweep_dir.is_dir() and not any(sweep_dir.glob("*/config.yaml")):
        (sweep_dir / "multirun.yaml").unlink(missing_ok=True)
        RunDir(sweep_dir).discard_if_unused()


# A launcher's worker process unpickles the callback above before it composes anything, and so comes by here.
compose.register()
