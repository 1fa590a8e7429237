"""Settings: what composes, what is refused and in which words, and that a saved config is the same one again."""

from __future__ import annotations

import dataclasses
import functools
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import hydra
import pytest
import yaml
from command_line import ROOT, CommandLine
from hydra.core.hydra_config import HydraConfig
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from lmtrain.config import compose
from lmtrain.config.explain import COMPOSITION_ERRORS, explain
from lmtrain.config.saved import PRIMARY_CONFIG, SAVED_CONFIG, dump_yaml, to_yaml
from lmtrain.config.schema import SCHEMAS, ExperimentConfig
from lmtrain.errors import ConfigError

CONF = compose.config_dir()
OPTIONS = [(group, option) for group in SCHEMAS for option in compose.group_options(group)]
EXPERIMENTS = compose.group_options("experiment")
PATH = "data.path=input.txt"


def in_hydra(config_dir: Path | None) -> Any:
    """Hydra as the command line sets it up, while entered; `config_dir` comes before the shipped configs."""
    compose.register()
    if config_dir is None:
        return hydra.initialize(config_path=None)
    return hydra.initialize_config_dir(str(config_dir))


def parse(*words: str, config_dir: Path | None = None, config_name: str = PRIMARY_CONFIG) -> ExperimentConfig:
    with in_hydra(config_dir):
        return compose.parse_config(hydra.compose(config_name, list(words)))


@functools.cache
def composed(*choices: str) -> DictConfig:
    with in_hydra(None):
        return hydra.compose(PRIMARY_CONFIG, list(choices))


def refusal(*words: str, config_dir: Path | None = None) -> str:
    """What the user is told about these words."""
    with pytest.raises((ConfigError, *COMPOSITION_ERRORS)) as caught:
        parse(*words, config_dir=config_dir)
    return explain(caught.value)


def comparable(config: ExperimentConfig) -> ExperimentConfig:
    """Without what is the invocation's own: the sweep folder, named after the time, and what it resumes."""
    return dataclasses.replace(config, sweep=parsed_default().sweep, resume=None)


@functools.cache
def parsed_default() -> ExperimentConfig:
    return parse()


# --------------------------------------------------------------------------------------- what is shipped


def test_every_group_has_a_schema_and_options() -> None:
    folders = {path.name for path in CONF.iterdir() if path.is_dir()}
    assert folders == {*SCHEMAS, "experiment", "hydra"}
    assert {group for group, _ in OPTIONS} == set(SCHEMAS)


VALUES = {"path": "input.txt", "source": "de", "target": "en", "vocab_size": "300"}
"""Of the settings that some options leave to the user."""


def needed(group: str, option: str) -> list[str]:
    """The words an option cannot do without."""
    if option == "mixture":
        return ["+data@data.sources.a=python_stdlib", "+data@data.sources.b=text", "data.sources.b.path=input.txt"]
    if option.startswith("seq2seq"):
        return ["data=multi30k"]
    missing = OmegaConf.missing_keys(composed(f"{group}={option}")[group])
    return [f"{key}={VALUES[key.rpartition('.')[2]]}" for key in sorted(missing)]


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=lambda name: str(name))
def test_every_option_composes(group: str, option: str) -> None:
    part = getattr(parse(f"{group}={option}", *needed(group, option)), group)
    assert type(part) in SCHEMAS[group].values()
    assert (CONF / group / f"{option}.yaml").read_text().startswith("#"), "say what the option is for"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_and_says_how_to_run_it(name: str) -> None:
    config = parse(f"experiment={name}", PATH) if is_text(name) else parse(f"experiment={name}")
    assert config != parsed_default()
    header = (CONF / "experiment" / f"{name}.yaml").read_text().split("\ndefaults:")[0]
    assert f"experiment={name}" in header


