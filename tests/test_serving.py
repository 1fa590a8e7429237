"""A trained model as an MLflow model: what the folder holds, what requests get, and `mlflow models serve` itself."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import TINY, CommandLine
from full_disk import on_a_small_disk
from trained_runs import captured, chat_tokenizer, make_run, make_translator

from lmtrain.commands import export
from lmtrain.commands import generate as command
from lmtrain.data.tokenizer import ByteTokenizer
from lmtrain.errors import CheckpointError, LmtrainError
from lmtrain.inference import Chat, load_model
from lmtrain.inference.serving import save_mlflow_model
from lmtrain.inference.settings import GenerationSettings
from lmtrain.training.checkpoint import CheckpointFolder

Capture = pytest.CaptureFixture[str]
GREEDY = {"temperature": 0, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs `plain`, `chat` and `pairs`, and what was saved of them: `plain_model` and so on."""
    folder = tmp_path_factory.mktemp("serving")
    plain = make_run(folder / "plain", ByteTokenizer(), "tracking=mlflow", "tracking.uri=http://me:secret@server")
    (plain / "sample.txt").write_text("\nonce there was\na king")
    make_run(folder / "chat", chat_tokenizer(), "data.seq_len=64")
    make_translator(folder / "pairs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", no_network)
        for name in ("plain", "chat", "pairs"):
            save_mlflow_model(folder / name, folder / f"{name}_model")
    return folder


def no_network(*arguments: object) -> None:
    raise AssertionError("saving a model connects to nothing")


def opened(path: Path, **config: str) -> Any:
    import mlflow

    return mlflow.pyfunc.load_model(str(path), model_config=config)


@pytest.fixture(scope="module")
def plain(folder: Path) -> Any:
    return opened(folder / "plain_model")


@pytest.fixture(scope="module")
def chat(folder: Path) -> Any:
    return opened(folder / "chat_model")


@pytest.fixture(scope="module")
def pairs(folder: Path) -> Any:
    return opened(folder / "pairs_model")


def texts(model: Any, data: Any, **params: Any) -> list[str]:
    predicted = model.predict(data, params=params)
    assert list(predicted.columns) == ["text"]
    return list(predicted["text"])


# ------------------------------------------------------------------------------------------- the folder


def test_the_folder_holds_what_generating_takes(folder: Path) -> None:
    model, run = folder / "plain_model", folder / "plain_model/artifacts/run"
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "sample.txt",
        "tokenizer.model",
    ]
    weights = run / "checkpoints/step_00000002"  # the best
    assert [path.name for path in weights.parent.iterdir()] == [weights.name]
    assert sorted(path.name for path in weights.iterdir()) == ["manifest.json", "meta.json", "model.safetensors"]
    assert not list(model.rglob("*.pkl"))
    requirements = (model / "requirements.txt").read_text().split()
    assert [line.partition("==")[0] for line in requirements] == ["mlflow", "lmtrain", "torch"]
    assert "+" not in "".join(requirements)
    assert "secret" not in (run / "config.yaml").read_text()
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_its_run_is_one_to_generate_from_and_not_to_resume(folder: Path, capsys: Capture) -> None:
    written = []
    for run in (folder / "plain", folder / "plain_model/artifacts/run"):
        command.main([str(run), "--prompt", "a", "--max-new-tokens", "9"])
        written.append(capsys.readouterr().out)
    assert written[0] == written[1]
    with pytest.raises(CheckpointError, match="weights only"):
        CheckpointFolder(folder / "plain_model/artifacts/run/checkpoints").load("step_00000002")


def test_the_example_is_answered(folder: Path, plain: Any) -> None:
    example = json.loads((folder / "plain_model/serving_input_example.json").read_text())
    assert example["dataframe_split"] == {"columns": ["prompt"], "data": [["once there was"]]}
    assert plain.input_example.to_dict("list") == {"prompt": ["once there was"]}
    assert len(texts(plain, plain.input_example, **example["params"])) == 1


