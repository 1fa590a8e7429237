"""`lmtrain data`: the settings a command composes, what it shows of a corpus and of a batch, what it frees."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from command_line import TINY

from lmtrain.config import compose
from lmtrain.config.explain import REQUEST_ERRORS, explain
from lmtrain.config.saved import to_yaml
from lmtrain.errors import LmtrainError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with nothing but its settings."""
    words = [*TINY, "data.path=nowhere.txt", "lr=0.5"]
    folder = tmp_path / "a run=of, [mine]"
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(compose.compose_config(words)))
    return folder


def test_a_command_composes_what_training_would() -> None:
    config = compose.compose_config(["model=tiny", "lr=0.25", "trainer.max_steps=7"])
    assert (config.lr, config.trainer.max_steps, config.model.num_layers) == (0.25, 7, 8)


def test_a_command_starts_from_the_settings_of_a_run(run: Path) -> None:
    config = compose.compose_config([], run)
    assert (config.lr, config.data.seq_len, config.model.d_model, config.resume) == (0.5, 16, 16, None)
    changed = compose.compose_config(["seed=3", "data.seq_len=8"], run)
    assert changed == replace(config, seed=3, data=replace(config.data, seq_len=8), sweep=changed.sweep)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("modle.d_model=8", "did you mean model?"),
        ("model=nanoo", "model has no option 'nanoo'; did you mean nano?"),
        ("model=null", "model must be one of"),
        ("~trainer", "trainer must be one of"),
        ("lr=fast", "lr: Value 'fast'"),
        ("lr=1,2", "names several values"),
        ("data=text", "data.path must be set"),
        ("unknownword", "cannot read the argument 'unknownword'"),
        ("+key=1", "there is no setting 'key'"),
        ("resume=nowhere", "resume=nowhere: there is no run folder nowhere"),
    ],
)
def test_a_wrong_word_is_told_as_to_training(words: str, message: str) -> None:
    with pytest.raises((LmtrainError, *REQUEST_ERRORS)) as raised:
        compose.compose_config(words.split())
    assert message in explain(raised.value)


def test_a_run_takes_no_options(run: Path) -> None:
    with pytest.raises(ValueError, match="a run's own config takes settings"):
        compose.compose_config(["model=tiny"], run)


def test_a_run_that_is_none_is_told(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="there is no run folder"):
        compose.compose_config([], tmp_path)
