"""From the words of a multirun to what it will take, without starting it. What the words mean is `config`'s."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from lmtrain.config.launch import count_workers
from lmtrain.config.multirun import composing_multirun
from lmtrain.config.points import runs_of_grid
from lmtrain.errors import ConfigError
from lmtrain.sweep.setup import sample_points
from lmtrain.sweep.sizing import SweepEstimate, estimate_grid, estimate_study
from lmtrain.sweep.sweeper import StudySweeper


def estimate_sweep(words: Sequence[str], *, probing: bool, watts: float | None) -> SweepEstimate:
    """What the multirun of these words will take.

    Args:
        probing: make short real steps of each shape.
        watts: what a device takes, where that is known better than by its own limit or meter.

    Raises LmtrainError, or an error that `explain` puts into words.
    """
    with composing_multirun(words) as multirun:
        config = multirun.config
        if not multirun.is_study:
            runs = runs_of_grid(config)
            if runs is None:
                raise ConfigError(
                    f"a plan is of a grid or of hydra/sweeper=study, not of {config.hydra.sweeper._target_}"
                )
            points = runs.by_size()
            first = next((settings for _, settings in points if not isinstance(settings, str)), None)
            workers = count_workers(config, None, first)
            return estimate_grid(points, workers.number, probing=probing, watts=watts)
        sweeper = cast(StudySweeper, multirun.sweeper())
        trials, base, plan = sweeper.request(multirun.words)
        drawn = [trials.settings_of(point) for point in sample_points(plan.space, plan.extend)]
        workers = count_workers(config, sweeper.settings["n_jobs"], base)
        return estimate_study(
            plan.name, trials.corners, drawn, plan.num_trials, workers.number, probing=probing, watts=watts
        )
