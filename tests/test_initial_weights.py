"""`init_from`: weights of a run folder or of a model folder of transformers; what is refused, and in which words."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from small_tokenizers import foreign_huggingface, sample_text, train_bpe
from torch import Tensor
from trained_runs import chat_tokenizer, make_run, settings

from lmtrain.config.compose import compose_config
from lmtrain.config.saved import to_yaml
from lmtrain.config.schema import ExperimentConfig
from lmtrain.data.prepared import PreparedData
from lmtrain.data.tokenizer import ByteTokenizer, IdsTokenizer, Tokenizer
from lmtrain.data.tokenizer.huggingface import adopt_huggingface
from lmtrain.errors import RunFolderError
from lmtrain.inference import load_model
from lmtrain.inference.export import export_run
from lmtrain.initial_weights import load_initial_weights
from lmtrain.model.building import Model, build_model
from lmtrain.run_dir import OWN_TOKENIZER

LLAMA = ("model.activation=swiglu", "model.qk_norm=false", "model.num_kv_heads=1")
GPT2 = ("model.norm=layernorm", "model.position=learned", "model.activation=gelu_tanh", "model.qk_norm=false")

cached_settings = functools.cache(settings)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs `llama` and `gpt2`, and what they are exported to, `llama-hf` and `gpt2-hf`."""
    folder = tmp_path_factory.mktemp("folders")
    for name, words in (("llama", LLAMA), ("gpt2", GPT2)):
        make_run(folder / name, ByteTokenizer(), *words)
        export_run(folder / name, folder / f"{name}-hf", checkpoint="last")
    return folder


def start(origin: Path | str, *words: str, tokenizer: Tokenizer | None = None) -> Model:
    """The model of a new run with these settings."""
    tokenizer = tokenizer or ByteTokenizer()
    config: ExperimentConfig = dataclasses.replace(cached_settings(*words), init_from=str(origin))
    model = build_model(config.model, vocab_size=tokenizer.vocab_size, seq_len=config.data.seq_len, dropout=0.0)
    load_initial_weights(model, config, PreparedData(sources=(), tokenizer=tokenizer))
    return model


def refusal(origin: Path, *words: str, tokenizer: Tokenizer | None = None) -> list[str]:
    """The lines of it."""
    with pytest.raises(RunFolderError) as refused:
        start(origin, *words, tokenizer=tokenizer)
    return str(refused.value).split("\n")


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def assert_same_weights(one: torch.nn.Module, other: torch.nn.Module) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize(("name", "words"), [("llama", LLAMA), ("gpt2", GPT2)])
def test_an_exported_model_has_the_weights_of_its_run(folders: Path, name: str, words: tuple[str, ...]) -> None:
    """To the bit, and as of the run folder itself: its newest."""
    trained = load_model(folders / name, checkpoint="last", device="cpu").model
    assert_same_weights(start(folders / name, *words), trained)
    assert_same_weights(start(folders / f"{name}-hf", *words), trained)


def test_settings_that_weights_do_not_depend_on(folders: Path) -> None:
    words = (*LLAMA, "model.attention=naive", "model.init_std=0.7", "dropout=0.3", "data.seq_len=128")
    for origin in (folders / "llama", folders / "llama-hf"):
        model = start(origin, *words)
        assert model.seq_len == 128


@pytest.mark.parametrize("origin", ["llama", "llama-hf"])
def test_every_setting_that_differs_is_named(folders: Path, origin: str) -> None:
    words = ("model.activation=geglu", "model.num_kv_heads=2", "model.num_layers=3", "model.norm_eps=1e-5")
    reasons, remedy = refusal(folders / origin, *words, "model.qk_norm=true", "model.sliding_window=4")
    assert reasons == (
        f"init_from={folders / origin} is another model: model.num_kv_heads is 1 there and 2 here; "
        "model.norm_eps is 1e-06 there and 1e-05 here; model.activation is swiglu there and geglu here; "
        "model.qk_norm is false there and true here; model.num_layers is 1 there and 3 here; "
        "model.sliding_window is null there and 4 here"
    )
    assert remedy == (
        "to start from it, add model.num_kv_heads=1 model.norm_eps=1e-06 model.activation=swiglu model.qk_norm=false "
        "model.num_layers=1 model.sliding_window=null"
    )
    start(folders / origin, *words, *remedy.removeprefix("to start from it, add ").split())


