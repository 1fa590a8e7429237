"""The Llama and GPT-2 formats against tables written by hand; writing and reading, to the bit; bad folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import EXPORTABLE, GPT2, LLAMA, random_decoder
from safetensors.torch import load_file, save_file
from torch import Tensor

from lmtrain.config.compose import compose_config
from lmtrain.config.schema import DecoderConfig
from lmtrain.errors import CheckpointError, ConfigError
from lmtrain.model.decoder import Decoder
from lmtrain.model.huggingface.choice import nearest_format
from lmtrain.model.huggingface.reading import is_model_folder, open_model
from lmtrain.model.huggingface.writing import write_model

SMALL = {"d_model": 8, "num_layers": 1, "num_heads": 4, "d_ff": 12}


def write(folder: Path, model: Decoder, dtype: torch.dtype = torch.float32) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder, model, nearest_format(model.config), dtype=dtype, end_ids=[96])
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content


def change_config(folder: Path, **values: Any) -> None:
    (folder / "config.json").write_text(json.dumps(config_of(folder) | values))


def weights_of(model: Decoder) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


# ------------------------------------------------------------------------------------------- by hand


def test_llama_by_hand(tmp_path: Path) -> None:
    settings = {**SMALL, "num_kv_heads": 2, "bias": True, "tie_embeddings": False, "norm_eps": 1e-5}
    model = random_decoder(settings, seq_len=16, vocab_size=11)
    found = load_file(write(tmp_path, model) / "model.safetensors")
    layer = "model.layers.0."
    assert shapes(found) == {
        "model.embed_tokens.weight": (11, 8),
        layer + "input_layernorm.weight": (8,),
        layer + "self_attn.q_proj.weight": (8, 8),
        layer + "self_attn.q_proj.bias": (8,),
        layer + "self_attn.k_proj.weight": (4, 8),
        layer + "self_attn.k_proj.bias": (4,),
        layer + "self_attn.v_proj.weight": (4, 8),
        layer + "self_attn.v_proj.bias": (4,),
        layer + "self_attn.o_proj.weight": (8, 8),
        layer + "self_attn.o_proj.bias": (8,),
        layer + "post_attention_layernorm.weight": (8,),
        layer + "mlp.gate_proj.weight": (12, 8),
        layer + "mlp.gate_proj.bias": (12,),
        layer + "mlp.up_proj.weight": (12, 8),
        layer + "mlp.up_proj.bias": (12,),
        layer + "mlp.down_proj.weight": (8, 12),
        layer + "mlp.down_proj.bias": (8,),
        "model.norm.weight": (8,),
        "lm_head.weight": (11, 8),
    }
    ours = weights_of(model)
    qkv, up = ours["blocks.0.attention.qkv.weight"], ours["blocks.0.feed_forward.up.bias"]
    assert torch.equal(found[layer + "self_attn.q_proj.weight"], qkv[:8])
    assert torch.equal(found[layer + "self_attn.k_proj.weight"], qkv[8:12])
    assert torch.equal(found[layer + "self_attn.v_proj.weight"], qkv[12:])
    assert torch.equal(found[layer + "mlp.gate_proj.bias"], up[:12])
    assert torch.equal(found[layer + "mlp.up_proj.bias"], up[12:])
    assert torch.equal(found[layer + "input_layernorm.weight"], ours["blocks.0.attention_norm.weight"])
    assert torch.equal(found["lm_head.weight"], ours["head.weight"])

    assert config_of(tmp_path) == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 11,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 16,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "mlp_bias": True,
        "attention_dropout": 0.0,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": None,
        "eos_token_id": 96,
        "pad_token_id": None,
        "dtype": "float32",
        "torch_dtype": "float32",
    }


def test_gpt2_by_hand(tmp_path: Path) -> None:
    model = random_decoder({**GPT2, **SMALL}, seq_len=16, vocab_size=11)
    found = load_file(write(tmp_path, model) / "model.safetensors")
    layer = "transformer.h.0."
    assert shapes(found) == {
        "transformer.wte.weight": (11, 8),
        "transformer.wpe.weight": (16, 8),
        layer + "ln_1.weight": (8,),
        layer + "ln_1.bias": (8,),
        layer + "attn.c_attn.weight": (8, 24),
        layer + "attn.c_attn.bias": (24,),
        layer + "attn.c_proj.weight": (8, 8),
        layer + "attn.c_proj.bias": (8,),
        layer + "ln_2.weight": (8,),
        layer + "ln_2.bias": (8,),
        layer + "mlp.c_fc.weight": (8, 12),
        layer + "mlp.c_fc.bias": (12,),
        layer + "mlp.c_proj.weight": (12, 8),
        layer + "mlp.c_proj.bias": (8,),
        "transformer.ln_f.weight": (8,),
        "transformer.ln_f.bias": (8,),
    }
    ours = weights_of(model)
    assert torch.equal(found[layer + "attn.c_attn.weight"], ours["blocks.0.attention.qkv.weight"].t())
    assert torch.equal(found[layer + "mlp.c_fc.bias"], ours["blocks.0.feed_forward.up.bias"])
    assert torch.equal(found["transformer.ln_f.bias"], ours["norm.bias"])
    described = {key: config_of(tmp_path)[key] for key in ("n_embd", "n_inner", "n_layer", "n_head", "n_positions")}
    assert described == {"n_embd": 8, "n_inner": 12, "n_layer": 1, "n_head": 4, "n_positions": 16}
    assert config_of(tmp_path)["activation_function"] == "gelu_new"


def test_a_gpt2_without_biases_has_zeros(tmp_path: Path) -> None:
    model = random_decoder({**GPT2, **SMALL, "bias": False})
    biases = {name: t for name, t in load_file(write(tmp_path, model) / "model.safetensors").items() if "bias" in name}
    assert len(biases) == 7
    assert not any(bias.any() for bias in biases.values())


@pytest.mark.parametrize(
    ("settings", "rope"),
    [
        ({"rope_theta": 5e5}, {"rope_theta": 5e5, "rope_scaling": None}),
        (
            {"rope_scaling": "linear", "rope_factor": 4},
            {"rope_theta": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        ),
        # Heads of 8 channels: 10,000 · 3^(8/6)
        ({"rope_scaling": "ntk", "rope_factor": 3.0}, {"rope_theta": pytest.approx(43267.4871), "rope_scaling": None}),
    ],
)
def test_rotary_settings(tmp_path: Path, settings: dict[str, Any], rope: dict[str, Any]) -> None:
    """`rope_parameters` says the same in one place."""
    found = config_of(write(tmp_path, random_decoder({**LLAMA, **settings})))
    assert {key: found[key] for key in ("rope_theta", "rope_scaling")} == rope
    scaling = rope["rope_scaling"] or {"rope_type": "default"}
    assert found["rope_parameters"] == scaling | {"rope_theta": rope["rope_theta"]}


# ------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("name", EXPORTABLE)
def test_what_was_written_is_read_to_the_bit(tmp_path: Path, name: str) -> None:
    model = random_decoder(EXPORTABLE[name])
    stored = open_model(write(tmp_path, model))
    assert (stored.described.vocab_size, stored.described.seq_len) == (model.vocab_size, model.seq_len)
    assert stored.has_biases == model.config.bias
    read = random_decoder(EXPORTABLE[name])
    with torch.no_grad():
        for parameter in read.parameters():
            parameter.fill_(7)
    stored.load_into(read)
    assert all(torch.equal(a, b) for a, b in zip(read.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("name", EXPORTABLE)
def test_settings_come_back(tmp_path: Path, name: str) -> None:
    """Those that the architecture depends on; ntk comes back as the larger base that it is."""
    config = random_decoder(EXPORTABLE[name]).config
    found = open_model(write(tmp_path, random_decoder(EXPORTABLE[name]))).described.config
    for key in (
        *("d_model", "num_layers", "num_heads", "kv_heads", "hidden_dim", "norm", "norm_eps", "position", "activation"),
        *("tie_embeddings", "qk_norm", "rope_base"),
    ):
        assert getattr(found, key) == getattr(config, key), key
    assert (found.rope_scaling, found.rope_factor) == (
        ("linear", 3.0) if config.rope_scaling == "linear" else ("none", 1.0)
    )


def test_smaller_number_formats(tmp_path: Path) -> None:
    model = random_decoder(LLAMA)
    for dtype, name in ((torch.bfloat16, "bfloat16"), (torch.float16, "float16")):
        folder = write(tmp_path / name, model, dtype)
        assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {dtype}
        assert config_of(folder)["dtype"] == name
        read = random_decoder(LLAMA)
        open_model(folder).load_into(read)
        assert torch.equal(read.embedding.weight, model.embedding.weight.to(dtype).float())


def test_a_weight_too_large_for_the_number_format(tmp_path: Path) -> None:
    model = random_decoder(LLAMA)
    with torch.no_grad():
        model.embedding.weight[3, 4] = -70000.0
    with pytest.raises(ConfigError, match="a weight of 70000 does not fit into float16; take --dtype bf16 or fp32"):
        write(tmp_path, model, torch.float16)
    write(tmp_path, model, torch.bfloat16)


def test_files_can_be_read_by_others(tmp_path: Path) -> None:
    folder = write(tmp_path, random_decoder(LLAMA))
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


# ------------------------------------------------------------------------------------------- what is not held


OBSTACLES: list[tuple[dict[str, Any], str, dict[str, object]]] = [
    (LLAMA, "Llama", {}),
    (GPT2, "GPT-2", {}),
    ({**LLAMA, "activation": "relu2", "qk_norm": True}, "Llama", {"activation": "swiglu", "qk_norm": False}),
    ({**LLAMA, "norm": "layernorm"}, "Llama", {"norm": "rmsnorm"}),
    ({**LLAMA, "position": "none", "logit_softcap": 30.0}, "Llama", {"position": "rotary", "logit_softcap": None}),
    ({**LLAMA, "position": "sinusoidal"}, "Llama", {"position": "rotary"}),
    ({**LLAMA, "sliding_window": 4}, "Llama", {"sliding_window": None}),
    ({**GPT2, "num_kv_heads": 2}, "GPT-2", {"num_kv_heads": None}),
    ({**GPT2, "activation": "swiglu", "qk_norm": True}, "GPT-2", {"activation": "gelu_tanh", "qk_norm": False}),
    ({**GPT2, "position": "rotary"}, "GPT-2", {"position": "learned"}),
]


@pytest.mark.parametrize(("settings", "name", "instead"), OBSTACLES)
def test_the_format_with_the_fewest_obstacles(settings: dict[str, Any], name: str, instead: dict[str, object]) -> None:
    config = DecoderConfig(**settings)
    format = nearest_format(config)
    assert (format.name, format.obstacles(config)) == (name, instead)


@pytest.mark.parametrize("preset", ["nano", "tiny", "small", "medium", "research", "gpt2"])
def test_presets(preset: str) -> None:
    """As docs/huggingface.md says."""
    words = {"nano": ["model.activation=swiglu", "model.qk_norm=false"]}.get(preset, [])
    config = compose_config([f"model={preset}", *words]).model
    assert isinstance(config, DecoderConfig)
    format = nearest_format(config)
    assert (format.name, format.obstacles(config)) == ("GPT-2" if preset == "gpt2" else "Llama", {})


# ------------------------------------------------------------------------------------------- folders of others


def reread(folder: Path, settings: dict[str, Any]) -> Decoder:
    model = random_decoder(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    open_model(folder).load_into(model)
    return model


def test_shards_with_an_index(tmp_path: Path) -> None:
    model = random_decoder(LLAMA)
    folder = write(tmp_path, model)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    read = reread(folder, LLAMA)
    assert all(torch.equal(a, b) for a, b in zip(read.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize(("settings", "prefix"), [(LLAMA, "model."), (GPT2, "transformer.")])
def test_names_without_prefix_and_tensors_nobody_needs(tmp_path: Path, settings: dict[str, Any], prefix: str) -> None:
    """As in folders saved without the output matrix, and those of old versions."""
    model = random_decoder(settings)
    folder = write(tmp_path, model)
    tensors = {name.removeprefix(prefix): t for name, t in load_file(folder / "model.safetensors").items()}
    old = {"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    if settings is GPT2:
        old = {"h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    save_file(tensors | old, folder / "model.safetensors")
    read = reread(folder, settings)
    assert all(torch.equal(a, b) for a, b in zip(read.parameters(), model.parameters(), strict=True))


def test_defaults_of_a_short_config(tmp_path: Path) -> None:
    """What the first Llama and GPT-2 folders leave out."""
    folder = write(tmp_path, random_decoder(LLAMA))
    keep = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    (folder / "config.json").write_text(json.dumps({key: config_of(folder)[key] for key in keep}))
    config = open_model(folder).described.config
    assert (config.kv_heads, config.norm_eps, config.activation, config.rope_theta) == (4, 1e-6, "swiglu", 10000.0)
    assert not config.tie_embeddings
    folder = write(tmp_path, random_decoder(GPT2))
    few = ("model_type", "vocab_size", "n_embd", "n_layer", "n_head")
    (folder / "config.json").write_text(json.dumps({key: config_of(folder)[key] for key in few}))
    described = open_model(folder).described
    assert (described.config.norm_eps, described.config.activation, described.seq_len) == (1e-5, "gelu_tanh", 1024)
    assert described.config.tie_embeddings


def test_rotary_words_of_older_versions(tmp_path: Path) -> None:
    folder = write(tmp_path, random_decoder(LLAMA))
    change_config(folder, rope_parameters=None, rope_theta=7.0, rope_scaling={"type": "linear", "factor": 2.0})
    config = open_model(folder).described.config
    assert (config.rope_theta, config.rope_scaling, config.rope_factor) == (7.0, "linear", 2.0)


def test_biases_that_are_missing_are_zero(tmp_path: Path) -> None:
    """As in folders with attention_bias alone."""
    settings = {**LLAMA, "bias": True}
    model = random_decoder(settings)
    folder = write(tmp_path, model)
    whole = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in whole.items() if ".mlp." not in name or "bias" not in name}
    save_file(kept, folder / "model.safetensors")
    read = weights_of(reread(folder, settings))
    for name, weight in weights_of(model).items():
        assert torch.equal(read[name], torch.zeros_like(weight) if "forward" in name and "bias" in name else weight)


def test_some_of_the_biases_of_a_weight_are_too_few(tmp_path: Path) -> None:
    settings = {**LLAMA, "bias": True}
    folder = write(tmp_path, random_decoder(settings))
    name = "model.layers.0.self_attn.k_proj.bias"
    edit_tensors(lambda tensors: tensors.pop(name))(folder)
    with pytest.raises(CheckpointError, match=f"there is no weight {name}"):
        reread(folder, settings)


Damage = Callable[[Path], object]


def edit(**values: Any) -> Damage:
    return lambda folder: change_config(folder, **values)


def edit_tensors(change: Callable[[dict[str, Tensor]], object]) -> Damage:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


NORM = "model.norm.weight"
GATE = "model.layers.1.mlp.gate_proj.weight"
BAD: dict[str, tuple[Damage, str]] = {
    "another architecture": (edit(model_type="mistral"), "a model of type mistral; llama and gpt2 are read"),
    "no architecture": (edit(model_type=None), "of type None"),
    "quantized": (edit(quantization_config={"bits": 4}), "quantized"),
    "another activation": (edit(hidden_act="relu"), "config.json has hidden_act=relu,"),
    "wide heads": (edit(head_dim=16, hidden_act="relu"), "has hidden_act=relu, head_dim=16,"),
    "other rotations": (edit(rope_scaling={"rope_type": "llama3", "factor": 8}), "rope_type=llama3"),
    "partial rotations": (edit(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}), "factor=0.5"),
    "config.json: no width": (edit(hidden_size=None), "config.json is damaged"),
    "config.json: a text": (edit(hidden_size="32"), "config.json is damaged"),
    "config.json: no heads": (edit(num_attention_heads=0), "config.json is damaged"),
    "config.json: heads": (edit(num_attention_heads=5, head_dim=None), "must be divisible by model.num_heads"),
    "config.json: no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json is damaged"),
    "config.json: a list": (lambda folder: (folder / "config.json").write_text("[]"), "it holds no object"),
    "no weights": (only_pickle, "has no model.safetensors"),
    "truncated": (truncate, "model.safetensors is damaged"),
    "a weight missing": (edit_tensors(lambda tensors: tensors.pop(NORM)), f"there is no weight {NORM}"),
    "a weight of another shape": (
        edit_tensors(lambda tensors: tensors.update({GATE: torch.zeros(2, 2)})),
        f"{GATE} has the shape [2, 2], where its config.json says [128, 32]",
    ),
    "a weight too many": (
        edit_tensors(lambda tensors: tensors.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)})),
        "no Llama model here has: model.layers.0.self_attn.q_norm.weight",
    ),
    "an output matrix of its own": (
        edit_tensors(lambda tensors: tensors.update({"lm_head.weight": torch.ones(97, 32)})),
        "lm_head.weight is not the embedding",
    ),
    "an index beyond the folder": (
        lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x"}}'),
        "index.json is damaged",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_folders_that_are_refused(tmp_path: Path, case: str) -> None:
    folder = write(tmp_path, random_decoder(LLAMA))
    assert is_model_folder(folder)
    damage, message = BAD[case]
    damage(folder)
    with pytest.raises(CheckpointError) as refused:
        open_model(folder).load_into(random_decoder(LLAMA))
    assert message in str(refused.value)
    assert str(folder) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("value", [{"scale_attn_weights": False}, {"add_cross_attention": True}])
def test_gpt2_folders_that_are_refused(tmp_path: Path, value: dict[str, bool]) -> None:
    folder = write(tmp_path, random_decoder(GPT2))
    change_config(folder, **value)
    with pytest.raises(CheckpointError, match=next(iter(value))):
        open_model(folder)
