"""Other people's training of the same shape: transformers' Trainer, and litgpt's model in the loop litgpt has for it.

Each is built from our model's settings and told apart by what it cannot be given: that is said in `differs`.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmtrain.config.schema import DecoderConfig


@dataclass(frozen=True, kw_only=True)
class Work:
    """What all of them train: a shape, batches of an array of tokens, a place and a number format."""

    model: DecoderConfig
    vocab_size: int
    seq_len: int
    batch_size: int
    tokens: NDArray[np.unsignedinteger[Any]]  # mapped from a file
    device: torch.device
    format: torch.dtype

    @property
    def like_gpt2(self) -> bool:
        """Otherwise like Llama."""
        return self.model.norm == "layernorm"

    @property
    def gated_width(self) -> int:
        """Hidden width of a gated feed-forward with as many parameters, to the next 8."""
        return self.model.hidden_dim if self.model.gated else round(self.model.hidden_dim * 2 / 3 / 8) * 8

    def window(self, number: int) -> Tensor:
        """Tokens of one sequence and the one after it, (T + 1,)."""
        start = number * 7919 % (len(self.tokens) - self.seq_len - 1)
        return torch.from_numpy(self.tokens[start : start + self.seq_len + 1].astype(np.int64))


class _Windows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows as the Trainer takes them: labels are the inputs, which the model shifts."""

    def __init__(self, work: Work, size: int) -> None:
        self.work, self.size = work, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        ids = self.work.window(number)[:-1]
        return {"input_ids": ids, "labels": ids}


def transformers_model(work: Work) -> Any:
    """A GPT-2 or a Llama of that shape, with random weights."""
    import transformers

    model = work.model
    if work.like_gpt2:
        config: Any = transformers.GPT2Config(
            vocab_size=work.vocab_size,
            n_positions=work.seq_len,
            n_embd=model.d_model,
            n_layer=model.num_layers,
            n_head=model.num_heads,
            n_inner=model.hidden_dim,
            activation_function="gelu" if model.activation == "gelu" else "gelu_pytorch_tanh",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
        )
    else:
        config = transformers.LlamaConfig(
            vocab_size=work.vocab_size,
            max_position_embeddings=work.seq_len,
            hidden_size=model.d_model,
            intermediate_size=work.gated_width,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_heads,
            num_key_value_heads=model.kv_heads,
            tie_word_embeddings=model.tie_embeddings,
            use_cache=False,
        )
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


class TransformersTrainer:
    """`transformers.Trainer` with its own defaults, but for logging and saving, which are off."""

    differs = "a model of transformers; the targets of a row are one fewer; its lr falls linearly"

    def __init__(self, work: Work) -> None:
        torch.manual_seed(0)
        self.work = work
        self.model = transformers_model(work)

    def train(self, *, block: int, blocks: int, after_block: Callable[[], None]) -> None:
        """Make that many blocks of steps; `after_block` is called after each."""
        import transformers

        class AfterBlocks(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
            def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
                if state.global_step % block == 0:
                    after_block()

        transformers.logging.set_verbosity_error()
        with tempfile.TemporaryDirectory() as folder:
            arguments = transformers.TrainingArguments(
                output_dir=folder,
                max_steps=block * blocks,
                per_device_train_batch_size=self.work.batch_size,
                learning_rate=1e-3,
                max_grad_norm=1.0,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=self.work.device.type == "cpu",
                bf16=self.work.format == torch.bfloat16,
                dataloader_pin_memory=self.work.device.type == "cuda",
            )
            rows = _Windows(self.work, block * blocks * self.work.batch_size)
            transformers.Trainer(
                model=self.model, args=arguments, train_dataset=rows, callbacks=[AfterBlocks()]
            ).train()


class LitgptLoop:
    """litgpt's GPT under Lightning Fabric, step by step as its `pretrain` does them, without logging."""

    differs = "a model of litgpt, whose positions are rotary; head and embedding are tied here, as ours are"

    def __init__(self, work: Work) -> None:
        logging.getLogger("lightning").setLevel(logging.ERROR)
        from lightning.fabric import Fabric

        torch.manual_seed(0)
        self.work, self.step = work, 0
        self.fabric = Fabric(
            accelerator=work.device.type,
            devices=1,
            precision="bf16-mixed" if work.format == torch.bfloat16 else "32-true",
        )
        self.model = litgpt_model(work)
        self.wrapped = self.fabric.setup_module(self.model)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        self.optimizer = self.fabric.setup_optimizers(optimizer)

    def __call__(self, num_steps: int) -> None:
        from litgpt.utils import chunked_cross_entropy

        size = self.work.batch_size
        for _ in range(num_steps):
            for group in self.optimizer.param_groups:
                group["lr"] = 1e-3
            numbers = range(self.step * size, (self.step + 1) * size)
            rows = torch.stack([self.work.window(number) for number in numbers]).to(self.work.device)
            inputs, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
            loss = chunked_cross_entropy(self.wrapped(inputs), targets)
            self.fabric.backward(loss)
            self.fabric.clip_gradients(self.wrapped, self.optimizer, max_norm=1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1


def litgpt_model(work: Work) -> Any:
    """Like GPT-NeoX or like Llama."""
    from litgpt.config import Config
    from litgpt.model import GPT

    model = work.model
    kind: dict[str, Any] = (
        {"norm_class_name": "LayerNorm", "mlp_class_name": "GptNeoxMLP", "parallel_residual": False}
        if work.like_gpt2
        else {
            "norm_class_name": "RMSNorm",
            "mlp_class_name": "LLaMAMLP",
            "parallel_residual": False,
            "rotary_percentage": 1.0,
        }
    )
    made = GPT(
        Config(
            block_size=work.seq_len,
            n_layer=model.num_layers,
            n_embd=model.d_model,
            n_head=model.num_heads,
            n_query_groups=model.kv_heads,
            intermediate_size=model.hidden_dim if work.like_gpt2 else work.gated_width,
            padded_vocab_size=work.vocab_size,
            vocab_size=work.vocab_size,
            bias=model.bias,
            attn_bias=model.bias,
            gelu_approximate="tanh" if model.activation == "gelu_tanh" else "none",
            **kind,
        )
    )
    made.apply(made._init_weights)
    if model.tie_embeddings:
        made.lm_head.weight = made.transformer.wte.weight
    return made
