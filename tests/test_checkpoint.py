"""Checkpoints: whole or not there, exact, safe to read, refused when damaged."""

from __future__ import annotations

import json
import os
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lmtrain.config.schema import SCHEMAS, MuonConfig, OptimizerConfig
from lmtrain.errors import CheckpointError, NewerFormatError, RunError, WeightsOnlyError
from lmtrain.training.checkpoint import Checkpoint, CheckpointFolder, capture, restore
from lmtrain.training.checkpoint_writer import CheckpointWriter
from lmtrain.training.optimizers import build_optimizers

Parts = tuple[nn.Module, list[torch.optim.Optimizer], torch.amp.GradScaler]


def build(seed: int, width: int = 4, optimizer: type[OptimizerConfig] = MuonConfig) -> Parts:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.5), nn.Linear(width, width))
    matrices = [p for p in model.parameters() if p.ndim == 2]
    optimizers = build_optimizers(optimizer(weight_decay=0.1), model.parameters(), matrices, lr=0.01)
    return model, optimizers, torch.amp.GradScaler("cpu", enabled=False)


def train(model: nn.Module, optimizers: list[torch.optim.Optimizer], steps: int) -> None:
    """Dropout draws from the global generator, so a wrong random state shows."""
    for _ in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(torch.ones(3, 4)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def raise_full_disk(*arguments: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("optimizer", SCHEMAS["optimizer"].values())
@pytest.mark.parametrize("steps_before", [0, 3])
def test_a_restored_run_goes_on_to_the_bit(tmp_path: Path, optimizer: type[OptimizerConfig], steps_before: int) -> None:
    """With every optimizer; also before its first step, when it has no state yet."""
    model, optimizers, scaler = build(seed=0, optimizer=optimizer)
    train(model, optimizers, steps_before)
    meta = {"progress": {"step": steps_before}}
    CheckpointFolder(tmp_path).save(capture(model, optimizers, scaler, meta), step=steps_before)
    train(model, optimizers, 4)

    other, other_optimizers, other_scaler = build(seed=99, optimizer=optimizer)
    checkpoint = CheckpointFolder(tmp_path).load("last")
    restore(checkpoint, other, other_optimizers, other_scaler)
    assert checkpoint.meta["progress"] == {"step": steps_before}
    train(other, other_optimizers, 4)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(other), strict=True))
    for before, after in zip(optimizers, other_optimizers, strict=True):
        _assert_same_state(before.state_dict()["state"], after.state_dict()["state"])


def _assert_same_state(before: dict[int, dict[str, object]], after: dict[int, dict[str, object]]) -> None:
    assert before.keys() == after.keys()
    for number, values in before.items():
        assert values.keys() == after[number].keys()
        for name, value in values.items():
            assert isinstance(value, torch.Tensor), name  # what a checkpoint can hold
            assert torch.equal(value, after[number][name])  # type: ignore[arg-type]


def test_retention_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    folder, parts = CheckpointFolder(tmp_path, keep=2), build(seed=0)
    for step in range(1, 6):
        folder.save(capture(*parts, {"step": step}), step=step, best_step=2)
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_00000002", "step_00000004", "step_00000005"]
    assert (tmp_path / "last").readlink() == Path("step_00000005")
    assert (tmp_path / "best").readlink() == Path("step_00000002")
    assert folder.load("best").meta["step"] == 2


def test_reading_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    folder, parts = CheckpointFolder(tmp_path), build(seed=0)
    for name in ("model.safetensors", "training_state.safetensors", "meta.json"):
        path = folder.save(capture(*parts, {}), step=1) / name
        whole = path.read_bytes()
        for damage in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
            path.write_bytes(damage)
            with pytest.raises(CheckpointError, match=f"{name} is damaged"):
                folder.load("last")
        path.unlink()
        with pytest.raises(CheckpointError, match="damaged"):
            folder.load("last")
        path.write_bytes(whole)
        folder.load("last")


def test_a_newer_format_and_a_missing_checkpoint_are_refused(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        folder.load("last")
    manifest = folder.save(capture(*build(seed=0), {}), step=1) / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 99}))
    with pytest.raises(NewerFormatError, match="newer version"):
        folder.load("last")


def test_a_newer_format_is_not_passed_over_for_an_older_checkpoint(tmp_path: Path) -> None:
    """It is not damage: what was trained since would be lost without a word."""
    folder, parts = CheckpointFolder(tmp_path, keep=3), build(seed=0)
    for step in (1, 2):
        manifest = folder.save(capture(*parts, {}), step=step) / "manifest.json"
    manifest.write_text(json.dumps({"format": 2}))
    with pytest.raises(NewerFormatError, match="step_00000002 was written by a newer version"):
        folder.load_newest()


