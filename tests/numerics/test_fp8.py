"""Training in 8 bits: what is converted, what stays as it was, and how near it comes; rounded alike on a CPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import TINY, CommandLine
from torch import Tensor, nn
from trained_runs import TRANSLATOR, settings

from lmtrain.config.compose import compose_config
from lmtrain.errors import HardwareError
from lmtrain.hardware import require_format
from lmtrain.inference.evaluation import choose_precision
from lmtrain.model.building import Model, build_model
from lmtrain.training.fp8 import fits, train_in_fp8
from lmtrain.training.precision import Precision

has_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs lmtrain[fp8]")
VOCAB = 40
WIDE = ("model.d_model=32", "model.num_layers=2", "model.d_ff=64", "dropout=0")


def model_of(*words: str, seed: int = 1) -> Model:
    config = settings(*WIDE, "model.init_std=0.05", *words)
    torch.manual_seed(seed)
    return build_model(config.model, vocab_size=VOCAB, seq_len=16, dropout=0.0)


def fp8_layers(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if type(module).__name__ == "Fp8InTraining"}


@has_torchao
@pytest.mark.parametrize("tied", ["true", "false"])
def test_the_products_of_the_blocks_are_converted_and_nothing_else(tied: str) -> None:
    model = model_of(f"model.tie_embeddings={tied}")
    before = dict(model.named_parameters())
    assert train_in_fp8(model.all_blocks(), emulate=True) == 8
    parts = ("attention.qkv", "attention.output", "feed_forward.up", "feed_forward.down")
    assert fp8_layers(model) == {f"blocks.{layer}.{part}" for layer in range(2) for part in parts}
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert list(model.state_dict()) == list(model_of(f"model.tie_embeddings={tied}").state_dict())


@has_torchao
def test_sizes_that_tensor_cores_do_not_take_stay_in_bf16() -> None:
    model = model_of("model.d_ff=40")
    train_in_fp8(model.all_blocks(), emulate=True)
    assert {name.split(".")[2] for name in fp8_layers(model)} == {"attention"}
    assert [fits(nn.Linear(*sizes)) for sizes in ((16, 32), (16, 24), (24, 16))] == [True, False, False]
    assert not fits(nn.Embedding(16, 16))


@has_torchao
def test_encoder_decoders_are_converted_in_both_halves() -> None:
    words = [word for word in TINY if not word.startswith(("data=", "model."))]
    config = compose_config([*words, *TRANSLATOR])
    model = build_model(config.model, vocab_size=VOCAB, seq_len=16, dropout=0.0)
    train_in_fp8(model.all_blocks(), emulate=True)
    assert {name.partition("_")[0].partition(".")[0] for name in fp8_layers(model)} == {"encoder", "blocks"}


@has_torchao
def test_it_is_evaluated_as_if_it_had_never_been_converted() -> None:
    plain, converted = model_of(), model_of()
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.3)  # some begin at 0
    converted.load_state_dict(plain.state_dict())
    train_in_fp8(converted.all_blocks(), emulate=True)
    tokens = torch.randint(VOCAB, (2, 16))
    for autocast in (Precision(torch.device("cpu"), torch.bfloat16), Precision(torch.device("cpu"), torch.float32)):
        with torch.inference_mode(), autocast.autocast():
            assert torch.equal(plain.eval()(tokens), converted.eval()(tokens))
    assert not torch.equal(plain.eval()(tokens), converted.train()(tokens))


def losses(convert: Callable[[Model], Any], steps: int = 20) -> Tensor:
    """Of training to repeat one text, in bf16 but for what `convert` does."""
    model = model_of()
    convert(model)
    tokens = torch.randint(VOCAB, (4, 17), generator=torch.Generator().manual_seed(0))
    optimizer, found = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(steps):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    return torch.stack(found)


@has_torchao
def test_training_in_fp8_follows_training_in_bf16() -> None:
    bf16 = losses(lambda model: None)
    fp8 = losses(lambda model: train_in_fp8(model.all_blocks(), emulate=True))
    assert bf16[-1] < bf16[0] - 0.5  # something was learnt
    assert not torch.equal(fp8, bf16)
    assert (fp8 - bf16).abs().max() < 0.05


@pytest.mark.parametrize(
    ("capability", "refusal"), [((8, 9), "NVIDIA L4 has 8.9"), ((9, 0), None), ((10, 0), None), ((8, 0), "has 8.0")]
)
def test_gpus_before_hopper_are_refused(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], refusal: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace())
    if refusal is None:
        return require_format("fp8", torch.device("cuda"))
    with pytest.raises(HardwareError, match=refusal) as told:
        require_format("fp8", torch.device("cuda"))
    assert "use precision=bf16" in str(told.value)


def test_torchao_is_asked_for_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(HardwareError, match=r"pip install 'lmtrain\[fp8\]'"):
        require_format("fp8", torch.device("cuda"))


def test_a_cpu_is_refused_before_text_is_prepared(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 200)
    told = CommandLine(tmp_path)(*TINY, "data.path=text.txt", "device=cpu", "precision=fp8", status=2)
    assert told.stderr == (
        "lmtrain: precision=fp8 needs a GPU of Hopper or later (compute capability 9.0), this run is on cpu; "
        "use precision=bf16\n"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.txt"]


@pytest.mark.parametrize(("device", "expected"), [("cpu", "fp32"), ("cuda", "bf16")])
def test_a_run_in_fp8_is_evaluated_anywhere(device: str, expected: str) -> None:
    trained: Any = SimpleNamespace(config=settings("precision=fp8"), model=SimpleNamespace(device=torch.device(device)))
    assert choose_precision(trained).name == expected


@has_torchao
@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
    reason="needs a GPU of Hopper or later",
)
@pytest.mark.parametrize("compiled", ["false", "true"])
def test_a_run_in_fp8_on_a_gpu(tmp_path: Path, compiled: str) -> None:
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 400)
    words = [*TINY, *WIDE, "data.path=text.txt", "trainer.max_steps=30", "lr=3e-3", f"trainer.compile={compiled}"]
    lmtrain = CommandLine(tmp_path)
    found = {}
    for precision in ("fp8", "bf16"):
        lmtrain(*words, "device=cuda", f"precision={precision}", f"hydra.run.dir={precision}")
        found[precision] = float(lmtrain("evaluate", precision, "--json").stdout.split('"val/loss": ')[1].split(",")[0])
    assert found["fp8"] == pytest.approx(found["bf16"], rel=0.05)
    lmtrain("generate", "fp8", "--prompt", "to be", "--device", "cpu")
