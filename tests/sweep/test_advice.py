"""What a report warns of, and what it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from studies import begun, end

from lmtrain.sweep.advice import advise, edges
from lmtrain.sweep.reading import read_study

RATE = FloatDistribution(1e-3, 2e-2, log=True)
DROPOUT = FloatDistribution(0.0, 0.2)


def edges_of(folder: Path, distribution: BaseDistribution, value: Any, **changes: Any) -> list[str]:
    study = begun(folder, space={"x": distribution}, starting_points=[{"x": value}], num_trials=1, **changes)
    end(study, "completed", *range(3, 3 + len(study.plan.directions)))
    return edges(read_study(folder))


@pytest.mark.parametrize(
    ("distribution", "value", "end_of_it", "next_search"),
    [
        (RATE, 1.95e-2, "upper", "x=tag(log,interval(0.0049,0.078))"),
        (RATE, 1.05e-3, "lower", "x=tag(log,interval(0.00026,0.0042))"),
        (DROPOUT, 0.199, "upper", "from 0.099 to 0.299"),
        (CategoricalDistribution([4, 8, 16]), 16, "upper", "with 32 among"),
        (CategoricalDistribution([16, 4, 8]), 4, "lower", "with 2 among"),
        (IntDistribution(2, 6), 6, "upper", "from 4 to 8"),
        (IntDistribution(10, 1000), 995, "upper", "from 500 to 1.49e+03"),
    ],
)
def test_an_optimum_at_the_end_of_its_range_is_told(
    tmp_path: Path, distribution: BaseDistribution, value: Any, end_of_it: str, next_search: str
) -> None:
    (said,) = edges_of(tmp_path, distribution, value)
    assert f"lies at the {end_of_it} end of what was searched" in said
    assert next_search in said


@pytest.mark.parametrize(
    ("distribution", "value"),
    [
        (RATE, 1e-2),
        (RATE, 1.3e-3),  # a tenth of the way, as such a rate was searched
        (DROPOUT, 0.0),  # there is no less
        (FloatDistribution(0.5, 1.0), 1.0),
        (IntDistribution(1, 5), 1),
        (IntDistribution(2, 6), 5),
        (CategoricalDistribution([4, 8, 16]), 8),
        (CategoricalDistribution([4, 8]), 8),  # each of two is an end
        (CategoricalDistribution(["adamw", "muon", "lion"]), "lion"),
        (CategoricalDistribution([False, True]), True),
    ],
)
def test_other_optima_are_not(tmp_path: Path, distribution: BaseDistribution, value: Any) -> None:
    assert edges_of(tmp_path, distribution, value) == []


def test_the_front_of_several_objectives_lies_at_ends_by_nature(tmp_path: Path) -> None:
    assert edges_of(tmp_path, RATE, 2e-2, directions=("minimize", "minimize"), objectives=("a", "b")) == []


def test_failures_are_told_once_each_with_their_reason(tmp_path: Path) -> None:
    study = begun(tmp_path)
    for _ in range(3):
        end(study, "failed", reason="KeyError: 1")
    end(study, "invalid", reason="d_model must be even")
    end(study, "diverged", 9.0)
    said = advise(read_study(tmp_path))
    assert said[0].startswith("The study has not ended: 5 trials to go")
    assert "3 trials failed (0, 1, 2): KeyError: 1; error.txt in the folder has the traceback." in said
    assert "1 trial could not be run with these settings (3): d_model must be even." in said
    assert "1 trial diverged (4)." in said


def test_pruning_is_told_with_what_it_saved(tmp_path: Path) -> None:
    study = begun(tmp_path, num_trials=4)
    for _ in range(2):
        end(study, "completed", *([3.0] * 10))
        end(study, "pruned", 4.0)
    said = advise(read_study(tmp_path))
    assert "2 of 4 ended trials were pruned, which saved 45% of the tokens." in said
    assert any(sentence.startswith("Each setting was trained once") for sentence in said)
    assert not any(sentence.startswith("Each setting") for sentence in advise(read_study(tmp_path), is_confirmed=True))


def test_a_stopped_study_says_why(tmp_path: Path) -> None:
    study = begun(tmp_path)
    end(study, "failed", reason="KeyError: 1")
    study.stop("the first 3 trials failed alike: KeyError: 1")
    assert advise(read_study(tmp_path))[0] == "The study was stopped: the first 3 trials failed alike: KeyError: 1."
