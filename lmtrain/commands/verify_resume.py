"""`lmtrain verify-resume [--steps N] [overrides]`: is a killed and resumed run the same, to the last bit, here?

Trains 2 N steps in one go, and again with a `kill -9` at a random instant and a resume;
then compares the hashes of weights and training state and every metric of every step.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lmtrain.errors import LmtrainError, RunError
from lmtrain.run_dir import RunDir

POLL_SECONDS = 0.002
CLOCKS = ("time", "attempt", "train/tokens_per_second", "train/mfu", "train/memory_gib")
"""What differs between two runs that did the same."""


def main(arguments: list[str]) -> int:
    """Exit status 0 if the endings are identical, 1 if not."""
    parser = argparse.ArgumentParser(prog="lmtrain verify-resume", description=__doc__, allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=20, help="N: half the length of the run (default 20)")
    parser.add_argument("--seed", type=int, default=None, help="of the instant of the kill (default: random)")
    parser.add_argument("overrides", nargs="*", help="settings of the run, as for training")
    options = parser.parse_intermixed_args(arguments)
    seed = random.randrange(2**31) if options.seed is None else options.seed
    with tempfile.TemporaryDirectory(prefix="lmtrain-verify-") as folder:
        differences = verify(Path(folder), options.overrides, steps=options.steps, chance=random.Random(seed))
    for line in differences:
        print(f"differs: {line}")
    print(f"{'NOT identical' if differences else 'identical'} (kill seed {seed})")
    return 1 if differences else 0


def verify(folder: Path, overrides: list[str], *, steps: int, chance: random.Random) -> list[str]:
    """Make both runs below `folder`; returns what differs between their ends, nothing if they are the same.

    Raises RunError if a run fails of itself.
    """
    whole = RunDir(folder / "whole")
    train_whole(whole, overrides, steps=2 * steps)
    print(f"uninterrupted: {2 * steps} steps")
    killed, differences = kill_and_resume(RunDir(folder / "broken"), whole, overrides, steps=2 * steps, chance=chance)
    print(f"killed with -9 {killed}, resumed")
    return differences


def train_whole(run: RunDir, overrides: list[str], *, steps: int) -> None:
    """Make the uninterrupted run of `steps` steps."""
    _train([*_settings(run, overrides, steps)])


def kill_and_resume(
    run: RunDir, whole: RunDir, overrides: list[str], *, steps: int, chance: random.Random
) -> tuple[str, list[str]]:
    """Make the run of `whole` again in another folder, with a kill on the way.

    Returns when it was killed, and what differs at the end.
    """
    result = whole.read_result()
    assert result is not None
    delay = chance.uniform(0, 0.8 * result["training_seconds"])
    killed = _train_and_kill(_settings(run, overrides, steps), run, delay)
    if run.read_result() is None:
        _train([f"resume={run.path}"])
    return killed, compare_ends(whole, run)


def _settings(run: RunDir, overrides: list[str], steps: int) -> list[str]:
    """The run's words: many checkpoints and every metric, and nothing that tells one run from the other."""
    budget = [f"trainer.max_steps={steps}", "trainer.max_epochs=null", "trainer.max_tokens=null"]
    evaluations = ["trainer.eval_every_tokens=null", f"trainer.eval_every={steps // 2}"]
    cadence = [*evaluations, f"trainer.checkpoint_every={max(1, steps // 8)}"]
    quiet = ["trainer.log_every=1", "trainer.sample_tokens=0", "tracking=none"]
    return [*budget, *cadence, *quiet, *overrides, f"hydra.run.dir={run.path}"]


def compare_ends(first: RunDir, second: RunDir) -> list[str]:
    """What differs between the last checkpoints and the metrics of two runs."""
    sums = [json.loads((run.checkpoints / "last" / "manifest.json").read_text())["sha256"] for run in (first, second)]
    differences = [
        f"{name} of the last checkpoint" for name in sums[0] if name != "meta.json" and sums[0][name] != sums[1][name]
    ]
    ours, theirs = (_records(run.metrics) for run in (first, second))
    if len(ours) != len(theirs):
        differences.append(f"metrics: {len(ours)} against {len(theirs)} records")
    differences += [f"metrics: {a} against {b}" for a, b in zip(ours, theirs, strict=False) if a != b][:5]
    return differences


def _records(metrics: Path) -> list[dict[str, Any]]:
    lines = metrics.read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in CLOCKS} for line in lines]


def _train(arguments: Iterable[str]) -> None:
    """Run a training command to its end. Raises RunError if it fails."""
    done = subprocess.run(_command(arguments), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise _failure(done.returncode, done.stdout + done.stderr)


def _train_and_kill(arguments: Iterable[str], run: RunDir, delay: float) -> str:
    """Start a training command and kill it `delay` seconds after it claimed its folder; returns when that was."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(_command(arguments), stdout=output, stderr=output)
        while not run.is_run() and process.poll() is None:
            time.sleep(POLL_SECONDS)
        try:
            process.wait(timeout=delay)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            steps = sorted(path.name for path in run.checkpoints.glob("step_*"))
            return f"{delay:.3f} s after its start, {steps[-1] if steps else 'before a checkpoint'}"
        if process.returncode != 0:
            output.seek(0)
            raise _failure(process.returncode, output.read())
    return "only after its end"


def _command(arguments: Iterable[str]) -> list[str]:
    return [sys.executable, "-m", "lmtrain", *arguments]


def _failure(status: int, output: str) -> LmtrainError:
    last = [line for line in output.splitlines() if line.strip()][-1:]
    error = RunError(f"a training run ended with status {status}: {' '.join(last)}")
    error.exit_status = status
    return error