@pytest.mark.parametrize("manifest", ["", "[]", "{}", '{"format": 1, "sha256": {}}', '{"format": "1", "sha256": 1}'])
def test_a_damaged_manifest_is_damage(tmp_path: Path, manifest: str) -> None:
    folder = CheckpointFolder(tmp_path)
    (folder.save(capture(*build(seed=0), {}), step=1) / "manifest.json").write_text(manifest)
    with pytest.raises(CheckpointError, match="is damaged"):
        folder.load("last")


def test_another_model_is_refused_by_name(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(capture(*build(seed=0, width=5), {}), step=1)
    with pytest.raises(CheckpointError, match=r"of another model: 0\.(weight|bias) is \(5"):
        restore(folder.load("last"), *build(seed=0, width=4))


def test_a_write_that_fails_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, parts = CheckpointFolder(tmp_path), build(seed=0)
    folder.save(capture(*parts, {"step": 1}), step=1, best_step=1)

    monkeypatch.setattr("lmtrain.training.checkpoint.save_file", raise_full_disk)
    with pytest.raises(RunError, match="No space left"):
        folder.save(capture(*parts, {"step": 2}), step=2, best_step=2)
    assert folder.load("last").meta["step"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "last", "step_00000001"]


def test_a_disk_too_full_for_the_links_is_told_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, parts = CheckpointFolder(tmp_path), build(seed=0)
    folder.save(capture(*parts, {"step": 1}), step=1)
    monkeypatch.setattr(Path, "symlink_to", raise_full_disk)
    with pytest.raises(RunError, match="No space left on device\nthose before it are whole"):
        folder.save(capture(*parts, {"step": 2}), step=2)
    assert folder.load("last").meta["step"] == 1


def test_what_a_kill_left_is_put_right(tmp_path: Path) -> None:
    """A kill between the rename and the links leaves those behind; one while writing, a folder of no use."""
    folder, parts = CheckpointFolder(tmp_path), build(seed=0)
    for step in (1, 2):
        folder.save(capture(*parts, {"step": step}), step=step, best_step=1)
    assert folder.load("best").meta["step"] == 1
    (tmp_path / ".step_00000007.partial").mkdir()
    folder.link(step=2, best_step=2)
    assert [folder.load(name).meta["step"] for name in ("last", "best")] == [2, 2]
    folder.save(capture(*parts, {"step": 3}), step=3, best_step=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "last", "step_00000002", "step_00000003"]


def save_and_die(folder: CheckpointFolder, checkpoint: Checkpoint, moment: int) -> bool:
    """Save as step 2 in a fork that ends without a word at its n-th act on a file; True if it got to its end."""
    if (child := os.fork()) == 0:
        moments = iter(range(moment))

        def act(event: str, arguments: tuple[object, ...]) -> None:
            if event.split(".")[0] in ("open", "os", "shutil") and next(moments, None) is None:
                os._exit(1)

        sys.addaudithook(act)
        folder.save(checkpoint, step=2, best_step=2)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_death_at_any_moment_of_saving_leaves_a_sound_checkpoint(tmp_path: Path) -> None:
    parts = build(seed=0)
    first, second = (capture(*parts, {"step": step}) for step in (1, 2))
    survived = []
    for moment in range(1000):
        folder = CheckpointFolder(tmp_path / str(moment), keep=1)
        folder.save(first, step=1, best_step=1)
        whole = save_and_die(folder, second, moment)
        assert folder.load("last").meta["step"] in (1, 2)
        assert folder.load("best").meta["step"] in (1, 2)
        survived.append(folder.load_newest().meta["step"])
        folder.link(step=survived[-1], best_step=survived[-1])
        folder.save(second, step=3, best_step=3)
        folder.save(second, step=4, best_step=4)
        assert sorted(path.name for path in folder.folder.iterdir()) == ["best", "last", "step_00000004"]
        if whole:
            break
    assert len(survived) > 20
    assert survived == sorted(survived), "once the new one is in its place it stays"
    assert set(survived) == {1, 2}


def test_damaged_folders_of_later_steps_do_not_push_out_the_last(tmp_path: Path) -> None:
    folder, parts = CheckpointFolder(tmp_path, keep=1), build(seed=0)
    (folder.save(capture(*parts, {}), step=9) / "manifest.json").unlink()
    folder.save(capture(*parts, {"step": 3}), step=3)
    assert folder.load("last").meta["step"] == folder.load_newest().meta["step"] == 3


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_mode_of_any_new_file(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        saved = CheckpointFolder(tmp_path).save(capture(*build(seed=0), {}), step=1)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in saved.iterdir()} == {0o666 & ~umask}


def test_a_step_saved_twice_holds_the_newer_state(tmp_path: Path) -> None:
    """A resumed run passes steps it has saved before, and must not keep what another attempt left there."""
    folder, parts = CheckpointFolder(tmp_path), build(seed=0)
    folder.save(capture(*parts, {"attempt": 0}), step=1)
    folder.save(capture(*parts, {"attempt": 1}), step=1)
    assert folder.load("last").meta["attempt"] == 1


def test_the_newest_sound_checkpoint_is_used_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, parts = CheckpointFolder(tmp_path, keep=3), build(seed=0)
    for step in (1, 2, 3):
        path = folder.save(capture(*parts, {"step": step}), step=step)
    with (path / "model.safetensors").open("r+b") as file:
        file.truncate(100)
    assert folder.load_newest().meta["step"] == 2
    assert "model.safetensors is damaged" in caplog.text
    for damaged in tmp_path.glob("step_*/manifest.json"):
        damaged.unlink()
    with pytest.raises(CheckpointError, match="no sound checkpoint"):
        folder.load_newest()


def test_the_writer_saves_the_state_of_the_call_while_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizers, scaler = build(seed=0)
    train(model, optimizers, 2)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    moved_on = threading.Event()
    write = CheckpointFolder.save

    def slow(self: CheckpointFolder, *arguments: Any, **settings: Any) -> Path:
        assert moved_on.wait(10)
        return write(self, *arguments, **settings)

    monkeypatch.setattr(CheckpointFolder, "save", slow)
    folder = CheckpointFolder(tmp_path)
    writer = CheckpointWriter(folder.save)
    writer.save(capture(model, optimizers, scaler, {}), step=2, best_step=2)
    train(model, optimizers, 3)
    assert not folder.has_any()
    moved_on.set()
    writer.wait()
    saved = folder.load("best").model
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)


