"""lm-eval on an exported model, as its users run it, without a network and with local task files."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import CommandLine

from lmtrain.inference import TrainedModel, load_model

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.slow

FACTS = {
    "the sky": "blue",
    "the grass": "green",
    "the snow": "white",
    "the night": "black",
    "a lemon": "yellow",
    "a cherry": "red",
}
"""What the model is taught, and asked."""

QUESTIONS = """\
task: facts
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/questions.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{subject}} is"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""

STORIES = """\
task: stories
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/stories.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}, {metric: bits_per_byte}]
"""


def sentences(count: int) -> list[str]:
    generator = random.Random(0)
    return [f"{subject} is {colour}" for subject, colour in generator.choices(list(FACTS.items()), k=count)]


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with both tasks and their documents; two stories are longer than the model's context."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    colours = list(FACTS.values())
    questions = [
        {"subject": subject, "choices": colours, "answer": colours.index(colour)} for subject, colour in FACTS.items()
    ]
    stories = [{"text": "\n".join(sentences(length))} for length in (1, 2, 8, 13)]
    for name, task, documents in (("questions", QUESTIONS, questions), ("stories", STORIES, stories)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
        (folder / f"{name}.yaml").write_text(task.replace("FOLDER", str(folder)))
    return folder


def test_lm_eval_measures_what_we_do(lmtrain: CommandLine, tasks: Path) -> None:
    """A model that was taught six facts knows them there too, and texts are as likely as they are here."""
    (lmtrain.folder / "facts.txt").write_text("\n".join(sentences(3000)))
    lmtrain(
        *("data=text", "data.path=facts.txt", "data.seq_len=48", "tokenizer=sentencepiece_bpe", "batch_size=8"),
        *("tokenizer.vocab_size=300", "model.d_model=48", "model.num_layers=2", "model.num_heads=4"),
        *("model.activation=swiglu", "model.qk_norm=false", "trainer.max_steps=150", "trainer.sample_tokens=0"),
        *("tracking=none", "parallel.num_threads=1", "hydra.run.dir=run"),
    )
    lmtrain("export", "run", "--to", "model")
    results = run_lm_eval(lmtrain.folder, "model", tasks)
    trained = load_model(lmtrain.folder / "run", device="cpu")

    assert results["facts"]["acc,none"] == 1.0
    texts = [json.loads(line)["text"] for line in (tasks / "stories.jsonl").read_text().splitlines()]
    num_bytes = sum(len(text.encode()) for text in texts)
    assert len(trained.tokenizer.encode(texts[-1])) > trained.seq_len
    nats = -sum(log_likelihood(trained, text) for text in texts)
    assert 0.1 < nats / num_bytes < 1  # a guess, but neither nonsense nor certainty
    assert results["stories"]["bits_per_byte,none"] == pytest.approx(nats / num_bytes / math.log(2), rel=1e-5)
    assert results["stories"]["byte_perplexity,none"] == pytest.approx(math.exp(nats / num_bytes), rel=1e-5)


def run_lm_eval(folder: Path, model: str, tasks: Path) -> dict[str, Any]:
    """What it measures, by task."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    words = [
        *("--model", "hf", "--model_args", f"pretrained={model},dtype=float32", "--device", "cpu", "--batch_size", "1"),
        *("--tasks", "facts,stories", "--include_path", str(tasks), "--output_path", "measured"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", "run", *words],
        cwd=folder,
        env=CommandLine(folder).environment(**offline),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [file] = (folder / "measured").rglob("results_*.json")
    results: dict[str, Any] = json.loads(file.read_text())["results"]
    return results


@torch.inference_mode()
def log_likelihood(trained: TrainedModel, text: str) -> float:
    """That of a text after the end of another: in windows of the context, each beginning with the token before it."""
    ids = [trained.tokenizer.end_id, *trained.tokenizer.encode(text).tolist()]
    total = 0.0
    first = 1  # of the tokens that are still to be predicted
    while first < len(ids):
        last = min(first + trained.seq_len, len(ids))
        start = max(0, last - 1 - trained.seq_len) if first > 1 else 0
        logits_TV = trained.model(torch.tensor([ids[start : last - 1]]))[0].log_softmax(dim=-1)
        total += sum(logits_TV[place - 1 - start, ids[place]].item() for place in range(first, last))
        first = last
    return total