def is_text(experiment: str) -> bool:
    return "override /data: text" in (CONF / "experiment" / f"{experiment}.yaml").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=seq2seq_nano"], "trained on pairs of a source and a target: choose data=multi30k"),
        (["model=seq2seq_nano", "data=multi30k", "data.targets=all"], "with data.targets=target"),
        (["model=seq2seq_nano", "data=multi30k", "data.batches=packed"], "needs data.batches=padded, got packed"),
        (["model.attention=flex", "dropout=0.1"], "model.attention=flex cannot drop out attention"),
        (["model.rope_scaling=ntk", "model.position=learned"], "is for model.position=rotary, got learned"),
        (["model.rope_factor=2"], "model.rope_factor=2.0 needs model.rope_scaling=linear or ntk"),
        (["model.rope_scaling=linear"], "model.rope_scaling=linear needs model.rope_factor above 1, got 1.0"),
        (
            ["model.rope_scaling=ntk", "model.rope_factor=2", "model.d_model=8", "model.num_heads=4"],
            "needs heads wider than 2",
        ),
        (["model.position=sinusoidal", "model.d_model=9", "model.num_heads=3"], "needs an even model.d_model, got 9"),
        (["model.sliding_window=0"], "model.sliding_window must be positive"),
        (["model.logit_softcap=-1"], "model.logit_softcap must be positive"),
    ],
)
def test_architectures_keep_their_rules(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse(*words)


def test_root_keys_and_their_defaults() -> None:
    config = parsed_default()
    assert (config.seed, config.device, config.objective) == (0, "auto", "val/loss")
    assert (config.resume, config.init_from) == (None, None)
    assert 0 <= config.dropout <= 0.1
    assert config.lr > 0
    assert config.batch_size > 0


def test_a_root_key_lives_in_one_place() -> None:
    roots = {field.name for field in dataclasses.fields(ExperimentConfig)}
    for options in SCHEMAS.values():
        for schema in options.values():
            assert not roots & {field.name for field in dataclasses.fields(schema)}


def test_an_option_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/mine.yaml").write_text(
        "defaults: [_decoder, _self_]\nd_model: 48\nnum_layers: 1\nnum_heads: 2\n"
    )
    assert vars(parse("model=mine", "model.num_heads=3", config_dir=tmp_path).model)["d_model"] == 48
    assert "did you mean mine?" in refusal("model=mien", config_dir=tmp_path)
    assert "did you mean model.d_model?" in refusal("model=mine", "model.d_modl=3", config_dir=tmp_path)
    (tmp_path / "model/untyped.yaml").write_text("d_model: 48\n")
    assert "defaults: [SCHEMA, _self_], SCHEMA being _decoder" in refusal("model=untyped", config_dir=tmp_path)


