"""What a newcomer waits for and gets: `python -m lmtrain` in an empty folder with an empty cache.

The time is that of the whole program, from reading the corpus to the sample and the plots. The sample is printed,
and the share of its lines that look like Python is counted: they open with a keyword, a comment, a decorator, a
name that is assigned, called or indexed, or a bracket. Prose, such as this paragraph, has next to none.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

import yaml
from report import Figure, median_figure, parser, publish, run_lmtrain

from lmtrain.run_dir import RunDir

MAX_SECONDS = 240.0
MIN_PYTHON_SHARE = 0.5
PYTHON_LINE = re.compile(
    r"""\s*(?:
        (?:async\ )?(?:def|class|with|for)\ \w.*   # opens a block
        | (?:if|elif|while|except)\b.*:            # ... with a condition
        | (?:else|try|finally):
        | (?:from|import|return|raise|assert|del|yield|global)\ .*
        | (?:return|pass|break|continue)$
        | \#.* | @\w.* | \"\"\".* | [\])}].*
        | [\w.]+(?:,\ [\w.]+)*\ [-+*/|&]?=\ .*     # assigns
        | [\w.]+[(\[].*                            # calls or indexes
    )""",
    re.VERBOSE,
)


def python_share(text: str) -> float:
    """The share of the lines with something on them that look like Python; 0 if there is no such line."""
    lines = [line for line in text.splitlines() if line.strip()]
    return sum(PYTHON_LINE.match(line) is not None for line in lines) / max(len(lines), 1)


def main() -> int:
    command_line = parser(__doc__)
    command_line.add_argument("--runs", type=int, default=1, help="with seeds from 0 (default 1)")
    command_line.add_argument("overrides", nargs="*", help="settings, as parallel.num_threads=1")
    arguments = command_line.parse_intermixed_args()
    overrides = [*(["trainer.max_steps=20", "trainer.eval_batches=2"] if arguments.quick else []), *arguments.overrides]
    seconds, results, samples = [], [], []
    for seed in range(1 if arguments.quick else arguments.runs):
        with tempfile.TemporaryDirectory() as temporary:
            cwd = Path(temporary)
            words = [*overrides, *([f"seed={seed}"] if seed else [])]
            seconds.append(run_lmtrain(words, folder=cwd, cache=cwd / "cache"))
            folder = RunDir(next(cwd.glob("outputs/*/*")))
            results.append(folder.read_result() or {})
            samples.append(folder.sample.read_text(encoding="utf-8"))
            config = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
        print(f"sample of seed {seed}:\n" + "\n".join(f"  | {line}" for line in samples[-1].split("\n")))

    figures = [
        Figure(name="whole program, slowest run", value=max(seconds), unit="s", at_most=MAX_SECONDS),
        Figure(
            name="sample lines that look like Python, fewest",
            value=min(map(python_share, samples)),
            at_least=MIN_PYTHON_SHARE,
        ),
        median_figure("training", [result["training_seconds"] for result in results], unit="s"),
        median_figure("validation loss", [result["metrics"]["val/loss"] for result in results], unit="nats"),
        median_figure("bits per byte", [result["metrics"]["val/bits_per_byte"] for result in results], unit="bits"),
    ]
    kept = {"seconds": seconds, "metrics": [result["metrics"] for result in results], "text": samples}
    return publish("default_run", figures, config=config, samples=kept, quick=arguments.quick)


if __name__ == "__main__":
    sys.exit(main())
