"""How long one waits for an answer, and for a run of a warm multirun to start training.

Help and a config error are timed as whole programs. For the multirun this script starts itself as the program, with
a clock around two of its functions: a start lasts from the end of the run before (its plots and its MLflow mirror
closed) to the first training step. So it holds all that Hydra and lmtrain do in between, with the default model,
data and tracking. The first run pays for the imports and for preparing the data; the median is over the others.
"""

from __future__ import annotations

import atexit
import functools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig
from report import ROOT, Figure, median_figure, parser, publish, run_lmtrain

from lmtrain.run_dir import RunDir

MAX_ANSWER, MAX_START = 0.5, 0.3  # seconds
CLOCKED = "--clocked"  # first word of this script as the program under the clock
GRID = ["lr=1e-3,3e-3,1e-2", "dropout=0,0.1,0.2"]
SHORT_RUN = ["trainer.max_steps=2", "trainer.eval_batches=1", "trainer.sample_tokens=0"]

stamps: list[tuple[str, float]] = []  # of the program under the clock


def run_clocked(stamps_file: str, arguments: list[str]) -> None:
    """`python -m lmtrain ARGUMENTS`, noting when each run begins, trains its first step and ends."""
    from lmtrain import __main__ as program

    original = program.task

    @functools.wraps(original)
    def clocked_task(config: DictConfig) -> float:
        stamp("begun")
        clock_training()
        try:
            return original(config)
        finally:
            stamp("ended")

    program.task = clocked_task
    sys.argv[1:] = arguments
    atexit.register(lambda: Path(stamps_file).write_text(json.dumps(stamps)))
    stamp("ended")  # in the place of a run before the first
    program.main()


def stamp(event: str) -> None:
    stamps.append((event, time.perf_counter()))


@functools.cache  # once is enough
def clock_training() -> None:
    # The first run comes here and imports torch, for which it would wait a little later without the clock.
    from lmtrain.training.interrupt import StopRequest
    from lmtrain.training.trainer import Trainer

    original = Trainer._loop  # what comes before it belongs to the start: finding the microbatch

    def clocked_loop(self: Trainer, stop: StopRequest) -> str:
        stamp("training")
        return original(self, stop)

    Trainer._loop = clocked_loop  # type: ignore[method-assign]


def time_multirun(overrides: list[str]) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds to the first step of each run, from the run before and from the run's own beginning; one run's config."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        stamps_file, sweep = folder / "stamps.json", folder / "sweep"
        # In the checkout, as a user would: reading its git state is part of starting a run.
        run_lmtrain(
            [
                "--multirun",
                *GRID,
                *SHORT_RUN,
                f"tracking.uri='sqlite:///{folder / 'mlflow.db'}'",
                f"hydra.sweep.dir='{sweep}'",
                *overrides,
            ],
            program=[str(Path(__file__).resolve()), CLOCKED, str(stamps_file)],
            folder=ROOT,
            cache=folder / "cache",
        )
        noted = json.loads(stamps_file.read_text())
        config = yaml.safe_load(RunDir(sweep / "0000").config.read_text(encoding="utf-8"))
    moments = {event: [moment for name, moment in noted if name == event] for event in ("ended", "begun", "training")}
    since = {
        event: [training - moment for moment, training in zip(moments[event], moments["training"], strict=False)]
        for event in ("ended", "begun")  # the end of the last run has no run after it
    }
    return {"since_the_run_before": since["ended"], "since_its_beginning": since["begun"]}, config


def main() -> int:
    command_line = parser(__doc__)
    command_line.add_argument("--repeats", type=int, default=10, help="of help and error (default 10)")
    command_line.add_argument("overrides", nargs="*", help="settings for the multirun, as parallel.num_threads=1")
    arguments = command_line.parse_intermixed_args()
    answers = {"bare Python": ["-c", "pass"], "--help": ["-m", "lmtrain", "--help"]}
    answers["modle=nano"] = ["-m", "lmtrain", "modle=nano"]
    samples: dict[str, list[float]] = {name: [] for name in answers}
    for repeat in range(1 + (2 if arguments.quick else arguments.repeats)):
        for name, program in answers.items():
            status = 2 if name == "modle=nano" else 0
            seconds = run_lmtrain([], program=program, folder=ROOT, cache=ROOT, status=status)
            if repeat > 0:  # the first fills the file cache
                samples[name].append(seconds)
    starts, config = time_multirun(arguments.overrides)
    warm = {name: seconds[1:] for name, seconds in starts.items()}
    figures = [
        median_figure("bare Python", samples["bare Python"], unit="s"),
        median_figure("--help", samples["--help"], unit="s", at_most=MAX_ANSWER),
        median_figure("a config error (modle=nano)", samples["modle=nano"], unit="s", at_most=MAX_ANSWER),
        Figure(name="first run of a multirun, data not prepared", value=starts["since_the_run_before"][0], unit="s"),
        median_figure(
            "warm run, since the end of the one before", warm["since_the_run_before"], unit="s", at_most=MAX_START
        ),
        median_figure("warm run, since its own beginning", warm["since_its_beginning"], unit="s"),
    ]
    return publish("startup", figures, config=config, samples=samples | starts, quick=arguments.quick)


if __name__ == "__main__":
    if sys.argv[1:2] == [CLOCKED]:
        run_clocked(sys.argv[2], sys.argv[3:])
    else:
        sys.exit(main())
