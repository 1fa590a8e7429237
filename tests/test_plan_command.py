"""`lmtrain plan`: what it says of a run, that it agrees with the run, and that it leaves nothing behind."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import TINY, CommandLine

from lmtrain.commands import plan as command
from lmtrain.config.compose import compose_config
from lmtrain.data.prepare import prepare, was_prepared
from lmtrain.errors import ConfigError, DataError, HardwareError
from lmtrain.model.building import build_model
from lmtrain.planning import plan as planning
from lmtrain.planning import probe
from lmtrain.planning.plan import make_plan
from lmtrain.session import build_session

STDLIB = ("parallel.num_threads=1", "tracking=none")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(probe, "SECONDS", 0.1)
    monkeypatch.chdir(tmp_path)


def told(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert command.main(list(words)) == 0
    return capsys.readouterr().out


def record(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(told(capsys, "--json", *words))
    return content


def test_the_default_run_is_planned_without_its_text(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = told(capsys, *STDLIB)
    assert "1,049,728 parameters: 4 blocks of width 128, as model=nano" in text
    assert "2,048 tokens\n" in text
    assert "1,000 steps of 8 sequences, 2.05 M tokens, 14.5 T FLOPs" in text
    assert re.search(r"^fits into [\d.]+ GiB of main memory with the whole batch at a time; up to [\d,]+", text, re.M)
    assert not list(tmp_path.iterdir())


def test_the_record_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    plan = record(capsys, *STDLIB, "model=tiny", "optimizer=adamw", "tokenizer.vocab_size=4000", "batch_size=16")
    parameters, memory = plan["parameters"], plan["memory"]
    assert parameters["total"] == sum(count for part, count in parameters.items() if part != "total")
    assert memory["peak"] == sum(memory["at_fullest"].values())
    assert memory["parts"]["weights"] == 4 * parameters["total"]
    assert memory["parts"]["optimizer state"] == 8 * parameters["total"]
    assert all(memory["at_fullest"][part] <= size for part, size in memory["parts"].items())
    assert plan["tokens"] == 1000 * 16 * 256
    assert plan["flops"] == plan["tokens"] * plan["flops_per_token"]
    assert (plan["model"]["preset"], plan["vocab_size"], plan["fits"]) == ("tiny", 4000, True)
    with torch.device("meta"):
        model = build_model(compose_config(["model=tiny"]).model, vocab_size=4000, seq_len=256, dropout=0.0)
    assert parameters["total"] == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    "words",
    [
        ("trainer.max_steps=7",),
        ("trainer.max_steps=null", "trainer.max_tokens=9000"),
        ("trainer.max_steps=null", "trainer.max_epochs=1.5"),
        ("trainer.max_steps=20", "trainer.batch_size_warmup_steps=9"),
        ("trainer.max_steps=null", "trainer.max_tokens=9000", "trainer.batch_size_warmup_steps=9"),
        ("trainer.max_steps=9", "data.batches=padded", "data.document=line"),
        ("trainer.max_steps=null", "trainer.max_tokens=900", "tokenizer=char"),
    ],
)
def test_steps_tokens_and_parameters_are_those_of_the_run(corpus: Path, words: tuple[str, ...]) -> None:
    config = compose_config([*TINY, f"data.path={corpus}", *words])
    data = prepare(config.data, config.tokenizer)
    session = build_session(config, data, torch.device("cpu"))
    plan = make_plan(config)
    assert plan.budget.steps == session.total_steps
    sequences = session.batches.sequences(session.total_steps - 1).stop
    assert plan.budget.tokens == int(sequences * session.batches.mean_targets)
    assert plan.parameters.total == session.num_parameters
    assert plan.vocab_size == data.tokenizer.vocab_size
    assert not plan.vocab_assumed


def test_what_follows_from_a_text_is_not_known_before_it_is_prepared(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*TINY, f"data.path={corpus}", "tokenizer=char", "trainer.max_steps=null", "trainer.max_epochs=2"]
    text = told(capsys, *words)
    assert "vocabulary 100 tokens, assumed" in text
    assert "some steps of 4 sequences, 2 passes over the text; how many tokens that is follows from the text" in text
    config = compose_config(words)
    assert not was_prepared(config.data, config.tokenizer)
    prepare(config.data, config.tokenizer)
    assert was_prepared(config.data, config.tokenizer)
    plan = record(capsys, *words)
    assert not plan["vocab_size_assumed"]
    assert plan["vocab_size"] < 100
    assert plan["steps"] > 0


def test_text_that_is_not_needed_is_not_looked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert record(capsys, *TINY, "data.path=nowhere.txt")["vocab_size"] == 257
    with pytest.raises(DataError, match="no file"):
        command.main([*TINY, "data.path=nowhere.txt", "tokenizer=huggingface", "tokenizer.path=nowhere.json"])


def test_the_microbatch_is_what_fits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*STDLIB, "batch_size=32"]
    memory = make_plan(compose_config(words)).memory
    monkeypatch.setattr(planning, "available_memory", lambda: memory.footprint(10, 32).peak)
    assert "with 8 of 32 sequences at a time; up to 10 sequences would" in told(capsys, *words)
    text = told(capsys, *words, "trainer.micro_batch_size=16")
    assert re.search(r"^does not fit into .*: trainer.micro_batch_size=16 needs .*; up to 10 sequences fit", text, re.M)
    monkeypatch.setattr(planning, "available_memory", lambda: memory.footprint(1, 32).peak - 1)
    text = told(capsys, *words)
    assert re.search(r"^does not fit into .*: one sequence at a time needs .*activation_checkpointing=full", text, re.M)
    plan = record(capsys, *words)
    assert (plan["fits"], plan["micro_batch_size"], plan["largest_micro_batch_size"]) == (False, 0, 0)


def test_models_of_every_kind_are_planned(capsys: pytest.CaptureFixture[str]) -> None:
    pairs = told(capsys, *STDLIB, "model=seq2seq_nano", "data=multi30k")
    assert re.search(r"parameters: \d \+ \d blocks of width", pairs)
    auto = record(capsys, *STDLIB, "model=auto")
    assert auto["model"]["preset"] in ("nano", "tiny", "small", "medium", "research")
    assert auto["model"]["choice"].startswith(f"model={auto['model']['preset']}, the largest preset that fits")


def test_a_wrong_request_is_refused() -> None:
    with pytest.raises(ConfigError, match="unrecognized arguments: --jsn"):
        command.main(["--jsn"])
    if not torch.cuda.is_available():
        with pytest.raises(HardwareError, match="device=cuda is not available"):
            command.main(["device=cuda"])


def test_the_program_knows_the_word(lmtrain: CommandLine) -> None:
    assert json.loads(lmtrain("plan", *TINY, "data.path=x.txt", "--json").stdout)["parameters"]["total"] > 0
    assert lmtrain("plan", "modle=nano", status=2).stderr == (
        "lmtrain: there is no setting 'modle'; did you mean model?\n"
    )
    assert not list(lmtrain.folder.iterdir())


def test_several_devices_share_a_batch_and_its_weights(capsys: pytest.CaptureFixture[str]) -> None:
    words = (*STDLIB, "model=tiny", "batch_size=30")
    alone, ddp, fsdp = (
        record(capsys, *words, *more)
        for more in ((), ("parallel=ddp", "--devices", "4"), ("parallel=fsdp", "--devices", "4"))
    )
    assert [plan["devices"] for plan in (alone, ddp, fsdp)] == [1, 4, 4]
    assert [plan["micro_batch_size"] for plan in (alone, ddp, fsdp)] == [30, 8, 8]
    weights = alone["memory"]["parts"]["weights"]
    assert ddp["memory"]["parts"]["weights"] == weights
    assert fsdp["memory"]["parts"]["weights"] == weights / 4
    assert fsdp["memory"]["parts"]["gathered weights"] > 0
    assert ddp["exchanged_bytes_a_step"] == 2 * 3 * weights // 4
    assert ddp["time"]["seconds_a_step"] == pytest.approx(alone["time"]["seconds_a_step"] * 8 / 30, rel=0.5)
    assert "each with 8 sequences of a batch" in told(capsys, *words, "parallel=ddp", "--devices", "4")
    with pytest.raises(ConfigError, match="2 devices make one run with parallel=ddp or parallel=fsdp"):
        command.main(["--devices", "2"])
    with pytest.raises(ConfigError, match="--devices must be at least 1"):
        command.main(["--devices", "0"])
    for watts in ("-3", "0", "nan", "inf"):
        with pytest.raises(ConfigError, match=f"--watts must be positive, got {watts}"):
            command.main(["--watts", watts])


def test_time_and_energy_follow_from_what_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    words = (*STDLIB, "trainer.eval_batches=4", "trainer.max_steps=500")
    plan = record(capsys, *words, "--watts", "50")
    time = plan["time"]
    assert time["evaluations"] == 2
    assert time["seconds"] == pytest.approx(time["training"] + time["evaluation"] + time["checkpoints"])
    assert time["training"] == pytest.approx(500 * time["seconds_a_step"])
    assert plan["energy_kwh"] == pytest.approx(50 * time["seconds"] / 3.6e6)
    assert plan["power"]["basis"] == "as given"
    text = told(capsys, *words, "--watts", "50")
    assert re.search(
        r"^time       about .* steps .*, 2 evaluations .* of [\d,]+ GFLOP/s in matrix products", text, re.M
    )
    assert re.search(r"^energy     about [\d.e-]+ kWh at 50 W \(as given\)$", text, re.M)
    assert ", 1 evaluation " in told(capsys, *words, "trainer.max_steps=20")
    assert "whole validation split not counted" in told(capsys, *STDLIB)


def test_a_whole_validation_split_is_counted_once_its_text_is_prepared(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*TINY, f"data.path={corpus}", "trainer.eval_batches=null"]
    assert record(capsys, *words)["time"]["evaluation"] is None
    config = compose_config(words)
    session = build_session(config, prepare(config.data, config.tokenizer), torch.device("cpu"))
    budget = make_plan(config).budget
    assert budget.evaluated_sequences == sum(batch.num_sequences for batch in session.val_batches)
    assert record(capsys, *words)["time"]["evaluation"] > 0


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("data.batches=packed_documents", "trainer.micro_batch_size=3"),
        ("data.batches=padded", "data.document=line"),
    ],
)
def test_a_probe_measures_and_leaves_nothing(
    corpus: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, words: tuple[str, ...]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    words = (*TINY, f"data.path={corpus}", *words)
    plan = record(capsys, *words, "--probe")
    assert sorted(tmp_path.rglob("*")) == before
    probe = plan["probe"]
    assert probe["steps"] >= 1
    assert probe["seconds_a_step"] > 0
    assert probe["micro_batch_size"] == plan["micro_batch_size"]
    assert not probe["scaled"]
    if plan["time"] is not None:
        assert plan["time"]["basis"] == "measured just now"
    assert "by formula" in told(capsys, *words, "--probe")


def test_a_probe_of_pairs_needs_no_text(capsys: pytest.CaptureFixture[str]) -> None:
    small = ("model.d_model=32", "model.num_heads=2", "data.seq_len=16", "batch_size=2", "tokenizer.vocab_size=300")
    plan = record(capsys, *STDLIB, "model=seq2seq_nano", "data=multi30k", *small, "--probe")
    assert plan["probe"]["seconds_a_step"] > 0
    assert plan["time"] is None