def test_export_writes_it(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    to = tmp_path / "new" / "model"
    words = [str(folder / "plain"), "--to", str(to), "--format", "mlflow"]
    with pytest.raises(LmtrainError, match="--dtype is not for --format mlflow"):
        export.main([*words, "--dtype", "fp32"])
    assert export.main([*words, "--checkpoint", "3"]) == 0
    size = f"{load_model(folder / 'plain').num_parameters:,} parameters"
    said = f"{to}: step 3 in the MLflow format, {size} in fp32\n"
    assert capsys.readouterr().out == f"{said}serve it with mlflow models serve -m {to} --env-manager local\n"
    assert load_model(to / "artifacts/run").step == 3


def test_a_full_disk_is_told_and_nothing_left(folder: Path) -> None:
    script = (
        "from pathlib import Path\n"
        "from lmtrain.errors import RunError\n"
        "from lmtrain.inference.serving import save_mlflow_model\n"
        "try:\n"
        "    save_mlflow_model(Path('plain'), Path('disk/model'))\n"
        "except RunError as error:\n"
        "    print(error)\n"
        "print(list(Path('disk').iterdir()))\n"
    )
    done = on_a_small_disk(folder, 20, f"{sys.executable} -c {shlex.quote(script)}")
    told, left = done.stdout.splitlines()
    assert re.fullmatch(".*cannot write .*No space left on device.*", told), done.stderr
    assert left == "[]"


def test_what_cannot_be_saved_leaves_nothing_behind(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(LmtrainError, match="chat_model is not empty: name a new folder, or empty it"):
        save_mlflow_model(folder / "plain", folder / "chat_model")
    with pytest.raises(LmtrainError, match="there is no run folder"):
        save_mlflow_model(tmp_path / "nowhere", tmp_path / "model")
    with pytest.raises(LmtrainError, match=r"no checkpoint '7'; there are last, best, 1, 2, 3"):
        save_mlflow_model(folder / "plain", tmp_path / "model", checkpoint="7")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("words", "params"),
    [
        ("", {}),
        ("--temperature 0 --max-new-tokens 30", {"temperature": 0, "max_new_tokens": 30}),
        ("--seed 5 --top-k all --top-p 0.9 --min-p 0.01", {"seed": 5, "top_k": None, "top_p": 0.9, "min_p": 0.01}),
        ("--repetition-penalty 1.3 --top-k 7", {"repetition_penalty": 1.3, "top_k": 7}),
        ("--num-samples 3 --stop f --stop the", {"num_samples": 3, "stop": ["f", "the"]}),
    ],
)
def test_answers_are_what_generate_writes(
    words: str, params: dict[str, Any], folder: Path, plain: Any, capsys: Capture
) -> None:
    prompts = ["the cat", "ü", ""]
    asked = [word for prompt in prompts for word in ("--prompt", prompt)]
    command.main([str(folder / "plain"), *asked, *words.split()])
    answers = texts(plain, {"prompt": prompts}, **params)
    assert "".join(f"{text}\n" for text in answers) == capsys.readouterr().out
    assert len(answers) == len(prompts) * params.get("num_samples", 1)


@pytest.mark.parametrize(
    ("words", "params"),
    [
        ("", {}),
        ("--beams 2 --length-penalty 0.5", {"beams": 2, "length_penalty": 0.5}),
        ("--temperature 0.7", {"temperature": 0.7}),
        ("--num-samples 2", {"num_samples": 2}),
    ],
)
def test_a_translator_is_asked_as_by_generate(
    words: str, params: dict[str, Any], folder: Path, pairs: Any, capsys: Capture
) -> None:
    command.main([str(folder / "pairs"), "--prompt", "ein Hund", "--max-new-tokens", "9", *words.split()])
    answers = texts(pairs, {"prompt": "ein Hund"}, max_new_tokens=9, **params)
    assert "".join(f"{text}\n" for text in answers) == capsys.readouterr().out


def test_the_params_are_the_options_of_generate(plain: Any) -> None:
    params = {param.name: param.default for param in plain.metadata.signature.params}
    assert params == asdict(GenerationSettings(stop=[]))


def test_prompts_come_in_every_form_mlflow_knows(plain: Any) -> None:
    import pandas as pd

    both = texts(plain, pd.DataFrame({"prompt": ["a", "b"]}), **GREEDY)
    assert both == texts(plain, [{"prompt": "a"}, {"prompt": "b"}], **GREEDY)
    assert both == texts(plain, {"prompt": ["a", "b"]}, **GREEDY)
    assert both[:1] == texts(plain, {"prompt": "a"}, **GREEDY)


def test_a_conversation_is_told_as_in_chat(folder: Path, chat: Any) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    answers = texts(chat, {"messages": messages}, max_new_tokens=20, seed=4)
    expected = Chat(load_model(folder / "chat"), max_new_tokens=20, system="be brief", seed=4).answer("hi")
    assert answers == [expected]
    assert texts(chat, [{"messages": messages}] * 2, max_new_tokens=20, seed=4) == [expected] * 2
    assert texts(chat, {"prompt": "a"}, **GREEDY) != texts(
        chat, {"messages": [{"role": "user", "content": "a"}]}, **GREEDY
    )


def test_a_prompt_beyond_the_context_is_told_or_refused(plain: Any, caplog: pytest.LogCaptureFixture) -> None:
    long = "x" * 20 + "end"
    assert texts(plain, {"prompt": ["a", long]}, **GREEDY)[1] == texts(plain, {"prompt": long[-16:]}, **GREEDY)[0]
    assert caplog.messages == ["prompt 2 has 23 tokens: only the last 16, the context, are read"]
    assert refusal(plain, {"prompt": long}, strict=True).endswith("has 23 tokens, more than the model's context of 16")


# ------------------------------------------------------------------------------------------- bad input


def refusal(model: Any, data: Any, status: int = 400, **params: Any) -> str:
    from mlflow.exceptions import MlflowException

    with pytest.raises(MlflowException) as refused:
        model.predict(data, params=params)
    assert refused.value.get_http_status_code() == status  # type: ignore[no-untyped-call]
    return str(refused.value.message)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"temperature": -1}, "temperature must be 0 or from 0.000001 up, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be 0 or from 0.000001 up, got nan"),
        ({"top_p": None}, "top_p must not be null: leave it out to have its default"),
        ({"top_k": 0}, "top_k must be at least 1, got 0; "),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5; 1 switches it off"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"beams": 0}, "beams must be at least 1, got 0"),
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        (
            {"beams": 2, "temperature": 1},
            "with beams the likeliest text is found and nothing is drawn: leave temperature and num_samples out",
        ),
        ({"seed": -1}, "seed must lie between 0 and 9223372036854775807, got -1"),
        (
            {"seed": 2**63 - 1, "num_samples": 2},
            "seed must lie between 0 and 9223372036854775806, got 9223372036854775807",
        ),
        ({"stop": ["a", ""]}, "stop must not be empty: every text would end before it begins"),
    ],
)
def test_a_setting_out_of_range_is_told(params: dict[str, Any], message: str, plain: Any) -> None:
    assert refusal(plain, {"prompt": "a"}, **params).startswith(message)


