"""Conversations: what the model is told, what is forgotten, and a model trained on one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from trained_runs import chat_tokenizer, make_run, settings

from lmtrain.data.encoding import Encoder
from lmtrain.data.records import Conversation, Message
from lmtrain.data.survey import Stretch
from lmtrain.data.tokenizer import ByteTokenizer
from lmtrain.errors import ConfigError, RunFolderError
from lmtrain.inference import Chat, TrainedModel, load_model
from lmtrain.model.building import build_model
from lmtrain.model.sampling import GREEDY


class Scripted(TrainedModel):
    """Answers as it is told to, and keeps the prompts."""

    def generate(self, prompts: Any, *arguments: Any, **words: Any) -> list[str]:
        said.extend(prompts)
        words["on_text"](0, "piece")
        words["on_text"](0, None)
        return [f"answer {len(said)}"]


said: list[list[int]] = []


@pytest.fixture
def scripted() -> Scripted:
    said.clear()
    config, tokenizer = settings("data.seq_len=120"), chat_tokenizer()
    model = build_model(config.model, vocab_size=tokenizer.vocab_size, seq_len=config.data.seq_len, dropout=0.0)
    return Scripted(config=config, model=model, tokenizer=tokenizer, step=1)


def spelt(ids: list[int]) -> str:
    """A prompt with its special tokens."""
    tokenizer = chat_tokenizer()
    names = {token: name for name, token in tokenizer.special.items()}
    return "".join(names[token] if token in names else tokenizer.decode([token]) for token in ids)


def test_the_model_is_told_all_turns(scripted: Scripted) -> None:
    chat = Chat(scripted, max_new_tokens=8, system="be kind")
    pieces: list[str] = []
    assert chat.answer("hi", pieces.append) == "answer 1"
    assert chat.answer("and <|user|>") == "answer 2"
    assert pieces == ["piece"]
    first = "<|system|>be kind<|turn_end|><|user|>hi<|turn_end|><|assistant|>"
    second = f"{first}answer 1<|turn_end|><|user|>and <|user|><|turn_end|><|assistant|>"
    assert [spelt(ids) for ids in said] == [first, second]
    assert said[1].count(chat_tokenizer().special["<|user|>"]) == 2  # the typed one is text


def test_the_prompt_is_how_training_begins(scripted: Scripted) -> None:
    chat = Chat(scripted, max_new_tokens=8, system="be kind")
    chat.answer("hi")
    chat.answer("ho")
    turns = [("system", "be kind"), ("user", "hi"), ("assistant", "answer 1"), ("user", "ho"), ("assistant", "x")]
    conversation = Conversation(tuple(Message(role, content) for role, content in turns))  # type: ignore[arg-type]
    trained_on = Encoder(chat_tokenizer(), prompts=True)([Stretch("train", conversation, closes=True, ends=True)])
    assert said[1] == trained_on["train"].tokens.tolist()[: len(said[1])]
    assert len(trained_on["train"].tokens) == len(said[1]) + 3  # x, the end of the turn, the end


def test_the_oldest_turns_are_forgotten_first(scripted: Scripted, caplog: pytest.LogCaptureFixture) -> None:
    chat = Chat(scripted, max_new_tokens=40, system="S")
    with caplog.at_level(logging.WARNING):
        for number in range(6):
            chat.answer(f"turn {number}")
    assert all(len(ids) <= 80 for ids in said)  # 40 of 120 are left for the answer
    assert spelt(said[-1]).startswith("<|system|>S<|turn_end|><|user|>turn ")
    assert spelt(said[-1]).endswith("<|user|>turn 5<|turn_end|><|assistant|>")
    assert 2 <= spelt(said[-1]).count("<|user|>") < 6
    [told] = caplog.messages
    assert "outgrows the model's context of 120 tokens" in told


def test_a_turn_alone_too_long_is_told(scripted: Scripted, caplog: pytest.LogCaptureFixture) -> None:
    Chat(scripted, max_new_tokens=40).answer("x" * 130)
    assert len(said[0]) == 133
    assert "longer than the model's context of 120 tokens" in caplog.text


def test_strict_refuses_rather_than_forget(scripted: Scripted) -> None:
    chat = Chat(scripted, max_new_tokens=200, strict=True)
    chat.answer("x" * 90)
    with pytest.raises(ConfigError, match="the conversation has 125 tokens, more than the model's context of 120"):
        chat.answer("y" * 20)


def test_a_model_without_roles_is_refused(scripted: Scripted) -> None:
    plain = Scripted(config=scripted.config, model=scripted.model, tokenizer=ByteTokenizer(["<|user|>"]), step=1)
    with pytest.raises(RunFolderError, match=r"no <\|system\|> <\|assistant\|> <\|turn_end\|>.*data=chat"):
        Chat(plain, max_new_tokens=8)


def test_a_model_answers_as_it_was_trained_to(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    trained = load_model(make_run(tmp_path / "run", tokenizer, "data.seq_len=64", "model.d_model=32"))
    turns = [("user", "sky?"), ("assistant", "blue"), ("user", "grass?"), ("assistant", "green é")]
    conversation = Conversation(tuple(Message(role, content) for role, content in turns))  # type: ignore[arg-type]
    encoded = Encoder(tokenizer, prompts=True)([Stretch("train", conversation, closes=True, ends=True)])["train"]
    assert encoded.counted is not None
    tokens_T = torch.tensor(encoded.tokens.tolist())
    targets_T = torch.where(torch.tensor(encoded.counted[1:]), tokens_T[1:], -100)
    optimizer = torch.optim.Adam(trained.model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.cross_entropy(trained.model(tokens_T[None, :-1])[0], targets_T)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    chat = Chat(trained, GREEDY, max_new_tokens=30)
    assert (chat.answer("sky?"), chat.answer("grass?")) == ("blue", "green é")
