# SPDX-License-Identifier: Apache-2.0
"""The text models of vLLM that a head can be trained for, and what is served of each.

``test_families.py`` tries all of it; docs/support.md has it as a table.

    python tests/lossless/families.py     # writes that table anew
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SUPPORT = Path(__file__).parents[2] / "docs/support.md"
WINDOW = 24
SLIDING, FULL = "sliding_attention", "full_attention"
# With the two layers of a head, three of each kind: vLLM makes two groups of them.
ALTERNATING: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": [SLIDING, SLIDING, FULL, SLIDING],
    "sliding_window": WINDOW,
}
FEW_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
EXPERTS = FEW_EXPERTS | {"moe_intermediate_size": 64}
ONE_GROUP = {"disable_hybrid_kv_cache_manager": True}

SINKS = "attention sinks"
MLA = "MLA targets"
HYBRID = "hybrid or attention-free targets"


@dataclass(frozen=True)
class Family:
    """Targets of one kind, and why something is refused: words of the error."""

    title: str
    names: str  # of the classes in vLLM's registry, without "ForCausalLM"
    model_type: str
    config: dict[str, Any] = field(default_factory=dict)  # changes to a tiny one
    no_tree: str | None = None
    no_chain: str | None = None
    embeddings: float = 1.0  # see ``save_other_target``
    options: dict[str, Any] = field(default_factory=dict)  # of the engine

    @property
    def classes(self) -> list[str]:
        """Of vLLM's registry."""
        return [f"{name}ForCausalLM" for name in self.names.split()]

    def refusal(self, mode: str) -> str | None:
        """Why ``mode``, "tree", "chain" or "none" (no head), is refused, if it is.

        Without a head trees are tried, or chains where those are refused.
        """
        return (self.no_tree or self.no_chain) if mode == "tree" else self.no_chain

    def row(self) -> str:
        """Of the table."""
        cells = {
            mode: f"no: {reason}" if (reason := self.refusal(mode)) else "yes"
            for mode in ("tree", "chain", "none")
        }
        if self.no_chain:
            cells["chain"] = cells["none"] = "no"
        if cells["none"] == "yes" != cells["tree"]:
            cells["none"] = "as a chain"
        names = ", ".join(self.names.split())
        return f"| {' | '.join([self.title, names, *cells.values()])} |\n"