# ------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("words", "message"),
    [
        # model
        ("model.d_model=30", "model.d_model (30) must be divisible by model.num_heads (4)"),
        ("model.num_kv_heads=3", "model.num_heads (4) must be divisible by model.num_kv_heads (3)"),
        ("model.d_model=12", "model.position=rotary needs an even head width, got d_model / num_heads = 3"),
        ("model.d_model=-8", "model.d_model must be positive, got -8"),
        ("model.num_layers=0", "model.num_layers must be positive, got 0"),
        ("model.num_heads=0", "model.num_heads must be positive, got 0"),
        ("model.num_kv_heads=-1", "model.num_kv_heads must be positive, got -1"),
        ("model.d_ff=0", "model.d_ff must be positive, got 0"),
        ("model.norm_eps=0", "model.norm_eps must be positive, got 0.0"),
        ("model.rope_theta=-1", "model.rope_theta must be positive, got -1.0"),
        ("model.init_std=0", "model.init_std must be positive, got 0.0"),
        # data and tokenizer
        ("data.seq_len=0", "data.seq_len must be positive, got 0"),
        ("data.max_documents=0", "data.max_documents must be positive, got 0"),
        ("data.min_chars=-1", "data.min_chars must not be negative, got -1"),
        ("data.val_fraction=0", "data.val_fraction must lie between 0 and 1, got 0.0"),
        ("data.val_fraction=1", "data.val_fraction must lie between 0 and 1, got 1.0"),
        ("tokenizer.vocab_size=100", "tokenizer.vocab_size must be at least 300 (256 of them are bytes), got 100"),
        ("tokenizer.character_coverage=1.5", "tokenizer.character_coverage must lie between 0 and 1, got 1.5"),
        ("tokenizer.sample_bytes=0", "tokenizer.sample_bytes must be positive, got 0"),
        # optimizer and schedule
        ("optimizer.weight_decay=-0.1", "optimizer.weight_decay must not be negative, got -0.1"),
        ("optimizer.betas=[0.9,1]", "optimizer.betas[1] must be at least 0 and below 1, got 1.0"),
        ("optimizer.eps=0", "optimizer.eps must be positive, got 0.0"),
        ("optimizer.momentum=1", "optimizer.momentum must be at least 0 and below 1, got 1.0"),
        ("optimizer.ns_steps=0", "optimizer.ns_steps must be positive, got 0"),
        ("schedule.warmup_steps=-1", "schedule.warmup_steps must not be negative, got -1"),
        ("schedule.warmup_fraction=1", "schedule.warmup_fraction must be at least 0 and below 1, got 1.0"),
        ("schedule.final_lr_fraction=2", "schedule.final_lr_fraction must lie between 0 and 1, got 2.0"),
        ("schedule.decay_fraction=1.1", "schedule.decay_fraction must lie between 0 and 1, got 1.1"),
        ("optimizer=adam optimizer.eps=0", "optimizer.eps must be positive, got 0.0"),
        ("optimizer=sgd optimizer.momentum=1", "optimizer.momentum must be at least 0 and below 1, got 1.0"),
        ("optimizer=sgd optimizer.momentum=0 optimizer.nesterov=true", "nesterov needs an optimizer.momentum above 0"),
        ("optimizer=lion optimizer.betas=[1,0.9]", "optimizer.betas[0] must be at least 0 and below 1, got 1.0"),
        ("optimizer=adafactor optimizer.beta2_decay=0.8", "optimizer.beta2_decay must not be positive, got 0.8"),
        ("optimizer=adafactor optimizer.clip_threshold=0.5", "optimizer.clip_threshold must be at least 1, got 0.5"),
        ("optimizer=adafactor optimizer.min_scale=0", "optimizer.min_scale must be positive, got 0.0"),
        ("schedule=cosine_restarts schedule.cycles=0", "schedule.cycles must be positive, got 0"),
        ("schedule=cosine_restarts schedule.cycle_mult=0", "schedule.cycle_mult must be positive, got 0.0"),
        (
            "schedule=inverse_sqrt schedule.min_lr_fraction=2",
            "schedule.min_lr_fraction must lie between 0 and 1, got 2.0",
        ),
        ("schedule=plateau schedule.factor=1", "schedule.factor must lie between 0 and 1, got 1.0"),
        ("schedule=plateau schedule.patience=0", "schedule.patience must be positive, got 0"),
        ("schedule=plateau trainer.patience=2", "trainer.patience (2) must be above schedule.patience (2)"),
        # trainer and the rest
        ("trainer.batch_size_warmup_steps=0", "trainer.batch_size_warmup_steps must be positive, got 0"),
        (
            "batch_size=4 trainer.batch_size_warmup_steps=9 trainer.initial_batch_size=8",
            "trainer.initial_batch_size (8) must not exceed batch_size (4)",
        ),
        (
            "data.seq_len=96 trainer.seq_len_warmup_steps=9 trainer.initial_seq_len=32",
            "data.seq_len (96) must be trainer.initial_seq_len (32) times a power of two",
        ),
        ("trainer.label_smoothing=1", "trainer.label_smoothing must be at least 0 and below 1, got 1.0"),
        ("trainer.z_loss=-1", "trainer.z_loss must not be negative, got -1.0"),
        ("trainer.max_tokens=5", "exactly one of trainer.max_steps, trainer.max_epochs and trainer.max_tokens"),
        ("trainer.max_tokens=5", "got max_steps=1000, max_tokens=5; set the others to null"),
        ("trainer.max_steps=null", "must be set, got none"),
        ("trainer.max_steps=0", "trainer.max_steps must be positive, got 0"),
        ("trainer.grad_clip=0", "trainer.grad_clip must be positive, got 0.0"),
        ("trainer.eval_every=0", "trainer.eval_every must be positive, got 0"),
        ("trainer.eval_batches=0", "trainer.eval_batches must be positive, got 0"),
        ("trainer.log_every=0", "trainer.log_every must be positive, got 0"),
        ("trainer.checkpoint_every=0", "trainer.checkpoint_every must be positive, got 0"),
        ("trainer.keep_checkpoints=0", "trainer.keep_checkpoints must be positive, got 0"),
        ("trainer.patience=0", "trainer.patience must be positive, got 0"),
        ("trainer.micro_batch_size=0", "trainer.micro_batch_size must be positive, got 0"),
        ("trainer.min_delta=-1", "trainer.min_delta must not be negative, got -1.0"),
        ("trainer.sample_tokens=-1", "trainer.sample_tokens must not be negative, got -1"),
        ("batch_size=4 trainer.micro_batch_size=8", "trainer.micro_batch_size (8) must not exceed batch_size (4)"),
        ("parallel.num_threads=0", "parallel.num_threads must be positive, got 0"),
        ("tracking.close_timeout=0", "tracking.close_timeout must be positive, got 0.0"),
        ("lr=0", "lr must be positive, got 0.0"),
        ("batch_size=-1", "batch_size must be positive, got -1"),
        ("dropout=1", "dropout must be at least 0 and below 1, got 1.0"),
        ("seed=-1", "seed must be at least 0 and below 2**63, got -1"),
    ],
)
def test_a_broken_rule_is_told_with_the_value(words: str, message: str) -> None:
    choices = [word for word in words.split() if word.split("=")[0] in SCHEMAS]
    values = [word for word in words.split() if word not in choices]
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        compose.parse_config(OmegaConf.merge(composed(*choices), OmegaConf.from_dotlist(values)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        # nearest names
        ("lrr=1", "there is no setting 'lrr'; did you mean lr?"),
        ("modle=small", "there is no setting 'modle'; did you mean model?"),
        ("experimnt=own_text", "there is no setting 'experimnt'; did you mean experiment?"),
        ("model=smal", "model has no option 'smal'; did you mean small?"),
        ("experiment=shakespear", "experiment has no option 'shakespear'; did you mean shakespeare_char?"),
        ("precision=int3", "precision has no option 'int3'; "),
        ("model.d_modl=3", "there is no setting 'model.d_modl'; did you mean model.d_model?"),
        ("trainer.max_step=3", "there is no setting 'trainer.max_step'; did you mean trainer.max_steps?"),
        ("hydra.rnu.dir=x", "there is no setting 'hydra.rnu'; did you mean hydra.run?"),
        ("hydra/launcher=jobib", "hydra/launcher has no option 'jobib'; did you mean joblib?"),
        # keys of another option
        ("optimizer=adamw optimizer.momentum=0.9", "there is no setting 'optimizer.momentum'"),
        ("schedule=cosine schedule.decay_fraction=0.1", "there is no setting 'schedule.decay_fraction'"),
        ("tokenizer=byte tokenizer.vocab_size=500", "there is no setting 'tokenizer.vocab_size'"),
        ("tracking=none tracking.uri=x", "tracking.uri is the address of MLflow: add tracking.mlflow=true"),
        # added and removed keys
        ("+key=1", "there is no setting 'key'; +key cannot add one"),
        ("+model.key=1", "there is no setting 'model.key'; +model.key cannot add one"),
        ("~lr", "lr must be set: ~lr cannot remove it"),
        ("~model.d_model", "model.d_model must be set: ~model.d_model cannot remove it"),
        ("~model", "model must be set"),
        # types
        ("lr=abc", "lr: Value 'abc' of type 'str' could not be converted to Float"),
        ("batch_size=1.5", "batch_size: Value '1.5' of type 'float' could not be converted to Integer"),
        ("model.d_model=wide", "model.d_model: Value 'wide' of type 'str' could not be converted to Integer"),
        ("model.norm=batchnorm", "model.norm: Invalid value 'batchnorm', expected one of ['rmsnorm', 'layernorm']"),
        ("device=gpu", "device: Invalid value 'gpu', expected one of ['auto', 'cpu', 'cuda', 'mps']"),
        ("optimizer.betas=[0.9]", "optimizer.betas: "),
        ("lr=null", "lr: "),
        ("sweep.name=''", "sweep.name must not be empty"),
        ("trainer.micro_batch_size=some", "trainer.micro_batch_size must be a whole number or auto, got 'some'"),
        # words
        ("data=text", "data.path must be set: add data.path=VALUE"),
        ("word", "cannot read the argument 'word': write key=value, or the name of a command"),
        ("lr=[1", "cannot read the argument 'lr=[1'"),
        ("lr=1,2", "lr=1,2 names several values: add --multirun for a run of each; a list is written key=[a,b]"),
    ],
)
def test_a_wrong_word_is_told_with_what_would_be_right(word: str, message: str) -> None:
    told = refusal(*word.split())
    assert told.startswith(message)
    assert len(told.splitlines()) <= 2