def test_widths_by_default_are_named_as_they_are(folders: Path) -> None:
    [reasons, remedy] = refusal(folders / "llama-hf", *LLAMA, "model.d_model=32")
    assert "model.d_model is 16 there and 32 here; model.d_ff is 64 there and 128 here" in reasons
    assert remedy == "to start from it, add model.d_model=16 model.d_ff=64"


@pytest.mark.parametrize("origin", ["gpt2", "gpt2-hf"])
def test_learned_positions_are_as_many_as_the_context(folders: Path, origin: str) -> None:
    reasons, remedy = refusal(folders / origin, *GPT2, "data.seq_len=8")
    assert reasons.endswith("is another model: data.seq_len is 16 there and 8 here")
    assert remedy == "to start from it, add data.seq_len=16"


def test_another_position_is_all_that_is_said_of_positions(folders: Path) -> None:
    reasons, _ = refusal(folders / "gpt2", *GPT2, "model.position=rotary", "data.seq_len=8")
    assert reasons.endswith("another model: model.position is learned there and rotary here")


def test_rotations(tmp_path: Path, folders: Path) -> None:
    """They may be stretched by rope_scaling, and only by it; ntk is the larger base that it is."""
    stretched = ("model.rope_scaling=linear", "model.rope_factor=4.0")
    for origin in (folders / "llama", folders / "llama-hf"):
        start(origin, *LLAMA, *stretched)
        reasons, remedy = refusal(origin, *LLAMA, "model.rope_theta=5e5", *stretched)
        assert "model.rope_theta is 10000.0 there and 500000.0 here" in reasons
        assert remedy.endswith("add model.rope_theta=10000.0 model.rope_scaling=none model.rope_factor=1.0")
    ntk = ("model.rope_scaling=ntk", "model.rope_factor=3.0")
    make_run(tmp_path / "ntk", ByteTokenizer(), *LLAMA, *ntk)
    export_run(tmp_path / "ntk", tmp_path / "ntk-hf")
    for name in ("ntk", "ntk-hf"):
        start(tmp_path / name, *LLAMA, *ntk)
        reasons, _ = refusal(tmp_path / name, *LLAMA)
        assert "model.rope_theta is" in reasons or "model.rope_scaling is ntk there and none here" in reasons


def test_an_encoder_decoder_is_no_decoder(tmp_path: Path, folders: Path) -> None:
    with pytest.raises(RunFolderError, match="of the kind EncoderDecoder, and these settings make one of the kind Dec"):
        start(encoder_decoder_run(tmp_path / "pairs"), *LLAMA)


def encoder_decoder_run(folder: Path) -> Path:
    """As much of one as is read."""
    sizes = ("model.d_model=16", "model.num_heads=2", "model.num_encoder_layers=1", "model.num_decoder_layers=1")
    pairs = (
        "data=pairs",
        "data.source=a",
        "data.target=b",
        "data.targets=target",
        "data.path=nowhere.jsonl",
        "tokenizer=byte",
    )
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(compose_config(["model=_encoder_decoder", *sizes, *pairs])))
    ByteTokenizer().save(folder / "tokenizer.model")
    return folder


# ------------------------------------------------------------------------------------------- biases


