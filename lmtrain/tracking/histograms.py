"""The histograms file: how the weights of each layer were distributed, one JSON object a looked-at step.

Owns the format. Beside the metrics file because its records are not flat numbers; `metrics_file.truncate_after` cuts
it back like that one. Each line is `{"step": …, "layers": {name: {"low": …, "high": …, "counts": […]}}}`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Histogram:
    """Counts of values in bins of equal width from `low` to `high`."""

    low: float
    high: float
    counts: Sequence[int]


def append_histograms(path: Path, step: int, layers: Mapping[str, Histogram]) -> None:
    """Add the histograms of a step, by layer."""
    record = {"step": step, "layers": {name: dataclasses.asdict(histogram) for name, histogram in layers.items()}}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read_histograms(path: Path) -> dict[int, dict[str, Histogram]]:
    """Histograms by step and layer, in the order they were made; none if there is no file.

    A last line that a crash tore is left out.
    """
    if not path.exists():
        return {}
    complete = path.read_text(encoding="utf-8").rpartition("\n")[0]
    records = [json.loads(line) for line in complete.splitlines()]
    return {
        record["step"]: {name: Histogram(**histogram) for name, histogram in record["layers"].items()}
        for record in records
    }
