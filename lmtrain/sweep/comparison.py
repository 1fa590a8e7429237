"""Runs side by side: which settings differ, what each reached, and where the numbers do not compare.

Reads run folders only, so it works for any sweeper and launcher, and later. How it is shown is in `comparison_view`,
its files in `comparison_report`; what seeds allow to conclude is in `repetition`.
"""

from __future__ import annotations

import difflib
import logging
import math
import os
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lmtrain.config.saved import PATHS, UNSEEN_IN_RESULTS, is_among, load_yaml
from lmtrain.config.schema import SCHEMAS
from lmtrain.errors import ConfigError, RunFolderError
from lmtrain.reading import RecordedRun, read_run
from lmtrain.run_dir import RunDir

log = logging.getLogger(__name__)

COMPLETED = ("completed", "early_stopped")
"""How a run ends that came to its end."""

BITS = "val/bits_per_byte"

_NO_SETTINGS = PATHS | {"resume", "force"}
_GROUPS = (*SCHEMAS, "experiment")
_NOT_ENTERED = ("mlruns", "mlartifacts")  # copies of what is in the run folders
_HIGHER_IS_BETTER = ("tokens_per_second", "mfu")
_SAME_BUDGET = 0.98  # runs whose tokens differ by less had the same: batch sizes round


@dataclass(frozen=True)
class Row:
    """One run of a comparison."""

    name: str
    run: RecordedRun

    @property
    def status(self) -> str:
        return self.run.status

    @property
    def came_to_its_end(self) -> bool:
        return self.run.status in COMPLETED

    @cached_property
    def result(self) -> dict[str, Any]:
        """What `result.json` says; of a run without one as much as its records tell."""
        if self.run.result is not None:
            return self.run.result
        records = self.run.records
        latest: dict[str, float] = {}
        for record in records:
            latest |= record
        metrics = {name: value for name, value in latest.items() if "/" in name}
        seconds = records[-1]["time"] - records[0]["time"] if records else None
        return {"metrics": metrics, "seconds": seconds} | {name: latest.get(name) for name in ("step", "tokens")}

    @cached_property
    def objective(self) -> str:
        """The name of what the run minimises, the first if there are several."""
        named = self.result.get("objective_name", self.run.config.get("objective", "val/loss"))
        return str(named[0] if isinstance(named, list) else named)

    @cached_property
    def words(self) -> dict[str, str]:
        """The key=value words that made the run, by key."""
        words: Iterable[str] = self.result.get("overrides", ())
        given = self.run.folder.path / ".hydra" / "overrides.yaml"
        if self.run.result is None and given.is_file():
            words = map(str, load_yaml(given.read_text(encoding="utf-8")) or ())
        return dict(word.lstrip("+~").split("=", 1) for word in words if "=" in word)

    def best_value(self, metric: str) -> float | None:
        """The lowest value of its objective; None if there is none that is finite."""
        if self.run.result is not None:
            return _finite(self.result.get("objective"))
        return min(filter(math.isfinite, (one[metric] for one in self.run.records if metric in one)), default=None)

    def last_value(self, metric: str) -> float | None:
        """The last value of a metric; None if there is none that is finite."""
        counts = {"run/seconds": self.result.get("seconds"), "run/parameters": self.result.get("parameters")}
        return _finite((self.result["metrics"] | counts).get(metric))


