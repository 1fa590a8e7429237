"""What the words of a study let it choose from, and the words that make a trial of a choice."""

from __future__ import annotations

from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from lmtrain.config.compose import config_dir, register
from lmtrain.config.search_space import (
    SearchSpace,
    defaults_within,
    describe,
    matching_choice,
    override_word,
    parse_space,
)
from lmtrain.errors import ConfigError
from lmtrain.sweep.setup import grid_points


def choices(*values: Any) -> CategoricalDistribution:
    return CategoricalDistribution(values)


# What hydra-optuna-sweeper makes of these is the same.
SYNTAX: dict[str, BaseDistribution] = {
    "choice(1,2)": choices(1, 2),
    "1,2": choices(1, 2),
    "choice(true,false)": choices(True, False),
    "choice('hello','world')": choices("hello", "world"),
    "choice([1,2],[3,4])": choices("[1,2]", "[3,4]"),
    "sort(3,1,2)": choices(1, 2, 3),
    "sort(choice(3,1,2),reverse=true)": choices(3, 2, 1),
    "range(1,3)": IntDistribution(1, 2),
    "range(0,8,3)": IntDistribution(0, 6, step=3),
    "range(3,0,-1)": IntDistribution(1, 3),
    "range(0.5,5.5,step=1)": FloatDistribution(0.5, 4.5, step=1),
    "range(0,1,0.1)": FloatDistribution(0.0, 0.9, step=0.1),
    "int(range(0,5,1.5))": choices(0, 1, 3, 4),
    "float(range(1,3))": choices(1.0, 2.0),
    "interval(1,5)": FloatDistribution(1, 5),
    "int(interval(1,5))": IntDistribution(1, 5),
    "tag(log,interval(1,5))": FloatDistribution(1, 5, log=True),
    "tag(other,log,interval(1e-3,1e-2))": FloatDistribution(1e-3, 1e-2, log=True),
    "tag(log,int(interval(1,5)))": IntDistribution(1, 5, log=True),
}

REFUSED = {
    "interval(2,1)": "must be below its upper end, got 2.0 and 1.0",
    "interval(1,1)": "must be below its upper end",
    "int(interval(4,4))": "must be below its upper end",
    "interval(1,inf)": "both ends of an interval must be finite",
    "interval(nan,1)": "both ends of an interval must be finite",
    "tag(log,interval(0,1))": "a logarithmic interval must lie above 0, got 0.0",
    "tag(log,int(interval(-1,3)))": "a logarithmic interval must lie above 0, got -1",
    "range(4,4)": "must contain at least one value",
    "range(1,4,-1)": "must contain at least one value",
    "range(4,8,0)": "nonzero step",
    "glob(*)": "x=choice(A,B)",
}


@pytest.mark.parametrize("words", SYNTAX)
def test_the_syntax_of_the_optuna_sweeper_is_valid(words: str) -> None:
    space = parse_space(None, [f"x={words}"])
    assert space.distributions == {"x": SYNTAX[words]}
    assert space.fixed == ()
    assert parse_space({"x": words}, []).distributions == space.distributions


@pytest.mark.parametrize("words", REFUSED)
def test_a_range_that_holds_nothing_is_refused(words: str) -> None:
    with pytest.raises(ConfigError) as told:
        parse_space(None, [f"x={words}"])
    assert str(told.value).startswith(f"x={words}: ")
    assert REFUSED[words] in str(told.value)
    assert "\n" not in str(told.value)


def test_a_shuffled_choice_is_the_same_in_the_next_process() -> None:
    """Else the study would be another one when its command is given again."""
    first, again = (parse_space(None, ["x=shuffle(range(1,30))"]).distributions["x"] for _ in range(2))
    assert isinstance(first, CategoricalDistribution)
    assert first == again
    assert set(first.choices) == set(range(1, 30))
    assert list(first.choices) != list(range(1, 30))


