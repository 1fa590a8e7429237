"""`lmtrain plan`: what a run would take, before it is made.

  lmtrain plan [key=value ...]          parameters, arithmetic, memory by part, the microbatch that fits; trains nothing
  lmtrain plan [key=value ...] --json   the same as one JSON object

The words are those of training. Exit status 0 whether the run fits or not: the text says so, and `fits` of the JSON.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lmtrain.commands import CommandParser
from lmtrain.config.compose import compose_config
from lmtrain.config.presets import preset_of
from lmtrain.config.schema import EncoderDecoderConfig, TransformerConfig
from lmtrain.fitting import MEMORY_OF, bytes_text
from lmtrain.hardware import has_bf16_instructions
from lmtrain.model.sizing import block_shapes
from lmtrain.planning import Plan, make_plan
from lmtrain.training.footprint import PARTS


def main(arguments: list[str]) -> int:
    """Print the plan of a run; exit status 0. Raises LmtrainError for a request that could not be trained."""
    parser = CommandParser("plan", __doc__)
    parser.add_argument("words", nargs="*", metavar="key=value", help="settings, as for training")
    parser.add_argument("--json", action="store_true", help="one JSON object, for other programs")
    options = parser.parse_intermixed_args(arguments)
    plan = make_plan(compose_config(options.words))
    if options.json:
        print(json.dumps(_record(plan), indent=2))
        return 0
    console = Console(highlight=False)
    for heading, text in _lines(plan):
        console.print(f"{heading:<10} {escape(text)}", soft_wrap=True)
    console.print(_parameter_table(plan), _memory_table(plan))
    console.print(escape(_verdict(plan)), soft_wrap=True)
    return 0


def _lines(plan: Plan) -> Iterator[tuple[str, str]]:
    config = plan.config
    yield "model", f"{plan.parameters.total:,} parameters: {_shape(plan.model)}"
    if plan.model_choice:
        yield "auto", plan.model_choice
    assumed = ", assumed: it follows from a text that was not prepared yet" if plan.vocab_assumed else ""
    yield "vocabulary", f"{plan.vocab_size:,} tokens{assumed}"
    yield "arithmetic", f"{_count(plan.flops_per_token)} FLOPs a token, in sequences of {config.data.seq_len:,}"
    yield "budget", _budget(plan)
    timed = config.precision.format == "auto" and plan.device.type == "cpu" and has_bf16_instructions()
    yield (
        "device",
        f"{plan.device.type}, in {plan.memory.work.format}"
        + (" (bf16 if that is faster here, which is timed when a run starts)" if timed else ""),
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
    return f"{of}, {_count(budget.tokens)} tokens, {_count(plan.flops)} FLOPs"


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
    table.add_column(f"{MEMORY_OF[plan.device.type]} of a step")
    table.add_column("at most", justify="right")
    table.add_column(f"in the {footprint.fullest}", justify="right")
    for part in PARTS:
        if largest := footprint.largest(part):
            table.add_row(part, bytes_text(largest), bytes_text(footprint.moments[footprint.fullest].get(part, 0)))
    table.add_section()
    table.add_row("together, when it is fullest", "", bytes_text(footprint.peak))
    if plan.device.type != "cpu":
        table.add_row("beside it: the checkpoint's copy, in main memory", bytes_text(plan.memory.checkpoint_bytes), "")
    return table


def _verdict(plan: Plan) -> str:
    size, batch, largest = plan.micro_batch_size, plan.config.batch_size, plan.largest_micro_batch_size
    needed, room = bytes_text(plan.footprint.peak), f"{bytes_text(plan.room)} of {MEMORY_OF[plan.device.type]}"
    if plan.fits:
        whole = "the whole batch" if size >= batch else f"{size:,} of {batch:,} sequences"
        return f"fits into {room} with {whole} at a time; up to {largest:,} sequences would"
    if largest:
        told = f"trainer.micro_batch_size={size} needs {needed}"
        return f"does not fit into {room}: {told}; up to {largest:,} sequences fit at a time"
    return (
        f"does not fit into {room}: one sequence at a time needs {needed}; take a smaller model, shorter sequences, "
        "trainer.activation_checkpointing=full or another optimizer"
    )


def _record(plan: Plan) -> dict[str, Any]:
    footprint = plan.footprint
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
        "fits": plan.fits,
    }


def _count(number: float) -> str:
    """A large number in three digits, with the letter of its size."""
    for size, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:,.0f}"