def test_the_first_save_copies_into_the_buffers_made_ready(tmp_path: Path) -> None:
    model, optimizers, scaler = build(seed=0)
    train(model, optimizers, 1)
    writer = CheckpointWriter(CheckpointFolder(tmp_path).save)
    writer.prepare(capture(model, optimizers, scaler, {}))
    writer.wait()
    places = {name: buffer.data_ptr() for name, buffer in writer._buffers.items()}
    train(model, optimizers, 1)
    writer.save(capture(model, optimizers, scaler, {}), step=2)
    writer.wait()
    assert places == {name: buffer.data_ptr() for name, buffer in writer._buffers.items()}
    saved = CheckpointFolder(tmp_path).load().model
    assert all(torch.equal(saved[name], parameter) for name, parameter in model.named_parameters())


def test_a_failed_write_in_the_background_is_raised_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, parts = CheckpointWriter(CheckpointFolder(tmp_path).save), build(seed=0)
    writer.save(capture(*parts, {"step": 1}), step=1)
    writer.wait()
    monkeypatch.setattr("lmtrain.training.checkpoint.sync", raise_full_disk)
    writer.save(capture(*parts, {"step": 2}), step=2)
    with pytest.raises(RunError, match="No space left"):
        writer.wait()
    writer.wait()  # told once
    assert CheckpointFolder(tmp_path).load_newest().meta["step"] == 1


def test_weights_are_read_without_what_only_training_needs(tmp_path: Path) -> None:
    folder, parts = CheckpointFolder(tmp_path), build(seed=0)
    state = folder.save(capture(*parts, {"step": 1}), step=1) / "training_state.safetensors"
    whole = folder.load()
    state.unlink()
    for checkpoint in (folder.load("last", weights_only=True), folder.load_newest(weights_only=True)):
        assert (checkpoint.state, checkpoint.meta) == ({}, whole.meta)
        assert all(torch.equal(checkpoint.model[name], tensor) for name, tensor in whole.model.items())
    with pytest.raises(CheckpointError, match="damaged"):
        folder.load()


def test_weights_alone_are_written_and_not_resumed_from(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    checkpoint = replace(capture(*build(seed=0), {"step": 7}), state={})
    written = folder.write(checkpoint, step=7)
    assert sorted(path.name for path in folder.folder.iterdir()) == ["step_00000007"]
    assert sorted(path.name for path in written.iterdir()) == ["manifest.json", "meta.json", "model.safetensors"]
    assert folder.load(written.name, weights_only=True).meta["step"] == 7
    for load in (folder.load_newest, lambda: folder.load(written.name)):  # not passed over as damage is
        with pytest.raises(
            WeightsOnlyError, match=f"holds weights only, nothing to resume from: .* init_from={tmp_path}$"
        ):
            load()
    (written / "model.safetensors").write_bytes(b"?")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        folder.load(written.name, weights_only=True)
