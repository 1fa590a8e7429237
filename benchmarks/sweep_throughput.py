"""A study of 16 trials against 16 cold processes: what warm starts, parallelism and pruning are worth.

All make the same 16 points (random search, seeded) of learning rate and dropout with `model=nano` on the default
corpus, at equal tokens:

  cold       16 processes `python -m lmtrain`, two at a time, one thread each, no pruning
  one        the study, one worker with two threads, no pruning
  two        the study, two workers with one thread each, no pruning
  pruned     the study, two workers, ASHA

Walls are of whole commands, from typing to prompt. Turnaround is the time from the last record of a trial to the first
step of the worker's next; idle is the time a worker has no trial while some are left.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from report import Figure, median_interval, parser, publish, run_lmtrain

from lmtrain.sweep.reading import read_study
from lmtrain.sweep.study import attempts_of
from lmtrain.tracking.metrics_file import read_metrics

TRIALS = 16
STEPS = 40
SETTINGS = (
    *("trainer.max_steps=null", f"trainer.max_tokens={STEPS * 2048}", "trainer.sample_tokens=0", "trainer.log_every=1"),
    *("trainer.eval_every=null", f"trainer.eval_every_tokens={STEPS * 2048 // 10}", "trainer.eval_batches=4"),
    "schedule.warmup_steps=3",
)
SPACE = ("lr=tag(log,interval(5e-4,5e-2))", "dropout=interval(0.0,0.3)")
STUDY = ("--multirun", "hydra/sweeper=study", "hydra/sweeper/sampler=random", f"hydra.sweeper.n_trials={TRIALS}")
TWO = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
NO_PRUNER = "hydra/sweeper/pruner=none"
ASHA = ("hydra/sweeper/pruner=asha", "hydra.sweeper.pruner.reduction_factor=4")  # the factor of the paper


def main() -> int:
    command_line = parser(__doc__)
    arguments = command_line.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root, cache = Path(temporary), Path(temporary) / "cache"
        run_lmtrain(["trainer.max_steps=1", "trainer.sample_tokens=0"], folder=_folder(root, "warm"), cache=cache)
        walls, best, studies = {}, {}, {}
        extra = ["hydra.sweeper.n_trials=4"] if arguments.quick else []
        for name, words in (("two", [*TWO, NO_PRUNER]), ("pruned", [*TWO, *ASHA]), ("one", [NO_PRUNER])):
            folder = _folder(root, name)
            words = [*STUDY, *SETTINGS, *SPACE, *words, "sweep.name=study", *extra]
            walls[name] = run_lmtrain(words, folder=folder, cache=cache)
            studies[name] = read_study(folder / "multirun/study")
            best[name] = min(trial.value for trial in studies[name].trials if trial.state.name == "COMPLETE")
            print(f"{name}: {walls[name]:.1f} s, best {best[name]:.4f}", flush=True)
        points = [trial.params for trial in studies["two"].trials]
        walls["cold"], losses = _cold(points, _folder(root, "cold"), cache)
        best["cold"] = min(losses)
        print(f"cold: {walls['cold']:.1f} s, best {best['cold']:.4f}", flush=True)
        turnarounds = _turnarounds(studies["two"]) + _turnarounds(studies["pruned"])
        idle = {name: _idle_share(studies[name]) for name in ("two", "pruned")}
        counts = {
            state: sum(t.state.name == state for t in studies["pruned"].trials) for state in ("COMPLETE", "PRUNED")
        }
    figures = [
        Figure(name="pruned study / cold processes, wall", value=walls["pruned"] / walls["cold"], at_most=0.25),
        Figure(name="best loss, pruned study - cold", value=best["pruned"] - best["cold"], unit="nats", at_most=1e-3),
        Figure(name="warm start alone (two / cold)", value=walls["two"] / walls["cold"]),
        Figure(name="parallelism alone (two / one)", value=walls["two"] / walls["one"]),
        Figure(name="pruning alone (pruned / two)", value=walls["pruned"] / walls["two"]),
        Figure(
            name="turnaround, median",
            value=statistics.median(turnarounds),
            unit="s",
            interval=median_interval(turnarounds),
            at_most=0.3,
        ),
        Figure(name="workers idle while trials remain", value=100 * max(idle.values()), unit="%", at_most=2.0),
    ]
    samples = {"walls": walls, "best": best, "turnarounds": turnarounds, "idle": idle, "pruned study": counts}
    config = {"settings": [*SETTINGS, *SPACE], "points": points}
    return publish("sweep_throughput", figures, config=config, samples=samples, quick=arguments.quick)


def _folder(root: Path, name: str) -> Path:
    folder = root / name
    folder.mkdir()
    return folder


def _cold(points: list[dict[str, Any]], folder: Path, cache: Path) -> tuple[float, list[float]]:
    """Wall seconds of a process for each point, two at a time, and the loss each reached."""

    def make(number: int) -> float:
        chosen = [f"{name}={value}" for name, value in points[number].items()]
        words = [*SETTINGS, *chosen, "parallel.num_threads=1", f"hydra.run.dir={number}"]
        run_lmtrain(words, folder=folder, cache=cache)
        return float(json.loads((folder / str(number) / "result.json").read_text())["objective"])

    started = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        losses = list(pool.map(make, range(len(points))))
    return time.perf_counter() - started, losses


def _turns(study: Any) -> list[list[Any]]:
    """The trials of each worker in the order they were made."""
    workers: dict[int, list[Any]] = {}
    for trial in study.trials:
        workers.setdefault(attempts_of(trial)[-1]["worker"], []).append(trial)
    return [sorted(trials, key=lambda trial: attempts_of(trial)[-1]["begun"]) for trials in workers.values()]


def _turnarounds(study: Any) -> list[float]:
    found = []
    for trials in _turns(study):
        records = [read_metrics(study.folder_of(trial) / "metrics.jsonl") for trial in trials]
        for before, after in itertools.pairwise(records):
            steps = [record["time"] for record in after if "train/loss" in record]
            step = statistics.median(b - a for a, b in itertools.pairwise(steps))
            found.append(steps[0] - step - before[-1]["time"])
    return found


def _idle_share(study: Any) -> float:
    """Share of the workers' time between trials, until the last trial was taken."""
    idle = busy = 0.0
    for trials in _turns(study):
        attempts = [attempts_of(trial)[-1] for trial in trials]
        busy += sum(attempt["ended"] - attempt["begun"] for attempt in attempts)
        idle += sum(after["begun"] - before["ended"] for before, after in itertools.pairwise(attempts))
    return idle / (idle + busy)


if __name__ == "__main__":
    sys.exit(main())
