"""`lmtrain generate RUN`: text from a trained model, shown as it comes.

  lmtrain generate RUN --prompt TEXT           goes on with a text; more than one --prompt: with each
  lmtrain generate RUN --prompt-file FILE      goes on with what a file holds, but for a last line end
  lmtrain generate RUN < FILE                  goes on with every line of standard input
  lmtrain generate RUN --chat [--system TEXT]  a conversation: a turn a line, until Ctrl-D

RUN is a run folder, or a model of the store (NAME, NAME:VERSION). Of a model trained on pairs, a prompt is a source,
and the likeliest target is searched for (--beams), unless a temperature is given. An empty prompt begins as documents
do. Standard output gets the new texts, each with a line end after it, and nothing else; a terminal also shows their
prompts. The same seed gives the same text again, whatever the other prompts are.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

from rich.console import Console
from rich.text import Text

from lmtrain.commands import CommandParser
from lmtrain.config.schema.rules import require
from lmtrain.errors import DataError
from lmtrain.inference import Chat, TrainedModel, load_model
from lmtrain.inference.settings import DEFAULT_BEAMS, GenerationSettings, continue_prompts, fit_prompts
from lmtrain.model.sampling import DEFAULT_SAMPLING


def main(arguments: list[str]) -> int:
    """Write texts to standard output; exit status 0. Raises LmtrainError for what cannot be done."""
    parser = _parser()
    options = parser.parse_args(arguments)
    _check(options)
    settings = GenerationSettings(**{field.name: getattr(options, field.name) for field in fields(GenerationSettings)})
    trained = load_model(options.run, checkpoint=options.checkpoint, device=options.device)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # as the prompts, whatever the locale
    if options.chat:
        _converse(trained, settings, options.system)
    else:
        _continue(trained, _prompts(options), settings)
    return 0


def _parser() -> CommandParser:
    parser = CommandParser("generate", __doc__)
    add, defaults = parser.add_argument, GenerationSettings()
    add("run", type=Path, metavar="RUN", help="a run folder, or NAME[:VERSION] of the model store")
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--prompt", action="append", metavar="TEXT", help="what to go on with (default: standard input)")
    asked.add_argument("--prompt-file", type=Path, metavar="FILE", help="the same from a file, as one text")
    asked.add_argument("--chat", action="store_true", help="keep a conversation with a model trained on some")
    add("--system", metavar="TEXT", help="with --chat: said to the model before the conversation")
    length = f"length of a text (default {defaults.max_new_tokens})"
    add("--max-new-tokens", type=int, default=defaults.max_new_tokens, metavar="N", help=length)
    hotter = f"0: always the likeliest token; higher: more surprising (default {DEFAULT_SAMPLING.temperature})"
    add("--temperature", type=float, metavar="T", help=hotter)
    likeliest = f"draw from the K likeliest tokens, or all (default {defaults.top_k})"
    add("--top-k", type=_top_k, default=defaults.top_k, metavar="K", help=likeliest)
    together = "draw from the likeliest tokens that together have probability P (default 1: all)"
    add("--top-p", type=float, default=defaults.top_p, metavar="P", help=together)
    share = "draw from tokens at least P times as likely as the likeliest (default 0: all)"
    add("--min-p", type=float, default=defaults.min_p, metavar="P", help=share)
    fewer = "above 1: fewer repetitions (default 1)"
    add("--repetition-penalty", type=float, default=defaults.repetition_penalty, metavar="R", help=fewer)
    searched = f"follow K texts and write the likeliest, drawing nothing (default {DEFAULT_BEAMS} for pairs, else 1)"
    add("--beams", type=int, metavar="K", help=searched)
    longer = "with --beams: a text counts by its log-probability / length^A; higher: longer texts (default 1)"
    add("--length-penalty", type=float, default=1.0, metavar="A", help=longer)
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given again")
    add("--seed", type=int, default=0, metavar="S", help="of everything random (default 0)")
    add("--num-samples", type=int, default=1, metavar="N", help="texts a prompt, with seeds S, S + 1, … (default 1)")
    add("--strict", action="store_true", help="refuse a prompt that is longer than the context")
    add("--checkpoint", metavar="C", help="last, best or a step (default: the best, else the newest)")
    add("--device", default="auto", metavar="D", help="auto, cpu, cuda or mps (default auto)")
    return parser


def _top_k(word: str) -> int | None:
    if word != "all" and not word.lstrip("-").isdecimal():
        raise argparse.ArgumentTypeError(f"must be a number or all, got {word!r}")
    return None if word == "all" else int(word)


def _check(options: argparse.Namespace) -> None:
    require(options.chat or options.system is None, "--system is for --chat")
    require(not options.chat or options.num_samples == 1, "--num-samples is not for --chat: a turn has one answer")
    require(not options.chat or options.beams in (None, 1), "--beams is not for --chat")


# ------------------------------------------------------------------------------------------- prompts


def _prompts(options: argparse.Namespace) -> list[str]:
    """What to go on with. Raises DataError for a file that cannot be read, or is not UTF-8."""
    if options.prompt is not None:
        return list(options.prompt)
    if options.prompt_file is not None:
        try:
            content = options.prompt_file.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read the prompt {options.prompt_file}: {error.strerror}") from error
        return [_line(_decode(content, str(options.prompt_file)))]
    if sys.stdin.isatty():
        print("a prompt a line; Ctrl-D ends", file=sys.stderr)
    lines = _line(_decode(sys.stdin.buffer.read(), "standard input")).split("\n")
    return [line.removesuffix("\r") for line in lines]


def _decode(content: bytes, source: str, offset: int = 0) -> str:
    """`offset`: the place of `content` in its source."""
    try:
        return content.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        place = offset + error.start
        raise DataError(
            f"{source} is not UTF-8: byte 0x{content[error.start]:02x} at offset {place}; convert it, as with iconv"
        ) from error


def _line(text: str) -> str:
    """Without one line end after it."""
    return text.removesuffix("\n").removesuffix("\r")


# ------------------------------------------------------------------------------------------- texts


def _continue(trained: TrainedModel, prompts: list[str], settings: GenerationSettings) -> None:
    """Write the texts that follow the prompts, one after the other."""
    encoded = [trained.encode_prompt(prompt) for prompt in prompts]
    for notice in fit_prompts(trained, encoded, settings):
        _tell(notice)
    for number, prompt in enumerate(prompts, start=1):
        if not prompt:
            _tell(f"{f'prompt {number}' if len(prompts) > 1 else 'the prompt'} is empty: beginning as documents do")
    output = Output([prompt for prompt in prompts for _ in range(settings.num_samples)])
    continue_prompts(trained, encoded, settings, output)


class Output:
    """Writes rows of text that come at the same time one after the other, the first of them as it comes."""

    def __init__(self, prompts: Sequence[str]) -> None:
        """`prompts` of all rows are shown before their texts on a terminal."""
        self._prompts = prompts
        self._waiting: defaultdict[int, deque[str | None]] = defaultdict(deque)
        self._current = 0
        _write_prompt(prompts[0])

    def __call__(self, row: int, piece: str | None) -> None:
        self._waiting[row].append(piece)
        while waiting := self._waiting[self._current]:
            if (shown := waiting.popleft()) is not None:
                write(shown)
                continue
            write("\n")
            self._current += 1
            if self._current < len(self._prompts):
                _write_prompt(self._prompts[self._current])


def _write_prompt(prompt: str) -> None:
    """On a terminal only, and dim."""
    if sys.stdout.isatty():
        Console().print(Text(_printable(prompt), style="dim"), end="", soft_wrap=True)
        sys.stdout.flush()


def write(piece: str) -> None:
    """Show a piece of text at once."""
    sys.stdout.write(_printable(piece) if sys.stdout.isatty() else piece)
    sys.stdout.flush()


def _printable(text: str) -> str:
    """Control characters by their escapes: text must not steer the terminal."""
    return "".join(
        character if character in "\n\t" or character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


def _tell(notice: str) -> None:
    print(f"lmtrain: {notice}", file=sys.stderr)


# ------------------------------------------------------------------------------------------- conversations


def _converse(trained: TrainedModel, settings: GenerationSettings, system: str | None) -> None:
    """Answer turn by turn."""
    chat = Chat(
        trained,
        settings.sampling,
        max_new_tokens=settings.max_new_tokens,
        system=system,
        seed=settings.seed,
        stops=settings.stop,
        strict=settings.strict,
    )
    for turn in _turns():
        if turn:
            chat.answer(turn, write)
            write("\n")


def _turns() -> Iterator[str]:
    """What the user says, line by line. Raises DataError for what is not UTF-8."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        offset = 0
        for line in sys.stdin.buffer:
            yield _line(_decode(line, "standard input", offset))
            offset += len(line)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (editing and history for input())
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except UnicodeDecodeError as error:
            raise DataError("what was typed is not UTF-8: set the terminal, or LANG, to UTF-8") from error
