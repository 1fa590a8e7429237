"""What reruns of the best settings show: means with intervals, and what cannot be told apart.

Owns how they are told: a table, `confirm.csv`, a picture. The arithmetic is in `statistics`, how reruns come about in
`confirm`.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lmtrain.run_dir import STUDY_FILE
from lmtrain.sweep.reading import ReadStudy, kind_of, read_study
from lmtrain.sweep.statistics import BEST, LEVEL, TIED, Interval, Judgement, judge, judge_alone
from lmtrain.sweep.storage import is_url
from lmtrain.sweep.terminal import new_table, output
from lmtrain.sweep.wording import short_names, short_value
from lmtrain.tracking.drawing import BLUE, GREY, INK, VERMILION, new_figure, save_figure

CONFIRM_FOLDER = "confirm"
"""Inside a sweep folder, and the end of the name of the study of reruns."""

TRIAL, SEED = "candidate", "seed"
"""The parameters of a rerun: the trial that is repeated, and with which seed."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A trial that was run again."""

    trial: int
    params: Mapping[str, Any]
    study_value: float  # its objective in the study, by which it was chosen
    values: Mapping[int, float]  # seed → objective, of the runs that came to their end
    mishaps: Mapping[int, str]  # seed → how it ended, of the others

    @cached_property
    def interval(self) -> Interval | None:
        """Its mean over the seeds; None if there are fewer than two."""
        return Interval.of(list(self.values.values()))

    @property
    def mean(self) -> float:
        """Infinity if no run came to its end."""
        return statistics.fmean(self.values.values()) if self.values else math.inf


@dataclass(frozen=True, kw_only=True)
class Confirmation:
    """The candidates of a study after their reruns, the best first. Lower is better."""

    study: str
    objective: str
    num_compared: int  # trials that the candidates were chosen from
    candidates: tuple[Candidate, ...]

    @property
    def best(self) -> Candidate:
        """The lowest mean of those whose runs all came to their end."""
        return self.candidates[0]

    @property
    def seeds(self) -> list[int]:
        """Those that a run came to its end with, in order."""
        return sorted({seed for candidate in self.candidates for seed in candidate.values})

    @cached_property
    def judgements(self) -> dict[int, Judgement]:
        """Trial → how it compares with the best."""
        found = [judge_alone(self.best), *judge(self.best, self.candidates[1:])]
        return {candidate.trial: one for candidate, one in zip(self.candidates, found, strict=True)}

    def conclusions(self) -> list[str]:
        """What follows, in sentences."""
        best = self.best
        verdicts = {trial: judgement.verdict for trial, judgement in self.judgements.items()}
        if verdicts[best.trial] != BEST:
            return [f"No setting can be confirmed: {verdicts[best.trial]}."]
        tied = [trial for trial, verdict in verdicts.items() if verdict == TIED]
        assert best.interval is not None
        found = f"{best.interval.mean:.4f} ({_span(best.interval, '.4f')}) over {len(best.values)} seeds"
        if tied:
            first = (
                f"Trial {best.trial} has the lowest mean, {found}, but {_trials(tied)} cannot be told apart from it. "
                "Choose among them by what else matters, or add seeds: sweep.confirm.seeds"
            )
        else:
            first = f"Trial {best.trial} wins: {self.objective} {found}; the others are worse beyond chance."
        return [first, self._winners_curse()]

    def _winners_curse(self) -> str:
        chosen = min(self.candidates, key=lambda candidate: (candidate.study_value, candidate.trial))
        gap = chosen.mean - chosen.study_value
        return (
            f"The study's own best value, {chosen.study_value:.4f} of trial {chosen.trial}, was the lowest of "
            f"{self.num_compared} and so tends to be optimistic (winner's curse): over new seeds it has a mean of "
            f"{chosen.mean:.4f}, {abs(gap):.4f} {'higher' if gap > 0 else 'lower'}."
        )


def read_confirmation(folder: Path, storage: str | None = None) -> Confirmation | None:
    """What the reruns of a study show so far; None if there are none.

    Args:
        folder: the sweep folder.
        storage: where the study is kept, if not where its folder says.
    """
    if not (folder / CONFIRM_FOLDER / STUDY_FILE).exists():
        return None
    study = read_study(folder, storage)
    where = storage or (study.storage if is_url(study.storage) else str((folder / study.storage).absolute()))
    return confirmation_of(study, read_study(folder / CONFIRM_FOLDER, where))


def confirmation_of(study: ReadStudy, reruns: ReadStudy) -> Confirmation | None:
    """What the reruns of a study show; None if none has ended."""
    values: dict[int, dict[int, float]] = {}
    mishaps: dict[int, dict[int, str]] = {}
    for rerun in reruns.ended:
        trial, seed, kind = rerun.params[TRIAL], rerun.params[SEED], kind_of(rerun)
        if kind == "completed":
            values.setdefault(trial, {})[seed] = float(rerun.values[0])
        else:
            mishaps.setdefault(trial, {})[seed] = kind
    trials = {trial.number: trial for trial in study.trials}
    candidates = [
        Candidate(
            trial=number,
            params=trials[number].params,
            study_value=float(trials[number].values[0]),
            values=dict(sorted(values.get(number, {}).items())),
            mishaps=dict(sorted(mishaps.get(number, {}).items())),
        )
        for number in dict.fromkeys([*values, *mishaps])
    ]
    if not candidates:
        return None
    ranked = sorted(candidates, key=lambda c: (bool(c.mishaps), c.interval is None, c.mean, c.trial))
    return Confirmation(
        study=study.name, objective=study.objectives[0], num_compared=len(study.ranked), candidates=tuple(ranked)
    )


