"""Runs on every kind of data as a user makes them: killed and resumed, in grids and studies, with given tokenizers."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import TINY, CommandLine
from small_tokenizers import foreign_huggingface, foreign_sentencepiece, sample_text, written

from lmtrain.commands.verify_resume import compare_ends, verify
from lmtrain.data.tokenizer import load_tokenizer
from lmtrain.run_dir import RunDir

WITHOUT_DATA = [word for word in TINY if word != "data=text"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with lines, conversations and pairs."""
    folder = tmp_path_factory.mktemp("texts")
    words = sample_text().split()
    lines = [" ".join(words[start : start + 1 + start % 9]) for start in range(0, len(words), 8)]
    (folder / "lines.txt").write_text("\n".join(lines))
    (folder / "other.txt").write_text("\n".join(line.upper() for line in lines[:60]))
    turns = [
        {"messages": [{"role": "user", "content": line}, {"role": "assistant", "content": line[::-1]}]}
        for line in lines
    ]
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, turns)))
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps({"q": line, "a": line[::2]}) for line in lines))
    return folder


@pytest.fixture(scope="module")
def data(texts: Path) -> dict[str, list[str]]:
    """Words that choose data of each kind."""
    two = ["+data@data.sources.a=text", "+data@data.sources.b=text", "data.sources.a.document=line"]
    paths = [f"data.sources.a.path={texts}/lines.txt", f"data.sources.b.path={texts}/other.txt"]
    return {
        "mixture": ["data=mixture", *two, *paths, "data.sources.b.weight=0.3"],
        "chat": ["data=chat", f"data.path={texts}/chat.jsonl"],
        "pairs": ["data=pairs", f"data.path={texts}/pairs.jsonl", "data.source=q", "data.target=a"],
    }


def wait_until(condition: Callable[[], bool], process: Any) -> None:
    deadline = time.monotonic() + 120
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def budget(steps: int) -> list[str]:
    """So many steps, with an evaluation at the end only."""
    every = ["trainer.eval_every_tokens=null", f"trainer.eval_every={steps}"]
    return [f"trainer.max_steps={steps}", "trainer.max_tokens=null", *every]


def result_of(folder: Path) -> dict[str, Any]:
    found = RunDir(folder).read_result()
    assert found is not None
    assert found["status"] == "completed"
    return found


# ------------------------------------------------------------------------------------------ resumed


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("kind", ["mixture", "chat", "pairs"])
def test_a_killed_run_goes_on_as_if_nothing_had_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: dict[str, list[str]], kind: str
) -> None:
    monkeypatch.setenv("LMTRAIN_CACHE", str(tmp_path / "cache"))
    assert not verify(tmp_path, [*WITHOUT_DATA, *data[kind]], steps=150, chance=random.Random(kind))


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("kind", ["mixture", "chat"])
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(
    lmtrain: CommandLine, data: dict[str, list[str]], kind: str
) -> None:
    words = [*WITHOUT_DATA, *data[kind], "trainer.max_steps=400", "trainer.log_every=1", "trainer.eval_every=100"]
    lmtrain(*words, "hydra.run.dir=whole")
    broken = lmtrain.folder / "broken"
    with lmtrain.start(*words, "hydra.run.dir=broken") as process:
        wait_until(lambda: (broken / "metrics.jsonl").exists(), process)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    lmtrain("resume=broken")
    assert not compare_ends(RunDir(lmtrain.folder / "whole"), RunDir(broken))


# ------------------------------------------------------------------------------------------ several runs


def test_a_grid_over_the_weight_of_a_source(lmtrain: CommandLine, data: dict[str, list[str]]) -> None:
    words = [*WITHOUT_DATA, *data["mixture"], "trainer.max_steps=30", "sweep.name=weights"]
    done = lmtrain("--multirun", *words, "data.sources.a.weight=1,3")
    folders = [lmtrain.folder / "multirun/weights" / name for name in ("0000", "0001")]
    configs = [yaml.safe_load((folder / "config.yaml").read_text()) for folder in folders]
    assert [config["data"]["sources"]["a"]["weight"] for config in configs] == [1, 3]
    one, other = map(result_of, folders)
    assert one["tokenizer_fingerprint"] == other["tokenizer_fingerprint"]
    assert one["objective"] != other["objective"]
    assert done.stdout.count("preparing") + done.stderr.count("preparing") == 1, "one entry serves both"
    assert len(list((lmtrain.folder / "cache/prepared").glob("*/manifest.json"))) == 1


