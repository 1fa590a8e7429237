"""What a study costs besides training: 200 trials whose training is a function that returns at once.

Everything else is real: the command, Hydra's composing, the journal with its syncs, TPE, ASHA, five reports a trial.
Sweeper time runs from the first trial's claim to the end of the last; memory is the process's resident size.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from report import Figure, parser, publish

TRIALS = 200
EARLY = 50  # trials after which memory is first looked at
WORDS = ("--multirun", "sweep=lr_dropout_batch", "sweep.name=study", "tracking=none")


def main() -> int:
    command_line = parser(__doc__)
    command_line.add_argument("--stubbed", type=Path, help=argparse.SUPPRESS)
    arguments = command_line.parse_args()
    if arguments.stubbed is not None:
        return _run_stubbed(arguments.stubbed, TRIALS)
    with tempfile.TemporaryDirectory() as temporary:
        measured = Path(temporary) / "measured.json"
        command = [sys.executable, str(Path(__file__).resolve()), "--stubbed", str(measured)]
        root = str(Path(__file__).resolve().parent.parent)
        environment = os.environ | {"LMTRAIN_CACHE": f"{temporary}/cache", "PYTHONPATH": root}
        subprocess.run(
            command, cwd=temporary, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        trials = json.loads(measured.read_text())
        syncs = _seconds_of_a_sync(Path(temporary))
    seconds = trials[-1]["time"] - trials[0]["time"]
    growth = (trials[-1]["rss"] - trials[EARLY]["rss"]) / 2**20
    writes = trials[-1]["syncs"] - trials[0]["syncs"]
    figures = [
        Figure(name=f"sweeper time of {TRIALS} trials", value=seconds, unit="s", at_most=10.0),
        Figure(name="... of it waiting for the disk", value=trials[-1]["syncing"] - trials[0]["syncing"], unit="s"),
        Figure(name="writes to the journal a trial", value=writes / TRIALS),
        Figure(name="a sync of this disk", value=1e3 * syncs, unit="ms"),
        Figure(name=f"memory from trial {EARLY} to {TRIALS}", value=growth, unit="MiB", at_most=20.0),
    ]
    return publish(
        "sweep_overhead", figures, config={"words": WORDS}, samples={"trials": trials}, quick=arguments.quick
    )


def _run_stubbed(measured: Path, count: int) -> int:
    """The command itself, in this process, with training stubbed; notes time and memory at each trial."""
    import psutil

    import lmtrain.run
    from lmtrain.__main__ import _run

    moments: list[dict[str, float]] = []
    syncing = {"count": 0, "seconds": 0.0}
    sync = os.fsync

    def timed_sync(descriptor: int) -> None:
        started = time.perf_counter()
        sync(descriptor)
        syncing["count"] += 1
        syncing["seconds"] += time.perf_counter() - started

    def train(config, run_dir, origin, judge):  # type: ignore[no-untyped-def]
        memory = psutil.Process().memory_info().rss
        moments.append({"time": time.time(), "rss": memory, "syncs": syncing["count"], "syncing": syncing["seconds"]})
        loss = abs(config.lr - 0.01) * 100 + config.dropout
        pruned = any(judge(100_000 * rung, loss + 1 / rung) for rung in range(1, 6))
        return lmtrain.run.RunResult(
            status="pruned" if pruned else "completed",
            objective=loss,
            objectives={"val/loss": loss},
            last_score=loss,
            best_step=5,
            step=5,
            tokens=500_000,
            metrics={"val/loss": loss},
            seconds=0.0,
        )

    os.fsync = timed_sync
    lmtrain.run.run_experiment = train
    sys.argv = ["lmtrain", *WORDS, f"hydra.sweeper.n_trials={count}"]
    status = _run(sys.argv[1:])
    measured.write_text(json.dumps(moments))
    return status


def _seconds_of_a_sync(folder: Path) -> float:
    """Seconds of an append of a line with its sync, the mean of 100."""
    with (folder / "sync").open("ab") as file:
        started = time.perf_counter()
        for _ in range(100):
            file.write(b"x" * 200)
            file.flush()
            os.fsync(file.fileno())
        return (time.perf_counter() - started) / 100


if __name__ == "__main__":
    sys.exit(main())
