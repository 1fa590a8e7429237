"""What every model store does, whether a folder or an MLflow registry; and the registry's own."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from command_line import CommandLine, snapshot
from mlflow_server import MlflowServer
from stored_models import train
from trained_runs import make_run

from lmtrain.commands import models
from lmtrain.data.tokenizer import ByteTokenizer
from lmtrain.errors import (
    CheckpointError,
    ConfigError,
    LmtrainError,
    ModelNotFoundError,
    ModelStoreError,
    RunError,
    WeightsOnlyError,
)
from lmtrain.inference import load_model
from lmtrain.inference.serving import write_mlflow_model
from lmtrain.initial_weights import load_initial_weights, name_version
from lmtrain.run_dir import RunDir
from lmtrain.store import ModelStore, open_store
from lmtrain.store.naming import ModelId, parse_id


@dataclass(frozen=True)
class Place:
    """A store of one kind, for all tests."""

    word: str
    run: Path  # trained, and mirrored to MLflow

    def store(self) -> ModelStore:
        return open_store(self.word, write_mlflow_model)


KINDS = ["folder", "registry", pytest.param("server", marks=[pytest.mark.slow, pytest.mark.multiprocess])]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A working folder with a run that was mirrored to `mlflow.db` in it."""
    folder = tmp_path_factory.mktemp("stores")
    train(folder, corpus, "tracking=mlflow", "tracking.log_model=false", "tracking.system_metrics_every=null")
    return folder


@pytest.fixture(scope="module", params=KINDS)
def place(request: pytest.FixtureRequest, trained: Path) -> Iterator[Place]:
    run = trained / "run"
    if request.param == "folder":
        yield Place(str(trained / "models"), run)
    elif request.param == "registry":
        yield Place(f"sqlite:///{trained}/mlflow.db", run)
    else:
        server = MlflowServer(trained / "server")
        try:
            server.start()
            yield Place(server.uri, run)
        finally:
            server.kill()


# ------------------------------------------------------------------------------------------- the contract


def test_versions_of_a_name(place: Place) -> None:
    store = place.store()
    saved = [store.save(place.run, "versions", checkpoint=step) for step in ("10", "20")]
    assert [metadata["id"] for metadata in saved] == ["versions:1", "versions:2"]
    models = store.models("versions")
    assert [(model.id, model.objective_name) for model in models] == [(f"versions:{n}", "val/loss") for n in (1, 2)]
    assert [model.objective for model in models] == [metadata["objective"]["value"] for metadata in saved]
    for model, metadata in zip(models, saved, strict=True):
        for key in ("parameters", "bytes", "created"):
            assert getattr(model, key) == metadata[key]
        assert model.data == metadata["data"]["name"] is not None
    assert set(models) <= set(store.models())
    assert store.resolve(ModelId(name="versions")).version == 2
    store.delete(ModelId(name="versions", version=1))
    assert [model.version for model in store.models("versions")] == [2]
    assert store.save(place.run, "versions")["version"] == 3


def test_what_is_shown_is_what_was_saved(place: Place) -> None:
    store = place.store()
    saved = store.save(place.run, "shown", checkpoint="15")
    shown = store.show(parse_id("shown"))
    assert {key: shown[key] for key in saved} == saved
    result = RunDir(place.run).read_result()
    assert result is not None
    assert shown["parameters"] == result["parameters"]
    assert shown["data"]["fingerprint"] == result["data_fingerprint"]
    assert shown["step"] == 15
    assert store.verify(parse_id("shown:1")) == []


def test_a_model_is_loaded_with_everything(place: Place) -> None:
    store = place.store()
    store.save(place.run, "loaded", checkpoint="15")
    model = load_model("loaded:1", device="cpu", store=place.word)
    own = load_model(place.run, device="cpu", checkpoint="15")
    for name, weights in own.model.named_parameters():
        assert torch.equal(weights, dict(model.model.named_parameters())[name])
    assert model.tokenizer.fingerprint == own.tokenizer.fingerprint
    assert model.metadata["id"] == "loaded:1"
    assert model.metadata["name"] == "loaded"
    assert model.metadata["version"] == 1
    ours = own.metadata
    assert {key: model.metadata[key] for key in ours} == ours
    assert set(model.metadata) - set(ours) >= {"format", "id", "name", "version", "created", "bytes", "files", "sha256"}
    stored, kept = model.training_state(), own.training_state()
    assert stored.meta == kept.meta
    assert stored.meta["progress"]["step"] == 15
    assert stored.state.keys() == kept.state.keys()
    assert any(name.startswith("optimizer/") for name in stored.state)
    assert any(name.startswith("random/") for name in stored.state)
    assert all(torch.equal(stored.state[name], kept.state[name]) for name in kept.state)


