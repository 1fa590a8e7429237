"""Data sets of the Hub, folders laid out like them, and addresses: what is fetched when, what is said offline."""

from __future__ import annotations

import functools
import gzip
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from lmtrain.config import compose
from lmtrain.config.schema import FilesConfig, RecordsConfig, TextConfig
from lmtrain.data.sources import open_corpus
from lmtrain.errors import DataError
from tests.command_line import ROOT, CommandLine
from tests.fake_hub import COMMIT, NAME, serving

CARD = """\
---
license: mit
configs:
- config_name: short
  data_files:
  - {split: train, path: short/train-*}
  - {split: validation, path: short/validation-*}
  - {split: unsupervised, path: short/more-*}
- config_name: chosen
  data_files:
  - {split: train_sft, path: short/train-*}
  - {split: train_gen, path: short/more-*}
---
# Stories
"""

# Opens corpora in a process of its own, as the libraries read the address of the Hub when they are imported.
OPEN = """
import json, sys
from itertools import islice
from lmtrain.config.schema import ChatConfig, PairsConfig, RecordsConfig, TextConfig
from lmtrain.data.sources import open_corpus
from lmtrain.errors import DataError
from pathlib import Path

for kind, settings, splits, first_only in json.load(sys.stdin):
    try:
        corpus = open_corpus(globals()[kind](seq_len=8, **settings))
        found = {split: list(islice(corpus.records(split), first_only or None)) for split in splits}
        sums = corpus.fingerprint(Path(settings["cache_dir"]))
        print(json.dumps({"name": corpus.name, "splits": corpus.splits, "records": found, "fingerprint": sums}))
    except DataError as error:
        print(json.dumps(str(error)))
"""

Case = tuple[str, dict[str, Any], list[str], bool]


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    """A folder laid out as on the Hub."""
    folder = tmp_path / "stories"
    (folder / "short").mkdir(parents=True)
    for name, texts in {
        "train-00000-of-00002": ["one", ""],
        "train-00001-of-00002": ["two"],
        "validation-00000-of-00001": ["three"],
        "more-00000-of-00001": ["four"],
    }.items():
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / "short" / f"{name}.parquet")
    (folder / "README.md").write_text(CARD)
    return folder


