"""What was measured as plain values: a summary, a record a document, a record a translation. Writes nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lmtrain.data.documents import TokenArray
from lmtrain.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lmtrain.inference.evaluation import Evaluation, PartLosses
    from lmtrain.inference.translation import Translations

SHOWN_CHARS = 60
"""Of a document, in its record."""

BYTES_OF_CHARACTER = 4
"""Of UTF-8, at the most: so many tokens hold a character, whatever the tokenizer."""

Record = dict[str, Any]


def summary(evaluation: Evaluation, translations: Sequence[Translations] = ()) -> Record:
    """Counts and metrics of the whole, with those of each source of a mixture under `sources`."""
    text = evaluation.text
    sources = list(dict.fromkeys(part.source for part in text.parts))
    scores = {one.source: _scores(text.split, one) for one in translations}
    record: Record = {"counted": evaluation.num_targets} | _bytes(text.bytes_per_target(), evaluation.num_targets)
    record |= evaluation.metrics
    if sources == [""]:
        return record | scores.get("", {})
    return record | {
        "sources": {
            source: _counts([one for one in evaluation.parts if one.part.source == source])
            | evaluation.metrics_of(source)
            | scores.get(source, {})
            for source in sources
        }
    }


def _counts(parts: Sequence[PartLosses]) -> Record:
    return {
        "documents": sum(len(one.part.documents) for one in parts),
        "targets": sum(one.part.documents.num_targets for one in parts),
        "counted": sum(one.num_targets for one in parts),
    }


def _bytes(per_target: float, num_targets: int) -> Record:
    return {"bytes": round(per_target * num_targets)} if per_target else {}


def _scores(split: str, translations: Translations) -> Record:
    scores = translations.scores
    return {
        "sentences": len(translations.pairs),
        f"{split}/bleu": scores.bleu,
        f"{split}/chrf": scores.chrf,
        "bleu_signature": scores.bleu_signature,
        "chrf_signature": scores.chrf_signature,
    }


def document_records(evaluation: Evaluation, tokenizer: Tokenizer) -> Iterator[Record]:
    """One of each document, in the order of the text; `loss` is None if no target of it counts."""
    several_splits = len({part.split for part in evaluation.text.parts}) > 1
    for measured in evaluation.parts:
        part, losses = measured.part, measured.documents
        assert losses is not None, "the documents were not measured one by one"
        where = {"source": part.source} if part.source else {}
        if several_splits:
            where["split"] = part.split
        for number in range(len(part.documents)):
            num_targets = int(losses.num_targets[number])
            nats = float(losses.nats[number])
            num_bytes = losses.num_bytes(number, part.documents, tokenizer) if part.num_bytes else 0
            yield {
                "number": number,
                **where,
                "tokens": num_targets,
                "bytes": num_bytes,
                "loss": nats / num_targets if num_targets else None,
                "bits_per_byte": nats / math.log(2) / num_bytes if num_bytes else None,
                "text": _beginning(part.documents[number].ids, tokenizer),
            }


def _beginning(ids: TokenArray, tokenizer: Tokenizer) -> str:
    """The first characters of a document, a line of each text in it, such as the two of a pair."""
    ids = ids[: SHOWN_CHARS * BYTES_OF_CHARACTER]
    texts = np.split(ids, np.flatnonzero(np.isin(ids, [tokenizer.end_id, *tokenizer.special.values()])))
    return "\n".join(filter(None, (tokenizer.decode(text.tolist()) for text in texts)))[:SHOWN_CHARS]


def translation_records(translations: Sequence[Translations]) -> Iterator[Record]:
    """One of each pair."""
    for one in translations:
        where = {"data": one.source} if one.source else {}
        for pair, target in zip(one.pairs, one.targets, strict=True):
            yield {**where, "source": pair.source, "reference": pair.target, "hypothesis": target}
