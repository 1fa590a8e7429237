"""The decoder against an independent implementation that shares none of the model's code, and its habits."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lmtrain.config.schema import DecoderConfig, ModelConfig
from lmtrain.model.building import build_model
from lmtrain.model.decoder import Decoder

VOCAB_SIZE, SEQ_LEN = 23, 12


def decoder_config(**settings: Any) -> DecoderConfig:
    shape = {"d_model": 32, "num_layers": 2, "num_heads": 4, "d_ff": 48}
    return DecoderConfig(**(shape | settings))


def decoder(dropout: float = 0.0, **settings: Any) -> Decoder:
    return build_model(decoder_config(**settings), vocab_size=VOCAB_SIZE, seq_len=SEQ_LEN, dropout=dropout)


def randomise(model: Decoder) -> None:
    """Weights large enough that a slip in any of them shows in the logits."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.3)


def tokens(batch_size: int = 3, length: int = SEQ_LEN) -> Tensor:
    return torch.randint(VOCAB_SIZE, (batch_size, length), generator=torch.Generator().manual_seed(1))


# --------------------------------------------------------- the reference: loops, float64, one sequence


def reference_norm(x: Tensor, weight: Tensor, config: DecoderConfig) -> Tensor:
    centred = x - x.mean(-1, keepdim=True) if config.norm == "layernorm" else x
    return weight * centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + config.norm_eps)


def reference_rotate(vector: Tensor, position: int, theta: float) -> Tensor:
    """Each pair (i, i + C/2) as a complex number, turned by position · theta^(-2i/C)."""
    half = vector.numel() // 2
    turned = torch.empty_like(vector)
    for i in range(half):
        angle = position * theta ** (-2 * i / vector.numel())
        number = complex(vector[i], vector[i + half]) * complex(math.cos(angle), math.sin(angle))
        turned[i], turned[i + half] = number.real, number.imag
    return turned


def reference_attention(x: Tensor, weights: dict[str, Tensor], config: DecoderConfig) -> Tensor:
    heads, kv_heads, width = config.num_heads, config.kv_heads, config.head_dim
    projected = x @ weights["qkv.weight"].T
    q = projected[:, : heads * width].view(-1, heads, width)
    k = projected[:, heads * width : (heads + kv_heads) * width].view(-1, kv_heads, width)
    v = projected[:, (heads + kv_heads) * width :].view(-1, kv_heads, width)
    if config.qk_norm:
        q = q / torch.sqrt((q**2).mean(-1, keepdim=True) + config.norm_eps)
        k = k / torch.sqrt((k**2).mean(-1, keepdim=True) + config.norm_eps)

    def placed(vector: Tensor, position: int) -> Tensor:
        rotary = config.position == "rotary"
        return reference_rotate(vector, position, config.rope_theta) if rotary else vector

    rows = []
    for t in range(len(x)):
        row = []
        for head in range(heads):
            shared = head // (heads // kv_heads)
            query = placed(q[t, head], t)
            scores = [query @ placed(k[s, shared], s) / math.sqrt(width) for s in range(t + 1)]
            probabilities = torch.softmax(torch.stack(scores), dim=0)
            row.append(sum(p * v[s, shared] for s, p in enumerate(probabilities)))
        rows.append(torch.cat(row))
    return torch.stack(rows) @ weights["output.weight"].T


def reference_feed_forward(x: Tensor, weights: dict[str, Tensor], config: DecoderConfig) -> Tensor:
    def gelu(z: Tensor) -> Tensor:
        return z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))

    hidden = x @ weights["up.weight"].T
    gate, value = hidden[:, : config.hidden_dim], hidden[:, config.hidden_dim :]
    if config.activation == "swiglu":
        hidden = gate / (1 + torch.exp(-gate)) * value
    elif config.activation == "geglu":
        hidden = gelu(gate) * value
    elif config.activation == "gelu":
        hidden = gelu(hidden)
    else:
        hidden = torch.where(hidden > 0, hidden**2, 0.0)
    return hidden @ weights["down.weight"].T


def reference_logits(model: Decoder, tokens_T: Tensor) -> Tensor:
    config = model.config
    weights = {name: value.double() for name, value in model.state_dict().items()}

    def within(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}

    x = weights["embedding.weight"][tokens_T]
    if config.position == "learned":
        x = x + weights["position.weight"][: len(tokens_T)]
    for i in range(config.num_layers):
        block = within(f"blocks.{i}.")
        normed = reference_norm(x, block["attention_norm.weight"], config)
        x = x + reference_attention(normed, within(f"blocks.{i}.attention."), config)
        normed = reference_norm(x, block["feed_forward_norm.weight"], config)
        x = x + reference_feed_forward(normed, within(f"blocks.{i}.feed_forward."), config)
    head = weights["embedding.weight" if config.tie_embeddings else "head.weight"]
    return reference_norm(x, weights["norm.weight"], config) @ head.T


CHOICES: dict[str, tuple[Any, ...]] = {
    "norm": ("rmsnorm", "layernorm"),
    "position": ("rotary", "learned"),
    "activation": ("swiglu", "geglu", "gelu", "relu2"),
    "num_kv_heads": (None, 2, 1),
    "qk_norm": (False, True),
    "tie_embeddings": (True, False),
}


