"""Runs on several processes, started by torchrun as a user starts them: they train what one process trains."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from lmtrain.data.batches import IGNORED, Batch
from tests.command_line import TINY, CommandLine

pytestmark = pytest.mark.multiprocess

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "lmtrain")

# Answers of very different lengths under a mask, seven rows among two processes, three microbatches each.
UNEVEN = (
    *("data=pairs", "data.path=pairs.jsonl", "data.source=source", "data.target=target", "data.seq_len=48"),
    *("tokenizer=byte", "batch_size=7", "tracking=none"),
    *("model.d_model=16", "model.num_layers=2", "model.num_heads=2", "parallel.num_threads=1", "dropout=0"),
    *("trainer.micro_batch_size=2", "trainer.max_steps=20", "trainer.eval_every=10", "trainer.log_every=1"),
    *("trainer.sample_tokens=0", "schedule=constant", "lr=1e-2"),
)


class Job:
    """The program on two processes, in a folder with a text."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.alone = CommandLine(folder)
        dice = random.Random(5)
        words = ["lamp", "river", "stone", "bread", "cloud", "seven", "green"]
        pairs = [
            {
                "source": " ".join(dice.choices(words, k=dice.randint(1, 3))),
                "target": " ".join(dice.choices(words, k=n)),
            }
            for n in (dice.choice([1, 1, 2, 7]) for _ in range(200))
        ]
        (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        (folder / "text.txt").write_text("\n".join(" ".join(dice.choices(words, k=8)) for _ in range(400)))

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *TORCHRUN, *words],
            cwd=self.folder,
            env=self.alone.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def __call__(self, *words: str, status: int = 0) -> str:
        """Run it to its end, which must be `status`; what it says."""
        process = self.start(*words)
        try:
            out, _ = process.communicate(timeout=300)
        finally:
            with_children = [process.pid, *(child.pid for child in _children(process.pid))]
            for pid in with_children if process.poll() is None else ():
                os.kill(pid, signal.SIGKILL)
        assert process.returncode == status, out
        return out

    def metrics(self, run: str) -> list[dict[str, float]]:
        return [json.loads(line) for line in (self.folder / run / "metrics.jsonl").read_text().splitlines()]

    def losses(self, run: str) -> list[float]:
        return [record["train/loss"] for record in self.metrics(run) if "train/loss" in record]

    def weights(self, run: str, step: str = "last") -> dict[str, torch.Tensor]:
        return load_file(self.folder / run / "checkpoints" / step / "model.safetensors")

    def result(self, run: str) -> dict[str, object]:
        content: dict[str, object] = json.loads((self.folder / run / "result.json").read_text())
        return content


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def process_of_rank(pid: int, rank: int) -> int:
    """Of the processes that a torchrun started, the one of a rank."""
    return next(child.pid for child in _children(pid) if child.environ().get("RANK") == str(rank))


def wait_until(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert process.poll() is None, process.stdout and process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def trained(job: Job) -> Job:
    """A grid on one process, and the same on two in both ways: adamw and muon, 20 steps."""
    job.alone("--multirun", *UNEVEN, "optimizer=adamw,muon", "hydra.sweep.dir=alone")
    job("--multirun", *UNEVEN, "parallel=ddp,fsdp", "optimizer=adamw,muon", "hydra.sweep.dir=two")
    return job


@pytest.mark.parametrize(("two", "alone"), [("0000", "0000"), ("0001", "0001"), ("0002", "0000"), ("0003", "0001")])
def test_two_processes_train_what_one_does(trained: Job, two: str, alone: str) -> None:
    """The losses of 20 steps, the validation and the weights, to fp32 rounding as 20 steps of Adam make of it."""
    assert trained.losses(f"two/{two}") == pytest.approx(trained.losses(f"alone/{alone}"), rel=2e-6)
    ours, theirs = (trained.metrics(run)[-1] for run in (f"two/{two}", f"alone/{alone}"))
    assert ours["val/loss"] == pytest.approx(theirs["val/loss"], rel=2e-6)
    assert ours["tokens"] == theirs["tokens"]
    expected = trained.weights(f"alone/{alone}")
    for name, weight in trained.weights(f"two/{two}").items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=2e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "tolerance"),
    [
        (("model=seq2seq_nano", "model.num_encoder_layers=1", "model.num_decoder_layers=1"), 2e-6),
        (("model.num_layers=2", "lr=1e-3", "precision=bf16", "trainer.activation_checkpointing=full"), 3e-4),
        (("model.num_layers=2", "model.tie_embeddings=false", "model.position=learned", "optimizer=lion"), 2e-6),
    ],
    ids=["encoder-decoder", "bf16 with activation checkpointing", "other parts"],
)
def test_every_kind_of_model_can_be_divided(job: Job, words: tuple[str, ...], tolerance: float) -> None:
    """16 bits round differently where weights are rounded before they travel; Adam makes more of it each step."""
    kept = [word for word in UNEVEN if not word.startswith("model.num_layers")]
    folder = f"kind_{words[-1].partition('=')[2]}"
    job.alone(*kept, *words, f"hydra.run.dir={folder}/alone")
    job("--multirun", *kept, *words, "parallel=ddp,fsdp", f"hydra.sweep.dir={folder}")
    for run in ("0000", "0001"):
        assert job.losses(f"{folder}/{run}") == pytest.approx(job.losses(f"{folder}/alone"), rel=tolerance)


