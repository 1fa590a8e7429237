"""One optimizer step: accumulation equals the full batch, non-finite gradients change nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lmtrain.config.schema import (
    AdafactorConfig,
    AdamConfig,
    AdamWConfig,
    DecoderConfig,
    LionConfig,
    MuonConfig,
    OptimizerConfig,
    SGDConfig,
)
from lmtrain.data.batches import IGNORED, Batch, Source
from lmtrain.data.documents import Documents
from lmtrain.data.padded import DocumentRows, PaddedEvalBatches
from lmtrain.model.building import build_model
from lmtrain.training.evaluation import evaluate
from lmtrain.training.losses import TrainingLoss, sum_loss
from lmtrain.training.memory import PeakMemory
from lmtrain.training.optimizers import build_optimizers
from lmtrain.training.precision import Precision
from lmtrain.training.step import TrainingStep

VOCABULARY, WIDTH, ROWS, LENGTH = 11, 8, 6, 5
FP32 = Precision(torch.device("cpu"), torch.float32)


def small_model() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, VOCABULARY)
    )


def dropout_model() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Embedding(VOCABULARY, WIDTH),
        nn.Dropout(0.3),
        nn.Linear(WIDTH, WIDTH),
        nn.Tanh(),
        nn.Linear(WIDTH, VOCABULARY),
    )


def uneven_batch() -> Batch:
    """Rows with 0 to 5 targets each, so that a mean of microbatch means would be wrong."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator)
    targets = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator)
    for row in range(ROWS):
        targets[row, row:] = IGNORED if row < LENGTH else targets[row, row:]
    return Batch(inputs, targets, int((targets != IGNORED).sum()))


