"""`docs/notebook.ipynb`: what it says is so, and a run in a notebook can be stopped."""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from command_line import ROOT, TINY, CommandLine
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

import lmtrain as api

NOTEBOOK = ROOT / "docs/notebook.ipynb"
COMMAND = "python -m lmtrain"


def read() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)  # type: ignore[no-untyped-call]


def sources() -> list[str]:
    return [cell.source for cell in read().cells if cell.cell_type == "code"]


@pytest.fixture
def jupyter(lmtrain: CommandLine, monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    """The environment of kernels: this Python first, everything inside the folder of the test."""
    places = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "TMPDIR": str(lmtrain.folder)}
    places |= {name: str(lmtrain.folder / name) for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR")}
    for name, value in lmtrain.environment(**places).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return lmtrain


def client(notebook: Any, folder: Path) -> NotebookClient:
    return NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}})


def text_of(cell: Any) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


def test_its_cells_are_python_and_take_from_us_what_there_is() -> None:
    taken = set()
    for source in sources():
        if source.startswith(("%%sh", "!")):
            commands = source.removeprefix("%%sh").replace("\\\n", "").strip().removeprefix("!").splitlines()
            assert all(command.startswith(COMMAND) for command in commands)
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.module == "lmtrain":
                taken |= {name.name for name in node.names}
    assert taken == set(api.__all__), "all of it is shown"


def test_it_is_kept_with_what_it_prints() -> None:
    notebook = read()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "executed in order, at once"
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    pictures = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 2
    assert sum(map(len, pictures)) < 200_000
    assert not [place for place in ("/home", "/tmp", "/root") if place in NOTEBOOK.read_text(encoding="utf-8")]


@pytest.mark.slow
def test_it_runs(jupyter: CommandLine) -> None:
    notebook = read()
    client(notebook, jupyter.folder).execute()
    texts = [text_of(cell) for cell in notebook.cells if cell.cell_type == "code"]
    assert "did you mean optimizer.weight_decay?" in texts[2]
    assert "step 200/200  val loss" in texts[3]
    assert "<study rates: 6 of 6 done: 6 completed" in texts[7]
    assert "first-steps:1: step 100" in texts[-2]
    assert "'val/loss'" in notebook.cells[-1].outputs[0]["data"]["text/plain"]


@pytest.mark.slow
def test_a_run_in_a_kernel_that_is_interrupted_goes_on_later(jupyter: CommandLine, corpus: Path) -> None:
    begin = f"""
import os, pathlib, signal, threading, time
from lmtrain import compose, run_experiment

def interrupt():  # what Jupyter does
    while not any(pathlib.Path("run").glob("checkpoints/step_*")):
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=interrupt).start()
run_experiment(compose({list(TINY)}, "data.path={corpus}", "trainer.eval_every=20", "trainer.max_steps=100000"), "run")
"""
    go_on = """
from lmtrain import read_run
stopped = read_run("run")
result = run_experiment(compose("resume=run", f"trainer.max_steps={stopped.result['step'] + 5}"))
print(stopped.status, result.status, result.step - stopped.result["step"])
"""
    cells = [nbformat.v4.new_code_cell(source) for source in (begin, go_on)]  # type: ignore[no-untyped-call]
    notebook = nbformat.v4.new_notebook(cells=cells)  # type: ignore[no-untyped-call]
    running = client(notebook, jupyter.folder)
    with running.setup_kernel():
        with pytest.raises(CellExecutionError, match=r"stopped by SIGINT at step \d+; go on with resume=run"):
            running.execute_cell(notebook.cells[0], 0)
        running.execute_cell(notebook.cells[1], 1)
    assert text_of(notebook.cells[1]).endswith("interrupted completed 5\n")