def test_an_unreadable_config_file_is_told_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/broken.yaml").write_text("d_model: 48\nbetas: [1, 2\nd_ff: 3\n")
    with pytest.raises(Exception, match=r"broken\.yaml") as caught:
        parse("model=broken", config_dir=tmp_path)
    assert explain(caught.value).startswith(f"cannot read {tmp_path}/model/broken.yaml, line ")


# --------------------------------------------------------------------------- config.yaml of a run folder

texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1).filter(lambda t: t != "???")
misleading = st.sampled_from(["1e3", "0x1f", "null", "yes", "~", "1_000", ".5", "${lr}", "\\${lr}", "a\\\\${b}"])


@settings(deadline=None, max_examples=20, phases=[Phase.generate])  # making an example smaller takes minutes
@given(data=st.data())
def test_a_saved_config_composes_to_the_same_settings(data: st.DataObject, tmp_path_factory: Any) -> None:
    options = {group: data.draw(st.sampled_from(compose.group_options(group))) for group in SCHEMAS}
    if options["model"].startswith("seq2seq"):
        options["data"] = "multi30k"
    if options["parallel"] == "fsdp" and (options["optimizer"] == "adafactor" or options["precision"] == "fp16"):
        options["parallel"] = "ddp"  # those need the whole model in one process
    words = [f"{group}={option}" for group, option in options.items()]
    config = parse(*words, *(word for group, option in options.items() for word in needed(group, option)))
    if "data=text" in words:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=data.draw(texts | misleading)))
    config = dataclasses.replace(
        config,
        lr=data.draw(st.floats(1e-12, 1e3)),
        dropout=data.draw(st.floats(0, 1, exclude_max=True)),
        batch_size=data.draw(st.integers(1, 10**6)),
        seed=data.draw(st.integers(0, 2**63 - 1)),
        init_from=data.draw(st.none() | texts | misleading),
        trainer=dataclasses.replace(config.trainer, micro_batch_size=data.draw(st.sampled_from(["auto", 1]))),
    )
    folder = tmp_path_factory.mktemp("run")
    (folder / f"{SAVED_CONFIG}.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert comparable(parse(config_dir=folder, config_name=SAVED_CONFIG)) == comparable(config)


@pytest.mark.parametrize("option", ["_mlflow", "_none"])
def test_a_config_saved_before_several_trackers_could_be_chosen_still_composes(tmp_path: Path, option: str) -> None:
    saved = yaml.safe_load(to_yaml(parse("lr=0.003")))
    saved["defaults"] = [
        {"override /tracking": option} if entry == {"override /tracking": "_tracking"} else entry
        for entry in saved["defaults"]
    ]
    saved["tracking"] = {"uri": "sqlite:///a.db", "experiment": "x", "run_name": None, "close_timeout": 60.0}
    if option == "_none":
        saved["tracking"] = {}
    (tmp_path / f"{SAVED_CONFIG}.yaml").write_text(dump_yaml(saved))
    config = parse(config_dir=tmp_path, config_name=SAVED_CONFIG)
    assert (config.lr, config.tracking.mlflow) == (0.003, option == "_mlflow")
    assert config.tracking.uri == ("sqlite:///a.db" if config.tracking.mlflow else None)


def test_a_saved_config_takes_overrides(tmp_path: Path) -> None:
    (tmp_path / f"{SAVED_CONFIG}.yaml").write_text(to_yaml(parse("model=tiny", "lr=0.003")))
    again = parse("model.d_ff=96", "seed=7", config_dir=tmp_path, config_name=SAVED_CONFIG)
    expected = parse("model=tiny", "lr=0.003", "model.d_ff=96", "seed=7")
    assert comparable(again) == comparable(expected)


# ------------------------------------------------------------------------------------ what is not default


def changed(*words: str) -> dict[str, Any]:
    with in_hydra(None):
        composed = hydra.compose(PRIMARY_CONFIG, list(words), return_hydra_config=True)
        HydraConfig.instance().set_config(composed)
        choices = {str(group): str(option) for group, option in composed.hydra.runtime.choices.items()}
        job = compose.Job(run_dir=Path("run"), sweep_dir=None, overrides=words, choices=choices, moved_from=None)
        return compose.changed_settings(settings_of(composed), job)


def settings_of(composed: DictConfig) -> DictConfig:
    return OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])


