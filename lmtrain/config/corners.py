"""The ends of what a study chooses from: where a run is as large, or as small, as any of it."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

NOT_OF_SIZE = ("lr", "seed", "schedule", "objective", "tracking", "sweep", "resume", "force")
"""Settings and groups that change neither the memory of a run nor how long it takes."""

MAX_CORNERS = 64


def is_of_size(name: str) -> bool:
    """Whether a setting, or the word that gives it, may change the memory of a run or its time."""
    return re.split("[.=]", name.lstrip("+~"), maxsplit=1)[0] not in NOT_OF_SIZE


def corners(distributions: Mapping[str, BaseDistribution]) -> list[dict[str, Any]]:
    """Every combination of both ends of each range and of all choices, of settings that are of size.

    Of more than MAX_CORNERS so many, drawn at random, always the same.
    """
    ends = {name: list(_ends(found)) for name, found in distributions.items() if is_of_size(name)}
    number = math.prod(map(len, ends.values()))
    if number <= MAX_CORNERS:
        return [dict(zip(ends, values, strict=True)) for values in itertools.product(*ends.values())]
    draw = random.Random(0)
    drawn = ({name: draw.choice(values) for name, values in ends.items()} for _ in range(MAX_CORNERS))
    return list({str(point): point for point in drawn}.values())


def _ends(distribution: BaseDistribution) -> Iterable[Any]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    return dict.fromkeys((distribution.low, distribution.high))
