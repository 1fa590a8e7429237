"""Diagnostics: the numbers are those of a naive computation, and looking changes nothing."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import TINY, CommandLine
from torch import Tensor

from lmtrain.config.schema import DecoderConfig
from lmtrain.data.batches import Batch
from lmtrain.model.building import build_model
from lmtrain.model.decoder import Decoder
from lmtrain.model.sizing import flops_per_token
from lmtrain.run_dir import RunDir
from lmtrain.tracking.histograms import Histogram, append_histograms, read_histograms
from lmtrain.tracking.metrics_file import read_metrics, truncate_after
from lmtrain.training.diagnostics import MIN_SPIKE_WINDOW, Diagnostics, by_layer, is_spike, weight_histograms
from lmtrain.training.losses import sum_loss
from lmtrain.training.precision import Precision
from lmtrain.training.step import TrainingStep
from lmtrain.training.utilisation import Utilisation, listed_peak, measured_peak, memory_bytes

CONFIG = DecoderConfig(d_model=16, num_layers=3, num_heads=2)
CPU = torch.device("cpu")
FP32 = Precision(CPU, torch.float32)
LR = 0.5
LAYERS = ["embedding", "block_0", "block_1", "block_2", "norm", "head"]


def small_model(**settings: Any) -> Decoder:
    torch.manual_seed(0)
    return build_model(replace(CONFIG, **({"tie_embeddings": False} | settings)), vocab_size=11, seq_len=8, dropout=0.0)


def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(11, (4, 9), generator=generator)
    return Batch(tokens[:, :-1], tokens[:, 1:], 32)


def sgd_step(model: Decoder, *, grad_clip: float | None = None) -> TrainingStep:
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    return TrainingStep(model, [optimizer], FP32, grad_clip=grad_clip, micro_batch_size=2)


def naive_norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(value**2 for tensor in tensors for value in tensor.flatten().tolist()))


def in_layer(name: str, layer: str) -> bool:
    return name.startswith(layer.replace("block_", "blocks.") + ".")


@pytest.mark.parametrize("grad_clip", [None, 0.01])
def test_norms_and_ratios_are_those_of_a_naive_computation(grad_clip: float | None) -> None:
    model, twin = small_model(), small_model()
    diagnostics = Diagnostics(model)
    outcome = sgd_step(model, grad_clip=grad_clip)(batch(), LR, diagnostics)
    report = diagnostics.report(1)

    (sum_loss(twin(batch().inputs), batch().targets) / 32).backward()
    clip = 1.0 if grad_clip is None else grad_clip / outcome.grad_norm.item()
    assert [name.rpartition("/")[2] for name in report] == LAYERS * 3
    for layer in LAYERS:
        parameters = [p for name, p in twin.named_parameters() if in_layer(name, layer)]
        gradient, weights = naive_norm([p.grad for p in parameters if p.grad is not None]), naive_norm(parameters)
        assert report[f"diagnostics/grad_norm/{layer}"] == pytest.approx(gradient, rel=1e-5)
        assert report[f"diagnostics/weight_norm/{layer}"] == pytest.approx(weights, rel=1e-5)
        # Plain SGD moves the weights by the rate times the clipped gradient.
        ratio = LR * clip * gradient / weights
        assert report[f"diagnostics/update_ratio/{layer}"] == pytest.approx(ratio, rel=1e-3, abs=1e-7)


def test_layer_norms_make_up_the_whole_gradient_norm() -> None:
    model = small_model()
    diagnostics = Diagnostics(model)
    outcome = sgd_step(model)(batch(), LR, diagnostics)
    norms = [value for name, value in diagnostics.report(1).items() if "/grad_norm/" in name]
    assert math.hypot(*norms) == pytest.approx(outcome.grad_norm.item(), rel=1e-5)


def test_looking_changes_no_bit_of_the_training(tmp_path: Path) -> None:
    plain, watched = small_model(), small_model()
    diagnostics = Diagnostics(watched, histograms=tmp_path / "histograms.jsonl")
    plain_step, watched_step = sgd_step(plain, grad_clip=1.0), sgd_step(watched, grad_clip=1.0)
    for step in range(1, 6):
        expected = plain_step(batch(), LR)
        found = watched_step(batch(), LR, diagnostics)
        diagnostics.report(step)
        assert torch.equal(found.loss, expected.loss)
        assert torch.equal(found.grad_norm, expected.grad_norm)
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), watched.parameters(), strict=True))


def test_histograms_count_every_weight_once() -> None:
    model = small_model()
    histograms = weight_histograms(by_layer(model))
    assert list(histograms) == ["embedding", "block_0", "block_1", "block_2", "head", "gains"]
    for layer in LAYERS[:4]:
        matrices = [p for name, p in model.named_parameters() if in_layer(name, layer) and p.ndim == 2]
        assert sum(histograms[layer].counts) == sum(p.numel() for p in matrices)
        assert histograms[layer].high == max(p.max().item() for p in matrices)
    assert sum(sum(h.counts) for h in histograms.values()) == sum(p.numel() for p in model.parameters())


def test_a_histogram_of_one_value_has_bins() -> None:
    histogram = weight_histograms({"zeros": [torch.zeros(3, 4)]})["zeros"]
    assert (histogram.low, histogram.high, sum(histogram.counts)) == (-0.5, 0.5, 12)


def test_blocks_sort_by_name_and_tied_weights_count_once() -> None:
    assert list(by_layer(small_model(num_layers=11, tie_embeddings=True))) == [
        "embedding",
        *(f"block_{i:02d}" for i in range(11)),
        "norm",
    ]


def test_without_memory_for_a_copy_the_ratios_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    def full(*arguments: object, **keywords: object) -> Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: made up")

    model = small_model()
    diagnostics = Diagnostics(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "clone", full)
        diagnostics.before_update()
    diagnostics.after_update()
    kinds = {name.split("/")[1] for name in diagnostics.report(1)}
    assert kinds == {"grad_norm", "weight_norm"}
    assert "no memory" in caplog.text


def test_the_histograms_file_is_cut_back_like_the_metrics_and_bears_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "histograms.jsonl"
    assert read_histograms(path) == {}
    for step in (1, 50, 100):
        append_histograms(path, step, {"block_0": Histogram(-1.0, step, [1, step])})
    with path.open("a") as file:
        file.write('{"step": 150, "lay')
    assert list(read_histograms(path)) == [1, 50, 100]
    truncate_after(path, 50)
    assert read_histograms(path)[50]["block_0"] == Histogram(-1.0, 50, [1, 50])
    assert list(read_histograms(path)) == [1, 50]


def test_a_run_with_diagnostics_is_the_same_and_leaves_pictures(lmtrain: CommandLine, corpus: Path) -> None:
    """They may be switched on and off on the way: the weights stay the same to the bit."""
    words = (*TINY, f"data.path={corpus}", "schedule=constant", "trainer.eval_every=3", "dropout=0.1")
    lmtrain(*words, "trainer.max_steps=6", "hydra.run.dir=plain")
    lmtrain(*words, "trainer.max_steps=3", "hydra.run.dir=watched", "trainer.diagnostics=true")
    watched = RunDir(lmtrain.folder / "watched")
    pictures = {"evaluation.png", "gradient_flow.png", "loss.png", "parameter_histograms.png", "training.png"}
    assert {path.name for path in watched.plots.iterdir()} == pictures
    records = read_metrics(watched.metrics)
    assert [r["step"] for r in records if "diagnostics/grad_norm/block_0" in r] == [1, 3]
    assert all(0 < r["train/mfu"] < 2 and r["train/memory_gib"] > 0 for r in records if "train/loss" in r)
    assert list(read_histograms(watched.histograms)) == [1, 3]

    lmtrain("resume=watched", "trainer.max_steps=6", "trainer.diagnostics=false")
    weights = [lmtrain.folder / run / "checkpoints/last/model.safetensors" for run in ("plain", "watched")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert list(read_histograms(watched.histograms)) == [1, 3]


NOISY = [3.0 + 0.02 * math.sin(7 * i) for i in range(20)]


@pytest.mark.parametrize(
    ("loss", "before", "expected"),
    [
        (3.3, NOISY, True),
        (3.1, NOISY, False),  # as far as noise of this size may carry
        (3.3, NOISY[: MIN_SPIKE_WINDOW - 1], False),  # too little is known
        (3.3, [*NOISY, 9.0, 9.0], True),  # earlier spikes do not hide this one
        (3.01, [3.0] * 20, False),  # without any noise, a rise must still be worth telling
        (4.0, [9.0 - 0.3 * i for i in range(20)], False),  # falling fast
        (math.nan, NOISY, False),  # told elsewhere
    ],
)
def test_a_spike_is_far_above_the_latest_losses(loss: float, before: list[float], expected: bool) -> None:
    assert is_spike(loss, before) is expected


def test_noise_alone_is_no_spike() -> None:
    """Of 20,000 records around a slowly falling loss, none is told of."""
    noise = torch.randn(20_000, generator=torch.Generator().manual_seed(0)).tolist()
    losses = [3.0 - 1e-5 * i + 0.05 * value for i, value in enumerate(noise)]
    assert not any(is_spike(losses[i], losses[i - 32 : i]) for i in range(32, len(losses)))


def test_utilisation_is_the_share_of_the_peak() -> None:
    flops = flops_per_token(CONFIG, 11, 8)
    told = Utilisation(CPU, flops_per_token=flops, peak_flops=1e12)(1e6)
    assert told["train/mfu"] == pytest.approx(flops * 1e6 / 1e12)
    assert told["train/memory_gib"] == pytest.approx(memory_bytes(CPU) / 2**30, rel=0.1)
    assert "train/mfu" not in Utilisation(CPU, flops_per_token=flops, peak_flops=None)(1e6)


def test_memory_follows_what_is_allocated() -> None:
    before = memory_bytes(CPU)
    held = torch.ones(2**24)  # 64 MiB
    assert memory_bytes(CPU) - before == pytest.approx(held.nbytes, rel=0.2)


@pytest.mark.parametrize(
    ("name", "kind", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", "16-bit", 989.5),
        ("NVIDIA H100 PCIe", "16-bit", 756.5),
        ("NVIDIA H200 NVL", "16-bit", 835.5),
        ("NVIDIA GH200 480GB", "tf32", 494.7),
        ("NVIDIA A100-SXM4-40GB", "fp32", 19.5),
        ("NVIDIA L40S", "16-bit", 362),
        ("NVIDIA L4", "16-bit", 121),
        ("Tesla V100-SXM2-16GB", "tf32", 15.7),  # has none: what it does instead
        ("NVIDIA GeForce RTX 4090", "16-bit", 165.2),
    ],
)
def test_peaks_of_known_cards(name: str, kind: str, teraflops: float) -> None:
    assert listed_peak(name, kind) == pytest.approx(teraflops * 1e12)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A10G",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    ],
)
def test_no_peak_is_guessed_for_other_cards(name: str) -> None:
    assert listed_peak(name, "16-bit") is None


def test_a_measured_peak_is_plausible_and_takes_no_random_numbers() -> None:
    state = torch.get_rng_state()
    peak = measured_peak(CPU, torch.float32, torch.get_num_threads())
    assert 1e9 < peak < 1e14
    assert torch.equal(torch.get_rng_state(), state)