def test_weights_only(place: Place) -> None:
    store = place.store()
    slim, whole = store.save(place.run, "slim", weights_only=True), store.save(place.run, "slim")
    assert slim["training_state"] is False
    assert whole["training_state"] is True
    assert slim["bytes"] < whole["bytes"]
    model = load_model("slim:1", device="cpu", store=place.word)
    with pytest.raises(WeightsOnlyError, match="holds weights only"):
        model.training_state()
    with pytest.raises(CheckpointError, match="has weights and no training state: add --weights-only"):
        store.save(store.path_of(parse_id("slim:1")), "whole")


def test_a_changed_file_is_named_and_the_model_not_opened(place: Place) -> None:
    if place.word.startswith("http"):
        pytest.skip("its files lie behind the server")
    store = place.store()
    store.save(place.run, "changed")
    folder = store.path_of(parse_id("changed"))
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("seed: 0", "seed: 1"))
    assert store.verify(parse_id("changed")) == ["changed: config.yaml"]
    with pytest.raises(ModelStoreError, match=r"is not as it was saved: changed: config\.yaml"):
        load_model("changed", store=place.word)
    (folder / "config.yaml").write_text(config)
    load_model("changed", store=place.word)
    metadata = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(metadata | {"step": 7}))
    with pytest.raises(ModelStoreError, match=r"model\.json was changed"):
        store.show(parse_id("changed"))
    assert "model.json was changed" in store.verify(parse_id("changed"))[0]


def test_what_is_not_there_is_told(place: Place) -> None:
    store = place.store()
    store.save(place.run, "there")
    for id in ("nothing", "there:7", "there@nobody"):
        for do in (store.show, store.verify, store.delete, store.path_of, store.resolve):
            with pytest.raises(LmtrainError, match=f"{id}"):
                do(parse_id(id))
        with pytest.raises(LmtrainError, match=f"there is no run folder {id}"):
            load_model(id, store=place.word)
    with pytest.raises(ModelNotFoundError):
        store.models("nothing")


def test_a_name_that_leads_elsewhere_is_refused(place: Place) -> None:
    for name in ("../up", "a/b", "a\nb", "-a", ".a", "", "x" * 101):
        with pytest.raises(ConfigError, match="a model's name is of letters, digits"):
            place.store().save(place.run, name)
        with pytest.raises(LmtrainError, match=r"there is no run folder|in its name"):
            load_model(name or "..", store=place.word)


