"""Kill -9 at random instants, resume, compare: how many of N endings are the uninterrupted one, to the bit.

Three settings take turns: dropout with accumulation in fp32; Muon, the default; activation checkpointing with bf16 and
a learned position table. For each, one run goes through. Then runs are killed at an instant drawn evenly from the life
of that run, from taking its folder to its result; a third of them again, while resuming or later. The last and best
checkpoints (sha256 of weights, optimizer and random state, counters), all metrics and the result must agree.
Evaluations and checkpoints are frequent, so that many kills fall into them.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from report import Figure, parser, publish

from lmtrain.commands.verify_resume import PHASES, Kill, kill_and_resume, train_whole
from lmtrain.errors import LmtrainError
from lmtrain.run_dir import RunDir

SMALL = [
    *("model.d_model=64", "model.num_layers=2", "data.seq_len=64", "parallel.num_threads=1", "precision=fp32"),
    *("trainer.eval_every=6", "trainer.eval_batches=8", "trainer.checkpoint_every=2"),
]
SETTINGS = {
    "dropout and accumulation": [*SMALL, "dropout=0.1", "trainer.micro_batch_size=3", "optimizer=adamw"],
    "Muon": [*SMALL, "trainer.checkpoint_every=1"],
    "activation checkpointing": [
        *(*SMALL, "trainer.activation_checkpointing=selective", "precision=bf16", "model.position=learned"),
        *("optimizer=adamw", "dropout=0.2"),
    ],
}
STEPS = 60
KILLED_TWICE = 1 / 3  # of the runs


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One run: where it was killed, and what differed at its end."""

    setting: str
    kills: list[Kill]
    differences: list[str]


def main() -> int:
    command_line = parser(__doc__)
    command_line.add_argument("--kills", type=int, default=100, help="runs that are killed (default 100)")
    command_line.add_argument("--seed", type=int, default=0, help="of the instants")
    arguments = command_line.parse_args()
    runs, chance = len(SETTINGS) if arguments.quick else arguments.kills, random.Random(arguments.seed)
    outcomes = []
    with tempfile.TemporaryDirectory() as temporary:
        wholes = {name: RunDir(Path(temporary) / f"whole-{number}") for number, name in enumerate(SETTINGS)}
        for name, overrides in SETTINGS.items():
            train_whole(wholes[name], overrides, steps=STEPS)
        for number in range(runs):
            name = list(SETTINGS)[number % len(SETTINGS)]
            broken = RunDir(Path(temporary) / f"broken-{number}")
            outcomes.append(break_one(name, broken, wholes[name], chance))
            told = ", then ".join(map(str, outcomes[-1].kills))
            print(f"{number + 1}/{runs} {name}: {told}: {outcomes[-1].differences or 'identical'}", flush=True)
    return publish(
        "kill_resume",
        figures_of(outcomes),
        config={"steps": STEPS, "settings": SETTINGS, "seed": arguments.seed},
        samples={"outcomes": [asdict(outcome) for outcome in outcomes]},
        quick=arguments.quick,
    )


def break_one(setting: str, broken: RunDir, whole: RunDir, chance: random.Random) -> Outcome:
    """Make a run again, killed once or twice."""
    attempts = 2 if chance.random() < KILLED_TWICE else 1
    try:
        kills, differences = kill_and_resume(broken, whole, chance=chance, attempts=attempts)
    except LmtrainError as error:  # it could not be loaded, or failed later
        kills, differences = [], [str(error)]
    return Outcome(setting=setting, kills=kills, differences=differences)


def figures_of(outcomes: list[Outcome]) -> list[Figure]:
    """How many ended alike, and what the kills fell into."""
    runs, phases = len(outcomes), Counter(kill.phase for outcome in outcomes for kill in outcome.kills)
    identical = sum(not outcome.differences for outcome in outcomes)
    caught = sum(any(kill.phase != "ended" for kill in outcome.kills) for outcome in outcomes)
    return [
        Figure(name="identical endings", value=identical, unit=f"of {runs}", at_least=runs),
        Figure(name="runs caught before their end", value=caught, unit=f"of {runs}", at_least=0.9 * runs),
        *(Figure(name=f"kills while {phase}", value=phases[phase]) for phase in PHASES),
    ]


if __name__ == "__main__":
    sys.exit(main())