def test_a_value_is_not_offered_twice() -> None:
    assert parse_space(None, ["x=int(range(0,1,0.25))"]).distributions == {"x": choices(0)}
    assert parse_space(None, ["x=choice(1,true,1)"]).distributions == {"x": choices(1, True)}


def test_the_command_line_wins_over_the_option() -> None:
    params = {"lr": "interval(0.1,0.2)", "dropout": "interval(0.0,0.2)", "seed": "3"}
    space = parse_space(params, ["dropout=0.1", "seed=choice(1,2)", "~tracking", "hydra.sweeper.params.x=1"])
    assert space.distributions == {"lr": FloatDistribution(0.1, 0.2), "seed": choices(1, 2)}
    assert space.fixed == ("dropout=0.1", "~tracking", "hydra.sweeper.params.x=1")


def test_a_study_adds_no_settings() -> None:
    for word in ("+new=choice(1,2)", "++lr=interval(0.1,0.2)"):
        with pytest.raises(ConfigError, match="write it without"):
            parse_space(None, [word])
    assert parse_space(None, ["+new=1"]).fixed == ("+new=1",), "refused when it is composed, as in a single run"


@pytest.mark.parametrize(
    "value", [1, 1e-05, True, None, "muon", "a b", "a,b", "it's", "[1,2]", "{a:1}", "choice(1,2)", "${lr}", "x=y", ""]
)
def test_a_trial_gets_just_the_value_that_was_chosen(value: Any) -> None:
    override = OverridesParser.create().parse_override(override_word("x", value))
    assert not override.is_sweep_override()
    found = override.value()
    if isinstance(value, str) and value[:1] in ("[", "{"):
        found = override.get_value_string()
    assert found == value or str(found) == value


def test_words_of_a_trial_are_those_of_all_and_its_own() -> None:
    space = SearchSpace(distributions={}, fixed=("model=tiny",))
    assert space.words({"lr": 0.003, "optimizer": "muon"}) == ["model=tiny", "lr=0.003", "optimizer=muon"]


def test_ranges_are_told_to_people() -> None:
    told = {
        "choice(4,8,16)": "4 | 8 | 16",
        "tag(log,interval(1e-3,2e-2))": "0.001 … 0.02 (log)",
        "range(1,5)": "1 … 4",
        "range(0,9,2)": "0 … 8 (step 2)",
        "range(0,1,0.25)": "0 … 0.75 (step 0.25)",
    }
    assert {words: describe(parse_space(None, [f"x={words}"]).distributions["x"]) for words in told} == told


def test_defaults_that_lie_within_their_ranges_are_where_a_study_begins() -> None:
    register()
    with initialize_config_dir(str(config_dir())):
        config = compose("lmtrain", ["optimizer=adamw", "lr=0.004"], return_hydra_config=True)
    ranges: dict[str, BaseDistribution] = {
        "optimizer": choices("muon", "adamw"),
        "model": choices("tiny", "small"),  # the default is nano
        "lr": FloatDistribution(1e-3, 1e-2, log=True),
        "model.d_model": IntDistribution(128, 256, step=64),
        "batch_size": choices(4, 8),
        "dropout": FloatDistribution(0.1, 0.2),
    }
    assert defaults_within(config, ranges) == {"optimizer": "adamw", "lr": 0.004, "model.d_model": 128, "batch_size": 8}
    assert matching_choice(ranges["model.d_model"], 130) is None
    assert matching_choice(ranges["lr"], "fast") is None


def test_a_grid_is_every_combination_in_order() -> None:
    space: dict[str, BaseDistribution] = {
        "a": choices("x", "y"),
        "b": IntDistribution(1, 5, step=2),
        "c": FloatDistribution(0.1, 0.3, step=0.1),
    }
    points = grid_points(space)
    assert len(points) == 2 * 3 * 3
    assert points[0] == {"a": "x", "b": 1, "c": 0.1}
    assert points[-1] == {"a": "y", "b": 5, "c": 0.3}
    assert [point["c"] for point in points[:3]] == [0.1, 0.2, 0.3], "as they would be typed"