def test_a_checkpoint_of_two_processes_goes_on_in_one_and_the_reverse(trained: Job) -> None:
    """After ten steps in one way and ten in another the weights are those of twenty in one process."""
    half = ("trainer.max_steps=10", "optimizer=adamw")
    trained("--multirun", *UNEVEN, *half, "parallel=ddp,fsdp", "hydra.sweep.dir=half")
    trained.alone(*UNEVEN, *half, "hydra.run.dir=half/alone")
    for run in ("half/0000", "half/0001"):
        trained.alone(f"resume={run}", "parallel.strategy=single", "trainer.max_steps=20")
    trained("resume=half/alone", "parallel.strategy=fsdp", "trainer.max_steps=20")
    expected = trained.weights("alone/0000")
    for run in ("half/0000", "half/0001", "half/alone"):
        assert trained.losses(run) == pytest.approx(trained.losses("alone/0000"), rel=2e-6), run
        for name, weight in trained.weights(run).items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=2e-5, msg=f"{run}: {name}")


@pytest.mark.slow
def test_a_resumed_job_of_as_many_processes_ends_in_the_same_bits(job: Job) -> None:
    """With dropout, whose random numbers each process has of its own."""
    words = (*UNEVEN, "dropout=0.2", "parallel=ddp,fsdp")
    job("--multirun", *words, "hydra.sweep.dir=undisturbed")
    job("--multirun", *words, "trainer.max_steps=10", "hydra.sweep.dir=resumed")
    for run in ("0000", "0001"):
        job(f"resume=resumed/{run}", "trainer.max_steps=20")
        expected = job.weights(f"undisturbed/{run}")
        assert all(torch.equal(weight, expected[name]) for name, weight in job.weights(f"resumed/{run}").items())


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_process_ends_the_job_which_can_go_on(job: Job, strategy: str, rank: int) -> None:
    run = f"killed_{strategy}_{rank}"
    endless = ("trainer.max_steps=100000", "trainer.eval_every=1000", "trainer.checkpoint_every=5")
    process = job.start(*UNEVEN, *endless, f"parallel={strategy}", f"hydra.run.dir={run}")
    wait_until((job.folder / run / "checkpoints" / "last").exists, process)
    os.kill(process_of_rank(process.pid, rank), signal.SIGKILL)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert (
        f"another process of this job has ended: what it said is above, its status below; go on with resume={run}"
        in out
    )
    if rank:  # the one that leads has written how it ended
        assert job.result(run)["status"] == "failed"
    reached = int((job.folder / run / "checkpoints" / "last").readlink().name.removeprefix("step_"))
    job.alone(f"resume={run}", "parallel.strategy=single", f"trainer.max_steps={reached + 3}")
    assert job.result(run)["status"] == "completed"