FAMILIES = [
    Family("Llama 2, 3", "Llama LLaMA InternLM3 IQuestCoder TeleChat3", "llama"),
    Family(
        "Mistral, Ministral 3", "Mistral Ministral3", "ministral3", {"head_dim": 32}
    ),
    Family("Phi 3, 4", "Phi3", "phi3", {"original_max_position_embeddings": 1024}),
    Family("ERNIE 4.5", "Ernie4_5", "ernie4_5", {"head_dim": 32}),
    Family(
        "Granite 3, 4",
        "Granite",
        "granite",
        {
            "embedding_multiplier": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
            "logits_scaling": 4.0,
        },
    ),
    Family(
        "Granite with windows",
        "GraniteSWA",
        "granite_swa",
        ALTERNATING,
        no_tree=SINKS,
    ),
    Family("Qwen 2, 2.5", "Qwen2", "qwen2"),
    Family("Qwen 3", "Qwen3", "qwen3", {"head_dim": 32}),
    Family("Qwen 3 MoE", "Qwen3Moe", "qwen3_moe", EXPERTS | {"head_dim": 32}),
    Family(
        "gpt-oss",
        "GptOss",
        "gpt_oss",
        {
            "num_hidden_layers": 2,
            "head_dim": 32,
            "sliding_window": WINDOW,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
        no_tree=SINKS,
        options=ONE_GROUP,
    ),
    Family("Apertus", "Apertus", "apertus"),
    Family(
        "MiniCPM 3",
        "MiniCPM3",
        "minicpm3",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16,
            "v_head_dim": 16,
            "scale_emb": 2,
            "dim_model_base": 64,
        },
    ),
    Family(
        "AFMoE (Trinity)",
        "Afmoe",
        "afmoe",
        ALTERNATING
        | EXPERTS
        | {
            "head_dim": 32,
            "num_shared_experts": 1,
            # Read by vLLM, and in the checkpoints' own config.
            "n_group": 1,
            "topk_group": 1,
            "score_func": "sigmoid",
            "route_norm": True,
        },
    ),
    Family(
        "Cohere 2 MoE",
        "Cohere2Moe",
        "cohere2_moe",
        ALTERNATING
        | FEW_EXPERTS
        | {
            "head_dim": 32,
            "intermediate_size": 64,
            "tie_word_embeddings": True,
        },
    ),
    Family(
        "Llama 4",
        "Llama4",
        "llama4_text",
        {
            "num_hidden_layers": 4,
            "head_dim": 32,
            "intermediate_size": 64,
            "intermediate_size_mlp": 128,
            "num_local_experts": 4,
            "attention_chunk_size": 32,
        },
        no_tree="layers of type ChunkedLocalAttention",
    ),
    Family(
        "Gemma 4",
        "Gemma4",
        "gemma4_text",
        {
            "num_hidden_layers": 4,
            "layer_types": [SLIDING, SLIDING, SLIDING, FULL],
            "sliding_window": WINDOW,
            "head_dim": 32,
            "global_head_dim": 32,
            "hidden_size_per_layer_input": 0,
            "tie_word_embeddings": True,
        },
        embeddings=0.05,
    ),
    Family(
        "Gemma 4 E2B, E4B",
        "Gemma4",
        "gemma4_text",
        {
            "num_hidden_layers": 4,
            "layer_types": [SLIDING, FULL, SLIDING, FULL],
            "num_kv_shared_layers": 2,
            "sliding_window": WINDOW,
            "head_dim": 32,
            "global_head_dim": 32,
            "hidden_size_per_layer_input": 32,
            "vocab_size_per_layer_input": 512,
            "tie_word_embeddings": True,
        },
        no_tree="KV shared between layers",
        embeddings=0.05,
        options=ONE_GROUP,
    ),
    Family(
        "DeepSeek V2, V3, R1",
        "DeepseekV2 DeepseekV3 MistralLarge3",
        "deepseek_v3",
        no_chain=MLA,
    ),
    Family(
        "DeepSeek V3.2, GLM 5",
        "DeepseekV32 GlmMoeDsa",
        "deepseek_v32",
        no_chain=MLA,
    ),
    Family("Qwen 3 Next", "Qwen3Next", "qwen3_next", no_chain=HYBRID),
    Family("Nemotron H", "NemotronH NemotronHPuzzle", "nemotron_h", no_chain=HYBRID),
    # By way of vLLM's "Transformers modeling backend".
    Family("SmolLM 3", "SmolLM3", "smollm3"),
    Family("OLMo 1, 2", "Olmo Olmo2", "olmo2"),
    Family("OLMo 3", "Olmo3", "olmo3", ALTERNATING),
    Family("FlexOlmo", "FlexOlmo", "flex_olmo", FEW_EXPERTS),
    Family("StarCoder 2", "Starcoder2", "starcoder2"),
    Family(
        "GPTBigCode (StarCoder)",
        "GPTBigCode",
        "gpt_bigcode",
        {"num_key_value_heads": 1},
    ),
    Family("GPT-NeoX, Pythia", "GPTNeoX", "gpt_neox", {"num_key_value_heads": 4}),
    Family("Phi 1, 2", "Phi", "phi"),
    Family("Seed-OSS", "SeedOss", "seed_oss", {"head_dim": 32}),
    Family("GLM 4", "Glm", "glm", {"head_dim": 32}),
    Family("Hunyuan", "HunYuanDenseV1", "hunyuan_v1_dense", {"head_dim": 32}),
    Family(
        "Hunyuan MoE",
        "HunYuanMoEV1",
        "hunyuan_v1_moe",
        {"head_dim": 32, "num_experts": 4, "moe_topk": 2, "intermediate_size": 64},
    ),
    Family("Arcee", "Arcee", "arcee", {"head_dim": 32}),
    Family("CWM", "Cwm", "cwm", ALTERNATING | {"head_dim": 32}),
    Family("Jais 2", "Jais2", "jais2", {"head_dim": 32}),
    Family("Mellum", "Mellum", "mellum", ALTERNATING | EXPERTS | {"head_dim": 32}),
    Family(
        "VaultGemma",
        "VaultGemma",
        "vaultgemma",
        ALTERNATING
        | {"head_dim": 32, "query_pre_attn_scalar": 32, "tie_word_embeddings": True},
        embeddings=0.05,
    ),
]

UNTESTED = {
    "Transformers has no configuration that vLLM reads": "Deepseek K2Horizon MiMo "
    "MiMoV2 MiMoV2Flash MiniCPM Nanbeige Plamo3 SarvamMLA Step1 TeleChat2 TeleFLM",
    "vLLM's CPU routing lacks their sigmoid scores": "Laguna MiniMaxM2",
    "vLLM itself takes no tiny one on the CPU": "DeepseekV4 KimiLinear",
    "vLLM's code needs torchvision": "Glm5Next MiniMaxM3Sparse MuseGlimmer Qwen3_5 "
    "Qwen3_5Moe",
}


def tables() -> str:
    """As docs/support.md has them, from the first heading row on."""
    families = "".join(family.row() for family in FAMILIES)
    untested = "".join(
        f"| {', '.join(names.split())} | {reason} |\n"
        for reason, names in UNTESTED.items()
    )
    return (
        "| target | vLLM's classes, ...ForCausalLM | tree | chain | no head |\n"
        f"| --- | --- | --- | --- | --- |\n{families}\n"
        f"| not tested | because |\n| --- | --- |\n{untested}"
    )


def with_tables(document: str) -> str:
    """The document with its tables of families replaced by ours."""
    found = re.compile(r"\| target \|.*?\n\n\| not tested \|.*?(?=\n\n)\n", re.DOTALL)
    assert len(found.findall(document)) == 1
    return found.sub(lambda _: tables(), document)


if __name__ == "__main__":
    SUPPORT.write_text(with_tables(SUPPORT.read_text()))
