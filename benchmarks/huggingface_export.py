"""Whether an exported model says the same in transformers as here: logits, and greedy text of a trained model.

`model=nano` in its exportable form is trained on the default data (words change that) and exported. Both programs
continue 100 pieces of validation text by the likeliest token each time, ours from ids, transformers from text through
the exported tokenizer. Then logits of random models of other shapes are compared.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from report import Figure, parser, publish, run_lmtrain
from torch import Tensor

from lmtrain.config.compose import compose_config
from lmtrain.config.schema import DecoderConfig
from lmtrain.data.prepare import prepare
from lmtrain.hardware import set_threads
from lmtrain.inference import TrainedModel, load_model
from lmtrain.model.decoder import Decoder
from lmtrain.model.generation import generate
from lmtrain.model.huggingface.choice import nearest_format
from lmtrain.model.huggingface.writing import write_model
from lmtrain.model.sampling import GREEDY

# Before transformers is imported.
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

EXPORTABLE = ["model=nano", "model.activation=swiglu", "model.qk_norm=false"]
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 100, 48, 64
TOLERANCE = 1e-4
SEQUENCES = 20  # of logits of the trained model

LLAMA: dict[str, Any] = {"d_model": 256, "num_layers": 6, "num_heads": 8}
GPT2: dict[str, Any] = {**LLAMA, "norm": "layernorm", "position": "learned", "activation": "gelu_tanh", "bias": True}
SHAPES: dict[str, tuple[dict[str, Any], int]] = {
    "Llama": (LLAMA, 512),
    "Llama, 2 key heads, untied": ({**LLAMA, "num_kv_heads": 2, "tie_embeddings": False}, 512),
    "Llama, 1 key head, GeGLU, biases": ({**LLAMA, "num_kv_heads": 1, "activation": "geglu", "bias": True}, 512),
    "Llama, context 4,096": ({**LLAMA, "num_layers": 2, "rope_theta": 500000.0}, 4096),
    "Llama, linear scaling, context 4,096": (
        {**LLAMA, "num_layers": 2, "rope_scaling": "linear", "rope_factor": 4.0},
        4096,
    ),
    "Llama, NTK scaling, context 4,096": ({**LLAMA, "num_layers": 2, "rope_scaling": "ntk", "rope_factor": 4.0}, 4096),
    "GPT-2": (GPT2, 512),
    "GPT-2, exact GELU, no biases, untied": (
        {**GPT2, "activation": "gelu", "bias": False, "tie_embeddings": False},
        512,
    ),
    "GPT-2, squared ReLU": ({**GPT2, "activation": "relu2"}, 512),
}
VOCAB_SIZE = 2048


def random_model(settings: dict[str, Any], seq_len: int) -> Decoder:
    """Weights so large that each shows in the logits, whose standard deviation is a few."""
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(**settings), vocab_size=VOCAB_SIZE, seq_len=seq_len, dropout=0.0).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(mean=float(name.endswith("weight")), std=0.3)
            else:
                table = name.startswith(("embedding", "position"))
                parameter.normal_(std=0.15 if table else 1.5 * parameter.size(1) ** -0.5)
    return model


def open_in_transformers(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


@torch.inference_mode()
def difference(ours: Decoder, theirs: Any, tokens_BT: Tensor) -> tuple[float, float]:
    """The largest of logits, and their standard deviation."""
    logits_BTV = ours(tokens_BT)
    return (logits_BTV - theirs(tokens_BT).logits).abs().max().item(), logits_BTV.std().item()


def validation_pieces(folder: Path, count: int, length: int) -> list[list[int]]:
    """Tokens of the run's validation text, spread evenly over it."""
    config = compose_config([], folder)
    tokens = prepare(config.data, config.tokenizer).documents("val")[0].tokens
    starts = torch.linspace(0, len(tokens) - length, count).long().tolist()
    return [[int(token) for token in tokens[start : start + length]] for start in starts]


def compare_texts(trained: TrainedModel, theirs: Any, tokenizer: Any, pieces: list[list[int]]) -> list[dict[str, Any]]:
    """What both say after each prompt; transformers is given text, ours the ids of that text."""
    ends = {trained.tokenizer.end_id}
    samples = []
    for piece in pieces:
        prompt = trained.tokenizer.decode(piece)
        ids = trained.encode_prompt(prompt)
        new_ids = generate(trained.model, ids, GREEDY, max_new_tokens=NEW_TOKENS, stop_ids=ends)
        given = tokenizer(prompt, return_tensors="pt")
        [found] = theirs.generate(**given, do_sample=False, max_new_tokens=NEW_TOKENS)
        told = [token for token in found[given["input_ids"].size(1) :].tolist() if token not in ends]
        text = trained.tokenizer.decode(new_ids)
        samples.append(
            {
                "the same ids": given["input_ids"][0].tolist() == ids,
                "the same new tokens": told == new_ids,
                "the same new text": tokenizer.decode(told) == text,
                "tokens": len(new_ids),
                "text": text,
            }
        )
    return samples


def main() -> int:
    command_line = parser(__doc__)
    command_line.add_argument("overrides", nargs="*", help="settings of the run, as data=text data.path=book.txt")
    arguments = command_line.parse_intermixed_args()
    steps = ["trainer.max_steps=20"] if arguments.quick else []
    overrides = [*EXPORTABLE, "tracking=none", "trainer.sample_tokens=0", *steps, *arguments.overrides]
    with tempfile.TemporaryDirectory() as name:
        folder, cache = Path(name), Path(name) / "cache"
        os.environ["LMTRAIN_CACHE"] = str(cache)
        run_lmtrain([*overrides, "hydra.run.dir=run"], folder=folder, cache=cache)
        run_lmtrain(["export", "run", "--to", "model"], folder=folder, cache=cache)
        from transformers import AutoTokenizer

        trained = load_model(folder / "run", device="cpu")
        set_threads(trained.config.parallel.num_threads)
        theirs = open_in_transformers(folder / "model")
        tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        count = 5 if arguments.quick else PROMPTS
        texts = compare_texts(trained, theirs, tokenizer, validation_pieces(folder / "run", count, PROMPT_TOKENS))
        sequences = torch.tensor(validation_pieces(folder / "run", SEQUENCES, trained.seq_len))
        assert isinstance(trained.model, Decoder)
        logits = {"the trained model": difference(trained.model, theirs, sequences)}
        for shape, (settings, seq_len) in SHAPES.items():
            model = random_model(settings, seq_len)
            (folder / shape).mkdir()
            write_model(folder / shape, model, nearest_format(model.config), dtype=torch.float32, end_ids=[0])
            tokens_BT = torch.randint(0, VOCAB_SIZE, (1, seq_len), generator=torch.Generator().manual_seed(1))
            logits[shape] = difference(model, open_in_transformers(folder / shape), tokens_BT)
    figures = [
        *(
            Figure(
                name=f"prompts with {what}", value=sum(text[what] for text in texts), unit=f"of {count}", at_least=count
            )
            for what in ("the same ids", "the same new tokens", "the same new text")
        ),
        Figure(name="new tokens", value=sum(text["tokens"] for text in texts)),
        Figure(name="different texts among them", value=len({text["text"] for text in texts})),
        *(
            Figure(name=f"largest difference of logits: {name}", value=difference, at_most=TOLERANCE)
            for name, (difference, _) in logits.items()
        ),
    ]
    samples = {"texts": texts, "logits: largest difference, standard deviation": logits}
    config = dataclasses.asdict(trained.config)
    return publish("huggingface_export", figures, config=config, samples=samples, quick=arguments.quick)


if __name__ == "__main__":
    sys.exit(main())