def test_a_signal_to_the_job_is_a_checkpoint(job: Job) -> None:
    process = job.start(*UNEVEN, "trainer.max_steps=100000", "parallel=ddp", "hydra.run.dir=stopped")
    wait_until((job.folder / "stopped" / "checkpoints" / "last").exists, process)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert "stopped by SIGTERM at step" in out
    assert job.result("stopped")["status"] == "interrupted"
    step = job.result("stopped")["step"]
    assert (job.folder / "stopped" / "checkpoints" / "last").readlink() == Path(f"step_{step:08d}")


def test_one_process_tells_a_study_and_the_others_hear_the_verdict(job: Job) -> None:
    """Four trials, of which the pruner ends some."""
    study = ("hydra/sweeper=study", "hydra.sweeper.n_trials=4", "lr=tag(log,interval(1e-6,1e-2))")
    pruner = ("hydra/sweeper/pruner=median", "hydra.sweeper.pruner.n_startup_trials=1")
    out = job("--multirun", *UNEVEN, *study, *pruner, "trainer.eval_every=4", "parallel=ddp", "hydra.sweep.dir=study")
    statuses = [job.result(f"study/{number:04d}")["status"] for number in range(4)]
    assert set(statuses) == {"completed", "pruned"}, out
    assert all(job.result(f"study/{number:04d}")["processes"] == 2 for number in range(4))


def test_what_one_run_of_a_grid_cannot_be_the_others_are(job: Job) -> None:
    """A batch that is too small for the processes is refused in all of them; the next run is made."""
    words = (*UNEVEN, "trainer.micro_batch_size=1", "parallel=ddp", "trainer.max_steps=2")
    out = job("--multirun", *words, "batch_size=1,2", "hydra.sweep.dir=grid", status=1)
    assert "batch_size=1 leaves some of the 2 processes without work" in out
    assert job.result("grid/0001")["status"] == "completed"
    assert not (job.folder / "grid" / "0000" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("parallel=ddp",), "parallel.strategy=ddp is for the processes of torchrun: torchrun --nproc-per-node=N"),
        (("parallel=fsdp", "optimizer=adafactor"), "optimizer=adafactor needs the whole model in one process"),
        (("parallel=fsdp", "trainer.diagnostics=true"), "trainer.diagnostics needs the whole model in one process"),
        (("parallel=ddp", "parallel.cpu_offload=true"), "parallel.cpu_offload is for parallel=fsdp"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(job: Job, words: tuple[str, ...], message: str) -> None:
    done = job.alone(*TINY, "data.path=text.txt", "trainer.max_steps=1", *words, "hydra.run.dir=refused", status=2)
    assert message in done.stderr
    assert not (job.folder / "refused").exists()


def test_processes_without_a_way_to_share_a_run_are_refused(job: Job) -> None:
    out = job(*TINY, "data.path=text.txt", "trainer.max_steps=1", "hydra.run.dir=refused", status=1)
    assert "2 processes were started for a run of one: add parallel=ddp or parallel=fsdp" in out
    assert not (job.folder / "refused").exists()


def test_a_launcher_of_many_runs_is_refused(job: Job) -> None:
    words = (*TINY, "data.path=text.txt", "trainer.max_steps=1", "hydra.sweep.dir=joblib", "parallel=ddp")
    out = job("--multirun", *words, "seed=1,2", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", status=1)
    assert "the processes of torchrun make one run at a time: leave hydra/launcher as it is" in out


def test_help_needs_no_second_process(job: Job) -> None:
    assert "lmtrain" in job("--help")


@pytest.mark.parametrize("of", [1, 2, 3, 8])
def test_shares_of_a_batch_hold_every_target_once(of: int) -> None:
    rows = torch.arange(7).unsqueeze(1).expand(7, 4)
    batch = Batch(inputs=rows.clone(), targets=rows.clone(), num_targets=28, documents=rows.clone())
    shares = [batch.share(number, of) for number in range(of)]
    assert {share.num_sequences for share in shares} == {-(-7 // of)}
    counted = torch.cat([share.targets for share in shares])
    assert counted[counted != IGNORED].tolist() == rows.flatten().tolist()
    assert all(share.num_targets == 28 for share in shares)
    assert all(torch.equal(share.inputs, share.documents) for share in shares if share.documents is not None)
