"""A run that was really trained, with optimizer state and result, for the tests of the model store."""

from __future__ import annotations

from pathlib import Path

from command_line import TINY, CommandLine

BUDGET = ("trainer.max_steps=20", "trainer.eval_every=5", "trainer.checkpoint_every=5", "trainer.keep_checkpoints=3")
STEPS = (10, 15, 20)
"""Of the checkpoints."""


def train(folder: Path, corpus: Path, *overrides: str) -> Path:
    """Train a tiny model in `folder/run`."""
    command = CommandLine(folder)
    command(*TINY, f"data.path={corpus}", "hydra.run.dir=run", *BUDGET, *overrides)
    return folder / "run"
