"""What a whole sweep will take, before it is made: its shapes, time and energy; what cannot fit.

Knows no Hydra: the runs of a grid, or the corners of a study's ranges, are handed in as words and settings.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lmtrain.config.schema import ExperimentConfig
from lmtrain.errors import LmtrainError, NotEnoughMemoryError
from lmtrain.hardware import choose_device
from lmtrain.planning.duration import Machine, energy_kwh
from lmtrain.planning.estimate import Estimate, estimate
from lmtrain.planning.probe import probe
from lmtrain.room import remedies, shortage

log = logging.getLogger(__name__)

Settings = ExperimentConfig | str
"""Of a point; a text says why it cannot be run."""

Point = tuple[Sequence[str], Settings]
"""Words, and what they compose to."""

NAMED = 4
"""Rows that a message names."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Runs that are alike in size."""

    words: tuple[str, ...]  # that all of them have, and not all of the sweep
    runs: int
    estimate: Estimate | None
    reason: str = ""  # why they cannot be run

    @property
    def fits(self) -> bool:
        return self.estimate is not None and self.estimate.fits


@dataclass(frozen=True, kw_only=True)
class SweepEstimate:
    """What a sweep will take."""

    study: str  # its name; empty: a grid
    shapes: tuple[Shape, ...]  # of a grid all, of a study the corners of what it chooses from
    runs: int
    typical: tuple[Estimate, ...]  # runs whose mean stands for each: those of a grid, or points drawn from a study
    at_once: int  # runs at full speed

    @property
    def seconds_a_run(self) -> float | None:
        """In the mean, of a run that goes to its end, by what was measured if anything was; None: not known."""
        known = [found.duration.seconds for found in self.typical if found.duration is not None]
        return sum(known) / len(known) * self._correction if known else None

    @property
    def seconds(self) -> float | None:
        """Of all runs, so many at once."""
        each = self.seconds_a_run
        return None if each is None else self.runs * each / self.at_once

    @property
    def steps(self) -> int | None:
        """Optimizer steps of all runs, in the mean."""
        known = [found.plan.budget.steps for found in self.typical]
        told = [steps for steps in known if steps is not None]
        return round(self.runs * sum(told) / len(told)) if told and len(told) == len(known) else None

    @property
    def energy(self) -> float | None:
        """kWh. Runs side by side on a CPU share what it takes, GPUs take it each."""
        seconds, first = self.seconds, self.typical[0] if self.typical else None
        if seconds is None or first is None:
            return None
        return energy_kwh(seconds, first.power, 1 if first.plan.device.type == "cpu" else self.at_once)

    @property
    def fits(self) -> bool:
        return all(shape.fits for shape in self.shapes)

    @property
    def _correction(self) -> float:
        """What the typical runs were not measured for, where the shapes were."""
        if any(found.probe is not None for found in self.typical):
            return 1.0
        measured = formula = 0.0
        for shape in self.shapes:
            found = shape.estimate
            if found is not None and found.probe is not None:
                measured += found.pace.batch + found.pace.update
                formula += found.formula.batch + found.formula.update
        return measured / formula if formula else 1.0


def estimate_grid(points: Sequence[Point], workers: int, *, probing: bool, watts: float | None) -> SweepEstimate:
    """Of the runs of a grid, with as many points as there are runs. Probing takes some seconds for each shape."""
    shapes = _shapes(points, probing=probing, watts=watts)
    typical = tuple(shape.estimate for shape in shapes for _ in range(shape.runs) if shape.estimate is not None)
    return SweepEstimate(study="", shapes=shapes, runs=len(points), typical=typical, at_once=_at_once(typical, workers))


def estimate_study(
    name: str,
    corners: Sequence[Point],
    drawn: Sequence[Settings],
    num_trials: int,
    workers: int,
    *,
    probing: bool,
    watts: float | None,
) -> SweepEstimate:
    """Of a study: memory of the corners of its ranges, time of points `drawn` from them."""
    shapes = _shapes(corners, probing=probing, watts=watts)
    able = [estimate(config, watts=watts) for config in drawn if not isinstance(config, str)]
    return SweepEstimate(
        study=name, shapes=shapes, runs=num_trials, typical=tuple(able), at_once=_at_once(able, workers)
    )


