"""Kill -9 at random instants and resume: the ending is that of the run nobody touched, to the bit."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import pytest
from command_line import ROOT, TINY

from lmtrain.commands.verify_resume import kill_and_resume, main, train_whole
from lmtrain.config.compose import group_options
from lmtrain.run_dir import RunDir

KILLS = 10
SMALL = ["data.seq_len=64", "parallel.num_threads=1", "model.d_model=64"]
SMALL_DECODER = [*SMALL, "model.num_layers=2"]
SMALL_PAIRS = [*SMALL, "model.num_encoder_layers=1", "model.num_decoder_layers=1", "tokenizer.vocab_size=400"]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_killed_runs_end_like_those_that_were_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings of the benchmark, ten kills or more."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("LMTRAIN_CACHE", str(tmp_path / "cache"))
    from kill_resume import SETTINGS, STEPS

    chance, kills, kills_of_resumed = random.Random(0), 0, 0
    wholes = {name: RunDir(tmp_path / f"whole {number}") for number, name in enumerate(SETTINGS)}
    for name, overrides in SETTINGS.items():
        train_whole(wholes[name], overrides, steps=STEPS)
    for number in range(KILLS):
        name = list(SETTINGS)[number % len(SETTINGS)]
        run = RunDir(tmp_path / f"broken {number}")
        where, differences = kill_and_resume(run, wholes[name], chance=chance, attempts=1 + number % 2)
        assert not differences, (name, where)
        kills += where[0].phase != "ended"
        kills_of_resumed += any(kill.phase != "ended" for kill in where[1:])
    assert kills >= KILLS / 2
    assert kills_of_resumed >= 1


@pytest.mark.multiprocess
def test_the_run_that_is_killed_takes_what_the_other_chose(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `auto` comes to by timing may be something else the next time."""
    monkeypatch.setenv("LMTRAIN_CACHE", str(tmp_path / "cache"))
    whole, broken = RunDir(tmp_path / "whole"), RunDir(tmp_path / "broken")
    train_whole(whole, [*TINY, f"data.path={corpus}", "parallel.num_threads=auto", "precision=auto"], steps=8)
    chosen = whole.config.read_text().replace("  num_threads: 1\n", "  num_threads: 2\n")
    chosen = chosen.replace("  format: fp32\n", "  format: bf16\n")
    whole.config.write_text(chosen)
    kill_and_resume(broken, whole, chance=random.Random(0))
    taken = broken.config.read_text()
    assert "  num_threads: 2\n" in taken
    assert "  format: bf16\n" in taken


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("experiment", group_options("experiment"))
def test_every_shipped_experiment_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, experiment: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Smaller than shipped, or it would take an hour, and on what is at hand; the rest is as it is."""
    monkeypatch.setenv("LMTRAIN_CACHE", str(tmp_path / "cache"))
    text = (ROOT / "experiments" / f"{experiment}.yaml").read_text()
    words = SMALL_DECODER
    if "override /data: text" in text:
        words = [*SMALL_DECODER, f"data.path={argparse.__file__}"]
    elif "override /data: multi30k" in text:
        lines = [line for line in Path(argparse.__file__).read_text().splitlines() if line.strip()]
        pairs = (json.dumps({"de": line, "en": line.upper()}) for line in lines)
        (tmp_path / "pairs.jsonl").write_text("\n".join(pairs))
        words = [*SMALL_PAIRS, f"data.path={tmp_path / 'pairs.jsonl'}"]
    assert main(["--steps", "12", "--seed", "0", f"experiment={experiment}", *words]) == 0
    assert "identical (kill seed 0)" in capfd.readouterr().out
