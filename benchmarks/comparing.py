"""How long 500 runs take to compare: `lmtrain compare` with its page and pictures, and the report of a study of 500.

The run folders are made here: every setting in `config.yaml`, 200 records and 40 evaluations each, five seeds of 100
settings, so that there are statistics to make. The study's trials lie in a journal and have such folders too; a half
was pruned. Each command is a process of its own, from its start to its end, over files that were written just before.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from report import Figure, median_figure, parser, publish, run_lmtrain

RUNS, SEEDS, RECORDS, EVALUATIONS = 500, 5, 200, 40
REPEATS = 6
TOKENS_PER_RECORD = 20_480
LIMIT = 10.0  # seconds


def main() -> int:
    arguments = parser(__doc__).parse_args()
    count, repeats = (20, 1) if arguments.quick else (RUNS, REPEATS)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _make_runs(folder / "runs", count)
        _make_study(folder / "study", count)
        commands = {
            f"compare {count} runs, with page and pictures": ("compare", "runs", "--to", "page"),
            f"compare {count} runs, table only": ("compare", "runs"),
            f"report of a study of {count} trials": ("sweep", "report", "study"),
        }
        samples: dict[str, list[float]] = {name: [] for name in commands}
        loads = []
        for _ in range(repeats):
            for name, words in commands.items():
                loads.append(os.getloadavg()[0])
                samples[name].append(run_lmtrain(words, folder=folder, cache=folder / "cache"))
    figures = [median_figure(name, seconds, unit="s", at_most=LIMIT) for name, seconds in samples.items()]
    figures.append(Figure(name="load of the machine before each command, the highest", value=max(loads)))
    made = {"runs": count, "seeds": SEEDS, "records": RECORDS, "evaluations": EVALUATIONS}
    return publish("comparing", figures, config=made, samples=samples | {"load": loads}, quick=arguments.quick)


def _make_runs(folder: Path, count: int) -> None:
    """A grid of learning rates and dropouts, each with every seed."""
    from lmtrain.config.compose import compose_config
    from lmtrain.config.saved import to_yaml

    config = compose_config(["data=text", "data.path=book.txt", "trainer.max_steps=2000"])
    draw = random.Random(0)
    for number in range(count):
        setting = number // SEEDS
        lr, dropout, seed = 1e-3 * 1.2 ** (setting % 20), 0.05 * (setting // 20), number % SEEDS
        text = to_yaml(dataclasses.replace(config, lr=lr, dropout=dropout, seed=seed))
        _write_run(folder / f"{number:04d}", text, _curve(draw, lr, RECORDS), [f"{lr=}", f"{dropout=}", f"{seed=}"])


def _curve(draw: random.Random, lr: float, records: int) -> list[dict[str, float]]:
    """Records of a run whose loss depends on its learning rate."""
    floor = 3.0 + 0.1 * abs(math.log(lr / 6e-3)) + draw.gauss(0, 0.01)
    made = []
    for number in range(1, records + 1):
        loss = floor + 4 * math.exp(-number / 40) + draw.gauss(0, 0.02)
        record = {"step": 10 * number, "tokens": TOKENS_PER_RECORD * number, "time": 1.7e9 + number, "attempt": 0}
        record |= {"train/loss": loss, "train/lr": lr, "train/grad_norm": 0.5, "train/tokens_per_second": 15_000.0}
        if number % (RECORDS // EVALUATIONS) == 0:
            record |= {"val/loss": loss, "val/perplexity": math.exp(loss), "val/bits_per_byte": loss / 2}
        made.append(record)
    return made


def _write_run(folder: Path, config: str, records: list[dict[str, float]], words: list[str]) -> None:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    last = records[-1]
    result: dict[str, Any] = {"status": "completed", "objective": last["val/loss"], "objective_name": "val/loss"}
    result |= {"best_step": last["step"], "step": last["step"], "tokens": last["tokens"], "seconds": 140.0}
    result |= {"metrics": {name: value for name, value in last.items() if "/" in name}, "overrides": words}
    result |= {"texts": {"book.txt": "0" * 64}, "data_fingerprint": "0", "tokenizer_fingerprint": "1"}
    (folder / "result.json").write_text(json.dumps(result))


def _make_study(folder: Path, count: int) -> None:
    """Trials over four settings; those whose loss is above the median so far were pruned halfway."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution
    from optuna.trial import TrialState, create_trial

    from lmtrain.sweep.reading import write_description
    from lmtrain.sweep.storage import journal_path
    from lmtrain.sweep.study import SharedStudy, StudyPlan

    folder.mkdir()
    space = {
        "lr": FloatDistribution(1e-4, 1e-1, log=True),
        "dropout": FloatDistribution(0.0, 0.3),
        "batch_size": CategoricalDistribution((4, 8, 16)),
        "optimizer.weight_decay": FloatDistribution(0.0, 0.2),
    }
    plan = StudyPlan(
        name="study",
        storage=journal_path(folder),
        folder=folder,
        directions=("minimize",),
        space=space,
        num_trials=count,
        budget_tokens=RECORDS * TOKENS_PER_RECORD,
    )
    study = SharedStudy(plan)
    write_description(plan)
    draw, losses, trials = random.Random(1), [], []
    for number in range(count):
        params = {
            "lr": 10 ** draw.uniform(-4, -1),
            "dropout": draw.uniform(0, 0.3),
            "batch_size": draw.choice((4, 8, 16)),
            "optimizer.weight_decay": draw.uniform(0, 0.2),
        }
        whole = _curve(draw, params["lr"], RECORDS)
        pruned = bool(losses) and whole[-1]["val/loss"] > sorted(losses)[len(losses) // 2]
        losses.append(whole[-1]["val/loss"])
        records = whole[: RECORDS // 2] if pruned else whole
        reports = {int(record["tokens"]): record["val/loss"] for record in records if "val/loss" in record}
        begun = 1.7e9 + 70 * number
        attempt = {"worker": str(number % 2), "host": "host", "begun": begun, "ended": begun + 140}
        outcome = {"status": "pruned" if pruned else "completed", "step": records[-1]["step"]}
        trials.append(
            create_trial(
                state=TrialState.PRUNED if pruned else TrialState.COMPLETE,
                value=None if pruned else losses[-1],
                params=params,
                distributions=space,
                intermediate_values=reports,
                user_attrs={"attempts": [attempt], "outcome": outcome | {"tokens": records[-1]["tokens"]}},
            )
        )
        _write_run(folder / f"{number:04d}", "lr: 1\n", records, [f"{name}={value}" for name, value in params.items()])
    study.study.add_trials(trials)


if __name__ == "__main__":
    sys.exit(main())