@dataclass(frozen=True)
class Comparison:
    """Runs by a metric, best first; those that did not come to their end follow."""

    rows: list[Row]
    metric: str
    is_objective: bool  # the best value of a run counts, not its last

    def value(self, row: Row) -> float | None:
        """What a run is compared by."""
        return row.best_value(self.metric) if self.is_objective else row.last_value(self.metric)

    def loss(self, row: Row) -> float:
        """The same for sorting: lower is better, infinity if there is none."""
        value = self.value(row)
        return math.inf if value is None else -value if higher_is_better(self.metric) else value

    @property
    def best(self) -> Row | None:
        """The best of the runs that came to their end."""
        first = self.rows[0] if self.rows else None
        return first if first is not None and first.came_to_its_end and self.value(first) is not None else None

    @cached_property
    def settings(self) -> dict[str, dict[str, Any]]:
        """Name of a run → those of its settings that not all runs have alike."""
        return {row.name: {key: found[key] for key in self.keys if key in found} for row, found in self._all}

    @cached_property
    def shared(self) -> dict[str, Any]:
        """The settings that all runs have alike."""
        differing = set(self._differing)
        return {key: value for key, value in (self._all[0][1] if self._all else {}).items() if key not in differing}

    @cached_property
    def identities(self) -> dict[str, tuple[Hashable, ...]]:
        """Name of a run → all that makes its result another one, but for its seed."""
        differing = [key for key in self._differing if key != "seed" and not is_among(UNSEEN_IN_RESULTS, key)]
        return {
            row.name: (
                *(found.get(key) for key in differing),
                *(row.result.get(name) for name in ("data_fingerprint", "tokenizer_fingerprint")),
            )
            for row, found in self._all
        }

    @cached_property
    def _all(self) -> list[tuple[Row, dict[str, Hashable]]]:
        chosen = [group for group in _GROUPS if all(group in row.words for row in self.rows)]
        return [(row, _settings(row) | {group: row.words[group] for group in chosen}) for row in self.rows]

    @cached_property
    def _differing(self) -> list[str]:
        values: dict[str, set[Hashable]] = {}
        for _, found in self._all:
            for key, value in found.items():
                values.setdefault(key, set()).add(value)
        return [key for key, several in values.items() if len(several) > 1]

    @cached_property
    def keys(self) -> list[str]:
        """The settings that differ: those given as words first, and none that follow from the choice of a group."""
        given = dict.fromkeys(key for row in self.rows for key in row.words)
        chosen = [key for key in self._differing if key in _GROUPS]
        rest = [key for key in self._differing if key in given or not any(self._follows(key, one) for one in chosen)]
        order = {key: place for place, key in enumerate(given)}
        return sorted(rest, key=lambda key: order.get(key, len(order)))

    def _follows(self, key: str, group: str) -> bool:
        """Whether a setting is one that the choice of a group has brought along."""
        if key == group or (group != "experiment" and not key.startswith(f"{group}.")):
            return False
        pairs = {(found.get(group), found.get(key)) for _, found in self._all}
        return len(pairs) == len({choice for choice, _ in pairs})


def compare(runs: Sequence[RecordedRun], metric: str | None = None) -> Comparison:
    """Runs by a metric, or by their objective.

    Raises ConfigError if no run has the metric, or their objectives are different and no metric stands for all.
    """
    rows = [Row(name, run) for name, run in zip(_names(runs), runs, strict=True)]
    objectives = {row.objective for row in rows}
    if metric is None and len(objectives) > 1:
        metric = _common_metric(rows, objectives)
    elif metric is not None:
        _require(metric, rows)
    chosen = metric or next(iter(objectives), "val/loss")
    unsorted = Comparison(rows, chosen, is_objective=objectives == {chosen})
    ranked = sorted(rows, key=lambda row: (not row.came_to_its_end, unsorted.loss(row), row.name))
    return Comparison(ranked, chosen, unsorted.is_objective)


def find_runs(paths: Iterable[Path]) -> list[RecordedRun]:
    """The runs of run folders, and of all folders below others, each once.

    A run that cannot be read is refused where it was named, and left out with a warning where it was found. Raises
    RunFolderError for that, and for a path that holds no run.
    """
    found: dict[Path, RecordedRun] = {}
    for path in paths:
        named = RunDir(path).is_run()
        if not named and not path.is_dir():
            read_run(path)  # says what is wrong with it
        folders = [path] if named else list(_run_folders(path))
        if not folders:
            raise RunFolderError(f"there is no run in {path}: the folder of a run has config.yaml and metrics.jsonl")
        for folder in folders:
            if folder.resolve() in found:
                log.warning("%s is named twice; it counts once", RunDir(folder))
                continue
            try:
                run = read_run(folder)
                _ = run.records
            except RunFolderError as error:
                if named:
                    raise
                log.warning("left out: %s", error)
            else:
                found[folder.resolve()] = run
    if not found:
        raise RunFolderError("none of the runs can be read")
    return list(found.values())