@pytest.mark.parametrize(
    "params", [{"max_new_tokens": "many"}, {"max_new_tokens": 2.5}, {"stop": "a"}, {"strict": "no"}]
)
def test_a_setting_of_another_type_is_told_by_mlflow(params: dict[str, Any], plain: Any) -> None:
    [name] = params
    assert refusal(plain, {"prompt": "a"}, **params).startswith(f"Invalid parameters found: {{('{name}'")


def test_what_is_no_prompt_is_told(plain: Any, chat: Any) -> None:
    assert refusal(plain, {"prompt": [None]}) == "a prompt must be a text, got None"
    assert "Model is missing inputs ['prompt']" in refusal(plain, {"text": "a"})
    assert "surrogates not allowed" in refusal(plain, {"prompt": "\ud800"})
    assert refusal(chat, ["a"]) == "the request holds no prompt"
    assert refusal(chat, {"messages": []}) == "messages must hold at least one message"
    assert refusal(chat, {"messages": None}) == "messages must hold at least one message"
    wizard = refusal(chat, {"messages": [{"role": "wizard", "content": "a"}]})
    assert wizard == "a message's role must be one of system, user, assistant, tool, got 'wizard'"
    assert "Missing required properties: {'content'}" in refusal(chat, {"messages": [{"role": "user"}]})