def build(model: nn.Module, **settings: object) -> TrainingStep:
    optimizers = build_optimizers(AdamWConfig(), model.parameters(), [], lr=0.01)
    return TrainingStep(model, optimizers, FP32, **({"grad_clip": 1.0, "micro_batch_size": None} | settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", [TrainingLoss(), TrainingLoss(label_smoothing=0.1, z_loss=0.01)])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 4, 5])
def test_accumulated_equals_full_batch(micro_batch_size: int, loss: TrainingLoss) -> None:
    batch = uneven_batch()
    whole, parts = small_model(), small_model()
    step_whole, step_parts = build(whole, loss=loss), build(parts, loss=loss, micro_batch_size=micro_batch_size)
    for _ in range(5):
        a, b = step_whole(batch, 0.01), step_parts(batch, 0.01)
        assert b.loss.item() == pytest.approx(a.loss.item(), rel=1e-6)
        assert b.grad_norm.item() == pytest.approx(a.grad_norm.item(), rel=1e-5)
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.allclose(p, q, atol=2e-6)


@pytest.mark.parametrize(("micro_batch_size", "expected"), [(None, [6]), (1, [2, 2, 2]), (2, [4, 2]), (7, [6])])
def test_a_microbatch_counts_sequences_not_their_pieces(micro_batch_size: int | None, expected: list[int]) -> None:
    """While sequences still grow, a row is a piece of one: half of it here."""
    batch, model = uneven_batch(), small_model()
    pieces = Batch(batch.inputs, batch.targets, batch.num_targets, rows_per_sequence=2)
    rows = []

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        rows.append(len(inputs))
        return model(inputs)

    outcome = build(model, forward=forward, micro_batch_size=micro_batch_size)(pieces, 0.01)
    assert rows == expected
    assert outcome.loss.item() == pytest.approx(build(small_model())(batch, 0.01).loss.item(), rel=1e-6)


class SeesDocuments(nn.Module):
    """A model that needs to know the documents: each token sees the mean of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = small_model()

    def forward(self, tokens_BT: torch.Tensor, documents_BT: torch.Tensor) -> torch.Tensor:
        seen_BTT = (documents_BT.unsqueeze(2) == documents_BT.unsqueeze(1)).float()
        embedded = self.layers[0](tokens_BT)
        logits: torch.Tensor = self.layers[1:](seen_BTT @ embedded / seen_BTT.sum(dim=2, keepdim=True))
        return logits


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_what_belongs_to_a_batch_goes_to_the_model_in_the_same_parts(micro_batch_size: int) -> None:
    documents = torch.tensor([[0, 0, 1, 1, 2], [0, 0, 0, 0, 0], [0, 1, 2, 3, 4]] * 2)
    batch = replace(uneven_batch(), documents=documents)
    whole, parts = SeesDocuments(), SeesDocuments()
    a = build(whole)(batch, 0.01)  # type: ignore[arg-type]
    b = build(parts, micro_batch_size=micro_batch_size)(batch, 0.01)  # type: ignore[arg-type]
    assert b.loss.item() == pytest.approx(a.loss.item(), rel=1e-6)
    assert b.grad_norm.item() == pytest.approx(a.grad_norm.item(), rel=1e-5)
    metrics = [
        evaluate(whole, [batch], FP32, bytes_per_token=1.0, micro_batch_size=size) for size in (None, micro_batch_size)
    ]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-6)


@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_rows_filled_up_count_nothing_in_any_microbatch(micro_batch_size: int) -> None:
    """Whole documents of a padded batch: the step of its microbatches is that of the documents one by one."""
    lengths = [2, 9, 4, 30]
    source = Source(Documents(np.arange(sum(lengths)) % VOCABULARY, np.cumsum(lengths)))
    (batch,) = PaddedEvalBatches(DocumentRows([source], seq_len=20, split="training"), batch_size=4)
    assert batch.num_targets == 1 + 8 + 3 + 20
    whole, parts, reference = (decoder() for _ in range(3))
    a, b = build(whole)(batch, 0.01), build(parts, micro_batch_size=micro_batch_size)(batch, 0.01)  # type: ignore[arg-type]
    alone = [
        sum_loss(reference(inputs[counted].unsqueeze(0)), targets[counted])
        for inputs, targets in zip(batch.inputs, batch.targets, strict=True)
        for counted in [targets != IGNORED]
    ]
    loss = torch.stack(alone).sum() / batch.num_targets
    loss.backward()
    norm = nn.utils.get_total_norm([p.grad for p in reference.parameters() if p.grad is not None])
    for outcome in (a, b):
        assert outcome.loss.item() == pytest.approx(loss.item(), rel=1e-5)
        assert outcome.grad_norm.item() == pytest.approx(norm.item(), rel=1e-4)


def decoder() -> nn.Module:
    torch.manual_seed(3)
    config = DecoderConfig(d_model=16, num_layers=2, num_heads=2)
    return build_model(config, vocab_size=VOCABULARY, seq_len=20, dropout=0.0)


def test_a_batch_without_targets_has_no_loss_and_no_gradient() -> None:
    """Such as one of text that is only read. Weights move as by a gradient of zero."""
    batch = uneven_batch()
    nothing = Batch(batch.inputs, torch.full_like(batch.targets, IGNORED), 0)
    model, reference = small_model(), small_model()
    step, by_hand = build(model), build(reference)
    for one in (step, by_hand):
        one(batch, 0.01)
    outcome = step(nothing, 0.01)
    assert outcome.applied
    assert (outcome.loss.item(), outcome.grad_norm.item()) == (0, 0)
    for parameter in reference.parameters():
        parameter.grad = torch.zeros_like(parameter)
    by_hand.optimizers[0].step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), reference.parameters(), strict=True))


def test_loss_is_the_mean_over_all_targets() -> None:
    batch, model = uneven_batch(), small_model()
    logits = model(batch.inputs)
    kept = batch.targets != IGNORED
    by_hand = F.cross_entropy(logits[kept], batch.targets[kept])
    assert build(model)(batch, 0.01).loss.item() == pytest.approx(by_hand.item(), rel=1e-6)
    assert sum_loss(logits, batch.targets).item() == pytest.approx(by_hand.item() * int(kept.sum()), rel=1e-6)


def test_the_loss_told_is_the_cross_entropy_whatever_is_minimised() -> None:
    batch, model, plain_model = uneven_batch(), small_model(), small_model()
    outcome = build(model, loss=TrainingLoss(label_smoothing=0.2, z_loss=0.1))(batch, 0.01)
    plain = build(plain_model)(batch, 0.01)
    assert outcome.loss.item() == pytest.approx(plain.loss.item(), rel=1e-6)
    assert outcome.grad_norm.item() != pytest.approx(plain.grad_norm.item(), rel=1e-2)


def test_clipping_limits_the_gradient_that_is_applied() -> None:
    """With plain SGD in place of AdamW the update is lr times the clipped gradient."""
    batch, model = uneven_batch(), small_model()
    before = [p.detach().clone() for p in model.parameters()]
    step = TrainingStep(
        model, [torch.optim.SGD(model.parameters(), lr=1.0)], FP32, grad_clip=0.01, micro_batch_size=None
    )
    outcome = step(batch, 1.0)
    assert outcome.grad_norm.item() > 0.01
    moved = torch.sqrt(sum(((p - q) ** 2).sum() for p, q in zip(model.parameters(), before, strict=True)))  # type: ignore[arg-type]
    assert moved.item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(poison: float) -> None:
    batch, model = uneven_batch(), small_model()
    step = build(model)
    step(batch, 0.01)
    weights = [p.detach().clone() for p in model.parameters()]
    moments = step.optimizers[0].state_dict()["state"][0]["exp_avg"].clone()
    hook = model[1].register_forward_hook(lambda module, inputs, output: output * poison)
    outcome = step(batch, 0.01)
    hook.remove()
    assert not outcome.applied
    assert not outcome.overflow
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    assert torch.equal(step.optimizers[0].state_dict()["state"][0]["exp_avg"], moments)
    assert step(batch, 0.01).applied


OPTIMIZERS: list[OptimizerConfig] = [
    AdamWConfig(),
    AdamConfig(),
    SGDConfig(momentum=0.9),
    MuonConfig(),
    LionConfig(),
    AdafactorConfig(),
]


def build_with(config: OptimizerConfig, model: nn.Module, device: str = "cpu") -> TrainingStep:
    """With the decision left to the device, as it is on a GPU."""
    optimizers = build_optimizers(config, model.parameters(), [model[1].weight], lr=0.01)  # type: ignore[index, list-item]
    precision = Precision(torch.device(device), torch.float32)
    step = TrainingStep(model, optimizers, precision, grad_clip=1.0, micro_batch_size=4)
    step.reads_at_once = False
    return step


@pytest.mark.parametrize("first_is_bad", [False, True])
@pytest.mark.parametrize("config", OPTIMIZERS, ids=lambda config: type(config).__name__)
def test_a_step_dropped_on_the_device_leaves_no_trace(config: OptimizerConfig, first_is_bad: bool) -> None:
    """Weights, moments and counts of steps are to the bit those of a run that never made it."""
    batch, model, reference = uneven_batch(), small_model(), small_model()
    step, never = build_with(config, model), build_with(config, reference)
    for number in range(4):
        if number == (0 if first_is_bad else 2):
            hook = model[1].register_forward_hook(lambda module, inputs, output: output * float("nan"))
            assert not step(batch, 0.01).applied
            hook.remove()
        assert step(batch, 0.01).applied
        never(batch, 0.01)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), reference.parameters(), strict=True))
    for ours, theirs in zip(step.optimizers, never.optimizers, strict=True):
        states, expected = ours.state_dict()["state"], theirs.state_dict()["state"]
        assert states.keys() == expected.keys()
        for key, state in states.items():
            assert all(torch.equal(state[name], value) for name, value in expected[key].items())


class NoReading(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fails where a value is read from a tensor: on a GPU that would wait for it."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        assert function not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("config", OPTIMIZERS, ids=lambda config: type(config).__name__)
def test_a_step_reads_nothing_from_the_device(config: OptimizerConfig) -> None:
    model = decoder()
    optimizers = build_optimizers(config, model.parameters(), model.block_matrices(), lr=0.01)  # type: ignore[operator]
    step = TrainingStep(model, optimizers, FP32, grad_clip=1.0, micro_batch_size=2)
    step.reads_at_once = False
    batch = uneven_batch()
    step(batch, 0.01)
    with NoReading():  # type: ignore[no-untyped-call]
        step(batch, 0.02)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("format", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", OPTIMIZERS, ids=lambda config: type(config).__name__)
def test_a_step_does_not_wait_for_a_gpu(config: OptimizerConfig, format: torch.dtype) -> None:
    model = decoder().cuda()
    optimizers = build_optimizers(config, model.parameters(), model.block_matrices(), lr=0.01)  # type: ignore[operator]
    step = TrainingStep(model, optimizers, Precision(torch.device("cuda"), format), grad_clip=1.0, micro_batch_size=2)
    batch = uneven_batch().pin_memory()
    for _ in range(3):  # the first one makes the optimizer's state
        step(batch, 0.01)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(batch, 0.02)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_out_of_memory_halves_the_microbatch_and_redoes_the_step() -> None:
    batch, reference = uneven_batch(), small_model()
    expected = build(reference)(batch, 0.01)
    model = small_model()
    sizes = []

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        sizes.append(len(inputs))
        if len(inputs) > 2:
            raise torch.OutOfMemoryError("made up")
        return model(inputs)

    step = build(model, forward=forward)
    outcome = step(batch, 0.01)
    assert sizes == [6, 3, 2, 2, 2]
    assert outcome.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)


@pytest.mark.parametrize("message", ["made up", "[enforce fail] DefaultCPUAllocator: can't allocate memory"])
@pytest.mark.parametrize("failing_call", [1, 2])
@pytest.mark.parametrize("in_backward", [False, True])
def test_a_redone_step_is_one_begun_with_the_smaller_microbatch(
    message: str, failing_call: int, in_backward: bool
) -> None:
    """To the bit, dropout and the random numbers after it included, wherever in the step memory ran out."""
    problem = torch.OutOfMemoryError if message == "made up" else RuntimeError
    batch, model, reference = uneven_batch(), dropout_model(), dropout_model()
    calls = 0

    def fail(_: torch.Tensor) -> None:
        raise problem(message)

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        logits = model(inputs)
        if calls == failing_call:
            if not in_backward:
                fail(logits)
            logits.register_hook(fail)
        return logits

    torch.manual_seed(7)
    step = build(model, forward=forward, micro_batch_size=4)
    outcomes = [step(batch, 0.01) for _ in range(2)]
    after = torch.get_rng_state()
    torch.manual_seed(7)
    begun_smaller = build(reference, micro_batch_size=2)
    expected = [begun_smaller(batch, 0.01) for _ in range(2)]
    assert step.micro_batch_size == 2
    assert torch.equal(torch.get_rng_state(), after)
    for ours, theirs in zip(outcomes, expected, strict=True):
        assert torch.equal(ours.loss, theirs.loss)
        assert torch.equal(ours.grad_norm, theirs.grad_norm)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), reference.parameters(), strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_redone_step_is_the_same_on_a_gpu() -> None:
    device = Precision(torch.device("cuda"), torch.float32)
    batch, weights = uneven_batch(), []
    for limit, size in ((2, 4), (None, 2)):
        model = dropout_model().cuda()

        def forward(inputs: torch.Tensor, model: nn.Module = model, limit: int | None = limit) -> torch.Tensor:
            logits: torch.Tensor = model(inputs)
            if limit is not None and len(inputs) > limit:
                raise torch.OutOfMemoryError("made up")
            return logits

        optimizers = build_optimizers(AdamWConfig(), model.parameters(), [], lr=0.01)
        torch.manual_seed(7)
        step = TrainingStep(model, optimizers, device, grad_clip=1.0, micro_batch_size=size, forward=forward)
        step(batch, 0.01)
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*weights, strict=True))


def test_out_of_memory_with_one_sequence_is_raised() -> None:
    def forward(inputs: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("made up")

    with pytest.raises(torch.OutOfMemoryError):
        build(small_model(), forward=forward)(uneven_batch(), 0.01)


def test_the_optimizer_running_out_of_memory_is_told_as_that() -> None:
    model = small_model()
    step = build(model)

    def fail(*arguments: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    step.optimizers[0].register_step_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        step(uneven_batch(), 0.01)


@pytest.mark.parametrize(("fitting", "expected"), [(6, 6), (5, 3), (3, 3), (2, 2), (1, 1)])
def test_a_dry_step_finds_the_microbatch_and_leaves_nothing(fitting: int, expected: int) -> None:
    model = dropout_model()
    largest_seen = 0

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        nonlocal largest_seen
        if len(inputs) > fitting:
            raise torch.OutOfMemoryError("made up")
        largest_seen = max(largest_seen, len(inputs))
        assert step.optimizers[0].state, "the optimizer's memory is taken meanwhile"
        logits: torch.Tensor = model(inputs)
        return logits

    step = build(model, forward=forward)
    weights = [p.detach().clone() for p in model.parameters()]
    random_state, groups = torch.get_rng_state(), [dict(group) for group in step.optimizers[0].param_groups]
    step.find_micro_batch_size(uneven_batch(), room=None)
    assert step.micro_batch_size == largest_seen == expected
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert not step.optimizers[0].state
    assert [dict(group) for group in step.optimizers[0].param_groups] == groups
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_dry_step_where_nothing_fits_leaves_nothing_either() -> None:
    model = dropout_model()

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        model(inputs).sum().backward()
        raise torch.OutOfMemoryError("made up")

    step, random_state = build(model, forward=forward), torch.get_rng_state()
    with pytest.raises(torch.OutOfMemoryError):
        step.find_micro_batch_size(uneven_batch(), room=None)
    assert all(p.grad is None for p in model.parameters())
    assert not step.optimizers[0].state
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_dry_step_between_steps_leaves_nothing_either() -> None:
    model = dropout_model()
    step = build(model)
    step(uneven_batch(), 0.01)
    state = {name: value.clone() for name, value in step.optimizers[0].state[model[2].weight].items()}  # type: ignore[index]
    step.micro_batch_size = None
    step.find_micro_batch_size(uneven_batch(), room=None)
    after = step.optimizers[0].state[model[2].weight]  # type: ignore[index]
    assert all(torch.equal(after[name], value) for name, value in state.items())
    assert all(p.grad is None for p in model.parameters())


def test_a_microbatch_that_is_known_is_not_looked_for() -> None:
    def forward(inputs: torch.Tensor) -> torch.Tensor:
        raise AssertionError("no dry step")

    step = build(small_model(), forward=forward, micro_batch_size=5)
    step.find_micro_batch_size(uneven_batch(), room=None)
    assert step.micro_batch_size == 5


def test_on_a_cpu_a_batch_that_clearly_fits_is_not_tried() -> None:
    def forward(inputs: torch.Tensor) -> torch.Tensor:
        raise AssertionError("no pass")

    model, beside = dropout_model(), 1000
    step = build(model, forward=forward)
    step.find_micro_batch_size(uneven_batch(), room=2 * (ROWS * 100 + beside), beside=beside, bound=100)
    assert step.micro_batch_size == ROWS
    with pytest.raises(AssertionError):  # with a byte less it is
        build(model, forward=forward).find_micro_batch_size(
            uneven_batch(), room=2 * (ROWS * 100 + beside) - 1, beside=beside, bound=100
        )


def test_on_a_cpu_what_would_not_fit_is_not_tried() -> None:
    """The system would not refuse it: it would kill the process that takes it."""
    model, batch = small_model(), uneven_batch()
    with PeakMemory(model.parameters()) as memory:
        sum_loss(model(batch.inputs[:3]), batch.targets[:3]).backward()  # three sequences of six
    beside = 5 * sum(p.nbytes for p in model.parameters())
    needed = memory.peak + beside
    for room, expected in ((1.05 * needed, 3), (0.95 * needed, 2)):
        sizes = []

        def forward(inputs: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(len(inputs))
            logits: torch.Tensor = model(inputs)
            return logits

        step = build(model, forward=forward)
        step.find_micro_batch_size(batch, room=room, beside=beside)
        assert step.micro_batch_size == expected
        assert max(sizes) == expected


def test_a_compiled_model_is_trained() -> None:
    """Such a model has no truth value where what it was made from has no length."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = small_model()

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.layers(tokens)
            return logits

    model, batch = Model(), uneven_batch()
    compiled = torch.compile(model, backend="eager")
    outcome = build(model, forward=compiled)(batch, 0.01)
    assert outcome.loss.item() == pytest.approx(build(small_model())(batch, 0.01).loss.item(), rel=1e-6)
    evaluate(model, [batch], FP32, bytes_per_token=1.0, forward=compiled)


def test_evaluation_weights_by_tokens_and_leaves_the_mode() -> None:
    model, batch = small_model().train(), uneven_batch()
    halves = [
        Batch(batch.inputs[rows], batch.targets[rows], int((batch.targets[rows] != IGNORED).sum()))
        for rows in (slice(0, 2), slice(2, ROWS))
    ]
    kept = batch.targets != IGNORED
    by_hand = F.cross_entropy(model(batch.inputs)[kept], batch.targets[kept]).item()
    metrics = evaluate(model, halves, FP32, bytes_per_token=2.0)
    assert metrics["val/loss"] == pytest.approx(by_hand, rel=1e-6)
    assert metrics["val/perplexity"] == pytest.approx(2.718281828**by_hand, rel=1e-5)
    assert metrics["val/bits_per_byte"] == pytest.approx(by_hand / 0.6931471806 / 2.0, rel=1e-6)
    assert model.training
