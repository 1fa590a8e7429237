"""What the benchmarks share: starting the program, intervals, the table and the result file.

Measures nothing itself. Lower is better for every figure with `at_most`, higher for one with `at_least`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from lmtrain.tracking.environment import describe_environment, git_state

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
CONFIDENCE = 0.95  # of every interval
FOLDERS = re.compile(r"(?:(?<![^\s='\"])|(?<=sqlite:///))(/[^/\s'\"]+)/(?:[^/\s'\"]+/)*")
"""What may be those of an absolute path; addresses have something before their slashes."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured number, and what it should be."""

    name: str
    value: float
    unit: str = ""
    interval: tuple[float, float] | None = None
    at_most: float | None = None
    at_least: float | None = None

    @property
    def target(self) -> str:
        if self.at_most is not None:
            return f"≤ {self.at_most:g}"
        return "" if self.at_least is None else f"≥ {self.at_least:g}"

    @property
    def reached(self) -> bool:
        """Whether the value is what it should be; NaN never is."""
        low = -math.inf if self.at_least is None else self.at_least
        high = math.inf if self.at_most is None else self.at_most
        return low <= self.value <= high


def median_figure(name: str, samples: Sequence[float], *, unit: str = "", at_most: float | None = None) -> Figure:
    """The median of samples with its interval."""
    return Figure(
        name=name,
        value=statistics.median(samples),
        unit=unit,
        interval=median_interval(samples),
        at_most=at_most,
    )


def median_interval(samples: Sequence[float]) -> tuple[float, float] | None:
    """An interval for the median by order statistics, which assumes nothing about the distribution.

    The k-th smallest and the k-th largest of n samples enclose the median unless fewer than k samples fall on one
    side of it, and the number on a side is binomial(n, 1/2). With fewer than six not even the extremes will do: None.
    """
    ordered, n = sorted(samples), len(samples)
    miss = 2 * 0.5**n  # probability that the median lies outside the k-th extremes, for k = 1
    k = 0
    while miss <= 1 - CONFIDENCE:
        k += 1
        miss += 2 * math.comb(n, k) * 0.5**n
    return (ordered[k - 1], ordered[n - k]) if k else None


def parser(description: str | None) -> argparse.ArgumentParser:
    """A command line with the option every benchmark has."""
    command_line = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command_line.add_argument(
        "--quick", action="store_true", help="a few samples to see that it works: judges nothing, writes nothing"
    )
    return command_line


def run_lmtrain(
    arguments: Sequence[str], *, folder: Path, cache: Path, program: Sequence[str] = ("-m", "lmtrain"), status: int = 0
) -> float:
    """Run `python -m lmtrain ARGUMENTS` in a folder with its own data cache; returns wall seconds.

    Output is kept back and shown only when the exit status is not the expected one, which ends the benchmark.
    """
    environment = os.environ | {"LMTRAIN_CACHE": str(cache)}
    environment.pop("MLFLOW_TRACKING_URI", None)  # a benchmark's runs do not belong on anyone's server
    started = time.perf_counter()
    process = subprocess.run(
        [sys.executable, *program, *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    seconds = time.perf_counter() - started
    if process.returncode != status:
        sys.exit(f"{shlex.join(arguments)}: exit status {process.returncode}, expected {status}\n{process.stdout}")
    return seconds


def publish(
    name: str,
    figures: Sequence[Figure],
    *,
    config: Mapping[str, Any],
    samples: Mapping[str, Any],
    quick: bool,
) -> int:
    """Print the figures and write `results/DATE_name.json`; returns the exit status: 1 if a target is missed.

    `config` holds the resolved settings of what was measured, `samples` every single measurement.
    """
    _print_table(name, figures, judge=not quick)
    if quick:
        return 0
    git = git_state(ROOT)
    content = {
        "benchmark": name,
        "date": date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "commit": None if git is None else git.commit + ("+changes" if git.dirty else ""),
        "environment": {key: value for key, value in describe_environment().items() if key != "hostname"},
        "figures": [asdict(figure) | {"reached": figure.reached} for figure in figures],
        "samples": samples,
        "config": config,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{content['date']}_{name}.json"
    path.write_text(json.dumps(without_folders(content), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written to {path.relative_to(ROOT)}")
    return 0 if all(figure.reached for figure in figures) else 1


def without_folders(content: Any) -> Any:
    """The same with every absolute path by its last name: where it lay on one machine is nobody's business.

    Text that only looks like a path, as a young model writes it, stays: nothing lies there.
    """
    if isinstance(content, Mapping):
        return {key: without_folders(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [without_folders(value) for value in content]
    if not isinstance(content, str):
        return content
    return FOLDERS.sub(lambda found: "" if Path(found[1]).is_dir() else found[0], content)


def _print_table(title: str, figures: Sequence[Figure], *, judge: bool) -> None:
    """Plain text: a machine that measures may have nothing that draws tables."""
    rows = [["figure", "value", f"{CONFIDENCE:.0%} interval", "target", ""]]
    for figure in figures:
        interval = "" if figure.interval is None else "{:.4g} … {:.4g}".format(*figure.interval)
        verdict = ("reached" if figure.reached else "MISSED") if judge and figure.target else ""
        rows.append([figure.name, f"{figure.value:.4g} {figure.unit}".strip(), interval, figure.target, verdict])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(title)
    for name, *others in rows:
        cells = [name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        print("  ".join(cells).rstrip())