def require_room_in_grid(points: Sequence[Point]) -> None:
    """Raise NotEnoughMemoryError, with their words, if some runs of a grid cannot be trained at all."""
    short = _short(points)
    if short:
        (_, config), reason = short[0]
        assert isinstance(config, ExperimentConfig)
        raise NotEnoughMemoryError(
            f"{_number(len(short), len(points), 'run')} of this grid cannot be trained here: "
            f"{_named(points, short)}: {reason}\n{remedies(config, choose_device(config.device))}"
        )


def require_room_in_study(corners: Sequence[Point]) -> None:
    """Raise NotEnoughMemoryError if no corner of a study's ranges can be trained; warn if some cannot.

    A trial that finds no room is told to the sampler, which keeps away from there.
    """
    short = _short(corners)
    able = [point for point in corners if isinstance(point[1], ExperimentConfig)]
    if not short:
        return
    (_, config), reason = short[0]
    assert isinstance(config, ExperimentConfig)
    if len(short) == len(able):
        raise NotEnoughMemoryError(
            f"nothing that this study chooses from can be trained here: {reason}\n"
            f"{remedies(config, choose_device(config.device))}"
        )
    log.warning(
        "warning: trials near %s find no room here and count as out of memory: %s", _named(corners, short), reason
    )


def _short(points: Sequence[Point]) -> list[tuple[Point, str]]:
    """The points that cannot be trained at all, with why."""
    found = []
    for point in points:
        config = point[1]
        if isinstance(config, str) or config.force:
            continue
        try:
            missing = shortage(config, choose_device(config.device))
        except LmtrainError as error:  # as a run of it says
            log.debug("%s: %s", " ".join(point[0]), error)
            continue
        if missing is not None:
            found.append((point, str(missing)))
    return found


def _named(points: Sequence[Point], short: Sequence[tuple[Point, str]]) -> str:
    """Words of those points that not all have."""
    own = [" ".join(word for word in words if not all(word in other for other, _ in points)) for (words, _), _ in short]
    different = list(dict.fromkeys(filter(None, own)))
    more = f" and {len(different) - NAMED} more" if len(different) > NAMED else ""
    return "; ".join(different[:NAMED]) + more or "each of them"


def _number(number: int, of: int, what: str) -> str:
    return f"{number} of {of} {what}s" if number < of else f"all {of} {what}s"


def _shapes(points: Sequence[Point], *, probing: bool, watts: float | None) -> tuple[Shape, ...]:
    """Points of one size together. Each distinct one is probed."""
    alike: dict[Any, list[Sequence[str]]] = {}
    found: dict[Any, Estimate | str] = {}
    known: dict[int, Estimate | str] = {}  # by the settings' identity: many points may share them
    for words, settings in points:
        if id(settings) not in known:
            known[id(settings)] = settings if isinstance(settings, str) else _estimate(settings, watts)
        one = known[id(settings)]
        key = one if isinstance(one, str) else _size(one)
        alike.setdefault(key, []).append(words)
        found.setdefault(key, one)
    everywhere = {word for words, _ in points for word in words if all(word in other for other, _ in points)}
    shapes = []
    for key, members in alike.items():
        one = found[key]
        common = tuple(
            word for word in members[0] if word not in everywhere and all(word in words for words in members)
        )
        if isinstance(one, str):
            shapes.append(Shape(words=common, runs=len(members), estimate=None, reason=one))
        else:
            probed = probe(one.plan, one.formula) if probing and one.plan.fits else None
            power = one.power if watts is not None or probed is None else probed.power or one.power
            measured = dataclasses.replace(one, probe=probed, power=power)
            shapes.append(Shape(words=common, runs=len(members), estimate=measured))
    return tuple(shapes)


def _estimate(config: ExperimentConfig, watts: float | None) -> Estimate | str:
    try:
        return estimate(config, watts=watts)
    except LmtrainError as error:
        return str(error).splitlines()[0]


def _size(found: Estimate) -> tuple[Any, ...]:
    """What runs are alike in."""
    plan = found.plan
    size = (plan.parameters, plan.footprint.peak, plan.config.batch_size, plan.config.data.seq_len)
    return (*size, plan.flops_per_token, plan.micro_batch_size, plan.budget, plan.device.type)


def _at_once(found: Sequence[Estimate], workers: int) -> int:
    return Machine.measure(found[0].plan.config).at_once(workers) if found else max(1, workers)