def test_a_study_over_the_vocabulary(lmtrain: CommandLine, texts: Path) -> None:
    tiny = [word for word in TINY if word != "tokenizer=byte"]
    study = ["--multirun", "sweep=lr", "sweep.name=study", "hydra.sweeper.n_trials=3", *budget(10)]
    words = [*tiny, *study, f"data.path={texts}/lines.txt", "data.document=line"]
    lmtrain(*words, "tokenizer=sentencepiece_bpe", "tokenizer.vocab_size=choice(300,320)")
    folders = sorted((lmtrain.folder / "multirun/study").glob("[0-9]*"))
    assert len(folders) == 3
    for folder in folders:
        chosen = yaml.safe_load((folder / "config.yaml").read_text())["tokenizer"]["vocab_size"]
        assert load_tokenizer(folder / "tokenizer.model").vocab_size == chosen
        assert (folder / "result.json").exists()
    assert len(list((lmtrain.folder / "cache/prepared").glob("*/manifest.json"))) == len(
        {(folder / "tokenizer.model").read_bytes() for folder in folders}
    )


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_text_that_changes_under_a_study_ends_it(lmtrain: CommandLine, texts: Path) -> None:
    text = lmtrain.folder / "lines.txt"
    shutil.copy(texts / "lines.txt", text)
    study = ["--multirun", "sweep=lr", "sweep.name=study", "hydra.sweeper.n_trials=4", "hydra/sweeper/pruner=none"]
    words = [*TINY, *study, "data.path=lines.txt", *budget(60)]
    second = lmtrain.folder / "multirun/study/0001/metrics.jsonl"
    with lmtrain.start(*words) as process:
        wait_until(second.exists, process)
        text.write_text(text.read_text()[::-1])
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1, stderr
    assert "Traceback" not in stderr
    assert "lines.txt has changed since this study began" in stderr
    assert not (lmtrain.folder / "multirun/study/0003/result.json").exists()
    again = lmtrain(*words, status=1)
    assert "lines.txt has changed since this study began" in again.stderr
    text.write_text(text.read_text()[::-1])
    lmtrain(*words)
    assert (lmtrain.folder / "multirun/study/0003/result.json").exists()


@pytest.mark.slow
def test_a_text_that_changes_under_a_run_is_told(lmtrain: CommandLine, data: dict[str, list[str]]) -> None:
    text = lmtrain.folder / "other.txt"
    text.write_text("a sentence of no account\n" * 90)
    words = [word for word in data["mixture"] if not word.startswith("data.sources.b.path")]
    words = [*WITHOUT_DATA, *words, "data.sources.b.path=other.txt", "trainer.max_steps=10"]
    lmtrain(*words, "hydra.run.dir=run")
    text.write_text("another sentence altogether\n" * 90)
    refused = lmtrain("resume=run", "trainer.max_steps=20", status=2)
    assert "the text is not the one this run was trained on" in refused.stderr


# ------------------------------------------------------------------------------------------ given tokenizers


@pytest.mark.parametrize("kind", ["sentencepiece_model", "huggingface"])
def test_a_given_tokenizer_is_saved_with_the_run(lmtrain: CommandLine, texts: Path, kind: str) -> None:
    file = lmtrain.folder / {"sentencepiece_model": "theirs.model", "huggingface": "tokenizer.json"}[kind]
    written(file, foreign_sentencepiece() if kind == "sentencepiece_model" else foreign_huggingface())
    tiny = [word for word in WITHOUT_DATA if word != "tokenizer=byte"]
    words = [*tiny, "data=chat", f"data.path={texts}/chat.jsonl", f"tokenizer={kind}", f"tokenizer.path={file.name}"]
    lmtrain(*words, "trainer.max_steps=5", "hydra.run.dir=run")
    shutil.rmtree(lmtrain.folder / "cache")
    file.unlink()
    alone = lmtrain.folder / "moved"
    (lmtrain.folder / "run").rename(alone)
    tokenizer = load_tokenizer(alone / "tokenizer.model")
    text = sample_text(40)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert "<|assistant|>" in tokenizer.special
    assert result_of(alone)["tokenizer_fingerprint"] == tokenizer.fingerprint
    assert tokenizer.decode(tokenizer.encode("seven wizards")) == "seven wizards"
