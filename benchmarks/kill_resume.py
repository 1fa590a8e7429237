"""Kill -9 at random instants, resume, compare: how many of N endings are the uninterrupted one, to the bit.

Three settings take turns: dropout with accumulation in fp32; Muon, the default; AdamW with a learned position table
and bf16. For each, one run goes through; then runs are killed at a random instant, some twice, and resumed to the
end. Weights, optimizer and random state (sha256 of the last checkpoint's files) and all metrics must agree.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

from report import Figure, parser, publish

from lmtrain.commands.verify_resume import kill_and_resume, train_whole
from lmtrain.run_dir import RunDir

SMALL = ["model.d_model=64", "model.num_layers=2", "data.seq_len=64", "parallel.num_threads=1", "precision=fp32"]
SETTINGS = {
    "dropout and accumulation": [*SMALL, "dropout=0.1", "trainer.micro_batch_size=3", "optimizer=adamw"],
    "Muon": SMALL,
    "bf16, learned positions": [*SMALL, "precision=bf16", "model.position=learned", "optimizer=adamw", "dropout=0.2"],
}
STEPS = 60


def main() -> int:
    command_line = parser(__doc__)
    command_line.add_argument("--kills", type=int, default=100, help="in all (default 100)")
    command_line.add_argument("--seed", type=int, default=0, help="of the instants")
    arguments = command_line.parse_args()
    chance = random.Random(arguments.seed)
    kills = len(SETTINGS) if arguments.quick else arguments.kills
    outcomes = []
    with tempfile.TemporaryDirectory() as temporary:
        wholes = {name: Path(temporary) / f"whole-{number}" for number, name in enumerate(SETTINGS)}
        for name, overrides in SETTINGS.items():
            train_whole(RunDir(wholes[name]), overrides, steps=STEPS)
        for number in range(kills):
            name = list(SETTINGS)[number % len(SETTINGS)]
            broken = RunDir(Path(temporary) / f"broken-{number}")
            killed, differences = kill_and_resume(
                broken, RunDir(wholes[name]), SETTINGS[name], steps=STEPS, chance=chance
            )
            outcomes.append({"setting": name, "killed": killed, "differences": differences})
            print(f"{number + 1}/{kills} {name}: killed {killed}: {differences or 'identical'}", flush=True)
    identical = sum(not outcome["differences"] for outcome in outcomes)
    caught = sum(outcome["killed"] != "only after its end" for outcome in outcomes)
    figures = [
        Figure(name="identical endings", value=identical, unit=f"of {kills}", at_least=kills),
        Figure(name="runs caught before their end", value=caught, unit=f"of {kills}", at_least=0.8 * kills),
    ]
    return publish(
        "kill_resume",
        figures,
        config={"steps": STEPS, "settings": SETTINGS},
        samples={"outcomes": outcomes},
        quick=arguments.quick,
    )


if __name__ == "__main__":
    sys.exit(main())
