"""The scripts of `benchmarks/`: that they run, compare what is alike, and need no more than they say."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from command_line import ROOT

BENCHMARKS = ROOT / "benchmarks"
NOT_ON_GPU_MACHINES = "hydra omegaconf optuna mlflow datasets pandas rich pyarrow platformdirs pynvml tenacity xxhash"
BLOCKED = """
import runpy, sys
sys.modules.update(dict.fromkeys({modules!r}.split()))
sys.path.insert(0, {folder!r})
for script, words in {scripts!r}:
    sys.argv = [script, *words]
    try:
        runpy.run_path({folder!r} + "/" + script, run_name="__main__")
    except SystemExit as end:
        assert not end.code, (script, end.code)
"""


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_gpu_scripts_run_with_little_more_than_torch(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be: that is the question.\n" * 200)
    device = ["--quick", "--device", "cpu"]
    scripts = [
        ("gpu_throughput.py", device),
        ("gpu_memory.py", device),
        ("gpu_shakespeare.py", [str(text), *device]),
        ("matrix_products.py", device),
    ]
    program = BLOCKED.format(modules=NOT_ON_GPU_MACHINES, folder=str(BENCHMARKS), scripts=scripts)
    ended = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    for figure in ("MFU", "predicted, deviation", "best validation loss", "all products"):
        assert figure in ended.stdout
    assert "written to" not in ended.stdout


def test_loops_take_turns_from_both_ends() -> None:
    from interleaving import in_turns

    made: list[tuple[str, int]] = []
    compared = in_turns(
        lambda steps: made.append(("first", steps)), lambda steps: made.append(("second", steps)), turn=2, blocks=3
    )
    block = [("first", 2), ("second", 4), ("first", 2)]
    assert made == [*block * 4, ("first", 2)]  # one block to warm up, and the turn that would open another
    assert len(compared.ratios) == 3


@pytest.mark.parametrize("shape", ["minimal", "minimal_llama", "nano", "gpt2", "small"])
def test_peers_have_as_many_parameters(shape: str) -> None:
    transformers = pytest.importorskip("transformers")
    from peers import Work, litgpt_model, transformers_model
    from step_time import SAME_SIZE, SHAPES

    from lmtrain.config.compose import compose_config
    from lmtrain.config.schema import DecoderConfig
    from lmtrain.model.sizing import count_parameters

    transformers.logging.set_verbosity_error()
    words = ["data=text", "data.path=t", "tokenizer=ids", f"tokenizer.vocab_size={SHAPES[shape].vocab_size}"]
    config = compose_config([*SHAPES[shape].model, *words])
    assert isinstance(config.model, DecoderConfig)
    sequences, tokens = SHAPES[shape].cpu
    work = Work(
        model=config.model,
        vocab_size=SHAPES[shape].vocab_size,
        seq_len=tokens,
        batch_size=sequences,
        tokens=torch.zeros(1000).numpy(),
        device=torch.device("cpu"),
        format=torch.float32,
    )
    ours = count_parameters(work.model, work.vocab_size, work.seq_len).total
    with torch.device("meta"):
        models = [transformers_model(work)]
        if find_spec("litgpt"):
            models.append(litgpt_model(work))
    for model in models:
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(ours, rel=SAME_SIZE)


def test_suite_names_scripts_that_are_there_and_documented() -> None:
    from suite import SUITE

    documented = (BENCHMARKS / "README.md").read_text()
    for script in SUITE:
        assert (BENCHMARKS / f"{script.name}.py").is_file()
        assert f"{script.name}.py" in documented


def test_figures_are_judged_and_shown_without_a_library(capsys: pytest.CaptureFixture[str]) -> None:
    from report import Figure, publish

    figures = [Figure(name="ratio", value=0.9, at_most=0.95), Figure(name="unknown", value=float("nan"), at_least=1)]
    assert [figure.reached for figure in figures] == [True, False]
    assert publish("nothing", figures, config={}, samples={}, quick=True) == 0
    assert "ratio      0.9" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["step_time", "step_overhead", "generation", "startup", "sweep_overhead"])
def test_quick_runs_judge_and_write_nothing(name: str, tmp_path: Path) -> None:
    before = sorted((BENCHMARKS / "results").iterdir())
    words = ["parallel.num_threads=1"] if name != "sweep_overhead" else []
    ended = subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{name}.py"), "--quick", *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert sorted((BENCHMARKS / "results").iterdir()) == before
