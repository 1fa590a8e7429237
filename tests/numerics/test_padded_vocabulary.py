"""Logits computed at a padded width: the same losses, gradients, text and files as without, to rounding."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lmtrain.config.schema import DecoderConfig, EncoderDecoderConfig
from lmtrain.data.batches import IGNORED
from lmtrain.hardware import pads_vocab
from lmtrain.model.building import Model, build_model
from lmtrain.model.generation import generate
from lmtrain.model.sizing import VOCAB_MULTIPLE
from lmtrain.training.losses import TrainingLoss
from lmtrain.training.step import losses_of

VOCABULARY, ROWS, LENGTH = 61, 3, 14
SHAPE: dict[str, Any] = {"d_model": 16, "num_heads": 2, "init_std": 0.2}
CUDA, CPU, MPS = (torch.device(name) for name in ("cuda", "cpu", "mps"))


def model_of(*, pairs: bool = False, vocabulary: int = VOCABULARY, **changed: Any) -> Model:
    torch.manual_seed(0)
    config = (
        EncoderDecoderConfig(**SHAPE, num_encoder_layers=1, num_decoder_layers=1, **changed)
        if pairs
        else DecoderConfig(**SHAPE, num_layers=2, **changed)
    )
    return build_model(config, vocab_size=vocabulary, seq_len=LENGTH, dropout=0.0)


def passes(model: Model, loss: TrainingLoss, losses: Any = losses_of) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    tokens, sources, targets = torch.randint(VOCABULARY, (3, ROWS, LENGTH), generator=generator).unbind()
    targets[0, 5:] = IGNORED
    context = {"sources_BS": sources} if isinstance(model.config, EncoderDecoderConfig) else {}
    objective, cross_entropy = losses(model, loss, tokens, targets, context)
    objective.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return objective, cross_entropy, gradients


def with_and_without(model: Model, of_model: Any) -> tuple[Any, Any]:
    plain = of_model(model)
    model.pad_vocab = True
    return of_model(model), plain


@pytest.mark.parametrize("positions", [None, 5])
@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("changed", [{}, {"tie_embeddings": False}, {"logit_softcap": 5.0}, {"pairs": True}])
def test_losses_and_gradients_are_the_same(changed: dict[str, Any], smoothed: bool, positions: int | None) -> None:
    smoothing = {"label_smoothing": 0.1, "z_loss": 1e-2} if smoothed else {}
    loss = TrainingLoss(positions=positions, **smoothing)
    padded, plain = with_and_without(model_of(**changed), functools.partial(passes, loss=loss))
    torch.testing.assert_close(padded, plain, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("positions", [None, 5])
def test_they_are_in_16_bits_as_well(positions: int | None) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        padded, plain = with_and_without(model_of(), functools.partial(passes, loss=TrainingLoss(positions=positions)))
    torch.testing.assert_close(padded[:2], plain[:2], rtol=1e-5, atol=0)
    torch.testing.assert_close(padded[2], plain[2], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("positions", [None, 5])
@pytest.mark.parametrize("format", [torch.float32, torch.bfloat16])
def test_compiled_it_is_one_graph_with_the_same_losses(format: torch.dtype, positions: int | None) -> None:
    """As it is traced for the compiler, without making code."""
    torch.compiler.reset()
    compiled = torch.compile(losses_of, backend="aot_eager", fullgraph=True)
    model, loss = model_of(), TrainingLoss(positions=positions)
    model.pad_vocab = True
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=format == torch.bfloat16):
        torch.testing.assert_close(passes(model, loss, compiled), passes(model, loss), rtol=1e-2, atol=1e-2)


def test_the_product_is_made_at_the_padded_width() -> None:
    made: list[int] = []

    class Seen(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is nn.functional.linear:
                made.append(args[1].size(0))
            return function(*args, **(kwargs or {}))

    twice = 2 * VOCAB_MULTIPLE
    for pad_vocab, vocabulary, width in ((False, 61, 61), (True, 61, VOCAB_MULTIPLE), (True, twice, twice)):
        model = model_of(vocabulary=vocabulary)
        model.pad_vocab = pad_vocab
        with Seen():
            assert model(torch.zeros(1, 2, dtype=torch.int64)).size(-1) == vocabulary
        assert made[-1] == width


def test_text_and_weights_are_the_same() -> None:
    model = model_of()
    names = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    padded, plain = with_and_without(model, lambda model: generate(model, [1, 2], max_new_tokens=30, seed=3))
    assert padded == plain
    assert {name: tuple(weight.shape) for name, weight in model.state_dict().items()} == names


def test_auto_pads_on_gpus_in_16_bits() -> None:
    def auto(device: torch.device, format: torch.dtype) -> bool:
        return pads_vocab("auto", device, format)

    assert auto(CUDA, torch.bfloat16)
    assert auto(CUDA, torch.float16)
    assert not auto(CUDA, torch.float32)
    assert not auto(CPU, torch.bfloat16)
    assert not auto(MPS, torch.bfloat16)
    assert pads_vocab(True, CPU, torch.float32)
    assert not pads_vocab(False, CUDA, torch.bfloat16)