def test_training_starts_from_it(place: Place) -> None:
    place.store().save(place.run, "begun")
    saved = load_model(place.run, checkpoint="last", device="cpu")
    config = name_version(replace(saved.config, init_from="begun", model_store=place.word))
    assert config.init_from == "begun:1"
    model = copy.deepcopy(saved.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    load_initial_weights(model, config, cast(Any, SimpleNamespace(tokenizer=saved.tokenizer)))
    for ours, theirs in zip(model.parameters(), saved.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


# ------------------------------------------------------------------------------------------- the registry


@pytest.fixture
def registry(trained: Path) -> Any:
    return open_store(f"sqlite:///{trained}/mlflow.db", write_mlflow_model)


@pytest.fixture
def client(trained: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{trained}/mlflow.db")


def test_an_alias_names_one_version(registry: Any, trained: Path) -> None:
    for _ in range(2):
        registry.save(trained / "run", "aliased")
    for version in (1, 2):
        registry.set_alias(ModelId(name="aliased", version=version), "champion")
        assert registry.resolve(parse_id("aliased@champion")).version == version
        assert registry.show(parse_id("aliased@champion"))["version"] == version
    assert [model.aliases for model in registry.models("aliased")] == [(), ("champion",)]
    assert load_model("aliased@champion", store=str(registry), device="cpu").metadata["id"] == "aliased:2"


def test_a_version_is_an_mlflow_model_of_the_run(registry: Any, client: Any, trained: Path) -> None:
    import mlflow

    registry.save(trained / "run", "served")
    version = client.get_model_version("served", "1")
    run_id = json.loads((trained / "run/mlflow_run.json").read_text())["run_id"]
    assert version.run_id == run_id
    metadata = registry.show(parse_id("served"))
    assert version.tags["lmtrain.sha256"] == metadata["sha256"]
    assert version.tags["parameters"] == str(metadata["parameters"])
    assert float(version.tags["objective_value"]) == metadata["objective"]["value"]
    model_id = version.tags["lmtrain.model_id"]
    logged = client.get_logged_model(model_id)
    assert logged.source_run_id == run_id
    assert logged.status == "READY"
    before = mlflow.get_tracking_uri()
    try:
        mlflow.set_tracking_uri(str(registry))
        model = mlflow.pyfunc.load_model("models:/served/1", model_config={"device": "cpu"})
    finally:
        mlflow.set_tracking_uri(before)
    assert model.metadata.model_id == model_id
    answer = model.predict({"prompt": ["the cat"]}, params={"max_new_tokens": 5, "temperature": 0})
    assert len(answer) == 1
    registry.delete(parse_id("served:1"))
    with pytest.raises(mlflow.exceptions.MlflowException):
        client.get_logged_model(model_id)


def test_a_run_without_mlflow_is_registered_too(registry: Any, client: Any, tmp_path: Path) -> None:
    registry.save(make_run(tmp_path / "run", ByteTokenizer()), "alone", weights_only=True)
    assert not client.get_model_version("alone", "1").run_id
    assert load_model("alone:1", store=str(registry), device="cpu").step == 2


def test_other_peoples_models_are_left_alone(registry: Any, client: Any, tmp_path: Path) -> None:
    client.create_registered_model("theirs")
    client.create_model_version("theirs", (tmp_path / "model").as_uri())
    assert "theirs" not in {model.name for model in registry.models()}
    with pytest.raises(ModelNotFoundError, match="there is no model theirs:1 of lmtrain in the registry"):
        registry.delete(parse_id("theirs:1"))
    assert client.get_model_version("theirs", "1")


def test_another_entry_in_place_of_the_registered_one_is_noticed(registry: Any, trained: Path) -> None:
    for checkpoint in ("10", "20"):
        registry.save(trained / "run", "swapped", checkpoint=checkpoint)
    first, second = (registry.path_of(parse_id(f"swapped:{version}")) for version in (1, 2))
    shutil.rmtree(first)
    shutil.copytree(second, first)
    assert registry.verify(parse_id("swapped:1")) == ["changed: model.json"]
    with pytest.raises(ModelStoreError, match=r"swapped:1 .* is not as it was saved: changed: model\.json"):
        registry.path_of(parse_id("swapped:1"))
    shutil.rmtree(first)
    with pytest.raises(RunError, match="the files of swapped:1 are not where"):
        registry.path_of(parse_id("swapped:1"))


def test_what_cannot_be_registered_leaves_no_version(registry: Any, client: Any, trained: Path, tmp_path: Path) -> None:
    def fail(run: Path, to: Path) -> None:
        raise RunError("no room")

    broken = open_store(str(registry), fail)
    with pytest.raises(RunError, match="no room"):
        broken.save(trained / "run", "broken")
    with pytest.raises(LmtrainError, match="no checkpoint '7'"):
        registry.save(trained / "run", "broken", checkpoint="7")
    assert not client.search_registered_models("name='broken'")
    assert registry.models() == open_store(str(registry)).models()


def test_listing_makes_no_database(tmp_path: Path) -> None:
    assert open_store(f"sqlite:///{tmp_path}/mlflow.db").models() == []
    assert list(tmp_path.iterdir()) == []


def test_saved_and_registered_in_one_go(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = f"sqlite:///{trained}/mlflow.db"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    models.main(["save", str(trained / "run"), "--name", "both", "--register", "--alias", "champion"])
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("both:1: step ")
    assert said[0].endswith(", in models")
    assert said[1:] == [f"registered as both:1 in {uri}", "both@champion is both:1"]
    models.main(["save", str(trained / "run"), "--name", "both", "--store", "mlflow", "--alias", "challenger"])
    assert capsys.readouterr().out.splitlines()[1:] == ["both@challenger is both:2"]
    for verb, store in (("verify", "models"), ("verify", "mlflow")):
        models.main([verb, "both:1", "--store", store])
        assert capsys.readouterr().out == "both:1  as it was saved\n"
    models.main(["list", "both", "--store", "mlflow"])
    assert "1 @champion" in capsys.readouterr().out
    models.main(["show", "both@champion", "--store", "mlflow"])
    assert "aliases" in capsys.readouterr().out
    own = load_model("models/both/1", device="cpu").metadata
    assert load_model("both@champion", store="mlflow", device="cpu").metadata == own
    models.main(["delete", "both@champion", "--store", "mlflow", "--yes"])
    assert capsys.readouterr().out == f"deleted both:1 from {uri}\n"


def test_a_registry_that_is_none_is_told_soon(lmtrain: CommandLine) -> None:
    run = make_run(lmtrain.folder / "run", ByteTokenizer())
    cases = [
        ("ftp://models", "ftp://models is no MLflow registry: its address begins with http://", 2),
        ("file:///models", "file:///models is no MLflow registry", 2),
        ("http://127.0.0.1:9", "the registry http://127.0.0.1:9 cannot be used: ConnectionRefusedError", 1),
        ("postgresql://me:secret@127.0.0.1:9/x", "the registry postgresql://me:***@127.0.0.1:9/x cannot be used", 1),
        ("mysql://me@127.0.0.1:9/x", "the registry mysql://me@127.0.0.1:9/x needs the Python package MySQLdb", 2),
        (f"sqlite:///{run}/config.yaml", "run/config.yaml cannot be used: file is not a database", 1),
    ]
    before = snapshot(run).keys()
    folders = [lmtrain.folder / f"case{number}" for number in range(len(cases))]
    for folder in folders:
        folder.mkdir()
    words = ["models", "save", str(run), "--name", "tale", "--store"]
    started = time.monotonic()
    statuses = lmtrain.fork(
        [(str(folder), [*words, store]) for folder, (store, _, _) in zip(folders, cases, strict=True)]
    )
    assert time.monotonic() - started < 60
    for folder, (store, told, expected), status in zip(folders, cases, statuses, strict=True):
        err = folder.with_suffix(".err").read_text()
        assert told in err, store
        assert status == expected, (store, err)
        assert err.count("\n") == 1, err
        assert "secret" not in err
        assert list(folder.iterdir()) == []
    assert snapshot(run).keys() - before <= {"config.yaml.lock"}  # as beside every SQLite database


@pytest.mark.parametrize(("status", "hint"), [(401, "set MLFLOW_TRACKING_"), (403, "set MLFLOW_TRACKING_"), (400, "")])
def test_a_registry_that_refuses_is_told(status: int, hint: str, tmp_path: Path) -> None:
    script = (
        "import http.server, sys\n"
        "class Refuse(http.server.BaseHTTPRequestHandler):\n"
        f"    def do_GET(self): self.send_error({status}, 'you may not')\n"
        "    do_POST = do_GET\n"
        "    def log_message(self, *arguments): pass\n"
        "server = http.server.HTTPServer(('127.0.0.1', 0), Refuse)\n"
        "print(server.server_port, flush=True)\n"
        "server.serve_forever()\n"
    )
    server = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        address = f"http://127.0.0.1:{int(server.stdout.readline())}"
        with pytest.raises(ModelStoreError, match=f"the registry {address} refuses: .*{hint}") as refused:
            open_store(address).models()
        assert "\n" not in str(refused.value)
    finally:
        server.kill()
        server.communicate()


SAVE = """
import sys
from pathlib import Path
from lmtrain.inference.serving import write_mlflow_model
from lmtrain.store import open_store
print(open_store(sys.argv[1], write_mlflow_model).save(Path("run"), "tale", weights_only=True)["version"])
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_processes_that_register_at_once_get_different_versions(tmp_path: Path) -> None:
    make_run(tmp_path / "run", ByteTokenizer())
    command = [sys.executable, "-c", SAVE, f"sqlite:///{tmp_path}/mlflow.db"]
    environment = CommandLine(tmp_path).environment()
    processes = [
        subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(8)
    ]
    versions = [int(process.communicate(timeout=300)[0]) for process in processes]
    assert sorted(versions) == list(range(1, 9))
    assert len(open_store(f"sqlite:///{tmp_path}/mlflow.db").models("tale")) == 8
