"""An evaluation for its readers: a table on a terminal, a line a number for other programs, or one JSON object.

What the numbers are is decided in `evaluation_records`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lmtrain.inference.evaluation_records import Record

HEADINGS = {
    "loss": ("loss", 4),
    "perplexity": ("perplexity", 2),
    "bits_per_byte": ("bits/byte", 4),
    "bleu": ("BLEU", 2),
    "chrf": ("chrF", 2),
}
"""Of a table, without the split, and decimals; elsewhere numbers are whole."""


WAYS_TO_READ = {
    "packed": "one document after another, in windows of {seq_len} tokens",
    "packed_documents": "in windows of {seq_len} tokens that hold documents apart",
    "padded": "each document by itself, up to {seq_len} tokens",
    "sliding": "each document by itself, in windows of {seq_len} tokens, {stride} apart",
}
"""By `data.batches`."""


class EvaluationView:
    """Shows what is evaluated as soon as that is known, and what was measured at the end."""

    def __init__(self, file: TextIO, *, as_json: bool) -> None:
        self._file = file
        self._as_json = as_json
        self._console = Console(file=file, highlight=False)
        self._head: Record = {}

    def begin(self, head: Record) -> None:
        """Show what is evaluated, and how; of JSON nothing yet."""
        self._head = head
        if self._as_json:
            return
        if not self._console.is_terminal:
            self._print_lines(head)
            return
        for name, value in (
            ("run", f"{head['run']} at step {head['step']}, in {head['precision']} on {head['device']}"),
            ("data", head["data"]),
            ("split", f"{head['split']}: {_count(head['documents'], 'document')}, {_count(head['targets'], 'target')}"),
            ("read", WAYS_TO_READ[head["batches"]].format(**head)),
        ):
            self._console.print(f"{name:<6} {value}", markup=False, soft_wrap=True)

    def end(self, found: Record) -> None:
        """Show what was measured: the record of `summary`."""
        if self._as_json:
            print(json_line({**self._head, **found}), file=self._file)
        elif self._console.is_terminal:
            self._print_table(found)
        else:
            self._print_lines(found)
        self._file.flush()

    def _print_lines(self, record: Mapping[str, Any], prefix: str = "") -> None:
        for key, value in record.items():
            if isinstance(value, dict):
                self._print_lines(value, f"{prefix}{key}.")
            else:
                print(f"{prefix}{key} {value}", file=self._file)
        self._file.flush()

    def _print_table(self, found: Record) -> None:
        rows = {**found.get("sources", {}), "all": {**self._head, **found}}
        metrics = list(dict.fromkeys(name for row in rows.values() for name in row if "/" in name))
        table = Table(box=box.SIMPLE_HEAD)
        if several := len(rows) > 1:
            table.add_column("source")
        for heading in ("documents", "counted", *(HEADINGS[_measure(name)][0] for name in metrics)):
            table.add_column(heading, justify="right")
        for source, row in rows.items():
            counts = (f"{row['documents']:,}", f"{row['counted']:,}")
            name = [escape(source)] if several else []
            table.add_row(*name, *counts, *(_rounded(metric, row.get(metric)) for metric in metrics))
        self._console.print(table)
        for source, row in rows.items():
            if "bleu_signature" in row:
                of = f" of {source}" if several else ""
                self._console.print(
                    f"{_count(row['sentences'], 'sentence')}{of} translated with {_count(found['beams'], 'beam')}\n"
                    f"BLEU   {row['bleu_signature']}\nchrF   {row['chrf_signature']}",
                    markup=False,
                    soft_wrap=True,
                )


def json_line(record: Mapping[str, Any]) -> str:
    """JSON has no NaN and no infinity: null in their place."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(one) for key, one in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(dict(record)), ensure_ascii=False)


def _rounded(name: str, value: float | None) -> str:
    return "" if value is None else f"{value:,.{HEADINGS[_measure(name)][1]}f}"


def _measure(metric: str) -> str:
    """`val/loss` → `loss`."""
    return metric.partition("/")[2]


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