@pytest.mark.parametrize(("norm", "position"), itertools.product(CHOICES["norm"], CHOICES["position"]))
def test_logits_equal_the_reference_for_every_choice(norm: str, position: str) -> None:
    torch.manual_seed(0)
    others = {name: values for name, values in CHOICES.items() if name not in ("norm", "position")}
    for values in itertools.product(*others.values()):
        settings = dict(zip(others, values, strict=True))
        model = decoder(norm=norm, position=position, **settings)
        randomise(model)
        sequence_T = tokens(batch_size=1, length=5)[0]
        with torch.no_grad():
            logits_TV = model(sequence_T[None])[0]
            expected_TV = reference_logits(model, sequence_T)
        # fp32 against float64; relative to the largest logit, which depends on the choice.
        error = (logits_TV - expected_TV).abs().max() / expected_TV.abs().max()
        assert error < 1e-5, f"{settings}: relative error {error}"


def test_reference_notices_a_wrong_setting() -> None:
    """The comparison above has teeth: each setting alone changes the logits."""
    torch.manual_seed(0)
    model = decoder(num_kv_heads=2, qk_norm=True)
    randomise(model)
    sequence_T = tokens(batch_size=1)[0]
    right_TV = reference_logits(model, sequence_T)
    for wrong in ({"norm": "layernorm"}, {"qk_norm": False}, {"rope_theta": 100.0}, {"activation": "geglu"}):
        model.config = decoder_config(**({"num_kv_heads": 2, "qk_norm": True} | wrong))
        assert (reference_logits(model, sequence_T) - right_TV).abs().max() > 1e-2, wrong


@pytest.mark.parametrize("position", CHOICES["position"])
@pytest.mark.parametrize("num_kv_heads", [None, 1])
def test_a_token_never_changes_logits_before_it(position: str, num_kv_heads: int | None) -> None:
    torch.manual_seed(0)
    model = decoder(position=position, num_kv_heads=num_kv_heads)
    randomise(model)
    tokens_BT = tokens()
    with torch.no_grad():
        before_BTV = model(tokens_BT)
        for t in range(SEQ_LEN):
            changed_BT = tokens_BT.clone()
            changed_BT[:, t] = (changed_BT[:, t] + 1) % VOCAB_SIZE
            after_BTV = model(changed_BT)
            assert torch.equal(after_BTV[:, :t], before_BTV[:, :t])
            assert not torch.equal(after_BTV[:, t], before_BTV[:, t])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"norm": "layernorm", "position": "learned", "activation": "gelu", "tie_embeddings": False},
        {"activation": "relu2", "qk_norm": True, "output_init": "zero", "num_kv_heads": 2},
    ],
    ids=["llama", "gpt", "nano"],
)
def test_overfits_one_batch(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = decoder(**settings)
    tokens_BT = torch.randint(VOCAB_SIZE, (4, SEQ_LEN + 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(150):
        logits_BTV = model(tokens_BT[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(VOCAB_SIZE), abs=0.1)
    # What is left is the first tokens, which no context tells apart.
    assert losses[-1] < 0.05


def test_dropout_acts_in_training_only_and_follows_the_seed() -> None:
    torch.manual_seed(0)
    model = decoder(dropout=0.2)
    without = decoder(dropout=0.0)
    without.load_state_dict(model.state_dict())
    tokens_BT = tokens()
    assert torch.equal(model.eval()(tokens_BT), without.train()(tokens_BT))

    model.train()
    torch.manual_seed(7)
    first_BTV, other_BTV = model(tokens_BT), model(tokens_BT)
    torch.manual_seed(7)
    assert torch.equal(model(tokens_BT), first_BTV)
    assert not torch.equal(other_BTV, first_BTV)


def test_dropout_acts_on_embedding_attention_and_both_sublayers() -> None:
    torch.manual_seed(0)
    model = decoder(dropout=0.5)
    rates = {name: module.p for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout)}
    assert rates == {"dropout": 0.5, "blocks.0.dropout": 0.5, "blocks.1.dropout": 0.5}
    attention = model.blocks[0].attention
    x_BTD = torch.randn(1, SEQ_LEN, 32)
    assert not torch.equal(attention(x_BTD), attention(x_BTD))
    attention.eval()
    assert torch.equal(attention(x_BTD), attention(x_BTD))


def test_context_longer_than_seq_len_is_refused() -> None:
    with pytest.raises(AssertionError, match="seq_len"):
        decoder()(torch.zeros(1, SEQ_LEN + 1, dtype=torch.int64))


def test_saved_state_holds_weights_only_and_each_once() -> None:
    tied = decoder().state_dict()
    assert "head.weight" not in tied
    assert not any("rotary" in name for name in tied)
    assert "head.weight" in decoder(tie_embeddings=False).state_dict()
    assert len({value.data_ptr() for value in tied.values()}) == len(tied)


def test_block_matrices_are_all_matrices_inside_the_blocks() -> None:
    model = decoder(position="learned", tie_embeddings=False)
    chosen = {id(parameter) for parameter in model.block_matrices()}
    names = [name for name, parameter in model.named_parameters() if id(parameter) in chosen]
    matrices = ("attention.qkv", "attention.output", "feed_forward.up", "feed_forward.down")
    assert names == [f"blocks.{i}.{matrix}.weight" for i in range(2) for matrix in matrices]


def test_same_seed_builds_the_same_model() -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(decoder().state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_bf16_autocast_stays_near_fp32() -> None:
    torch.manual_seed(0)
    model = decoder(qk_norm=True, num_kv_heads=2)
    tokens_BT = tokens()
    with torch.no_grad():
        exact_BTV = model(tokens_BT)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded_BTV = model(tokens_BT)
    assert (rounded_BTV.float() - exact_BTV).abs().max() < 0.02 * exact_BTV.abs().max()


def test_a_config_of_another_architecture_is_refused() -> None:
    with pytest.raises(TypeError, match="ModelConfig"):
        build_model(ModelConfig(), vocab_size=VOCAB_SIZE, seq_len=SEQ_LEN, dropout=0.0)
