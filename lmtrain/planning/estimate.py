"""A plan with its time and energy: by formula, or corrected by a probe."""

from __future__ import annotations

from dataclasses import dataclass

from lmtrain.config.schema import ExperimentConfig
from lmtrain.planning.duration import Duration, Machine, Pace, duration, energy_kwh, pace_by_formula
from lmtrain.planning.plan import Plan, make_plan
from lmtrain.planning.power import Power, power_limit
from lmtrain.planning.probe import Probe, probe


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run will take."""

    plan: Plan
    formula: Pace
    probe: Probe | None  # what was measured, if anything
    power: Power | None  # None: not known

    @property
    def pace(self) -> Pace:
        return self.formula if self.probe is None else self.probe.pace

    @property
    def duration(self) -> Duration | None:
        """None: not known before the text is prepared."""
        return duration(self.plan, self.pace)

    @property
    def energy(self) -> float | None:
        """kWh of all devices; None: not known."""
        taken = self.duration
        return None if taken is None else energy_kwh(taken.seconds, self.power, self.plan.devices)

    @property
    def peak(self) -> float:
        """Bytes of a device's memory when it is fullest, corrected by what was measured."""
        return self.plan.footprint.peak * (1.0 if self.probe is None else self.probe.memory_ratio)

    @property
    def fits(self) -> bool:
        """By formula and, if it was measured, by that as well."""
        return self.plan.fits and self.peak <= self.plan.room


def estimate(
    config: ExperimentConfig,
    *,
    devices: int = 1,
    machine: Machine | None = None,
    probing: bool = False,
    watts: float | None = None,
) -> Estimate:
    """The plan of a run on this machine with its time and energy.

    Args:
        devices: that make it together, with parallel=ddp or parallel=fsdp.
        machine: as measured before.
        probing: make short real steps; not where the run does not fit.
        watts: what a device takes, where that is known better than by its own limit or meter.

    Raises UsageError for a request that the run would refuse as well.
    """
    plan = make_plan(config, devices)
    machine = machine or Machine.measure(config)
    formula = pace_by_formula(plan, machine)
    probed = probe(plan, formula) if probing and plan.fits else None
    power = Power(watts=watts, basis="as given") if watts is not None else None
    power = power or (probed and probed.power) or power_limit(plan.device)
    return Estimate(plan=plan, formula=formula, probe=probed, power=power)
