"""German to English in a quarter of an hour of processor time: `experiment=multi30k`, trained and evaluated.

The folder holds Multi30k as line-aligned files (train, val, test_2016_flickr; .de and .en; .gz or not). BLEU and chrF
are those of `lmtrain evaluate` on the test set, with beam search. The processor time is that of the whole training
command, of all its threads: reading the data, the tokenizer, evaluations and checkpoints included. A few sentences of
our own, which no data set holds, are translated and printed: whether they read right is for the reader to say.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from report import Figure, parser, publish, run_lmtrain

MAX_MINUTES = 15.0
SENTENCES = (
    "Ein Mann schläft auf einem Sofa.",
    "Zwei Hunde spielen im Schnee.",
    "Eine Frau liest ein Buch im Park.",
    "Ein kleines Mädchen in einem roten Kleid springt ins Wasser.",
    "Drei Männer stehen vor einem großen Gebäude.",
    "Ein Junge fährt mit dem Fahrrad auf der Straße.",
    "Die Kinder essen Eis am Strand.",
    "Eine alte Frau kocht in der Küche.",
)


def processor_seconds() -> float:
    """Of the processes started and ended so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def output_of(words: list[str], *, folder: Path, text: str = "") -> str:
    """What a command of ours writes to standard output."""
    process = subprocess.run(
        [sys.executable, "-m", "lmtrain", *words],
        cwd=folder,
        env=os.environ | {"LMTRAIN_CACHE": str(folder / "cache")},
        input=text,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return process.stdout


def main() -> int:
    command_line = parser(__doc__)
    command_line.add_argument("path", type=Path, help="the folder of Multi30k")
    command_line.add_argument("--seeds", type=int, default=1, help="runs, with seeds from 0 (default 1)")
    command_line.add_argument("overrides", nargs="*", help="settings, as parallel.num_threads=1")
    arguments = command_line.parse_intermixed_args()
    words = ["experiment=multi30k", f"data.path={arguments.path.absolute()}", "tracking=none"]
    words += ["parallel.num_threads=1", *arguments.overrides]  # a second thread costs processor time of its own
    words += ["trainer.max_steps=20", "trainer.eval_batches=2"] if arguments.quick else []
    minutes, losses, bleus, chrfs, kept = [], [], [], [], []
    for seed in range(1 if arguments.quick else arguments.seeds):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            before = processor_seconds()
            wall = run_lmtrain([*words, f"seed={seed}", "hydra.run.dir=run"], folder=folder, cache=folder / "cache")
            minutes.append((processor_seconds() - before) / 60)
            limit = ["--max-sentences", "20"] if arguments.quick else []
            found = json.loads(output_of(["evaluate", "run", "--split", "test", "--json", *limit], folder=folder))
            english = output_of(["generate", "run"], folder=folder, text="\n".join(SENTENCES)).splitlines()
            config = yaml.safe_load((folder / "run" / "config.yaml").read_text(encoding="utf-8"))
        losses.append(found["test/loss"])
        bleus.append(found["test/bleu"])
        chrfs.append(found["test/chrf"])
        kept.append({"seed": seed, "wall_seconds": wall, "evaluation": found, "translations": english})
        for german, translation in zip(SENTENCES, english, strict=True):
            print(f"{german:<62} {translation}")

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    figures = [
        Figure(name="training, processor time of the slowest", value=max(minutes), unit="min", at_most=MAX_MINUTES),
        Figure(
            name="training, wall time of the slowest", value=max(one["wall_seconds"] for one in kept) / 60, unit="min"
        ),
        Figure(name="test loss", value=mean(losses), unit="nats"),
        Figure(name="BLEU, beam search", value=mean(bleus)),
        Figure(name="chrF", value=mean(chrfs)),
    ]
    return publish("translation", figures, config=config, samples={"runs": kept}, quick=arguments.quick)


if __name__ == "__main__":
    sys.exit(main())
