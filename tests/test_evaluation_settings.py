"""Words of `lmtrain evaluate` → what is evaluated: kept from the run, brought by an option, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from trained_runs import composed_once, make_run, make_translator

from lmtrain.config import evaluation as evaluation_settings
from lmtrain.config.evaluation import compose_evaluation
from lmtrain.config.explain import REQUEST_ERRORS, explain
from lmtrain.config.schema import MixtureConfig, PairsConfig, TextConfig
from lmtrain.data.tokenizer import ByteTokenizer
from lmtrain.errors import LmtrainError

RUN = (
    *("data.val_path=val.txt", "data.document=line", "data.batches=packed_documents", "data.cache_dir='a cache'"),
    *("trainer.seq_len_warmup_steps=3", "trainer.initial_seq_len=8", "trainer.eval_batches=5"),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run", ByteTokenizer(), *RUN, steps=())


@pytest.fixture(autouse=True)
def composing_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation_settings, "compose_config", composed_once)


def test_without_words_it_is_the_run_s_own(run: Path) -> None:
    found = compose_evaluation([], run)
    assert isinstance(found.config.data, TextConfig)
    assert (found.config.data.path, found.config.data.val_path) == ("nowhere.txt", "val.txt")
    assert not found.other_text
    assert [found.num_batches(split) for split in ("val", "train", "all")] == [5, None, None]


def test_another_path_is_read_alike_without_the_other_files(run: Path) -> None:
    found = compose_evaluation(["data.path=x.txt"], run)
    data = found.config.data
    assert isinstance(data, TextConfig)
    assert (data.path, data.val_path, data.document, data.batches) == ("x.txt", None, "line", "packed_documents")
    assert found.other_text
    assert found.num_batches("val") is None
    kept = compose_evaluation(["data.path=x.txt", "data.val_path=y.txt"], run).config.data
    assert isinstance(kept, TextConfig)
    assert kept.val_path == "y.txt"


def test_another_option_keeps_the_context_and_the_cache(run: Path) -> None:
    text = compose_evaluation(["data=text", "data.path=x.txt"], run).config.data
    assert isinstance(text, TextConfig)
    assert (text.seq_len, text.cache_dir, text.document, text.batches) == (16, "a cache", "file", "packed_documents")
    pairs = compose_evaluation(["data=multi30k", "data.seq_len=8", "data.path=x"], run)
    assert isinstance(pairs.config.data, PairsConfig)
    assert (pairs.config.data.seq_len, pairs.config.data.batches, pairs.config.data.source) == (8, "padded", "de")
    assert pairs.other_text
    words = ["data=text", "data.path=x", "data.batches=packed", "data.cache_dir=other"]
    typed = compose_evaluation(words, run).config.data
    assert (typed.batches, typed.cache_dir) == ("packed", "other")
    mixed = compose_evaluation(["data=mixture", "+data@data.sources.a=text", "data.sources.a.path=x"], run)
    assert isinstance(mixed.config.data, MixtureConfig)
    assert mixed.other_text


@pytest.mark.parametrize(
    ("word", "other_text", "other_documents"),
    [
        ("data.batches=padded", False, False),
        ("data.seq_len=8", False, False),
        ("data.cache_dir=x", False, False),
        ("data.max_documents=3", False, True),
        ("data.val_fraction=0.5", False, True),
        ("data.document=file", False, True),
        ("data.val_path=x", True, False),
        ("data.hub_config=x", True, False),
    ],
)
def test_what_words_change(word: str, other_text: bool, other_documents: bool, run: Path) -> None:
    """A ramp of the run is no obstacle to other batches: nothing is trained."""
    found = compose_evaluation([word], run)
    assert (found.other_text, found.other_documents) == (other_text, other_documents)


def test_what_is_read_of_a_text_can_be_limited(run: Path) -> None:
    found = compose_evaluation(["trainer.eval_batches=2", "parallel.num_threads=1", "data.path=x"], run)
    assert [found.num_batches(split) for split in ("val", "all")] == [2, 2]
    assert found.config.parallel.num_threads == 1
    assert compose_evaluation(["trainer.eval_batches=null"], run).num_batches("val") is None
    with pytest.raises(LmtrainError, match=r"leave out trainer\.eval_batches"):
        found.require_stride(4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("lr=1e-3", "lr=1e-3: a trained model is evaluated as it is; what can be set is the text (data=OPTION, "),
        ("model=tiny", "model=tiny: a trained model is evaluated as it is"),
        ("model.d_model=3", "model.d_model=3: a trained model is evaluated as it is"),
        ("+experiment=own_text", "a trained model is evaluated as it is"),
        ("trainer.max_steps=3", "trainer.max_steps=3: a trained model is evaluated as it is"),
        ("tokenizer=byte", "tokenizer=byte: a trained model knows the ids of its own tokenizer only"),
        ("tokenizer.path=x", "a trained model knows the ids of its own tokenizer only"),
        ("device=cpu", "device=cpu: evaluate takes --device"),
        ("precision=bf16", "precision=bf16: evaluate takes --precision"),
        ("data.seq_len=17", "data.seq_len=17 is more than the model's context of 16 tokens"),
        ("data.pth=x", "there is no setting 'data.pth'; did you mean data.path?"),
        ("data=txt", "data has no option 'txt'; did you mean text?"),
        ("data=text", "data.path must be set: add data.path=VALUE"),
        ("data.val_fraction=2", "data.val_fraction must lie between 0 and 1, got 2"),
        ("~data.path", "data.path must be set: ~data.path cannot remove it"),
        ("book.txt", "cannot read the argument 'book.txt': write key=value"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(words: str, message: str, run: Path) -> None:
    with pytest.raises(REQUEST_ERRORS) as raised:
        compose_evaluation(words.split(), run)
    assert message in explain(raised.value)
    assert "\n" not in explain(raised.value)


def test_an_encoder_decoder_reads_pairs_only(tmp_path: Path) -> None:
    run = make_translator(tmp_path / "run")
    assert compose_evaluation(["data.path=y"], run).config.data.batches == "padded"
    with pytest.raises(LmtrainError, match="an encoder-decoder is trained on pairs"):
        compose_evaluation(["data=text", "data.path=y"], run)
    with pytest.raises(LmtrainError, match="a stride is for decoders"):
        compose_evaluation([], run).require_stride(4)
