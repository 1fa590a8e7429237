"""`lmtrain verify-resume [--steps N] [overrides]`: is a killed and resumed run the same, to the last bit, here?

Trains 2 N steps in one go, and again with a `kill -9` at a random instant and a resume;
then compares the hashes of weights and training state, every metric of every step, and the result.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmtrain.commands import CommandParser
from lmtrain.errors import ConfigError, LmtrainError, RunError
from lmtrain.run_dir import RunDir
from lmtrain.tracking.metrics_file import read_metrics, without_clocks

POLL_SECONDS = 0.002
"""What differs between two runs that did the same."""
OUTCOME = ("status", "objective", "best_step", "step", "tokens", "nonfinite_steps")
"""What result.json says of a run that its metrics do not."""

PHASES = ("starting", "training", "evaluating", "saving", "ended")
"""What an attempt may be doing when it is killed; ended: it was over before."""


@dataclass(frozen=True, kw_only=True)
class Kill:
    """Where in its life an attempt was killed."""

    seconds: float  # after it had taken its folder
    phase: str  # of PHASES

    def __str__(self) -> str:
        return f"{self.seconds:.3f} s after its start, {self.phase}"


def main(arguments: list[str]) -> int:
    """Exit status 0 if the endings are identical, 1 if not."""
    parser = CommandParser("verify-resume", __doc__)
    parser.add_argument("--steps", type=int, default=20, help="N: half the length of the run (default 20)")
    parser.add_argument("--seed", type=int, default=None, help="of the instant of the kill (default: random)")
    parser.add_argument("overrides", nargs="*", help="settings of the run, as for training")
    options = parser.parse_intermixed_args(arguments)
    if options.steps < 1:
        raise ConfigError(f"--steps must be at least 1, got {options.steps}")
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
    result = whole.read_result()
    assert result is not None
    print(f"uninterrupted: {result['step']} steps")
    kills, differences = kill_and_resume(RunDir(folder / "broken"), whole, chance=chance)
    print(f"killed with -9 {', then '.join(map(str, kills))}; resumed")
    return differences


def train_whole(run: RunDir, overrides: list[str], *, steps: int) -> None:
    """Make the uninterrupted run of `steps` steps."""
    _train(_settings(run, overrides, steps))


def kill_and_resume(
    run: RunDir, whole: RunDir, *, chance: random.Random, attempts: int = 1
) -> tuple[list[Kill], list[str]]:
    """Make the run of `whole` again in another folder; so many attempts are killed, the next goes to the end.

    Made from its config.yaml, it takes what `auto` came to there: by timing, it might come to something else.

    Returns when they were killed, and what differs at the end.
    """
    kills: list[Kill] = []
    life = whole.result.stat().st_mtime - whole.lock_file.stat().st_mtime  # from taking the folder to its result
    while len(kills) < attempts and run.read_result() is None:
        delay = chance.uniform(0, life / (1 + len(kills)))  # an attempt that resumes has less to do
        kills.append(_train_and_kill(_words(run, whole), run, whole, delay))
    if run.read_result() is None:
        _train(_words(run, whole))
    return kills, compare_ends(whole, run)


def _words(run: RunDir, whole: RunDir) -> list[str]:
    """Those that begin the run of `whole` again, or that go on with it once it has begun."""
    if run.is_run():
        return [f"resume={run.path}"]
    return ["--config-dir", str(whole.path), "--config-name", whole.config.stem, f"hydra.run.dir={run.path}"]


def _settings(run: RunDir, overrides: list[str], steps: int) -> list[str]:
    """The run's words: many checkpoints and every metric, and nothing that tells one run from the other."""
    budget = [f"trainer.max_steps={steps}", "trainer.max_epochs=null", "trainer.max_tokens=null"]
    evaluations = ["trainer.eval_every_tokens=null", f"trainer.eval_every={steps // 2}"]
    cadence = [*evaluations, f"trainer.checkpoint_every={max(1, steps // 8)}"]
    quiet = ["trainer.log_every=1", "trainer.sample_tokens=0", "tracking=none"]
    return [*budget, *cadence, *quiet, *overrides, f"hydra.run.dir={run.path}"]


def compare_ends(first: RunDir, second: RunDir) -> list[str]:
    """What differs between the last and best checkpoints, the metrics and the results of two runs."""
    differences = []
    for name in ("last", "best"):
        ours, theirs = (_sums(run.checkpoints / name / "manifest.json") for run in (first, second))
        differences += [f"{file} of the {name} checkpoint" for file in ours if ours[file] != theirs.get(file)]
    before, after = (_records(run.metrics) for run in (first, second))
    if len(before) != len(after):
        differences.append(f"metrics: {len(before)} against {len(after)} records")
    differences += [f"metrics: {a} against {b}" for a, b in zip(before, after, strict=False) if a != b][:5]
    one, other = (run.read_result() or {} for run in (first, second))
    return differences + [
        f"{key}: {one[key]} against {other.get(key)}" for key in OUTCOME if one[key] != other.get(key)
    ]


def _sums(manifest: Path) -> dict[str, str]:
    sums: dict[str, str] = json.loads(manifest.read_text())["sha256"] if manifest.exists() else {}
    return sums


def _records(metrics: Path) -> list[dict[str, Any]]:
    lines = metrics.read_text().splitlines()
    return [without_clocks(json.loads(line)) for line in lines]


def _train(arguments: Iterable[str]) -> None:
    """Run a training command to its end. Raises RunError if it fails."""
    done = subprocess.run(_command(arguments), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise _failure(done.returncode, done.stdout + done.stderr)


def _train_and_kill(arguments: Iterable[str], run: RunDir, whole: RunDir, delay: float) -> Kill:
    """Start a training command and kill it `delay` seconds after it has taken its folder; returns where it was."""
    attempt = _last_record(run).get("attempt", -1)
    run.lock_file.unlink(missing_ok=True)  # nobody holds it; it comes again when the folder is taken
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(_command(arguments), stdout=output, stderr=output)
        while not run.lock_file.exists() and process.poll() is None:
            time.sleep(POLL_SECONDS)
        try:
            process.wait(timeout=delay)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return Kill(seconds=delay, phase=_phase(run, whole, attempt))
        if process.returncode != 0:
            output.seek(0)
            raise _failure(process.returncode, output.read())
    return Kill(seconds=delay, phase="ended")


def _phase(run: RunDir, whole: RunDir, attempt_before: float) -> str:
    """What a run was doing when it was killed, from what it left."""
    last = _last_record(run)
    if last.get("attempt", -1) == attempt_before:
        return "starting"
    if any(run.checkpoints.glob(".step_*.partial")):
        return "saving"
    evaluated = {record["step"] for record in _records(whole.metrics) if "val/loss" in record}
    return "evaluating" if last["step"] in evaluated and "val/loss" not in last else "training"


def _last_record(run: RunDir) -> dict[str, float]:
    return ([{}, *read_metrics(run.metrics)] if run.metrics.exists() else [{}])[-1]


def _command(arguments: Iterable[str]) -> list[str]:
    return [sys.executable, "-m", "lmtrain", *arguments]


def _failure(status: int, output: str) -> LmtrainError:
    last = [line for line in output.splitlines() if line.strip()][-1:]
    error = RunError(f"a training run ended with status {status}: {' '.join(last)}")
    error.exit_status = status
    return error
