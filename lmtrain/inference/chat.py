"""A conversation with a trained model, told to it as conversations are in training (`data/encoding.py`)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from lmtrain.data.encoding import Encoder
from lmtrain.data.records import Conversation, Message
from lmtrain.data.survey import Stretch
from lmtrain.data.tokenizer import ASSISTANT, SYSTEM, TURN_END, USER, Tokenizer
from lmtrain.errors import RunFolderError
from lmtrain.inference.trained import TrainedModel
from lmtrain.model.sampling import DEFAULT_SAMPLING, Sampling

log = logging.getLogger(__name__)


class Chat:
    """Turns of a user and a model, all of which the model sees as long as they fit into its context."""

    def __init__(
        self,
        trained: TrainedModel,
        sampling: Sampling = DEFAULT_SAMPLING,
        *,
        max_new_tokens: int,
        system: str | None = None,
        seed: int = 0,
        stops: Sequence[str] = (),
        strict: bool = False,
    ) -> None:
        """`system` is said before all turns. `strict`: refuse what does not fit, rather than forget.

        Raises RunFolderError if the tokenizer has no tokens for roles.
        """
        if missing := _missing_roles(trained.tokenizer):
            raise RunFolderError(
                f"the model's tokenizer has no {' '.join(missing)}: it was not made for conversations; "
                "train a model on some with data=chat, or generate without --chat"
            )
        self._trained = trained
        self._sampling = sampling
        self._max_new_tokens = max_new_tokens
        self._seed = seed
        self._stops = stops
        self._strict = strict
        self._system = [] if system is None else [Message("system", system)]
        self._turns: list[Message] = []  # user, assistant, user, …
        self._forgetful = False

    def answer(self, content: str, on_text: Callable[[str], None] | None = None) -> str:
        """What the model says to the user's turn; `on_text` is told each piece as it comes.

        Raises ConfigError if strict and the conversation does not fit, DataError for text the tokenizer does not know.
        """
        prompt_ids = self._make_room([*self._turns, Message("user", content)])
        [text] = self._trained.generate(
            [prompt_ids],
            self._sampling,
            max_new_tokens=self._max_new_tokens,
            seeds=[self._seed],
            stops=self._stops,
            on_text=lambda _, piece: None if on_text is None or piece is None else on_text(piece),
        )
        self._turns.append(Message("assistant", text))
        return text

    def _make_room(self, turns: list[Message]) -> list[int]:
        """The prompt of the conversation, whose oldest turns are forgotten so that half the context is free."""
        seq_len = self._trained.seq_len
        prompt_ids = self._encode(turns)
        if self._strict:
            self._trained.require_room(prompt_ids, "the conversation")
        else:
            room = seq_len - min(self._max_new_tokens, seq_len // 2)
            while len(prompt_ids) > room and len(turns) > 1:
                turns = turns[2:]
                prompt_ids = self._encode(turns)
                self._tell(f"it outgrows the model's context of {seq_len:,} tokens: its oldest turns are forgotten")
            if len(prompt_ids) > seq_len:
                self._tell(
                    f"a turn is longer than the model's context of {seq_len:,} tokens: its beginning is not read"
                )
        self._turns = turns
        return prompt_ids

    def _tell(self, what: str) -> None:
        if not self._forgetful:
            log.warning("the conversation: %s", what)
        self._forgetful = True

    def _encode(self, turns: list[Message]) -> list[int]:
        return encode_turns(self._trained.tokenizer, [*self._system, *turns])


def knows_roles(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer has what a conversation is told with."""
    return not _missing_roles(tokenizer)


def encode_turns(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """The ids of a conversation as in training, up to where the assistant begins to speak. Raises DataError."""
    conversation = Stretch("train", Conversation(tuple(messages)), closes=True, ends=False)
    encoded = Encoder(tokenizer, prompts=False)([conversation])["train"]
    return [*encoded.tokens.tolist(), tokenizer.special[ASSISTANT]]


def _missing_roles(tokenizer: Tokenizer) -> list[str]:
    return [name for name in (SYSTEM, USER, ASSISTANT, TURN_END) if name not in tokenizer.special]
