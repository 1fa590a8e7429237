"""What a study searches, read from the words of the command line and `hydra.sweeper.params`.

The syntax is hydra-optuna-sweeper's: `lr=tag(log, interval(1e-3, 1e-2))`, `batch_size=choice(4,8)`, `range(1,4)`.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from lmtrain.errors import ConfigError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """Settings that a study chooses, and words that all its trials share."""

    distributions: dict[str, BaseDistribution]
    fixed: tuple[str, ...]

    def words(self, params: Mapping[str, Any]) -> list[str]:
        """The overrides that make the trial of these parameters. Raises ConfigError if one of them is fixed."""
        for word in self.fixed:
            if (name := _setting(word)) in params:
                raise ConfigError(f"{name} is suggested by the search function, so that {word} is not possible")
        return [*self.fixed, *(override_word(name, value) for name, value in params.items())]

    def changed(self, settings: Mapping[str, Any]) -> SearchSpace:
        """The same with these settings for all trials, instead of what they share now."""
        kept = (word for word in self.fixed if _setting(word) not in settings)
        words = (override_word(name, value) for name, value in settings.items())
        return dataclasses.replace(self, fixed=(*kept, *words))


def _setting(word: str) -> str:
    return word.partition("=")[0].lstrip("+")


def parse_space(params: Mapping[str, str] | None, arguments: Sequence[str]) -> SearchSpace:
    """The space of `hydra.sweeper.params` and the command line, which wins. Raises ConfigError for an empty range."""
    parser = OverridesParser.create()
    distributions: dict[str, BaseDistribution] = {}
    fixed: dict[str, str] = {}
    for word in [*(f"{name}={value}" for name, value in (params or {}).items()), *arguments]:
        override = parser.parse_override(word)
        name = override.get_key_element()
        distributions.pop(name, None)
        fixed.pop(name, None)
        if not override.is_sweep_override():
            fixed[name] = word
        elif name.startswith("+"):
            raise ConfigError(f"{word}: write it without +, a study chooses among the settings there are")
        else:
            distributions[name] = _distribution(override, word)
    return SearchSpace(distributions=distributions, fixed=tuple(fixed.values()))


def _distribution(override: Override, word: str) -> BaseDistribution:
    """What a word lets a study choose from. Raises ConfigError if that is nothing."""
    from hydra_plugins.hydra_optuna_sweeper._impl import create_optuna_distribution_from_override
    from optuna.distributions import CategoricalDistribution

    value = override.value()
    if isinstance(value, IntervalSweep):
        _require_interval(word, value)
    if isinstance(value, Glob):
        raise ConfigError(f"{word}: a study needs the names, {override.get_key_element()}=choice(A,B)")
    state = random.getstate()
    random.seed(word)  # what shuffle() makes of it belongs to the study: the same each time
    try:
        found: BaseDistribution = create_optuna_distribution_from_override(override)
    except (ValueError, NotImplementedError) as error:
        raise ConfigError(f"{word}: {str(error).splitlines()[0]}") from error
    finally:
        random.setstate(state)
    if not isinstance(found, CategoricalDistribution):
        return found
    unlike = {(type(choice), choice): choice for choice in found.choices}  # True is not 1
    return CategoricalDistribution(tuple(unlike.values()))


def _require_interval(word: str, interval: IntervalSweep) -> None:
    low, high = interval.start, interval.end
    assert low is not None
    assert high is not None
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ConfigError(f"{word}: both ends of an interval must be finite")
    if low >= high:
        raise ConfigError(f"{word}: the lower end of an interval must be below its upper end, got {low} and {high}")
    if "log" in interval.tags and low <= 0:
        raise ConfigError(f"{word}: a logarithmic interval must lie above 0, got {low} as its lower end")


def override_word(name: str, value: Any) -> str:
    """A setting as a word of the command line that means just this value."""
    if value is None:
        return f"{name}=null"
    if not isinstance(value, str) or _reads_as(f"{name}={value}", value):
        return f"{name}={value}"
    return f"{name}={QuotedString(value, Quote.single).with_quotes()}"


def _reads_as(word: str, value: str) -> bool:
    """Whether Hydra takes a word for one value written so; a list or a dictionary is."""
    try:
        override = OverridesParser.create().parse_override(word)
    except HydraException:
        return False
    return not override.is_sweep_override() and override.get_value_string() == value


def describe(distribution: BaseDistribution) -> str:
    """A range for people: `0.001 … 0.02 (log)`, `4 | 8 | 16`."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    match distribution:
        case CategoricalDistribution():
            return " | ".join(str(choice) for choice in distribution.choices)
        case FloatDistribution() | IntDistribution():
            implied = 1 if isinstance(distribution, IntDistribution) else None
            step = "" if distribution.step == implied else f" (step {distribution.step:g})"
            return f"{distribution.low:g} … {distribution.high:g}{' (log)' if distribution.log else step}"
    raise AssertionError(distribution)


def matching_choice(distribution: BaseDistribution, value: Any) -> Any:
    """`value` as the distribution has it; None if it lies outside."""
    from optuna.distributions import CategoricalDistribution

    if isinstance(distribution, CategoricalDistribution):
        same = [choice for choice in distribution.choices if choice == value or str(choice) == str(value)]
        return same[0] if same else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if distribution._contains(value) else None


def defaults_within(config: DictConfig, distributions: Mapping[str, BaseDistribution]) -> dict[str, Any]:
    """What a composed config has where each parameter goes, for those of which it lies within the range."""
    found = {name: matching_choice(among, _current_value(config, name)) for name, among in distributions.items()}
    return {name: value for name, value in found.items() if value is not None}


def _current_value(config: DictConfig, name: str) -> Any:
    """What a composed config has where a parameter goes: the option of a group, or a setting."""
    key = name.lstrip("+").split("@")[0]
    choices = config.hydra.runtime.choices
    if key in choices:
        return choices[key]
    return OmegaConf.select(config, key)