def show_confirmation(folder: Path, storage: str) -> None:
    """Print what the reruns of a study show, and write it into its folder; nothing if there are none."""
    confirmation = read_confirmation(folder, storage)
    if confirmation is not None:
        write_confirmation(confirmation, folder)
        print_confirmation(confirmation)


def print_confirmation(confirmation: Confirmation) -> None:
    """Print table and conclusions."""
    console = output()
    names = short_names(_parameters(confirmation))
    seeds = " ".join(map(str, confirmation.seeds))
    title = (
        f"the best {len(confirmation.candidates)} again, seeds {seeds}: {confirmation.objective}, {LEVEL:.0%} intervals"
    )
    table = new_table(title)
    for heading in ("trial", *names.values(), "in the study", "mean", "interval", "above the best", "p"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for candidate in confirmation.candidates:
        judgement = confirmation.judgements[candidate.trial]
        table.add_row(
            str(candidate.trial),
            *(short_value(candidate.params.get(name, "")) for name in names),
            f"{candidate.study_value:.4f}",
            f"{candidate.mean:.4f}" if candidate.values else "",
            _span(candidate.interval, ".4f"),
            _span(judgement.difference, "+.4f"),
            "" if judgement.p_value is None else f"{judgement.p_value:.2g}",
            _ends(candidate) if candidate.mishaps else judgement.verdict,
            style="bold" if candidate is confirmation.best else None,
        )
    console.print(table)
    for sentence in confirmation.conclusions():
        console.print(sentence, highlight=False, soft_wrap=True)


def write_confirmation(confirmation: Confirmation, folder: Path) -> list[Path]:
    """Write `confirm.csv` and `plots/confirm.png` into the sweep folder; returns their paths."""
    table = folder / "confirm.csv"
    parameters, seeds = _parameters(confirmation), confirmation.seeds
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        spans = ("mean", "low", "high", "difference", "difference_low", "difference_high", "p_value")
        writer.writerow(["trial", *parameters, "study_value", *spans, "verdict", *(f"seed_{seed}" for seed in seeds)])
        for candidate in confirmation.candidates:
            own, judgement = candidate.interval, confirmation.judgements[candidate.trial]
            above = judgement.difference
            writer.writerow(
                [
                    candidate.trial,
                    *(candidate.params.get(name) for name in parameters),
                    candidate.study_value,
                    *((own.mean, own.low, own.high) if own else (None, None, None)),
                    *((above.mean, above.low, above.high) if above else (None, None, None)),
                    judgement.p_value,
                    judgement.verdict,
                    *(candidate.values.get(seed, candidate.mishaps.get(seed)) for seed in seeds),
                ]
            )
    (folder / "plots").mkdir(exist_ok=True)
    return [table, _draw(confirmation, folder / "plots" / "confirm.png")]


def _draw(confirmation: Confirmation, path: Path) -> Path:
    """A line for each candidate: its runs, their mean with its interval, and its value in the study."""
    names = short_names(_parameters(confirmation))
    figure, (axes,) = new_figure(width=8.0)
    figure.set_figheight(1.5 + 0.75 * len(confirmation.candidates))
    labels = []
    for place, candidate in enumerate(confirmation.candidates):
        verdict = confirmation.judgements[candidate.trial].verdict
        colour = BLUE if verdict in (BEST, TIED) else GREY
        first = place == 0
        axes.scatter(
            list(candidate.values.values()),
            [place - 0.2] * len(candidate.values),  # above the line
            s=16,
            color=INK,
            linewidths=0,
            label="a seed" if first else None,
        )
        if (own := candidate.interval) is not None:
            axes.plot([own.low, own.high], [place, place], color=colour, linewidth=2.5, solid_capstyle="butt")
            axes.scatter(
                [own.mean], [place], s=70, color=colour, zorder=4, label="mean, 95 % interval" if first else None
            )
        axes.scatter(
            [candidate.study_value],
            [place],
            s=60,
            marker="D",
            facecolors="none",
            edgecolors=VERMILION,
            zorder=4,
            label="in the study" if first else None,
        )
        settings = ", ".join(f"{short} {short_value(candidate.params[name])}" for name, short in names.items())
        labels.append(f"trial {candidate.trial}: {verdict}\n{settings}")
    axes.set_yticks(range(len(labels)), labels, fontsize=8, color=INK)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlabel(confirmation.objective)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return save_figure(figure, path)


def _parameters(confirmation: Confirmation) -> list[str]:
    return list(dict.fromkeys(name for candidate in confirmation.candidates for name in candidate.params))


def _span(interval: Interval | None, format: str) -> str:
    return "" if interval is None else f"{interval.low:{format}} … {interval.high:{format}}"


def _ends(candidate: Candidate) -> str:
    kinds = list(candidate.mishaps.values())
    counted = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    return f"{counted} of {len(candidate.values) + len(kinds)} runs"


def _trials(numbers: Sequence[int]) -> str:
    words = [str(number) for number in sorted(numbers)]
    return f"trial {words[0]}" if len(words) == 1 else f"trials {', '.join(words[:-1])} and {words[-1]}"
