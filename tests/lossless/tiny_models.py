# SPDX-License-Identifier: Apache-2.0
"""Targets and heads with random weights, small enough to start an engine in a second.

Weights are drawn wide, so that the target's choices are clear and its text depends on
the whole context: a wrong position, mask or KV entry changes the text within tokens.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from vllm_clover2.model import Clover2Config, Clover2Model
from vllm_clover2.model.weights import save_head

REPO = Path(__file__).parents[2]
BOS, EOS = 1, 2
CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


# Settings of training runs that take seconds.
TINY_TRAINING: dict[str, Any] = {
    "num_layers": 1,
    "num_draft_steps": 3,
    "max_tokens": 256,
    "learning_rate": 3e-3,
    "warmup_steps": 2,
    "value_weight": 1.0,
    "validation_fraction": 0.2,
    "precision": "fp32",
}


@dataclass(frozen=True)
class TinyModel:
    """Shape of a target; head_dim 32 is the smallest that vLLM's CPU attention has."""

    vocab_size: int = 512
    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    seed: int = 0
    init: float = 0.3  # standard deviation of the weights


def save_target(
    folder: Path,
    shape: TinyModel,
    lm_head: torch.Tensor | None = None,  # [vocab, hidden]
) -> Path:
    """Write a Llama with a byte-level tokenizer to ``folder``, in float32."""
    torch.manual_seed(shape.seed)
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=2 * shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=BOS,
        eos_token_id=EOS,
        initializer_range=shape.init,
    )
    model = LlamaForCausalLM(config).float()
    if lm_head is not None:
        model.lm_head.weight.data.copy_(lm_head)
    model.save_pretrained(folder)
    if shape.vocab_size >= 300:  # all bytes and a few merges
        _tokenizer(shape.vocab_size).save_pretrained(folder)
    return folder


def other_config(changes: dict[str, Any]) -> PreTrainedConfig:
    """Of a model of another architecture; ``changes`` have its ``model_type``."""
    shape = TinyModel()
    sizes = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": 2 * shape.hidden_size,
        "num_hidden_layers": 3,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "initializer_range": shape.init,
        "max_position_embeddings": 1024,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    return AutoConfig.for_model(**(sizes | changes))


def save_other_target(
    folder: Path,
    changes: dict[str, Any],  # of its config, ``model_type`` among them
    embeddings: float = 1.0,  # factor, for those that are tied and scaled up
) -> Path:
    """Write a model of another architecture to ``folder``, without a tokenizer."""
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(other_config(changes)).float()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(embeddings)
    model.save_pretrained(folder)
    return folder


def save_predictable_target(
    folder: Path, hidden_size: int, num_heads: int, num_kv_heads: int
) -> Path:
    """Write a Llama of 48 tokens whose text can be learned from a hundred answers.

    Strong embeddings make it sharp, and mostly a bigram model. It has no tokenizer.
    """
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_(std=0.5)
        model.get_output_embeddings().weight.normal_(std=0.5)
    model.save_pretrained(folder)
    return folder


def save_random_head(
    folder: Path,
    shape: TinyModel,
    dtype: torch.dtype = torch.float32,
    **changes: object,
) -> Path:
    """Write a head for ``shape`` to ``folder``; ``changes`` override its config."""
    torch.manual_seed(shape.seed + 1000)
    sizes = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": 2 * shape.hidden_size,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "num_hidden_layers": 2,
    }
    model = Clover2Model(Clover2Config(**(sizes | changes)))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            is_norm = name.endswith("norm.weight")
            weight.normal_(1.0 if is_norm else 0.0, 0.1)
    ids = model.draft_vocab_ids
    if ids is not None:
        ids.copy_(torch.randperm(shape.vocab_size)[: len(ids)].sort().values)
    save_head(model, folder, dtype)
    return folder


def _tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the licence's text; reads and writes any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([(REPO / "LICENSE").read_text()], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
    )
