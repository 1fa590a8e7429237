"""What a study searches, read from the words of the command line and `hydra.sweeper.params`.

The syntax is hydra-optuna-sweeper's: `lr=tag(log, interval(1e-3, 1e-2))`, `batch_size=choice(4,8)`, `range(1,4)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
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
        """The overrides that make the trial of these parameters."""
        return [*self.fixed, *(f"{name}={value}" for name, value in params.items())]


def parse_space(params: Mapping[str, str] | None, arguments: Sequence[str]) -> SearchSpace:
    """The space of `hydra.sweeper.params` and the command line, which wins. Raises ConfigError for an empty range."""
    from hydra_plugins.hydra_optuna_sweeper._impl import create_params_from_overrides

    parser = OverridesParser.create()
    distributions: dict[str, BaseDistribution] = {}
    fixed: dict[str, str] = {}
    for word in [*(f"{name}={value}" for name, value in (params or {}).items()), *arguments]:
        name = parser.parse_override(word).get_key_element()
        try:
            searched, _, _ = create_params_from_overrides([word])
        except (ValueError, AssertionError, NotImplementedError) as error:
            raise ConfigError(f"{word}: {_rule(str(error))}") from error
        distributions.pop(name, None)
        fixed.pop(name, None)
        if searched:
            distributions |= searched
            _require_room(word, searched[name])
        else:
            fixed[name] = word
    return SearchSpace(distributions=distributions, fixed=tuple(fixed.values()))


def _require_room(word: str, distribution: BaseDistribution) -> None:
    low, high = getattr(distribution, "low", 0), getattr(distribution, "high", 1)
    if low >= high and not getattr(distribution, "step", None):
        raise ConfigError(f"{word}: the lower end of an interval must be below its upper end, got {low} and {high}")


def _rule(message: str) -> str:
    """Optuna's message in words of the command line."""
    text = message.split("\n")[0]
    if "log" in text and "low" in text:
        return f"a logarithmic interval must lie above 0 ({text})"
    return text


def describe(distribution: BaseDistribution) -> str:
    """A range for people: `0.001 … 0.02 (log)`, `4 | 8 | 16`."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    match distribution:
        case CategoricalDistribution():
            return " | ".join(str(choice) for choice in distribution.choices)
        case FloatDistribution() | IntDistribution():
            step = "" if distribution.step in (None, 1) else f" (step {distribution.step:g})"
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


def current_value(config: DictConfig, name: str) -> Any:
    """What a composed config has where a parameter goes: the option of a group, or a setting."""
    key = name.lstrip("+").split("@")[0]
    choices = config.hydra.runtime.choices
    if key in choices:
        return choices[key]
    return OmegaConf.select(config, key)