def higher_is_better(metric: str) -> bool:
    """Whether more of a metric is better; of losses, which are the rule, less is."""
    return metric.rpartition("/")[2] in _HIGHER_IS_BETTER


def doubts(comparison: Comparison) -> list[str]:
    """Where the numbers of the runs do not compare, in sentences."""
    return [*_other_texts(comparison), *_other_tokenizers(comparison), *_other_budgets(comparison)]


def _other_texts(comparison: Comparison) -> Iterator[str]:
    texts = [row.result["texts"] for row in comparison.rows if row.result.get("texts")]
    fingerprints: dict[str, set[str]] = {}
    for name, fingerprint in (pair for one in texts for pair in one.items()):
        fingerprints.setdefault(name, set()).add(fingerprint)
    changed = [name for name, several in fingerprints.items() if len(several) > 1]
    for name in changed:
        yield f"{name} is not the same text in all runs: they do not compare"
    if not changed and len({frozenset(one) for one in texts}) > 1:
        yield f"The runs were trained on different texts ({', '.join(sorted(fingerprints))}): they do not compare"


def _other_tokenizers(comparison: Comparison) -> Iterator[str]:
    tokenizers = {row.result.get("tokenizer_fingerprint") for row in comparison.rows} - {None}
    if len(tokenizers) > 1 and comparison.metric in ("val/loss", "val/perplexity", "train/loss"):
        yield (
            f"The runs have {len(tokenizers)} tokenizers, so what they lose a token does not compare; bits per byte "
            f"do: --metric {BITS}"
        )


def _other_budgets(comparison: Comparison) -> Iterator[str]:
    ended = [row.result["tokens"] for row in comparison.rows if row.status == "completed"]
    if ended and min(ended) < _SAME_BUDGET * max(ended):
        least, most = (f"{tokens:,}" for tokens in (min(ended), max(ended)))
        yield f"The completed runs saw from {least} to {most} tokens: what is lower may only be trained longer"


def _settings(row: Row) -> dict[str, Hashable]:
    return {
        key: value if isinstance(value, Hashable) else str(value)
        for key, value in row.run.settings.items()
        if not is_among(_NO_SETTINGS, key) and not key.startswith("sweep")
    }


def _common_metric(rows: Sequence[Row], objectives: Iterable[str]) -> str:
    for metric in (BITS, "val/loss"):
        if all(row.last_value(metric) is not None for row in rows if row.came_to_its_end):
            log.warning(
                "the runs have different objectives (%s): compared by %s", ", ".join(sorted(objectives)), metric
            )
            return metric
    raise ConfigError(f"the runs have different objectives ({', '.join(sorted(objectives))}): choose by --metric NAME")


def _require(metric: str, rows: Sequence[Row]) -> None:
    known = dict.fromkeys(["run/seconds", "run/parameters", *(name for row in rows for name in row.result["metrics"])])
    if metric not in known:
        nearest = difflib.get_close_matches(metric, known, n=1, cutoff=0.4)
        hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(sorted(known))}"
        raise ConfigError(f"no run has a metric {metric}; {hint}")


def _names(runs: Sequence[RecordedRun]) -> list[str]:
    """The folders as seen from the one they have in common."""
    folders = [run.folder.path.resolve() for run in runs]
    common = os.path.commonpath([folder.parent for folder in folders]) if folders else ""
    return [os.path.relpath(folder, common) for folder in folders]


def _run_folders(root: Path) -> Iterator[Path]:
    for folder, below, files in os.walk(root):
        if "config.yaml" in files and {"metrics.jsonl", "result.json", ".lock"} & set(files):
            below.clear()
            yield Path(folder)
        below[:] = sorted(name for name in below if not name.startswith(".") and name not in _NOT_ENTERED)


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
