"""`lmtrain evaluate RUN`: how well a trained model predicts a text, and translates pairs.

  lmtrain evaluate RUN                             the run's validation text, in the batches training evaluates on
  lmtrain evaluate RUN --split test                another split; all: every document, undivided
  lmtrain evaluate RUN data=text data.path=FILE    another text, in the ids of the run's own tokenizer
  lmtrain evaluate RUN --stride 64                 each document by itself, in windows that move on by 64 tokens
  lmtrain evaluate RUN --per-document FILE.jsonl   the loss of every document

RUN is a run folder, or a model of the store (NAME, NAME:VERSION). Prints loss (nats a token), perplexity and bits per
byte; of pairs also BLEU and chrF of what the model makes of their sources. A terminal gets a table, another program a
line a number, or a JSON object (--json).
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.progress import Progress

from lmtrain.commands import CommandParser
from lmtrain.config.evaluation import EvaluationSettings, compose_evaluation
from lmtrain.config.schema import is_of_pairs
from lmtrain.config.schema.rules import require
from lmtrain.errors import ConfigError, RunError
from lmtrain.inference.evaluated_text import SPLIT_CHOICES, EvaluatedText, open_text
from lmtrain.inference.evaluation_records import document_records, summary, translation_records
from lmtrain.inference.evaluation_view import EvaluationView, json_line
from lmtrain.inference.settings import DEFAULT_BEAMS
from lmtrain.inference.trained import TrainedModel, load_model
from lmtrain.inference.translation import translate_text
from lmtrain.run_dir import RunDir
from lmtrain.store import find_run

if TYPE_CHECKING:
    from lmtrain.inference.evaluation import Evaluation

STANDARD_OUTPUT = Path("-")

OF_PAIRS = ("beams", "max_sentences", "translations")
"""Options for data whose sources are translated."""

Record = Mapping[str, Any]


def main(arguments: list[str]) -> int:
    """Print what was measured; exit status 0. Raises LmtrainError for what cannot be done."""
    options = _parser().parse_intermixed_args(arguments)
    _check(options)
    options.run = find_run(options.run).folder
    settings = compose_evaluation(options.overrides, options.run)
    if options.stride is not None:
        settings.require_stride(options.stride)
    with ExitStack() as files:
        for path in (options.per_document, options.translations):
            if path not in (None, STANDARD_OUTPUT):
                files.enter_context(_reserved(path))
        trained = load_model(options.run, checkpoint=options.checkpoint, device=options.device)
        _evaluate(options, settings, trained)
    return 0


def _parser() -> CommandParser:
    parser = CommandParser("evaluate", __doc__)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="a run folder, or NAME[:VERSION] of the model store")
    add(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="the text, as for training: data=OPTION data.KEY=VALUE",
    )
    add("--split", choices=SPLIT_CHOICES, help="default: val; of other text all, unless it has a split val of its own")
    add("--checkpoint", metavar="C", help="last, best or a step (default: the best, else the newest)")
    add("--device", default="auto", metavar="D", help="auto, cpu, cuda or mps (default auto)")
    add("--precision", choices=("fp32", "bf16", "fp16"), help="default: fp32, on CUDA that of the run")
    add("--stride", type=int, metavar="N", help="sliding windows inside each document, N tokens apart")
    add("--per-document", type=Path, metavar="FILE", help="write a JSON line a document; -: standard output")
    add("--json", action="store_true", help="print one JSON object")
    add("--beams", type=int, metavar="K", help=f"of pairs: beams of the search, 1: greedy (default {DEFAULT_BEAMS})")
    add("--max-sentences", type=int, metavar="N", help="of pairs: translate the first N only; 0: none")
    add(
        "--translations",
        type=Path,
        metavar="FILE",
        help="of pairs: write source, reference, hypothesis; .tsv or .jsonl",
    )
    return parser


def _check(options: argparse.Namespace) -> None:
    require(
        not (options.json and options.per_document == STANDARD_OUTPUT),
        "--json and --per-document - both want standard output: give the documents a file",
    )
    require(options.beams is None or options.beams >= 1, f"--beams must be at least 1, got {options.beams}")
    sentences = options.max_sentences
    require(sentences is None or sentences >= 0, f"--max-sentences must not be negative, got {sentences}")
    path = options.translations
    require(path is None or path.suffix in (".tsv", ".jsonl"), f"--translations must end in .tsv or .jsonl, got {path}")


def _evaluate(options: argparse.Namespace, settings: EvaluationSettings, trained: TrainedModel) -> None:
    # Not at the top: torch.
    from lmtrain.hardware import set_threads
    from lmtrain.inference.evaluation import choose_precision, evaluate_text

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # as files, whatever the locale
    translating = _is_translating(options, settings, trained)
    num_beams = options.beams or DEFAULT_BEAMS
    precision = choose_precision(trained, options.precision)
    set_threads(settings.config.parallel.num_threads)
    console = Console(stderr=True)
    with console.status("preparing") as status:
        text = open_text(RunDir(options.run), settings, trained.tokenizer, options.split, status.update)
    view = EvaluationView(sys.stderr if options.per_document == STANDARD_OUTPUT else sys.stdout, as_json=options.json)
    view.begin(_head(options, settings, trained, text) | {"precision": precision.name})
    _tell(text.notes)
    with _progress(console, "evaluating") as advance:
        evaluation = evaluate_text(
            trained,
            settings,
            text,
            precision,
            stride=options.stride,
            per_document=options.per_document is not None,
            on_progress=advance,
        )
    _tell(_not_counted(options, settings, trained, evaluation))
    translations = []
    if translating:
        with _progress(console, "translating") as advance:
            translations = translate_text(
                trained, text, num_beams=num_beams, max_sentences=options.max_sentences, on_progress=advance
            )
    view.end(summary(evaluation, translations) | ({"beams": num_beams} if translating else {}))
    if options.per_document is not None:
        _write_lines(options.per_document, map(json_line, document_records(evaluation, trained.tokenizer)))
    if options.translations is not None:
        _write_translations(options.translations, list(translation_records(translations)))


def _is_translating(options: argparse.Namespace, settings: EvaluationSettings, trained: TrainedModel) -> bool:
    """Whether there are pairs, and a model that answers sources. Raises ConfigError for options that need both."""
    why = ""
    if not is_of_pairs(settings.config.data):
        why = "the data are no pairs of a source and a target"
    elif not trained.reads_sources:
        why = "the model was not trained on pairs"
    for name in OF_PAIRS if why else ():
        option = f"--{name.replace('_', '-')}"
        require(getattr(options, name) is None, f"{option} is for translations, and there are none: {why}")
    return not why and options.max_sentences != 0


def _head(
    options: argparse.Namespace, settings: EvaluationSettings, trained: TrainedModel, text: EvaluatedText
) -> dict[str, Any]:
    """What is evaluated, and how it is read."""
    data = settings.config.data
    return {
        "run": str(RunDir(options.run)),
        "step": trained.step,
        "data": text.name,
        "split": text.split,
        "documents": text.num_documents,
        "targets": text.num_targets,
        "seq_len": data.seq_len,
        "batches": data.batches if options.stride is None else "sliding",
        **({} if options.stride is None else {"stride": options.stride}),
        "device": trained.model.device.type,
    }


def _not_counted(
    options: argparse.Namespace, settings: EvaluationSettings, trained: TrainedModel, evaluation: Evaluation
) -> Iterator[str]:
    text, data = evaluation.text, settings.config.data
    if missing := text.num_targets - evaluation.num_targets:
        longest = max(int(part.documents.lengths.max()) for part in text.parts)
        cut = data.batches == "padded" and options.stride is None and longest > data.seq_len + 1
        remedy = "; --stride N reads whole documents" if cut and not trained.reads_from_the_start else ""
        yield f"not counted: {missing:,} of {text.num_targets:,} targets; {evaluation.note}{remedy}"


def _tell(notes: Iterable[str]) -> None:
    for note in notes:
        print(f"lmtrain: {note}", file=sys.stderr)


# ------------------------------------------------------------------------------------------- files


@contextmanager
def _reserved(path: Path) -> Iterator[None]:
    """Find out before the work whether a file can be written; leave nothing of it if that fails."""
    is_new = not path.exists()
    try:
        path.open("a").close()
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
    try:
        yield
    except BaseException:
        if is_new:
            path.unlink(missing_ok=True)
        raise


@contextmanager
def _writing(path: Path) -> Iterator[TextIO]:
    try:
        with path.open("w", encoding="utf-8", newline="") as file:
            yield file
    except OSError as error:  # a full disk
        raise RunError(f"cannot write {path}: {error.strerror}") from error


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    if path == STANDARD_OUTPUT:
        for line in lines:
            print(line)
        return
    with _writing(path) as file:
        file.writelines(f"{line}\n" for line in lines)


def _write_translations(path: Path, records: Sequence[Record]) -> None:
    if path.suffix == ".jsonl":
        _write_lines(path, map(json_line, records))
        return
    with _writing(path) as file:
        writer = csv.DictWriter(file, records[0] if records else (), dialect="excel-tab", lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)


@contextmanager
def _progress(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal; told what is done and how much there is."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what)
        yield lambda done, total: progress.update(task, completed=done, total=total)
