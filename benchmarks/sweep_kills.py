"""Kill -9 of workers and of whole sweeps at random instants: is a trial lost, doubled or left running?

Half of the kills hit a study of one worker, whose points follow from the history alone (TPE): in the end it must equal
the study that was left alone, to the last digit of every evaluation. The others hit a study of two workers: one of
them, or the process that started them, or all at once.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from report import Figure, parser, publish

from lmtrain.sweep.reading import ReadStudy, read_study
from lmtrain.sweep.study import attempts_of
from lmtrain.tracking.metrics_file import read_metrics

TRIALS = 24
SETTINGS = (
    *("--multirun", "sweep=lr_dropout_batch", "sweep.name=study", "tracking=none", f"hydra.sweeper.n_trials={TRIALS}"),
    *("model.d_model=32", "model.num_layers=2", "model.num_heads=2", "data.seq_len=64", "parallel.num_threads=1"),
    *("trainer.max_tokens=655360", "trainer.eval_every_tokens=65536", "trainer.eval_batches=2", "precision=fp32"),
    *("hydra.sweeper.sampler.n_startup_trials=4",),
)
TWO = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
EARLIEST, LATEST = 3.0, 14.0  # seconds from the start of a command to its kill


def main() -> int:
    command_line = parser(__doc__)
    command_line.add_argument("--kills", type=int, default=20, help="in all (default 20)")
    command_line.add_argument("--seed", type=int, default=0, help="of the instants and victims")
    arguments = command_line.parse_args()
    kills, chance = (4 if arguments.quick else arguments.kills), random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        alone = _finish(root, "alone", ())
        one, story_of_one = _kill_and_finish(root, "one", (), kills=kills // 2, chance=chance)
        two, story_of_two = _kill_and_finish(root, "two", TWO, kills=kills - kills // 2, chance=chance)
        losses = [_damage(study) for study in (one, two)]
        same = sum(_story(a) == _story(b) for a, b in zip(alone.trials, one.trials, strict=True))
    figures = [
        Figure(name="kills that hit a running study", value=len(story_of_one) + len(story_of_two), at_least=kills),
        Figure(name="trials lost, doubled or left running", value=sum(len(found) for found in losses), at_most=0),
        Figure(name="trials as in the undisturbed study", value=same, unit=f"of {TRIALS}", at_least=TRIALS),
    ]
    samples = {"one worker": story_of_one, "two workers": story_of_two, "damage": losses}
    return publish("sweep_kills", figures, config={"settings": SETTINGS}, samples=samples, quick=arguments.quick)


def _start(root: Path, name: str, extra: tuple[str, ...]) -> subprocess.Popen[bytes]:
    folder = root / name
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "lmtrain", *SETTINGS, *extra],
        cwd=folder,
        env=os.environ | {"LMTRAIN_CACHE": str(root / "cache"), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def _finish(root: Path, name: str, extra: tuple[str, ...]) -> ReadStudy:
    process = _start(root, name, extra)
    _, stderr = process.communicate()
    if process.returncode != 0:
        sys.exit(f"exit status {process.returncode}\n{stderr.decode()}")
    return read_study(root / name / "multirun/study")


def _kill_and_finish(
    root: Path, name: str, extra: tuple[str, ...], *, kills: int, chance: random.Random
) -> tuple[ReadStudy, list[str]]:
    """Start a study and kill something of it, again and again; then let it go to its end."""
    story: list[str] = []
    while len(story) < kills:
        process = _start(root, name, extra)
        victim = chance.choice(["worker", "coordinator", "everything"]) if extra else "everything"
        try:
            process.wait(chance.uniform(EARLIEST, LATEST))
            break  # the study came to its end before
        except subprocess.TimeoutExpired:
            killed = _kill(process, victim)
        story.append(f"{killed} after {_ended(root / name)} trials")
        print(f"{len(story)}/{kills} {name}: killed {story[-1]}", flush=True)
    return _finish(root, name, extra), story


def _kill(process: subprocess.Popen[bytes], victim: str) -> str:
    """Kill with -9; after that of one worker the study goes on for a while, then everything is killed."""
    main_process = psutil.Process(process.pid)
    workers = [child for child in main_process.children(recursive=True) if "popen_loky" in " ".join(child.cmdline())]
    if victim == "worker" and workers:
        workers[0].kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(8)
    elif victim == "coordinator":
        workers = []  # they notice, and stop
    for doomed in (*workers, main_process):
        with contextlib.suppress(psutil.NoSuchProcess):
            doomed.kill()
    process.wait()
    time.sleep(0.2)
    return victim


def _ended(folder: Path) -> int:
    return len(list((folder / "multirun/study").glob("0*/result.json")))


def _damage(study: ReadStudy) -> list[str]:
    """What must not be in a study that has ended."""
    found = [f"trial {trial.number} is {trial.state.name}" for trial in study.trials if not trial.state.is_finished()]
    if [trial.number for trial in study.trials] != list(range(TRIALS)):
        found.append(f"numbers {[trial.number for trial in study.trials]}")
    for trial in study.trials:
        attempts = sorted((attempt["begun"], attempt["ended"]) for attempt in attempts_of(trial))
        if any(later[0] < earlier[1] - 1e-3 for earlier, later in itertools.pairwise(attempts)):
            found.append(f"trial {trial.number} was worked on by two at once: {attempts}")
        steps = [
            record["step"] for record in read_metrics(study.folder_of(trial) / "metrics.jsonl") if "val/loss" in record
        ]
        if len(set(steps)) != len(steps):
            found.append(f"trial {trial.number} has an evaluation twice: {steps}")
    return found


def _story(trial: Any) -> tuple[Any, ...]:
    return trial.number, trial.state, trial.params, trial.values, trial.intermediate_values


if __name__ == "__main__":
    sys.exit(main())
