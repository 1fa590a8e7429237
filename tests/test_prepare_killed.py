"""Builds by several processes that are killed: nothing outlives them, and the next one goes on where they were."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from lmtrain.config.schema import PairsConfig, SentencePieceBpeConfig
from lmtrain.data import build
from lmtrain.data import entry as entry_module
from lmtrain.data import prepare as prepare_module
from lmtrain.errors import DataError

pytestmark = pytest.mark.multiprocess

# Prints what a build did, as JSON: whether it built, its folder, and how many batches it encoded of how many.
SCRIPT = textwrap.dedent("""
    import json, os, signal, sys
    import psutil
    from lmtrain.config.schema import PairsConfig, SentencePieceBpeConfig
    from lmtrain.data import build, entry as entry_module, prepare as prepare_module

    path, cache, dies_at = sys.argv[1], sys.argv[2], int(sys.argv[3])
    entry_module.ALONE_CHARS = 0
    build.available_cores = lambda: 2
    build.BATCH_CHARS, build.BATCHES_PER_MARK = 20_000, 4
    count, encode = 0, build._encoded

    def counting(*arguments, **settings):
        global count
        for item in encode(*arguments, **settings):
            count += 1
            yield item
            if count == dies_at:
                workers = [child.pid for child in psutil.Process().children(recursive=True)]
                print(json.dumps(workers), flush=True)
                os.kill(os.getpid(), signal.SIGKILL)

    build._encoded = counting
    data = PairsConfig(seq_len=8, path=path, source="q", target="a", cache_dir=cache)
    prepared = prepare_module.prepare(data, SentencePieceBpeConfig(vocab_size=300))
    (source,) = prepared.sources
    print(json.dumps({"built": source.built, "folder": str(source.folder), "batches": count}))
""")

NEVER = 0
LINES = 20_000
WHOLE_BATCHES = 40


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 0.9 MB of pairs."""
    generator = random.Random(0)
    words = "alpha beta gamma delta epsilon zeta eta theta".split()  # noqa: SIM905
    path = tmp_path_factory.mktemp("pairs") / "pairs.tsv"
    rows = (" ".join(generator.choices(words, k=4)) + f"\tthe answer {number} é" for number in range(LINES))
    path.write_text("q\ta\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def whole(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a build that nobody disturbed."""
    answer = finish(start(pairs, tmp_path_factory.mktemp("whole")))
    assert answer["batches"] == WHOLE_BATCHES
    return contents(answer["folder"])


def start(path: Path, cache: Path, dies_at: int = NEVER) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, str(path), str(cache), str(dies_at)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> dict[str, object]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    answer: dict[str, object] = json.loads(out)
    return answer


def contents(folder: object) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(str(folder)).iterdir()}


def killed_at(path: Path, cache: Path, batches: int) -> list[int]:
    """Build until so many batches are encoded, then die; returns the processes that were there for it."""
    with start(path, cache, batches) as process:
        assert process.stdout is not None
        workers: list[int] = json.loads(process.stdout.readline())
        process.wait(timeout=60)
        assert process.returncode == -signal.SIGKILL
        return workers


def alive(pids: list[int]) -> list[int]:
    def runs(pid: int) -> bool:
        try:
            return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False

    return [pid for pid in pids if runs(pid)]


def test_a_killed_build_takes_its_processes_along(tmp_path: Path, pairs: Path) -> None:
    workers = killed_at(pairs, tmp_path, 20)
    assert len(workers) >= 2
    deadline = time.monotonic() + 10
    while left := alive(workers):
        assert time.monotonic() < deadline, f"{len(left)} of {len(workers)} processes outlive the build by 10 s"
        time.sleep(0.05)


def test_the_next_build_goes_on(tmp_path: Path, pairs: Path, whole: dict[str, bytes]) -> None:
    killed_at(pairs, tmp_path, 30)
    answer = finish(start(pairs, tmp_path))
    assert answer["built"]
    assert isinstance(answer["batches"], int)
    assert WHOLE_BATCHES - 30 <= answer["batches"] <= WHOLE_BATCHES - 20
    assert contents(answer["folder"]) == whole


def test_two_go_on_at_once(tmp_path: Path, pairs: Path, whole: dict[str, bytes]) -> None:
    killed_at(pairs, tmp_path, 15)
    answers = [finish(process) for process in [start(pairs, tmp_path), start(pairs, tmp_path)]]
    assert sorted(bool(answer["built"]) for answer in answers) == [False, True]
    assert contents(answers[0]["folder"]) == whole
    assert sorted(path.suffix for path in (tmp_path / "prepared").iterdir()) == ["", ".lock"]


def is_worker(process: psutil.Process) -> bool:
    """Whether it tokenises for a build; one that has ended, and nobody has waited for, does not."""
    try:
        return "LokyProcess" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


def test_a_process_that_is_killed_ends_the_build_in_a_line(
    tmp_path: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entry_module, "ALONE_CHARS", 0)
    monkeypatch.setattr(build, "available_cores", lambda: 2)
    monkeypatch.setattr(build, "BATCH_CHARS", 20_000)

    def kill_one(message: str) -> None:
        if message.startswith("tokenising"):
            for worker in list(filter(is_worker, psutil.Process().children()))[:1]:
                worker.kill()

    data = PairsConfig(seq_len=8, path=str(pairs), source="q", target="a", cache_dir=str(tmp_path))
    with pytest.raises(DataError, match="a process that tokenises was killed"):
        prepare_module.prepare(data, SentencePieceBpeConfig(vocab_size=300), kill_one)
    assert [path.suffix for path in (tmp_path / "prepared").iterdir()] == [".lock"]
    assert prepare_module.prepare(data, SentencePieceBpeConfig(vocab_size=300)).sources[0].built


@pytest.mark.slow
def test_kills_at_any_moment(tmp_path: Path, pairs: Path, whole: dict[str, bytes]) -> None:
    generator = random.Random(0)
    begin = time.monotonic()
    finish(start(pairs, tmp_path / "timed"))
    life = time.monotonic() - begin
    for number in range(4):
        cache = tmp_path / str(number)
        for _ in range(4):
            with start(pairs, cache) as process:
                time.sleep(generator.uniform(0, life))
                process.kill()
        answer = finish(start(pairs, cache))
        assert contents(answer["folder"]) == whole
        assert sorted(path.suffix for path in (cache / "prepared").iterdir()) == ["", ".lock"]
