"""What a study's reader should know before believing it: optima at the end of a range, failures, few trials."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial

from lmtrain.config.search_space import describe
from lmtrain.sweep.reading import ReadStudy, status_of
from lmtrain.sweep.scales import Scale, scales_of
from lmtrain.sweep.study import outcome_of
from lmtrain.sweep.wording import short_value

EDGE = 0.05
"""An optimum in this share of a range, at either end, counts as lying at its end."""

TRIALS_FOR_A_SETTING = 10
"""Completed trials for each setting below which pictures and importances are a rough guide."""

ONE_SEED = (
    "Each setting was trained once, so small differences may be chance. The same command with sweep.confirm.top=3 "
    "trains the best three again with new seeds and says which can be told apart."
)

_NAMED_TRIALS = 8  # a list of trials names so many
_ABNORMAL = {
    "failed": "failed",
    "invalid": "could not be run with these settings",
    "out_of_memory": "did not fit into memory",
    "diverged": "diverged",
}


def advise(study: ReadStudy, *, is_confirmed: bool = False) -> list[str]:
    """Sentences for the reader, what matters most first."""
    once = [] if is_confirmed or len(study.ranked) < 2 or len(study.objectives) > 1 else [ONE_SEED]
    return [*_unfinished(study), *edges(study), *once, *_few_trials(study), *_abnormal(study), *_pruning(study)]


def edges(study: ReadStudy) -> list[str]:
    """Where the best trial lies at the end of a range, so that better may lie beyond.

    Not said where the end is one by nature (a dropout of 0), of two choices (each is an end), and of several
    objectives (the ends of their front lie there).
    """
    best = study.best
    if best is None or len(study.objectives) > 1:
        return []
    found = (
        (name, scale, _edge(scale, best.params[name]))
        for name, scale in scales_of(study).items()
        if name in best.params
    )
    return [
        f"{name}={short_value(best.params[name])}, the best, lies at the {end} end of what was searched, "
        f"{describe(scale.distribution)}: better may lie beyond. {_wider(name, scale, best.params[name], end)}"
        for name, scale, end in found
        if end is not None
    ]


def _edge(scale: Scale, value: Any) -> str | None:
    """`lower` or `upper` if a value lies at that end of its range, and the range could be wider there."""
    if not scale.is_ordered:
        return None
    distribution = scale.distribution
    levels = _levels(scale)
    if levels is not None and len(levels) < 3:
        return None
    low, high = (levels[0], levels[-1]) if levels is not None else (distribution.low, distribution.high)
    margin = EDGE if levels is None else 1e-9
    place = scale.place(value)
    if place <= margin and not (low == 0 or (low == 1 and isinstance(low, int))):
        return "lower"
    return "upper" if place >= 1 - margin and high != 1.0 else None


def _levels(scale: Scale) -> list[Any] | None:
    """The values there are, by size; None for an interval, or so many that it is like one."""
    match scale.distribution:
        case CategoricalDistribution():
            return scale.choices
        case IntDistribution(low=low, high=high, step=step) if (high - low) / step < 1 / EDGE:
            return list(range(low, high + 1, step))
    return None


def _wider(name: str, scale: Scale, value: Any, end: str) -> str:
    """What to search next."""
    distribution = scale.distribution
    match distribution:
        case FloatDistribution(log=True):
            return f"Search next: '{name}=tag(log,interval({value / 4:.2g},{value * 4:.2g}))'"
        case FloatDistribution() | IntDistribution():
            half = (distribution.high - distribution.low) / 2
            low = max(0.0, value - half) if distribution.low >= 0 else value - half
            return f"Search next from {low:.3g} to {value + half:.3g}"
    levels = _levels(scale) or []
    outer, inner = (levels[-1], levels[-2]) if end == "upper" else (levels[0], levels[1])
    beyond = outer * outer / inner if outer and inner and outer / inner > 0 else 2 * outer - inner
    return f"Search next with {beyond:g} among the choices"


def _unfinished(study: ReadStudy) -> list[str]:
    if study.stopped is not None:
        return [f"The study was stopped: {study.stopped}."]
    left = len(study.trials) - len(study.ended)
    return (
        [f"The study has not ended: {_count(left, 'trial')} to go. The same command goes on with it."] if left else []
    )


def _few_trials(study: ReadStudy) -> list[str]:
    completed, settings = len(study.ranked), len(scales_of(study))
    if not completed:
        return ["No trial was completed, so there is no best setting."]
    if completed < TRIALS_FOR_A_SETTING * settings:
        return [
            f"{_count(completed, 'trial')} completed for {_count(settings, 'setting')}: "
            "importances, slices and contours are a rough guide."
        ]
    return []


def _abnormal(study: ReadStudy) -> list[str]:
    """Trials that ended otherwise, alike ones together."""
    alike: dict[tuple[str, str], list[FrozenTrial]] = defaultdict(list)
    for trial in study.ended:
        if (status := status_of(trial)) in _ABNORMAL:
            alike[status, str(outcome_of(trial).get("reason") or "")].append(trial)
    said = []
    for (status, reason), trials in sorted(alike.items(), key=lambda entry: list(_ABNORMAL).index(entry[0][0])):
        numbers = [str(trial.number) for trial in trials]
        named = ", ".join(numbers[:_NAMED_TRIALS]) + (", …" if len(numbers) > _NAMED_TRIALS else "")
        files = "; error.txt in the folder has the traceback" if status == "failed" else ""
        why = f": {reason}" if reason else ""
        said.append(f"{_count(len(trials), 'trial')} {_ABNORMAL[status]} ({named}){why}{files}.")
    return said


def _pruning(study: ReadStudy) -> list[str]:
    pruned = study.by_kind["pruned"]
    if not pruned:
        return []
    said = f"{len(pruned)} of {len(study.ended)} ended trials were pruned"
    if study.budget_tokens is not None:
        whole = study.budget_tokens * len(study.ended)
        saved = sum(max(0, study.budget_tokens - study.tokens_of(trial)) for trial in pruned)
        said += f", which saved {saved / whole:.0%} of the tokens"
    return [f"{said}."]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