def test_a_model_of_no_use_is_a_fault_of_the_server(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ByteTokenizer(), steps=(1, 2))
    model = load_model(run).model
    with torch.no_grad():
        model.embedding.weight.fill_(torch.nan)
    CheckpointFolder(run / "checkpoints").save(captured(model, 2), step=2)
    save_mlflow_model(run, tmp_path / "model", checkpoint="2")
    assert "its weights are of no use" in refusal(opened(tmp_path / "model"), {"prompt": "a"}, status=500)


def test_a_device_is_chosen_when_the_model_is_opened(folder: Path) -> None:
    assert texts(opened(folder / "plain_model", device="cpu"), {"prompt": "a"}, max_new_tokens=2)
    with pytest.raises(LmtrainError, match="device=tpu is not available"):
        opened(folder / "plain_model", device="tpu")


# ------------------------------------------------------------------------------------------- over HTTP


@pytest.fixture
def served(lmtrain: CommandLine, corpus: Path) -> Iterator[str]:
    """The address of a model that was trained, saved and is being served."""
    lmtrain(*TINY, f"data.path={corpus}", "trainer.max_steps=30", "trainer.eval_every=10", "hydra.run.dir=run")
    lmtrain("export", "run", "--to", "model", "--format", "mlflow")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # MLflow starts `uvicorn` by name: it is where this Python is.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    words = ["-m", "mlflow", "models", "serve", "-m", "model", "--env-manager", "local", "-p", str(port)]
    with (lmtrain.folder / "server.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, *words],
            cwd=lmtrain.folder,
            env=lmtrain.environment(PATH=path),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"{address}/ping", server)
        yield f"{address}/invocations"
    finally:
        os.killpg(server.pid, signal.SIGTERM)  # MLflow's process, and the server it started
        server.wait(timeout=30)


def wait_for(address: str, server: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        assert server.poll() is None, "the server has ended"
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    pytest.fail("the server does not answer")


def post(address: str, **content: Any) -> tuple[int, Any]:
    """Status and content of the answer."""
    request = urllib.request.Request(address, json.dumps(content).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.slow
def test_mlflow_serves_a_trained_model(served: str, lmtrain: CommandLine) -> None:
    words = ["--temperature", "1", "--seed", "3", "--max-new-tokens", "12"]
    text = lmtrain("generate", "run", "--prompt", "the cat", *words).stdout.removesuffix("\n")
    other = lmtrain("generate", "run", "--prompt", "a mat", *words).stdout.removesuffix("\n")
    drawn = {"temperature": 1, "seed": 3, "max_new_tokens": 12}
    one, both = {"predictions": [{"text": text}]}, {"predictions": [{"text": text}, {"text": other}]}

    assert post(served, dataframe_records=[{"prompt": "the cat"}], params=drawn) == (200, one)
    assert post(served, dataframe_split={"columns": ["prompt"], "data": [["the cat"]]}, params=drawn) == (200, one)
    assert post(served, inputs=["the cat", "a mat"], params=drawn) == (200, both)
    assert post(served, inputs=[{"prompt": "the cat"}, {"prompt": "a mat"}], params=drawn) == (200, both)
    assert post(served, prompt=["the cat", "a mat"], **drawn) == (200, both["predictions"])

    status, answer = post(served, inputs=["the cat"], params={"temperature": -1})
    assert status == 400
    assert answer["error_code"] == "INVALID_PARAMETER_VALUE"
    assert answer["message"].endswith("Error: temperature must be 0 or from 0.000001 up, got -1.0")
    assert "Traceback" not in json.dumps(answer)
    assert post(served, words="the cat")[0] == 400

    with ThreadPoolExecutor() as clients:  # at the same time: each gets what it would alone
        asked = [{"seed": seed, "max_new_tokens": 30} for seed in range(4)] * 2
        answers = list(clients.map(lambda params: post(served, inputs=["the cat"], params=params), asked))
    assert answers[:4] == answers[4:]
    assert [status for status, _ in answers] == [200] * 8
    assert len({json.dumps(answer) for _, answer in answers}) == 4
