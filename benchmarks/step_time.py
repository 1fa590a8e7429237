"""One optimizer step of one shape: by lmtrain, and by what one would use instead.

Ours is the `TrainingStep` of a session, on its own batches, as a long run has it: `trainer.compile=auto` compiles it
where that pays. The others, as they are by default, which is eager: a minimal GPT written out in `minimal_gpt.py`,
transformers' Trainer, and litgpt's model in litgpt's kind of loop; and a bare loop over our own model, compiled if ours
is. Each of them takes turns with ours in this process, with AdamW, gradients clipped at 1, the same threads and number
format, and as many parameters to within 2 %; what differs all the same is printed and kept. The first line compares
ours with ours, another one with ours not compiled. Every shape has a result file of its own.

On a CPU the larger shapes take short contexts and batches of one sequence: there, most of a step is AdamW's.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import minimal_gpt
import numpy as np
import torch
from bare_loop import BareLoop
from interleaving import WARM_UP, Comparison, Loop, Turns, in_turns
from peers import LitgptLoop, TransformersTrainer, Work
from report import Figure, median_figure, parser, publish
from texts import write_ids

from lmtrain.config.compose import compose_config
from lmtrain.config.schema import DecoderConfig, ExperimentConfig
from lmtrain.data.prepare import prepare
from lmtrain.hardware import FORMATS, choose_device, set_threads
from lmtrain.session import Session, build_session
from lmtrain.training.schedules import lr_at

TARGETS = {"bare loop": 1.02, "minimal GPT": 0.95, "transformers' Trainer": 0.65}
SAME_SIZE = 0.02  # parameters of a peer may differ by this share


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model, its batches, and how long to look at it."""

    model: tuple[str, ...]  # words
    vocab_size: int
    cpu: tuple[int, int]  # sequences, tokens of each
    cuda: tuple[int, int]
    turn: int  # steps
    blocks: int = 24


MINIMAL = "model=gpt2 model.d_model=128 model.num_layers=4 model.num_heads=4 model.activation=gelu model.bias=false"
MINIMAL_LLAMA = "model=nano model.activation=swiglu model.d_ff=344 model.qk_norm=false"
SHAPES = {
    "minimal": Shape(model=tuple(MINIMAL.split()), vocab_size=65, cpu=(12, 64), cuda=(12, 64), turn=10),
    "minimal_llama": Shape(model=tuple(MINIMAL_LLAMA.split()), vocab_size=65, cpu=(12, 64), cuda=(12, 64), turn=10),
    "nano": Shape(model=("model=nano",), vocab_size=2048, cpu=(8, 256), cuda=(64, 256), turn=3, blocks=14),
    "gpt2": Shape(model=("model=gpt2",), vocab_size=50257, cpu=(1, 64), cuda=(16, 1024), turn=1, blocks=8),
    "small": Shape(model=("model=small",), vocab_size=32000, cpu=(1, 64), cuda=(8, 1024), turn=1, blocks=6),
}


class OurLoop:
    """`TrainingStep` of a session with the batches of the session."""

    def __init__(self, config: ExperimentConfig) -> None:
        data = prepare(config.data, config.tokenizer)
        self.vocab_size = data.tokenizer.vocab_size
        self.session: Session = build_session(config, data, choose_device(config.device))
        self.session.find_micro_batch_size()
        self.step = 0

    def __call__(self, num_steps: int) -> None:
        config, session = self.session.config, self.session
        for _ in range(num_steps):
            lr = lr_at(config.schedule, self.step, lr=config.lr, total_steps=session.total_steps)
            session.step(session.batches[self.step], lr)
            self.step += 1

    @property
    def num_parameters(self) -> int:
        return self.session.num_parameters


