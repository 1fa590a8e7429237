"""Run folders with numbers in them, made without training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trained_runs import composed_once

from lmtrain.config.saved import to_yaml
from lmtrain.run_dir import RunDir
from lmtrain.tracking.metrics_file import MetricsFile


def records_of(losses: Sequence[float], **extra: float) -> list[dict[str, float]]:
    """A record of training and evaluation after each 10 steps of 64 tokens."""
    return [
        {"step": 10 * n, "tokens": 640 * n, "time": 1e9 + n, "attempt": 0, "train/loss": loss + 0.1, "train/lr": 1e-3}
        | {"val/loss": loss, "val/perplexity": 2.7182818**loss, "val/bits_per_byte": loss / 2}
        | extra
        for n, loss in enumerate(losses, start=1)
    ]


def result_of(records: Sequence[Mapping[str, float]], **changed: Any) -> dict[str, Any]:
    """What a run of these records leaves in `result.json`."""
    last = records[-1]
    metrics = {name: value for name, value in last.items() if "/" in name}
    losses = [record["val/loss"] for record in records]
    best = min(losses)
    return {
        "status": "completed",
        "objective": best,
        "objectives": {"val/loss": best},
        "objective_name": "val/loss",
        "last_score": losses[-1],
        "best_step": records[losses.index(best)]["step"],
        "step": last["step"],
        "tokens": last["tokens"],
        "metrics": metrics,
        "seconds": 12.5,
        "training_seconds": 10.0,
        "overrides": [],
        "texts": {"nowhere.txt": "a" * 64},
        "data_fingerprint": "data",
        "tokenizer_fingerprint": "bytes",
        "parameters": 7000,
    } | changed


def record_run(
    path: Path, losses: Sequence[float], *words: str, result: Mapping[str, Any] | None = None, ended: bool = True
) -> Path:
    """A run folder with these validation losses; `words` as on the command line, `result`: what differs in it."""
    folder = RunDir(path)
    path.mkdir(parents=True)
    folder.config.write_text(to_yaml(composed_once(["data=text", "data.path=nowhere.txt", *words])), encoding="utf-8")
    records = records_of(losses)
    file = MetricsFile(folder.metrics)
    for record in records:
        file.append(record)
    file.close()
    if ended:
        folder.result.write_text(json.dumps(result_of(records, **{"overrides": list(words), **(result or {})})))
    return path
