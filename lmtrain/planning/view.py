"""A plan for people, and as a record for programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lmtrain.config.presets import preset_of
from lmtrain.config.schema import EncoderDecoderConfig, TransformerConfig
from lmtrain.fitting import MEMORY_OF, bytes_text
from lmtrain.hardware import has_bf16_instructions
from lmtrain.model.sizing import block_shapes
from lmtrain.planning.duration import duration_text
from lmtrain.planning.estimate import Estimate
from lmtrain.planning.plan import Plan
from lmtrain.training.footprint import PARTS


def show(estimate: Estimate) -> None:
    """Print what a run will take."""
    plan, console = estimate.plan, Console(highlight=False)
    for heading, text in (*_lines(plan), *_division(plan), *_costs(estimate)):
        console.print(f"{heading:<10} {escape(text)}", soft_wrap=True)
    console.print(_parameter_table(plan), _memory_table(plan))
    for text in (*_measured(estimate), _verdict(estimate)):
        console.print(escape(text), soft_wrap=True)


def _lines(plan: Plan) -> Iterator[tuple[str, str]]:
    config = plan.config
    yield "model", f"{plan.parameters.total:,} parameters: {_shape(plan.model)}"
    if plan.model_choice:
        yield "auto", plan.model_choice
    assumed = ", assumed: it follows from a text that was not prepared yet" if plan.vocab_assumed else ""
    yield "vocabulary", f"{plan.vocab_size:,} tokens{assumed}"
    yield "arithmetic", f"{count_text(plan.flops_per_token)} FLOPs a token, in sequences of {config.data.seq_len:,}"
    yield "budget", _budget(plan)
    timed = config.precision.format == "auto" and plan.device.type == "cpu" and has_bf16_instructions()
    yield (
        "device",
        f"{plan.device.type}, in {plan.memory.work.format}"
        + (" (bf16 if that is faster here, which is timed when a run starts)" if timed else ""),
    )


def _costs(estimate: Estimate) -> Iterator[tuple[str, str]]:
    """Time and energy, with where they come from."""
    taken, pace = estimate.duration, estimate.pace
    if taken is None:
        yield "time", "not known before the text is prepared: it is as long as that"
        return
    parts = [f"steps {duration_text(taken.training)}"]
    if taken.evaluation is not None:
        number = estimate.plan.budget.evaluations
        parts.append(f"{number:,} evaluation{'' if number == 1 else 's'} {duration_text(taken.evaluation)}")
    else:
        parts.append("evaluations of the whole validation split not counted, as the text was not prepared yet")
    if taken.checkpoints:
        parts.append(f"copies for checkpoints {duration_text(taken.checkpoints)}")
    yield "time", f"about {duration_text(taken.seconds)}: {', '.join(parts)}; {pace.basis}"
    if estimate.energy is None or estimate.power is None:
        device = "processor" if estimate.plan.device.type == "cpu" else "GPU"
        yield "energy", f"not known: this {device} does not tell what power it takes; --watts W says it"
    else:
        yield "energy", f"about {estimate.energy:.3g} kWh at {estimate.power.watts:.0f} W ({estimate.power.basis})"


def _division(plan: Plan) -> Iterator[tuple[str, str]]:
    """How several devices share the work."""
    if plan.config.parallel.strategy == "single":
        return
    yield (
        "devices",
        f"{plan.devices:,} by parallel={plan.config.parallel.strategy}, each with {plan.share:,} sequences of a batch; "
        f"each sends {bytes_text(plan.exchanged)} a step, whose time is not counted",
    )


def _measured(estimate: Estimate) -> Iterator[str]:
    """What the probe found, beside what the formulas say."""
    probe = estimate.probe
    if probe is None:
        return
    (measured, pace), size = (probe.pace, estimate.formula), f"{probe.micro_batch_size:,} sequences at a time"
    scaled = ", scaled from fewer sequences" if probe.scaled else ""
    yield (
        f"measured in {probe.steps} steps with {size}: a step takes {measured.batch + measured.update:.3g} s"
        f"{scaled}, by formula {pace.batch + pace.update:.3g} s; "
        f"memory {bytes_text(probe.peak)}, by formula {bytes_text(probe.formula_peak)}"
    )


def _shape(model: TransformerConfig) -> str:
    blocks = (
        f"{model.num_encoder_layers} + {model.num_decoder_layers}"
        if isinstance(model, EncoderDecoderConfig)
        else str(len(block_shapes(model)))
    )
    preset = preset_of(model)
    return f"{blocks} blocks of width {model.d_model:,}" + (f", as model={preset}" if preset else "")


def _budget(plan: Plan) -> str:
    config, budget = plan.config, plan.budget
    steps = "some steps" if budget.steps is None else f"{budget.steps:,} steps"
    of = f"{steps} of {config.batch_size:,} sequences"
    if budget.tokens is None:
        epochs = config.trainer.max_epochs
        passes = "" if epochs is None else f", {epochs:g} passes over the text"
        return f"{of}{passes}; how many tokens that is follows from the text, which was not prepared yet"
    assert plan.flops is not None
    return f"{of}, {count_text(budget.tokens)} tokens, {count_text(plan.flops)} FLOPs"


def _parameter_table(plan: Plan) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("parameters")
    table.add_column("", justify="right")
    for part, number in dataclasses.asdict(plan.parameters).items():
        if number:
            table.add_row(part.replace("_", "-"), f"{number:,}")
    return table


def _memory_table(plan: Plan) -> Table:
    footprint = plan.footprint
    table = Table(box=box.SIMPLE_HEAD)
    each = " on each device" if plan.devices > 1 else ""
    table.add_column(f"{MEMORY_OF[plan.device.type]} of a step{each}")
    table.add_column("at most", justify="right")
    table.add_column(f"in the {footprint.fullest}", justify="right")
    for part in PARTS:
        if largest := footprint.largest(part):
            table.add_row(part, bytes_text(largest), bytes_text(footprint.moments[footprint.fullest].get(part, 0)))
    table.add_section()
    table.add_row("together, when it is fullest", "", bytes_text(footprint.peak))
    if plan.memory.offloaded_bytes:
        table.add_row("beside it: what lies in main memory", bytes_text(plan.memory.offloaded_bytes), "")
    if plan.device.type != "cpu":
        table.add_row("beside it: the checkpoint's copy, in main memory", bytes_text(plan.memory.checkpoint_bytes), "")
    return table


def _verdict(estimate: Estimate) -> str:
    plan = estimate.plan
    size, batch, largest = plan.micro_batch_size, plan.share, plan.largest_micro_batch_size
    needed, room = bytes_text(estimate.peak), f"{bytes_text(plan.room)} of {MEMORY_OF[plan.device.type]}"
    if estimate.fits:
        all_of_it = "the whole batch" if plan.devices == 1 else "its share of the batch"
        whole = all_of_it if size >= batch else f"{size:,} of {batch:,} sequences"
        return f"fits into {room} with {whole} at a time; up to {largest:,} sequences would"
    if plan.fits:
        return f"does not fit into {room}: by what was measured, {needed} with {size:,} sequences at a time"
    if largest:
        told = f"trainer.micro_batch_size={size} needs {needed}"
        return f"does not fit into {room}: {told}; up to {largest:,} sequences fit at a time"
    return (
        f"does not fit into {room}: one sequence at a time needs {needed}; take a smaller model, shorter sequences, "
        "trainer.activation_checkpointing=full or another optimizer"
    )


def record(estimate: Estimate) -> dict[str, Any]:
    """The same as plain values."""
    plan, footprint = estimate.plan, estimate.plan.footprint
    return {
        "model": {"preset": preset_of(plan.model), "choice": plan.model_choice or None}
        | dataclasses.asdict(plan.model),
        "vocab_size": plan.vocab_size,
        "vocab_size_assumed": plan.vocab_assumed,
        "parameters": dataclasses.asdict(plan.parameters) | {"total": plan.parameters.total},
        "flops_per_token": plan.flops_per_token,
        "steps": plan.budget.steps,
        "tokens": plan.budget.tokens,
        "flops": plan.flops,
        "device": plan.device.type,
        "format": plan.memory.work.format,
        "devices": plan.devices,
        "strategy": plan.config.parallel.strategy,
        "exchanged_bytes_a_step": plan.exchanged,
        "batch_size": plan.config.batch_size,
        "seq_len": plan.config.data.seq_len,
        "memory": {
            "parts": {part: footprint.largest(part) for part in PARTS},
            "fullest": footprint.fullest,
            "at_fullest": {part: footprint.moments[footprint.fullest].get(part, 0) for part in PARTS},
            "peak": footprint.peak,
            "room": plan.room,
            "checkpoint_copy": plan.memory.checkpoint_bytes,
        },
        "micro_batch_size": plan.micro_batch_size,
        "largest_micro_batch_size": plan.largest_micro_batch_size,
        "fits": estimate.fits,
        "time": _time_record(estimate),
        "energy_kwh": estimate.energy,
        "power": None if estimate.power is None else dataclasses.asdict(estimate.power),
        "probe": None if estimate.probe is None else _probe_record(estimate),
    }


def _time_record(estimate: Estimate) -> dict[str, Any] | None:
    taken, pace = estimate.duration, estimate.pace
    if taken is None:
        return None
    return {
        "seconds": taken.seconds,
        **dataclasses.asdict(taken),
        "evaluations": estimate.plan.budget.evaluations,
        "seconds_a_step": pace.batch + pace.update,
        "basis": pace.basis,
    }


def _probe_record(estimate: Estimate) -> dict[str, Any]:
    assert estimate.probe is not None
    return {
        "seconds_a_step": estimate.pace.batch + estimate.pace.update,
        "seconds_a_step_by_formula": estimate.formula.batch + estimate.formula.update,
        "peak": estimate.probe.peak,
        "peak_by_formula": estimate.probe.formula_peak,
        "micro_batch_size": estimate.probe.micro_batch_size,
        "steps": estimate.probe.steps,
        "scaled": estimate.probe.scaled,
    }


def count_text(number: float) -> str:
    """A large number in three digits, with the letter of its size."""
    for size, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:,.0f}"
