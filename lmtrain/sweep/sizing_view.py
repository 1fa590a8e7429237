"""What a sweep will take, for people, and as a record for programs."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from lmtrain.fitting import bytes_text
from lmtrain.planning.duration import duration_text
from lmtrain.planning.view import count_text, record
from lmtrain.sweep.sizing import Shape, SweepEstimate
from lmtrain.sweep.terminal import output

MAX_ROWS = 40


def show_sweep(found: SweepEstimate) -> None:
    """Print what a sweep will take."""
    console = output()
    for heading, text in _lines(found):
        console.print(f"{heading:<10} {escape(text)}", soft_wrap=True, highlight=False)
    console.print(_table(found))
    for text in (*_refusals(found), _verdict(found)):
        console.print(escape(text), soft_wrap=True, highlight=False)


def _lines(found: SweepEstimate) -> list[tuple[str, str]]:
    steps = "" if found.steps is None else f", {found.steps:,} steps"
    if found.study:
        kind = ("study", f"{found.study}: {found.runs:,} trials{steps}; below, the corners of what it chooses from")
    else:
        shapes = f"{len(found.shapes):,} shape{'s' * (len(found.shapes) != 1)}"
        kind = ("grid", f"{found.runs:,} runs{steps}, of {shapes}")
    return [kind, ("time", _time(found)), ("energy", _energy(found))]


def _time(found: SweepEstimate) -> str:
    if found.seconds is None or found.seconds_a_run is None:
        return "not known before the text is prepared: the budget is in passes over it"
    several = f"{found.at_once:,} at a time" if found.at_once > 1 else "one after the other"
    unknown = any(one.duration is not None and one.duration.evaluation is None for one in found.typical)
    missing = "; evaluations of the whole validation split not counted" if unknown else ""
    probed = any(shape.estimate is not None and shape.estimate.probe is not None for shape in found.shapes)
    basis = "measured just now" if probed else found.typical[0].pace.basis
    return (
        f"about {duration_text(found.seconds)} if all go to the end, {several}, {duration_text(found.seconds_a_run)} "
        f"each{missing}; {basis}"
    )


def _energy(found: SweepEstimate) -> str:
    if found.energy is None:
        return "not known; --watts W says what a device takes"
    power = found.typical[0].power
    assert power is not None
    return f"about {found.energy:.3g} kWh at {power.watts:.0f} W ({power.basis})"


def _table(found: SweepEstimate) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("corner" if found.study else "shape", overflow="fold")
    numbers = ("" if found.study else "runs", "parameters", "memory", "microbatch", "a step", "a run")
    for heading in filter(None, numbers):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for shape in found.shapes[:MAX_ROWS]:
        runs = [] if found.study else [f"{shape.runs:,}"]
        table.add_row(escape(" ".join(shape.words) or "all"), *runs, *_cells(shape))
    if len(found.shapes) > MAX_ROWS:
        table.add_row(f"… and {len(found.shapes) - MAX_ROWS} more")
    return table


def _cells(shape: Shape) -> list[str]:
    one = shape.estimate
    if one is None:
        return ["", "", "", "", "", "cannot be run"]
    taken, plan = one.duration, one.plan
    return [
        count_text(plan.parameters.total),
        bytes_text(one.peak),
        f"{plan.micro_batch_size:,} of {plan.config.batch_size:,}",
        duration_text(one.pace.batch + one.pace.update),
        "?" if taken is None else duration_text(taken.seconds),
        "" if one.fits else "does not fit",
    ]


def _refusals(found: SweepEstimate) -> list[str]:
    """Why some cannot be run. Not in the table, whose cells are too narrow for reasons."""
    return [
        f"cannot be run: {' '.join(shape.words)}: {shape.reason}" for shape in found.shapes[:MAX_ROWS] if shape.reason
    ]


def _verdict(found: SweepEstimate) -> str:
    able = [shape for shape in found.shapes if shape.estimate is not None]
    short = [shape for shape in able if not shape.fits]
    rooms = {shape.estimate.plan.room for shape in able if shape.estimate is not None}
    room = f" into {bytes_text(max(rooms))}" if rooms else ""
    if not short:
        return f"each of them fits{room}" if able else "none of them can be run"
    each = "corners" if found.study else "shapes"
    return f"{len(short):,} of {len(able):,} {each} do not fit{room}; `lmtrain plan` with their words tells why"


def record_sweep(found: SweepEstimate) -> dict[str, Any]:
    """The same as plain values."""
    return {
        "kind": "study" if found.study else "grid",
        "name": found.study or None,
        "runs": found.runs,
        "steps": found.steps,
        "at_once": found.at_once,
        "seconds": found.seconds,
        "seconds_a_run": found.seconds_a_run,
        "energy_kwh": found.energy,
        "fits": found.fits,
        "shapes": [
            {
                "words": list(shape.words),
                "runs": None if found.study else shape.runs,
                "reason": shape.reason or None,
                "plan": None if shape.estimate is None else record(shape.estimate),
            }
            for shape in found.shapes
        ],
    }