def test_zero_biases_need_not_be_there(tmp_path: Path, folders: Path) -> None:
    """A model without biases starts one with them, and one whose biases are zero starts one without."""
    biased = weights(start(folders / "gpt2-hf", *GPT2, "model.bias=true"))
    assert [name for name, weight in biased.items() if not weight.any()] == [name for name in biased if "bias" in name]
    make_run(tmp_path / "biased", ByteTokenizer(), *GPT2, "model.bias=true")
    export_run(tmp_path / "biased", tmp_path / "biased-hf")
    start(tmp_path / "biased-hf", *GPT2, "model.bias=true")
    reasons, remedy = refusal(tmp_path / "biased-hf", *GPT2)
    assert reasons.endswith("another model: model.bias is true there and false here")
    assert remedy == "to start from it, add model.bias=true"


# ------------------------------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize("origin", ["llama", "llama-hf"])
def test_another_tokenizer(folders: Path, origin: str) -> None:
    other = train_bpe(sample_text())
    reasons, remedy = refusal(folders / origin, *LLAMA, "model.num_layers=2", tokenizer=other)
    assert "; its tokenizer is another (byte of 257 ids there, sentencepiece_bpe of 340 ids here)" in reasons
    assert remedy == f"to start from it, add model.num_layers=1 tokenizer=saved tokenizer.path={folders / origin}"


def test_the_same_kind_of_tokenizer_with_other_tokens(folders: Path) -> None:
    reasons, _ = refusal(folders / "llama-hf", *LLAMA, tokenizer=chat_tokenizer())
    assert "its tokenizer is another (byte of 257 ids there, byte of 263 ids here)" in reasons


def foreign_folder(folder: Path, tokenizer: Tokenizer, content: bytes) -> Path:
    """A model with a tokenizer.json, as transformers saves it."""
    make_run(folder / "run", tokenizer, *LLAMA)
    export_run(folder / "run", folder / "hf", checkpoint="last")
    (folder / "hf" / OWN_TOKENIZER).unlink()
    (folder / "hf" / "tokenizer.json").write_bytes(content)
    return folder / "hf"


def test_a_tokenizer_json_of_others(tmp_path: Path) -> None:
    """The ids are compared; how text is cut is not."""
    content = foreign_huggingface().to_str().encode()
    tokenizer = adopt_huggingface(content, None, [])
    folder = foreign_folder(tmp_path, tokenizer, content)
    trained = load_model(tmp_path / "run", checkpoint="last", device="cpu").model
    assert_same_weights(start(folder, *LLAMA, tokenizer=tokenizer), trained)
    reasons, remedy = refusal(folder, *LLAMA, tokenizer=ByteTokenizer())
    assert "its tokenizer is another (tokenizer.json there, byte of 257 ids here)" in reasons
    assert remedy == f"to start from it, add tokenizer=huggingface tokenizer.path={folder}"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 1000}))
    [reasons] = refusal(folder, *LLAMA, tokenizer=tokenizer)
    assert f"it has rows for 1,000 ids, and the tokenizer of this text has {tokenizer.vocab_size}" in reasons


def test_tokenizers_that_cannot_be_compared(tmp_path: Path, folders: Path, caplog: pytest.LogCaptureFixture) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(folders / "llama-hf", bare)
    for path in (bare / OWN_TOKENIZER, *bare.glob("tokenizer*")):
        path.unlink()
    trained = load_model(folders / "llama", checkpoint="last", device="cpu").model
    assert_same_weights(start(bare, *LLAMA), trained)
    assert "nothing tells whether its tokenizer is that of this text (byte of 257 ids)" in caplog.text
    [reasons] = refusal(bare, *LLAMA, tokenizer=chat_tokenizer())
    assert "it has rows for 257 ids, and the tokenizer of this text has 263" in reasons
    caplog.clear()
    (bare / "tokenizer.json").write_bytes(foreign_huggingface().to_str().encode())
    assert_same_weights(start(bare, *LLAMA, tokenizer=IdsTokenizer(256)), trained)
    assert "(ids of 257 ids)" in caplog.text


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(
        RunFolderError,
        match=r"no run folder .*, and no model of a store .*; a model folder of transformers would",
    ):
        start(tmp_path, *LLAMA)
