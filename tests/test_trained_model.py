"""Opening the model of a run folder, and the texts that follow prompts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from trained_runs import chat_tokenizer, fresh_model, make_run, settings

from lmtrain.data.tokenizer import TURN_END, ByteTokenizer
from lmtrain.errors import CheckpointError, ConfigError, LmtrainError
from lmtrain.inference import TrainedModel, load_model
from lmtrain.model.building import Model
from lmtrain.model.generation import generate
from lmtrain.model.sampling import GREEDY, Sampling
from lmtrain.training.checkpoint import CheckpointFolder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run", ByteTokenizer())


@pytest.fixture(scope="module")
def trained(run: Path) -> TrainedModel:
    return load_model(run)


def same_weights(model: Model, seed: int) -> bool:
    other = fresh_model(settings(), ByteTokenizer(), seed)
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(("checkpoint", "step"), [(None, 2), ("best", 2), ("last", 3), ("1", 1), ("3", 3)])
def test_a_checkpoint_is_chosen(run: Path, checkpoint: str | None, step: int) -> None:
    trained = load_model(run, checkpoint=checkpoint)
    assert trained.step == step
    assert same_weights(trained.model, step)
    assert not trained.model.training
    assert trained.seq_len == 16


def test_without_a_best_the_newest_is_taken(run: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "run", ByteTokenizer())
    (other / "checkpoints" / "best").unlink()
    assert load_model(other).step == 3
    with pytest.raises(CheckpointError, match=r"no checkpoint 'best'; there are last, 1, 2, 3$"):
        load_model(other, checkpoint="best")


@pytest.mark.parametrize("wanted", ["7", "newest", "-1", "step_00000001", ""])
def test_a_checkpoint_that_is_not_there_is_told_with_those_that_are(run: Path, wanted: str) -> None:
    with pytest.raises(CheckpointError, match=f"no checkpoint '{wanted}'; there are last, best, 1, 2, 3$"):
        load_model(run, checkpoint=wanted)


def test_what_is_no_trained_run_is_told(run: Path, tmp_path: Path) -> None:
    with pytest.raises(LmtrainError, match="there is no run folder"):
        load_model(tmp_path / "nowhere")
    untrained = make_run(tmp_path / "untrained", ByteTokenizer(), steps=())
    with pytest.raises(CheckpointError, match=r"untrained has no checkpoint: a run writes them every trainer\."):
        load_model(untrained)
    emptied = make_run(tmp_path / "emptied", ByteTokenizer())
    CheckpointFolder(emptied / "checkpoints").remove_all("it was no use")
    with pytest.raises(CheckpointError, match="was emptied: it was no use"):
        load_model(emptied)
    damaged = make_run(tmp_path / "damaged", ByteTokenizer())
    weights = damaged / "checkpoints" / "best" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match="damaged"):
        load_model(damaged)
    assert load_model(damaged, checkpoint="last").step == 3
    (damaged / "tokenizer.model").unlink()
    with pytest.raises(LmtrainError, match="cannot read the tokenizer"):
        load_model(damaged, checkpoint="last")
    with pytest.raises(LmtrainError, match="device=tpu is not available"):
        load_model(run, device="tpu")


def test_texts_are_what_the_model_says(trained: TrainedModel) -> None:
    prompts = [trained.encode_prompt(text) for text in ("the cat", "", "a much longer prompt than the context is")]
    assert prompts[1] == [trained.tokenizer.end_id]
    texts = trained.generate(prompts, GREEDY, max_new_tokens=30)
    for prompt, text in zip(prompts, texts, strict=True):
        ids = generate(trained.model, prompt, GREEDY, max_new_tokens=30, stop_ids=[256])
        assert text == trained.tokenizer.decode(ids)


def test_pieces_are_told_as_they_come(trained: TrainedModel) -> None:
    told: list[tuple[int, str | None]] = []
    texts = trained.generate(
        [[1], [2, 3]], max_new_tokens=20, seeds=[5, 6], on_text=lambda row, piece: told.append((row, piece))
    )
    for row, text in enumerate(texts):
        pieces = [piece for number, piece in told if number == row]
        assert pieces[-1] is None
        assert "".join(piece or "" for piece in pieces) == text
        assert "" not in pieces
    assert len({row for row, _ in told[:6]}) == 2  # together


def test_a_small_model_takes_one_thread(trained: TrainedModel) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        threads = []
        trained.generate([[1]], max_new_tokens=2, on_text=lambda *_: threads.append(torch.get_num_threads()))
        assert (set(threads), torch.get_num_threads()) == ({1}, 2)
    finally:
        torch.set_num_threads(before)


def test_a_text_ends_before_a_stop_string(trained: TrainedModel) -> None:
    hot = Sampling(temperature=3.0, top_k=None)
    [whole] = trained.generate([[65]], hot, max_new_tokens=60)
    stop = whole[20:22]
    [text] = trained.generate([[65]], hot, max_new_tokens=60, stops=["never said", stop])
    assert text == whole[: whole.index(stop)]


def test_a_text_ends_with_its_document_or_turn(tmp_path: Path) -> None:
    """What the model says is decided by its output matrix here."""
    tokenizer = chat_tokenizer()
    trained = load_model(make_run(tmp_path / "run", tokenizer, "model.tie_embeddings=false"))
    head = trained.model.head
    assert head is not None
    for ends in (tokenizer.end_id, tokenizer.special[TURN_END]):
        with torch.no_grad():
            head.weight.zero_()
            assert trained.generate([[65]], GREEDY, max_new_tokens=3) == ["\0\0\0"]  # of equal logits the first
            head.weight[ends] = trained.model.norm(trained.model.read(torch.tensor([[65]])))[0, -1]
        assert trained.generate([[65]], GREEDY, max_new_tokens=3) == [""]


def test_a_prompt_beyond_the_context_can_be_refused(trained: TrainedModel) -> None:
    trained.require_room([1] * 16)
    with pytest.raises(ConfigError, match="the prompt has 17 tokens, more than the model's context of 16"):
        trained.require_room([1] * 17)


def test_a_text_is_asked_for_in_words(trained: TrainedModel, caplog: pytest.LogCaptureFixture) -> None:
    """The same as by ids."""
    prompt = trained.encode_prompt("the cat")
    sampling = Sampling(temperature=0.8)
    (expected,) = trained.generate([prompt], sampling, max_new_tokens=12, seeds=[3])
    assert trained.generate_text("the cat", max_new_tokens=12, temperature=0.8, seed=3) == expected
    assert trained.generate_text("the cat", max_new_tokens=12, temperature=0.8, seed=4) != expected
    assert not caplog.messages
    trained.generate_text("a text that is longer than the context", max_new_tokens=1)
    assert caplog.messages == ["the prompt has 38 tokens: only the last 16, the context, are read"]
    with pytest.raises(ConfigError, match="temperature must be"):
        trained.generate_text("the cat", temperature=-1)
    with pytest.raises(TypeError, match="tempature"):
        trained.generate_text("the cat", tempature=1)


def test_a_model_introduces_itself_in_a_line(trained: TrainedModel, run: Path) -> None:
    assert repr(trained) == f"<model of {run} at step 2: 0.01 M parameters>"