def opened(tmp_path: Path, hub: str, *cases: Case) -> list[Any]:
    """What comes of opening corpora with this address of the Hub: their content, or messages."""
    environment = CommandLine(tmp_path).environment(HF_ENDPOINT=hub, HF_HOME=str(tmp_path / "hf"), NO_PROXY="*")
    done = subprocess.run(
        [sys.executable, "-c", OPEN], input=json.dumps(cases), capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def case(tmp_path: Path, config: str | None = None, *splits: str, first_only: bool = False, **settings: object) -> Case:
    """Records of the data set."""
    always = {"path": None, "hub": NAME, "hub_config": config, "cache_dir": str(tmp_path / "cache")}
    return "RecordsConfig", always | settings, list(splits), first_only


def test_a_name_of_the_hub(tmp_path: Path, stories: Path) -> None:
    with serving(stories) as hub:
        (first,) = opened(tmp_path, hub.url, case(tmp_path, "short", "train", first_only=True))
        # The first record asks for no other file than its own.
        assert hub.fetched == ["README.md", "short/train-00000-of-00002.parquet"]
        (whole,) = opened(tmp_path, hub.url, case(tmp_path, "short", "train", "val"))
        assert hub.fetched[2:] == ["short/train-00001-of-00002.parquet", "short/validation-00000-of-00001.parquet"]
        assert first["name"] == f"{NAME} short at {COMMIT[:7]}"
        assert first["splits"] == ["train", "val"]
        assert first["records"] == {"train": ["one"]}
        assert whole["records"] == {"train": ["one", "two"], "val": ["three"]}
        assert whole["fingerprint"] == first["fingerprint"]
    # What was resolved and fetched before needs no network, what was not says what to do.
    again, other = opened(
        tmp_path, hub.url, case(tmp_path, "short", "train", "val"), case(tmp_path, "chosen", hub_split="train_sft")
    )
    assert again == whole
    assert other.startswith(f"cannot reach the Hugging Face Hub for {NAME} (")
    assert other.endswith("; without network, name a local copy by data.path=PATH")


def test_what_the_hub_does_not_have(tmp_path: Path, stories: Path) -> None:
    with serving(stories) as hub:
        nobody, revision, config, split, text = opened(
            tmp_path,
            hub.url,
            case(tmp_path, hub="nobody/nothing"),
            case(tmp_path, "short", revision="v7"),
            case(tmp_path),
            case(tmp_path, "chosen"),
            ("TextConfig", case(tmp_path, "short")[1], [], False),
        )
    assert (
        nobody == "the Hugging Face Hub has no data set nobody/nothing (data.hub), or it asks to log in: hf auth login"
    )
    assert revision == f"{NAME} has no revision of this name (data.revision) on the Hugging Face Hub"
    assert config.startswith(f"{NAME}: Config name is missing")
    assert "['short', 'chosen']" in config
    assert split == f"{NAME} has the splits train_sft, train_gen: choose one to train on by data.hub_split=NAME"
    assert text.startswith(
        f"{NAME} short at {COMMIT[:7]} holds records (parquet), not text files: read it by data=jsonl"
    )


def records(path: Path | str, tmp_path: Path, **settings: object) -> dict[str, list[object]]:
    corpus = open_corpus(RecordsConfig(seq_len=8, path=str(path), cache_dir=str(tmp_path / "cache"), **settings))  # type: ignore[arg-type]
    return {split: list(corpus.records(split)) for split in corpus.splits}


def test_a_folder_laid_out_like_the_hub(tmp_path: Path, stories: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert records(stories, tmp_path, hub_config="short") == {"train": ["one", "two"], "val": ["three"]}
    assert "not used are the splits unsupervised" in caplog.text
    assert records(stories, tmp_path, hub_config="chosen", hub_split="train_gen") == {"train": ["four"]}
    with pytest.raises(
        DataError, match=r"BuilderConfig 'long' not found\. Available: \['short', .* \(data\.hub_config"
    ):
        records(stories, tmp_path, hub_config="long")
    with pytest.raises(DataError, match=r"train_sft, train_gen: choose one to train on by data\.hub_split=NAME"):
        records(stories, tmp_path, hub_config="chosen")
    # A file that is added is found: notes hold for a folder that did not change.
    pyarrow.parquet.write_table(pyarrow.table({"text": ["new"]}), stories / "short" / "train-00002-of-00003.parquet")
    assert records(stories, tmp_path, hub_config="short")["train"] == ["one", "two", "new"]


@pytest.mark.parametrize(
    ("name", "content", "settings"),
    [
        ("a.csv", "id;text\n1;word\n", 'sep: ";"'),
        ("a.json", json.dumps({"rows": [{"text": "word"}]}), "field: rows"),  # only the library's builder knows it
    ],
)
def test_a_card_says_how_files_are_read(tmp_path: Path, name: str, content: str, settings: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / name).write_text(content)
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: default\n  {settings}\n  data_files: {name}\n---\n"
    )
    assert records(folder, tmp_path) == {"train": ["word"]}


def test_a_copy_without_its_card(tmp_path: Path, stories: Path) -> None:
    (stories / "README.md").unlink()
    assert records(stories, tmp_path, hub_config="short") == {"train": ["one", "two"], "val": ["three"]}
    assert records(stories / "short", tmp_path, hub_config="short") == {"train": ["one", "two"], "val": ["three"]}
    with pytest.raises(DataError, match=r"data\.hub_split=x: data\.path=.* is no data set with splits of its own"):
        records(stories, tmp_path, hub_split="x")


# ------------------------------------------------------------------------------------------------ addresses


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    """The address of `tmp_path / "site"`."""
    folder = tmp_path / "site"
    folder.mkdir()
    handler = functools.partial(QuietHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves files."""

    def log_message(self, *words: object) -> None:
        pass


def test_an_address_is_fetched_once(tmp_path: Path, site: str) -> None:
    config = TextConfig(seq_len=8, path=f"{site}/a%20b.txt.gz?download=1", cache_dir=str(tmp_path / "cache"))
    (tmp_path / "site" / "a b.txt.gz").write_bytes(gzip.compress(b"some text"))
    corpus = open_corpus(config)
    assert list(corpus.records()) == ["some text"]
    fingerprint = corpus.fingerprint(tmp_path / "cache")
    (tmp_path / "site" / "a b.txt.gz").unlink()
    assert list(open_corpus(config).records()) == ["some text"]
    assert open_corpus(config).fingerprint(tmp_path / "cache") == fingerprint


def test_an_address_that_gives_nothing_leaves_nothing_behind(tmp_path: Path, site: str) -> None:
    for address in (f"{site}/nothing.txt", "http://127.0.0.1:9/a.txt", "nonsense://a/b.txt"):
        corpus = open_corpus(TextConfig(seq_len=8, path=address, cache_dir=str(tmp_path / "cache")))
        with pytest.raises(DataError) as caught:
            list(corpus.records())
        assert str(caught.value).startswith(f"cannot fetch {address} (")
        assert str(caught.value).endswith("); without network, name a local copy by data.path=PATH")
        assert "\n" not in str(caught.value)
        assert not list((tmp_path / "cache").rglob("*"))


def test_a_download_that_cannot_be_kept(tmp_path: Path, site: str) -> None:
    (tmp_path / "cache").write_text("in the way")
    corpus = open_corpus(TextConfig(seq_len=8, path=f"{site}/a.txt", cache_dir=str(tmp_path / "cache")))
    with pytest.raises(
        DataError, match=r"cannot keep .*; name another folder by data\.cache_dir=\.\.\. or LMTRAIN_CACHE"
    ):
        list(corpus.records())


def test_a_file_address_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("here")
    assert list(open_corpus(TextConfig(seq_len=8, path=f"file://{tmp_path}/a.txt")).records()) == ["here"]


# -------------------------------------------------------------------------------------------------- presets


LOCAL_COPIES = {
    "wikitext2": ("wikitext-2-raw-v1/train-00000-of-00001.parquet", {"text": ["A line."]}),
    "wikitext103": ("wikitext-103-raw-v1/train-00000-of-00001.parquet", {"text": ["A line."]}),
    "tinystories": ("data/train-00000-of-00001.parquet", {"text": ["A story."]}),
    "fineweb_edu": ("sample-10BT/000_00000.parquet", {"text": ["A page."], "id": ["x"]}),
    "squad": (
        "plain_text/train-00000-of-00001.parquet",
        {"context": ["It is."], "question": ["Is it?"], "answers": [{"text": ["It is"], "answer_start": [0]}]},
    ),
    "multi30k": ("train.jsonl", {"en": ["Yes."], "de": ["Ja."]}),
}


def preset(name: str, *words: str) -> FilesConfig:
    config = compose.compose_config([f"data={name}", *words]).data
    assert isinstance(config, FilesConfig)
    return config


@pytest.mark.parametrize("name", LOCAL_COPIES)
def test_a_preset_takes_a_local_copy(tmp_path: Path, name: str) -> None:
    place, columns = LOCAL_COPIES[name]
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table(columns)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    else:
        pyarrow.parquet.write_table(table, path)
    (record,) = open_corpus(preset(name, f"data.path={tmp_path}")).records()
    values = [value for column in columns.values() for value in column]
    assert record in values if isinstance(record, str) else record


def test_presets_that_fetch_say_what_to_do_without_network(tmp_path: Path) -> None:
    options = compose.config_dir() / "data"
    assert {path.stem for path in options.glob("*.yaml") if "\nhub:" in path.read_text()} == set(LOCAL_COPIES)
    settings = [preset(name) for name in LOCAL_COPIES]
    cases: list[Case] = [
        case(tmp_path, config.hub_config, hub=config.hub, revision=config.revision) for config in settings
    ]
    for config, message in zip(settings, opened(tmp_path, "http://127.0.0.1:9", *cases), strict=True):
        assert message.startswith(f"cannot reach the Hugging Face Hub for {config.hub} (")
        assert message.endswith("; without network, name a local copy by data.path=PATH")
    assert not (tmp_path / "cache").exists()
    shakespeare = preset("shakespeare")
    assert str(shakespeare.path).startswith("https://")
    assert shakespeare.split == "tail"