def test_what_is_the_default_is_not_reported() -> None:
    assert changed() == {}
    assert changed("model=nano", "tracking=[mlflow,tensorboard]", "tracking.close_timeout=3", "sweep.name=x") == {}


def test_what_a_choice_brings_is_not_reported_as_changed() -> None:
    reported = changed("model=tiny", "lr=0.5", "optimizer=adamw", "sweep.name=mine")
    assert reported == {"lr": 0.5, "model": "tiny", "optimizer": "adamw"}


def test_what_an_experiment_changes_is_reported() -> None:
    reported = changed("experiment=shakespeare_char", "data.path=x.txt", "model.d_ff=64")
    assert reported["data.path"] == "x.txt"
    assert reported["model.d_ff"] == 64
    assert reported["data.seq_len"] == 64
    assert "model.d_model" not in reported


# ------------------------------------------------------------------------------------ installed from a wheel


@pytest.mark.slow
def test_an_installed_wheel_brings_its_configs(lmtrain: CommandLine) -> None:
    pytest.importorskip("hatchling", reason="builds the wheel without a network")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(lmtrain.folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = lmtrain.folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(lmtrain.folder / "site")
        packed = {name for name in archive.namelist() if name.startswith("lmtrain/conf/")}
    shipped = {str(path.relative_to(CONF)) for path in (*CONF.rglob("*.yaml"), *CONF.glob("experiment/*.yaml"))}
    assert packed == {f"lmtrain/conf/{name}" for name in shipped}

    site = str(lmtrain.folder / "site")
    found = subprocess.run(
        [sys.executable, "-c", "import lmtrain.config.compose as c; print(c.config_dir())"],
        cwd=lmtrain.folder,
        env=lmtrain.environment(PYTHONPATH=site),
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == f"{site}/lmtrain/conf"
    words = ("experiment=shakespeare_char", "--cfg", "job")
    assert lmtrain(*words, PYTHONPATH=site).stdout == lmtrain(*words).stdout
