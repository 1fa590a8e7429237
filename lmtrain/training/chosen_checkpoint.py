"""Which checkpoint of a run a word of the user means."""

from __future__ import annotations

from lmtrain.errors import CheckpointError
from lmtrain.run_dir import RunDir
from lmtrain.training.checkpoint import Checkpoint, CheckpointFolder


def load_chosen(run: RunDir, wanted: str | None, *, weights_only: bool) -> Checkpoint:
    """Read `last`, `best` or the number of a step; None: the best if there is one, else the newest.

    `weights_only`: not what only training needs. Raises CheckpointError.
    """
    checkpoints = CheckpointFolder(run.checkpoints)
    checkpoints.require_not_removed()
    steps = sorted(int(path.name.removeprefix("step_")) for path in checkpoints.folder.glob("step_*"))
    if not steps:
        raise CheckpointError(
            f"{run} has no checkpoint: a run writes them every trainer.checkpoint_every steps and at its end"
        )
    has_best = (checkpoints.folder / "best").is_dir()
    if wanted is None:
        wanted = "best" if has_best else "last"
    if wanted == "last":
        return checkpoints.load_newest(weights_only=weights_only)
    if wanted == "best" and has_best:
        return checkpoints.load("best", weights_only=weights_only)
    if wanted.isdecimal() and int(wanted) in steps:
        return checkpoints.load(f"step_{int(wanted):08d}", weights_only=weights_only)
    there = ", ".join(["last", *["best"] * has_best, *map(str, steps)])
    raise CheckpointError(f"{run} has no checkpoint {wanted!r}; there are {there}")