class Measurement:
    """One shape, with its peers."""

    def __init__(self, name: str, device: torch.device, words: list[str], folder: Path, *, quick: bool) -> None:
        shape = SHAPES[name]
        self.name, self.device, self.quick = name, device, quick
        batch_size, seq_len = shape.cpu if device.type == "cpu" else shape.cuda
        self.turn, self.blocks = (1, 2) if quick else (shape.turn, shape.blocks)
        ids = write_ids(folder / f"{name}.npy", shape.vocab_size)
        steps = 1_000_000  # more than are made
        self.config = compose_config(
            [
                *shape.model,
                *("data=tokens", f"data.path='{ids}'", f"data.seq_len={seq_len}", "data.val_fraction=0.1"),
                *("tokenizer=ids", f"tokenizer.vocab_size={shape.vocab_size}"),
                *("optimizer=adamw", "schedule=constant", "lr=1e-3", f"batch_size={batch_size}"),
                *(f"device={device.type}", f"precision={'fp32' if device.type == 'cpu' else 'bf16'}"),
                *(f"trainer.max_steps={steps}", "trainer.max_tokens=null", "trainer.max_epochs=null"),
                *words,
            ]
        )
        set_threads(self.config.parallel.num_threads)
        assert isinstance(self.config.model, DecoderConfig)
        self.work = Work(
            model=self.config.model,
            vocab_size=shape.vocab_size,
            seq_len=self.config.data.seq_len,
            batch_size=self.config.batch_size,
            tokens=np.load(ids, mmap_mode="r"),
            device=device,
            format=FORMATS[self.config.precision.format],
        )
        self.differs: dict[str, str] = {}

    @cached_property
    def ours(self) -> OurLoop:
        """The one that all peers are compared with."""
        loop = OurLoop(self.config)
        self.config = loop.session.config  # nothing in it is `auto` any more
        return loop

    def peers(self) -> dict[str, Callable[[], Comparison]]:
        """Those there are for this shape, each with the comparison peer / ours."""
        found = {"lmtrain again": lambda: self._in_turns(OurLoop(self.config))}
        if self.ours.session.config.trainer.compile:
            eager = replace(self.config, trainer=replace(self.config.trainer, compile=False))
            found["lmtrain not compiled"] = lambda: self._in_turns(OurLoop(eager))
        found["bare loop"] = lambda: self._in_turns(self._bare())
        if not self.work.model.gated:
            found["minimal GPT"] = lambda: self._in_turns(self._minimal())
        if find_spec("transformers"):
            found["transformers' Trainer"] = self._against_trainer
        if find_spec("litgpt"):
            found["litgpt"] = lambda: self._in_turns(self._known("litgpt", LitgptLoop(self.work)))
        return found

    def compare(self, peer: str) -> Comparison:
        """Ours / peer."""
        comparison = self.peers()[peer]().swapped
        gc.collect()  # of a large model before the next is made
        return comparison

    def _in_turns(self, peer: Loop) -> Comparison:
        return in_turns(self.ours, peer, turn=self.turn, blocks=self.blocks, device=self.device)

    def _bare(self) -> BareLoop:
        session = self.ours.session
        return BareLoop(session.config, self.ours.vocab_size, session.batches, session.total_steps)

    def _minimal(self) -> minimal_gpt.MinimalLoop:
        model = self.work.model
        shape = minimal_gpt.Shape(
            vocab_size=self.work.vocab_size,
            layers=model.num_layers,
            heads=model.num_heads,
            width=model.d_model,
            context=self.work.seq_len,
            batch=self.work.batch_size,
        )
        loop = minimal_gpt.MinimalLoop(shape, self.work.tokens, device=self.device, format=self.work.format)
        return self._known("minimal GPT", loop)

    def _against_trainer(self) -> Comparison:
        peer = self._known("transformers' Trainer", TransformersTrainer(self.work))
        turns = Turns(self.ours, turn=self.turn, device=self.device)
        # The blocks before the first switch and after it are left out: one by asking, one as everywhere.
        peer.train(block=turns.block, blocks=1 + WARM_UP + self.blocks, after_block=turns.switch)
        return turns.comparison()

    def _known(self, name: str, peer: Any) -> Any:
        """Refuses a peer of another size, and keeps what else is different."""
        share = sum(p.numel() for p in peer.model.parameters()) / self.ours.num_parameters - 1
        if abs(share) > SAME_SIZE:
            sys.exit(f"{name} has {share:+.1%} parameters against ours: not the same shape")
        forms = f"{type(peer.model).__name__}, {share:+.2%} parameters"
        self.differs[name] = f"{forms}; {getattr(peer, 'differs', 'LayerNorm, learned positions, GELU; no biases')}"
        return peer


def measure(name: str, device: str, words: list[str], folder: Path, *, quick: bool) -> int:
    """One shape; returns the exit status."""
    measured = Measurement(name, torch.device(device), words, folder, quick=quick)
    figures: list[Figure] = []
    samples: dict[str, Any] = {}
    for peer in measured.peers():
        print(f"{name}: lmtrain and {peer}", flush=True)
        comparison = measured.compare(peer)
        samples[peer] = dataclasses.asdict(comparison)
        figures += [
            median_figure(f"lmtrain / {peer}", comparison.ratios, at_most=TARGETS.get(peer)),
            median_figure(f"  {peer}", [1e3 * seconds for seconds in comparison.first], unit="ms a step"),
            median_figure("  lmtrain beside it", [1e3 * seconds for seconds in comparison.second], unit="ms a step"),
        ]
        if peer in measured.differs:
            print(f"  {measured.differs[peer]}")
    config = dataclasses.asdict(measured.config) | {
        "parameters": measured.ours.num_parameters,
        "threads": torch.get_num_threads(),
        "differs": measured.differs,
    }
    title = f"step_time_{name}" + ("" if device == "cpu" else f"_{device}")
    return publish(title, figures, config=config, samples=samples, quick=quick)


def main() -> int:
    command_line = parser(__doc__)
    command_line.add_argument("--shape", choices=SHAPES, nargs="+", default=list(SHAPES), help="default: all")
    command_line.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    command_line.add_argument("overrides", nargs="*", help="settings of ours, as parallel.num_threads=1")
    arguments = command_line.parse_intermixed_args()
    names = ["minimal"] if arguments.quick else arguments.shape
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["LMTRAIN_CACHE"] = f"{temporary}/cache"
        folder, words, quick = Path(temporary), arguments.overrides, arguments.quick
        return max([measure(name, arguments.device, words, folder, quick=quick) for name in names])


if __name__ == "__main__":
    sys.exit(main())
