"""Batches made ahead: the same ones, errors where they are asked for, and no thread left."""

from __future__ import annotations

import threading

import pytest
import torch

from lmtrain.data.batches import Batch
from lmtrain.data.prefetch import Prefetched


class Numbered:
    """Batch n holds the number n; told which were made, and in which thread."""

    def __init__(self, broken: int | None = None) -> None:
        self.made: list[int] = []
        self.threads: list[str] = []
        self.broken = broken

    def __getitem__(self, step: int) -> Batch:
        if step == self.broken:
            raise OSError("the disk is gone")
        self.made.append(step)
        self.threads.append(threading.current_thread().name)
        number = torch.full((1, 1), step)
        return Batch(number, number, 1)


def test_every_step_gets_its_batch_and_none_is_made_twice_or_beyond_the_end() -> None:
    source = Numbered()
    batches = Prefetched(source, num_steps=10, pin_memory=False)
    assert [batches[step].inputs.item() for step in range(3, 10)] == list(range(3, 10))
    batches.close()
    assert source.made == list(range(3, 10))
    assert source.threads[0] == threading.current_thread().name
    assert all(name.startswith("batches") for name in source.threads[1:])


def test_the_next_one_is_made_meanwhile() -> None:
    made = threading.Event()

    class Signalling(Numbered):
        def __getitem__(self, step: int) -> Batch:
            batch = super().__getitem__(step)
            if step == 1:
                made.set()
            return batch

    batches = Prefetched(Signalling(), num_steps=5, pin_memory=False)
    batches[0]
    assert made.wait(timeout=10), "nobody asked for it yet"
    batches.close()


def test_steps_may_be_asked_for_in_any_order() -> None:
    batches = Prefetched(Numbered(), num_steps=10, pin_memory=False)
    assert [batches[step].inputs.item() for step in (5, 2, 3, 3, 9, 0)] == [5, 2, 3, 3, 9, 0]
    batches.close()


def test_an_error_of_the_thread_is_raised_where_its_batch_is_asked_for() -> None:
    batches = Prefetched(Numbered(broken=2), num_steps=10, pin_memory=False)
    assert [batches[step].inputs.item() for step in range(2)] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone"):
        batches[2]
    batches.close()


def test_no_thread_is_left() -> None:
    before = threading.active_count()
    for stop in (0, 1, 4, 5):
        batches = Prefetched(Numbered(), num_steps=5, pin_memory=False)
        for step in range(stop):
            batches[step]
        batches.close()
    assert threading.active_count() == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_for_a_gpu_are_pinned() -> None:
    batches = Prefetched(Numbered(), num_steps=3, pin_memory=True)
    for step in range(3):
        batch = batches[step]
        assert batch.inputs.is_pinned()
        assert next(batch.split(1)).inputs.is_pinned()
        assert batch.to(torch.device("cuda")).inputs.item() == step
    batches.close()
