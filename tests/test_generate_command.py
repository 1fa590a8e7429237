"""`lmtrain generate`: what it writes to standard output, to a terminal and to standard error; bad input."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from command_line import CommandLine
from trained_runs import chat_tokenizer, make_run, make_translator

from lmtrain.commands import generate as command
from lmtrain.data.tokenizer import ByteTokenizer
from lmtrain.errors import LmtrainError
from lmtrain.inference import Chat, TrainedModel, load_model
from lmtrain.inference.settings import GenerationSettings
from lmtrain.inference.trained import ROWS_AT_ONCE
from lmtrain.model.sampling import DEFAULT_SAMPLING, Sampling

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run folders `plain` and `chat`."""
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "plain", ByteTokenizer())
    make_run(folder / "chat", chat_tokenizer(), "data.seq_len=64")
    make_translator(folder / "pairs")
    return folder


@pytest.fixture(scope="module")
def trained(runs: Path) -> TrainedModel:
    return load_model(runs / "plain")


def text_of(trained: TrainedModel, prompt: str, seed: int = 0, length: int = 20, **settings: Any) -> str:
    sampling = Sampling(**settings)
    [text] = trained.generate([trained.encode_prompt(prompt)], sampling, max_new_tokens=length, seeds=[seed])
    return text


def give_input(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


# ------------------------------------------------------------------------------------------- texts


def test_standard_output_is_the_text(runs: Path, trained: TrainedModel, capsys: Capture) -> None:
    assert command.main([str(runs / "plain"), "--prompt", "the cat", "--max-new-tokens", "20", "--seed", "3"]) == 0
    out, err = capsys.readouterr()
    assert out == text_of(trained, "the cat", seed=3) + "\n"
    assert err == ""


def test_settings_reach_the_model(runs: Path, trained: TrainedModel, capsys: Capture) -> None:
    words = "--temperature 1.5 --top-k all --top-p 0.9 --min-p 0.01 --repetition-penalty 1.2 --max-new-tokens 30"
    command.main([str(runs / "plain"), "--prompt", "a", *words.split(), "--checkpoint", "last"])
    last = load_model(runs / "plain", checkpoint="last")
    settings: dict[str, Any] = {
        "top_k": None,
        "temperature": 1.5,
        "top_p": 0.9,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
    }
    assert capsys.readouterr().out == text_of(last, "a", length=30, **settings) + "\n"
    assert text_of(last, "a", length=30) != text_of(last, "a", length=30, **settings)


def test_the_defaults_are_those_of_the_library(runs: Path) -> None:
    options = command._parser().parse_args([str(runs)])
    defaults = asdict(GenerationSettings(stop=[]))
    assert {name: getattr(options, name) for name in defaults} == defaults
    assert GenerationSettings().sampling == DEFAULT_SAMPLING


def test_every_line_is_a_prompt_and_every_prompt_has_its_samples(
    runs: Path, trained: TrainedModel, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than are made at once; each is what it would be alone."""
    prompts = [f"line {number}" for number in range(ROWS_AT_ONCE // 2)] + ["ü", "a b"]
    give_input(monkeypatch, "\r\n".join([*prompts, ""]).encode())
    command.main([str(runs / "plain"), "--max-new-tokens", "5", "--num-samples", "2", "--seed", "7"])
    expected = [text_of(trained, prompt, seed, length=5) for prompt in prompts for seed in (7, 8)]
    assert capsys.readouterr().out == "".join(f"{text}\n" for text in expected)


def test_of_pairs_the_likeliest_target_is_searched_for(runs: Path, capsys: Capture) -> None:
    trained = load_model(runs / "pairs")
    sources = [trained.encode_prompt(text) for text in ("ein Hund", "b")]
    assert sources[1] == [ord("b"), trained.tokenizer.end_id]

    def written(*words: str) -> list[str]:
        command.main([str(runs / "pairs"), "--prompt", "ein Hund", "--prompt", "b", "--max-new-tokens", "9", *words])
        return capsys.readouterr().out.splitlines()

    def likeliest(**settings: Any) -> list[str]:
        texts = trained.generate(sources, Sampling(temperature=0), max_new_tokens=9, **settings)
        return "\n".join(texts).splitlines()

    assert written() == written("--beams", "4") == likeliest(num_beams=4)
    assert written("--beams", "1") == written("--temperature", "0") == likeliest()
    assert written("--beams", "3", "--length-penalty", "0") == likeliest(num_beams=3, length_penalty=0.0)
    assert written("--stop", written()[0][:2])[0] == ""
    drawn = written("--temperature", "1", "--seed", "3")
    assert drawn == written("--temperature", "1", "--seed", "3") != written("--temperature", "1", "--seed", "4")


def test_a_source_beyond_the_context_loses_its_end(runs: Path, capsys: Capture) -> None:
    command.main([str(runs / "pairs"), "--prompt", "x" * 300, "--max-new-tokens", "1"])
    assert capsys.readouterr().err == ("lmtrain: the prompt has 301 tokens: only the first 16, the context, are read\n")


def test_a_file_is_one_prompt(runs: Path, trained: TrainedModel, capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "poem").write_bytes("\ufeffone\ntwo\n\n".encode())
    command.main([str(runs / "plain"), "--prompt-file", str(tmp_path / "poem"), "--max-new-tokens", "20"])
    assert capsys.readouterr().out == text_of(trained, "one\ntwo\n") + "\n"


@pytest.mark.parametrize("content", [b"", b"\n", b"\xef\xbb\xbf"])
def test_an_empty_prompt_begins_a_document(
    content: bytes, runs: Path, trained: TrainedModel, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_input(monkeypatch, content)
    command.main([str(runs / "plain"), "--max-new-tokens", "20"])
    out, err = capsys.readouterr()
    assert out == trained.generate([[256]], max_new_tokens=20)[0] + "\n"
    assert err == "lmtrain: the prompt is empty: beginning as documents do\n"


def test_a_prompt_beyond_the_context_is_told_or_refused(runs: Path, trained: TrainedModel, capsys: Capture) -> None:
    words = [str(runs / "plain"), "--prompt", "short", "--prompt", "x" * 20 + "end", "--max-new-tokens", "9"]
    command.main(words)
    out, err = capsys.readouterr()
    assert out == text_of(trained, "short", length=9) + "\n" + text_of(trained, "x" * 13 + "end", length=9) + "\n"
    assert err == "lmtrain: prompt 2 has 23 tokens: only the last 16, the context, are read\n"
    with pytest.raises(LmtrainError, match="prompt 2 has 23 tokens, more than the model's context of 16"):
        command.main([*words, "--strict"])
    assert capsys.readouterr().out == ""


def test_stop_texts_end_a_text(runs: Path, trained: TrainedModel, capsys: Capture) -> None:
    whole = text_of(trained, "a", length=40)
    stop = whole[10:12]
    command.main([str(runs / "plain"), "--prompt", "a", "--max-new-tokens", "40", "--stop", "?!?", "--stop", stop])
    assert capsys.readouterr().out == whole[: whole.index(stop)] + "\n"


def test_texts_come_in_order_and_the_first_at_once(capsys: Capture) -> None:
    output = command.Output(["p", "q", "r"])
    output(1, "B")
    output(0, "A")
    assert capsys.readouterr().out == "A"
    output(0, "a")
    assert capsys.readouterr().out == "a"
    output(1, None)
    output(0, None)
    assert capsys.readouterr().out == "\nB\n"
    output(2, "C")
    output(2, None)
    assert capsys.readouterr().out == "C\n"


# ------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--temperature -1", "temperature must be 0 or from 0.000001 up, got -1.0"),
        ("--temperature warm", "argument --temperature: invalid float value: 'warm'"),
        ("--top-k 0", "top_k must be at least 1, got 0"),
        ("--top-k many", "argument --top-k: must be a number or all, got 'many'"),
        ("--top-p 0", "top_p must be above 0 and at most 1, got 0.0"),
        ("--min-p 1.5", "min_p must lie between 0 and 1, got 1.5"),
        ("--repetition-penalty nan", "repetition_penalty must be positive, got nan"),
        ("--max-new-tokens 0", "max_new_tokens must be at least 1, got 0"),
        ("--num-samples 0", "num_samples must be at least 1, got 0"),
        ("--seed -1", "seed must lie between 0 and 9223372036854775807, got -1"),
        ("--seed 9223372036854775807 --num-samples 2", "seed must lie between 0 and 9223372036854775806"),
        ("--stop=", "stop must not be empty"),
        ("--system hello", "--system is for --chat"),
        ("--chat", "not allowed with argument --prompt"),
        ("--prompt-file x", "not allowed with argument --prompt"),
        ("--checkpoint 77", "plain has no checkpoint '77'; there are last, best, 1, 2, 3"),
        ("--beams 0", "beams must be at least 1, got 0"),
        ("--beams 4 --temperature 1", "with beams the likeliest text is found and nothing is drawn"),
        ("--beams 4 --num-samples 2", "leave temperature and num_samples out"),
        ("--beams 2 --length-penalty inf", "length_penalty must be finite, got inf"),
        ("--device tpu", "device=tpu is not available to PyTorch here"),
        ("more", "unrecognized arguments: more"),
    ],
)
def test_a_bad_request_is_told(words: str, message: str, runs: Path, capsys: Capture) -> None:
    with pytest.raises(LmtrainError) as raised:
        command.main([str(runs / "plain"), "--prompt", "x", *words.split()])
    assert message in str(raised.value)
    assert raised.value.exit_status == 2
    assert "\n" not in str(raised.value)
    assert capsys.readouterr().out == ""


def test_what_is_not_there_is_told(runs: Path, tmp_path: Path) -> None:
    for words in (["nowhere"], [str(tmp_path)]):
        with pytest.raises(LmtrainError, match="there is no run folder"):
            command.main([*words, "--prompt", "x"])
    with pytest.raises(LmtrainError, match="arguments are required: RUN"):
        command.main([])
    with pytest.raises(LmtrainError, match=r"cannot read the prompt nowhere\.txt: No such file"):
        command.main([str(runs / "plain"), "--prompt-file", "nowhere.txt"])


@pytest.mark.parametrize("chat", [False, True])
def test_input_that_is_not_utf8_is_told_with_its_place(
    chat: bool, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    give_input(monkeypatch, "one ü\ntwo".encode() + b"\xfc\n")
    with pytest.raises(LmtrainError, match="standard input is not UTF-8: byte 0xfc at offset 10; convert it"):
        command.main([str(runs / "chat"), *["--chat"] * chat, "--max-new-tokens", "3"])
    assert capsys.readouterr().out.count("\n") == chat  # the first turn was answered


# ------------------------------------------------------------------------------------------- as a user sees it


def test_a_conversation_on_a_pipe(runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    give_input(monkeypatch, b"hello\n\nand you?")
    command.main([str(runs / "chat"), "--chat", "--system", "be kind", "--max-new-tokens", "9", "--seed", "4"])
    chat = Chat(load_model(runs / "chat"), max_new_tokens=9, system="be kind", seed=4)
    assert capsys.readouterr().out == "".join(chat.answer(turn) + "\n" for turn in ("hello", "and you?"))


def test_a_conversation_with_a_model_that_knows_no_roles_is_refused(runs: Path) -> None:
    with pytest.raises(LmtrainError, match="data=chat"):
        command.main([str(runs / "plain"), "--chat"])


def on_terminal(lmtrain: CommandLine, words: list[str], typed: tuple[str, ...] = ()) -> str:
    """What a terminal shows of the program; one of `typed` is typed whenever it asks."""
    terminal, inside = pty.openpty()
    answers = iter(typed)
    process = subprocess.Popen(
        [sys.executable, "-m", "lmtrain", *words],
        cwd=lmtrain.folder,
        env=lmtrain.environment(TERM="xterm", COLUMNS="80"),
        stdin=inside,
        stdout=inside,
        stderr=inside,
    )
    os.close(inside)
    too_late = threading.Timer(60, process.kill)
    too_late.start()
    shown = b""
    while True:
        try:
            if not (part := os.read(terminal, 4096)):
                break
        except OSError:  # the program has closed its side
            break
        shown += part
        if shown.endswith(b"> "):
            os.write(terminal, next(answers).encode())
    os.close(terminal)
    status = process.wait()
    too_late.cancel()
    assert status == 0, shown.decode()
    return shown.decode().replace("\r\n", "\n")


def test_a_terminal_shows_the_prompt_dim_and_is_not_steered(
    lmtrain: CommandLine, runs: Path, trained: TrainedModel
) -> None:
    words = [
        "generate",
        str(runs / "plain"),
        "--prompt",
        "the \x1b[31mcat",
        "--max-new-tokens",
        "60",
        "--temperature",
        "3",
    ]
    shown = on_terminal(lmtrain, words)
    text = text_of(trained, "the \x1b[31mcat", length=60, temperature=3)
    assert not text.isprintable()
    assert shown == "\x1b[2mthe \\x1b[31mcat\x1b[0m" + command._printable(text) + "\n"


def test_a_conversation_on_a_terminal(lmtrain: CommandLine, runs: Path) -> None:
    words = ["generate", str(runs / "chat"), "--chat", "--max-new-tokens", "5"]
    shown = on_terminal(lmtrain, words, ("hello\n", "ho\n", "\x04"))
    chat = Chat(load_model(runs / "chat"), max_new_tokens=5)
    answers = [command._printable(chat.answer(turn)) for turn in ("hello", "ho")]
    assert shown.count("> ") == 3
    assert shown.index(answers[0] + "\n") < shown.rindex(answers[1] + "\n")


def test_a_reader_that_goes_away_ends_it_quietly(lmtrain: CommandLine, runs: Path) -> None:
    with lmtrain.start("generate", str(runs / "plain"), "--max-new-tokens", "1000000") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(5)  # the text comes as it is made
        process.stdout.close()
        process.stdout = None
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err == "lmtrain: the prompt is empty: beginning as documents do\n"


def test_a_closed_output_is_none_of_its_business(runs: Path) -> None:
    words = f"generate {runs / 'plain'} --prompt a --max-new-tokens 2"
    ended = subprocess.run(
        ["sh", "-c", f"exec {sys.executable} -m lmtrain {words} >&-"], stderr=subprocess.PIPE, text=True
    )
    assert (ended.returncode, ended.stderr) == (0, "")
