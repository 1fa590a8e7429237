"""`lmtrain export`: what it writes, that it writes all or nothing, and what it refuses."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
from command_line import TINY, CommandLine, snapshot
from full_disk import FullDisk
from trained_runs import chat_tokenizer, make_run

from lmtrain.commands import export as command
from lmtrain.config.compose import compose_config
from lmtrain.data.tokenizer import ByteTokenizer, IdsTokenizer, load_tokenizer
from lmtrain.errors import CheckpointError, ConfigError, LmtrainError, RunError, RunFolderError
from lmtrain.inference import export as exporting
from lmtrain.inference import load_model
from lmtrain.run_dir import OWN_TOKENIZER

LLAMA = ("model.activation=swiglu", "model.qk_norm=false")
FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of three checkpoints, the second of which is the best."""
    return make_run(tmp_path_factory.mktemp("runs") / "run", ByteTokenizer(), *LLAMA)


def generation_of(folder: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads((folder / "generation_config.json").read_text())
    return content


def test_the_folder_and_what_is_said_of_it(run: Path, tmp_path: Path, capsys: Capture) -> None:
    """Parents are made, an empty folder is used, our own tokenizer comes along."""
    folder = tmp_path / "new" / "model"
    assert command.main([str(run), "--to", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    first, second = out.splitlines()
    assert first == f"{folder}: step 2 in the Llama format, 8,256 parameters in fp32"
    assert f'AutoModelForCausalLM.from_pretrained("{folder}")' in second
    assert second.endswith(f"train on with init_from={folder} tokenizer=saved tokenizer.path={folder}")
    assert {path.name for path in folder.iterdir()} == FILES | {OWN_TOKENIZER}
    assert load_tokenizer(folder / OWN_TOKENIZER).fingerprint == ByteTokenizer().fingerprint
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    (tmp_path / "empty").mkdir()
    command.main([str(run), "--to", str(tmp_path / "empty")])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "empty").iterdir()
    }
    assert {path.name for path in tmp_path.iterdir()} == {"new", "empty"}


def test_checkpoint_and_number_format_are_chosen(run: Path, tmp_path: Path, capsys: Capture) -> None:
    command.main([str(run), "--to", str(tmp_path / "last"), "--checkpoint", "last", "--dtype", "bf16"])
    assert f"{tmp_path / 'last'}: step 3 in the Llama format, 8,256 parameters in bf16\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "last" / "config.json").read_text())["dtype"] == "bfloat16"
    command.main([str(run), "--to", str(tmp_path / "first"), "--checkpoint", "1", "--dtype", "fp16"])
    assert ": step 1 in" in capsys.readouterr().out


def test_tokens_that_end_a_text(run: Path, tmp_path: Path) -> None:
    """Those of a document and of a turn, as for `generate`."""
    command.main([str(run), "--to", str(tmp_path / "plain")])
    assert generation_of(tmp_path / "plain") == {"bos_token_id": None, "eos_token_id": 256, "pad_token_id": 256}
    tokenizer = chat_tokenizer()
    special = tokenizer.special
    make_run(tmp_path / "run", tokenizer, *LLAMA)
    command.main([str(tmp_path / "run"), "--to", str(tmp_path / "chat")])
    assert generation_of(tmp_path / "chat") == {
        "bos_token_id": None,
        "eos_token_id": [256, special["<|turn_end|>"]],
        "pad_token_id": special["<|pad|>"],
    }


# ------------------------------------------------------------------------------------------- what cannot be done


def refusal(kind: type[LmtrainError], *words: object) -> str:
    with pytest.raises(kind) as refused:
        command.main([str(word) for word in words])
    return str(refused.value)


def test_the_default_model_is_refused_with_what_would_do(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ByteTokenizer())
    assert refusal(ConfigError, run, "--to", tmp_path / "model") == (
        f"{run} cannot be exported: the Llama format has no model.activation=relu2, no model.qk_norm=true\n"
        "to export a run, train it with model.activation=swiglu model.qk_norm=false"
    )
    assert not (tmp_path / "model").exists()


def test_all_reasons_are_told_at_once(tmp_path: Path) -> None:
    words = ("model.norm=layernorm", "model.position=learned", "model.sliding_window=8", "model.logit_softcap=30")
    run = make_run(tmp_path / "run", IdsTokenizer(40), *words)
    told = refusal(ConfigError, run, "--to", tmp_path / "model")
    assert told.startswith(
        f"{run} cannot be exported: the GPT-2 format has no model.qk_norm=true, no model.logit_softcap=30.0, no "
        "model.sliding_window=8; "
    )
    assert "ids" in told
    assert told.endswith(
        "\nto export a run, train it with model.qk_norm=false model.logit_softcap=null model.sliding_window=null"
    )


def test_folders_that_hold_something_stay_as_they_are(run: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = snapshot(tmp_path)
    assert refusal(RunFolderError, run, "--to", taken) == f"{taken} is not empty: name a new folder, or empty it"
    assert (
        refusal(RunFolderError, run, "--to", tmp_path / "file") == f"{tmp_path / 'file'} is a file: name a new folder"
    )
    assert "is not empty" in refusal(RunFolderError, run, "--to", "/")
    assert refusal(RunFolderError, run, "--to", tmp_path / "file" / "x").endswith("/file/x: Not a directory")
    assert snapshot(tmp_path) == before


def test_no_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ByteTokenizer(), *LLAMA, steps=())
    assert "has no checkpoint: a run writes them" in refusal(CheckpointError, run, "--to", tmp_path / "a" / "model")
    other = make_run(tmp_path / "other", ByteTokenizer(), *LLAMA)
    told = refusal(CheckpointError, other, "--to", tmp_path / "model", "--checkpoint", 7)
    assert "has no checkpoint '7'; there are last, best, 1, 2, 3" in told
    assert {path.name for path in tmp_path.iterdir()} == {"run", "other"}


def test_words_that_are_wrong(run: Path, tmp_path: Path) -> None:
    assert "there is no run folder" in refusal(LmtrainError, tmp_path, "--to", tmp_path / "model")
    assert "required: --to" in refusal(ConfigError, run)
    assert "invalid choice: 'int8'" in refusal(ConfigError, run, "--to", tmp_path / "model", "--dtype", "int8")


def test_a_disk_that_fills_at_any_write(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left but what was there; then the same command succeeds."""
    monkeypatch.setattr(exporting, "load_model", functools.cache(load_model))  # the same again and again
    config = compose_config([], run)
    monkeypatch.setattr(exporting, "compose_config", lambda *_: config)
    target = tmp_path / "there" / "new" / "model"
    (tmp_path / "there").mkdir()
    full_at = 0
    while True:
        with monkeypatch.context() as patch:
            disk = FullDisk(tmp_path / "there", full_at, patch)
            try:
                command.main([str(run), "--to", str(target)])
                break
            except RunError as error:
                assert str(error) == f"cannot write {target}: No space left on device"  # noqa: PT017
                assert error.exit_status == 1  # noqa: PT017
        assert disk.failed
        assert list((tmp_path / "there").iterdir()) == []
        full_at += 1
    assert full_at > 10
    assert {path.name for path in target.iterdir()} == FILES | {OWN_TOKENIZER}


def test_a_draft_left_by_a_kill_is_in_nobodys_way(run: Path, tmp_path: Path) -> None:
    draft = tmp_path / ".model.partial"
    draft.mkdir()
    (draft / "half").write_text("")
    command.main([str(run), "--to", str(tmp_path / "model")])
    assert {path.name for path in (tmp_path / "model").iterdir()} == FILES | {OWN_TOKENIZER}
    assert not draft.exists()


# ------------------------------------------------------------------------------------------- as typed


def test_training_goes_on_from_what_was_exported(lmtrain: CommandLine, corpus: Path, run: Path) -> None:
    """With the tokenizer in the folder; a rate of almost nothing leaves the weights where they were."""
    done = lmtrain("export", str(run), "--to", "model")
    assert "step 2 in the Llama format" in done.stdout
    tiny = [word for word in TINY if not word.startswith("tokenizer=")]
    start = ["tokenizer=saved", "tokenizer.path=model", "init_from=model"]
    lmtrain(*tiny, *LLAMA, *start, f"data.path={corpus}", "lr=1e-9", "trainer.max_steps=1", "hydra.run.dir=tuned")
    before = load_model(run, checkpoint="2", device="cpu").model
    after = load_model(lmtrain.folder / "tuned", device="cpu").model
    for weight, tuned in zip(before.parameters(), after.parameters(), strict=True):
        assert (weight - tuned).abs().max() < 1e-6
