# SPDX-License-Identifier: Apache-2.0
"""The schemas of ``torch.ops.clover2.*``: their only declaration.

The compiled library registers kernels for the CPU and CUDA dispatch keys under these
names; the pure-torch references are registered for every other case (the dispatcher's
CompositeExplicitAutograd key), so that the most specific kernel present wins.
"""

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "clover2"

SCHEMAS: dict[str, str] = {
    "tree_attention": (
        "(Tensor query, Tensor kv_cache, int layout, Tensor block_table, "
        "Tensor prefix_lens, Tensor query_starts, Tensor row_offsets, "
        "Tensor ancestors, float scale, float softcap, int sliding_window, "
        "Tensor(a!) out) -> ()"
    ),
    "tree_accept": (
        "(Tensor target_tokens, Tensor draft_tokens, Tensor parents, "
        "Tensor row_offsets, int max_depth) -> (Tensor, Tensor, Tensor)"
    ),
    "commit_kv": (
        "(Tensor(a!)[] kv_caches, int layout, Tensor block_table, "
        "Tensor prefix_lens, Tensor paths, Tensor lengths) -> ()"
    ),
    "context_nodes": (
        "(Tensor history, Tensor requests, Tensor lengths, int min_match, "
        "int max_match, int max_places, int max_depth, int max_nodes) -> "
        "(Tensor tokens, Tensor parents, Tensor depths, Tensor matches, "
        "Tensor places, Tensor sizes)"
    ),
    "add_candidates": (
        "(Tensor(a!) tokens, Tensor(b!) parents, Tensor(c!) joint, "
        "Tensor(d!) below, Tensor(e!) credit, Tensor(f!) by_head, Tensor depths, "
        "Tensor beside, int first, int level, Tensor rows, Tensor open_, "
        "Tensor asked, Tensor child_values, Tensor child_tokens, int width) -> "
        "(Tensor rows, Tensor tokens, Tensor parents, Tensor open)"
    ),
    "best_candidates": (
        "(Tensor parents, Tensor joint, Tensor below, Tensor depths, "
        "int num_nodes) -> (Tensor rows, Tensor parents, Tensor depths, "
        "Tensor joint, Tensor sizes)"
    ),
    "judge_context": (
        "(Tensor parents, Tensor depths, Tensor matches, Tensor places, "
        "Tensor[] bounds, Tensor values, float max_sum) -> "
        "(Tensor cells, Tensor alone, Tensor beside, Tensor joint)"
    ),
    "learn_context": (
        "(Tensor(a!) counts, Tensor(b!) values, Tensor tokens, Tensor parents, "
        "Tensor depths, Tensor cells, Tensor credit, Tensor emitted, "
        "float max_trials) -> ()"
    ),
    "top_k_log_probs": "(Tensor logits, int k) -> (Tensor, Tensor)",
    "int8_product": (
        "(Tensor input, Tensor packed, Tensor scales, Tensor? bias) -> Tensor"
    ),
    "packed_linear": (
        "(Tensor input, Tensor packed, Tensor? bias, int outputs) -> Tensor"
    ),
    "recurrent_step": (
        "(Tensor state, Tensor embedding, Tensor[] query, Tensor[] of_embedding, "
        "Tensor[] output, Tensor input_norm, Tensor output_norm, int num_heads, "
        "float eps) -> (Tensor, Tensor)"
    ),
}

# Ops whose reference serves a device type even where the library is built.
WITHOUT_KERNEL: dict[str, set[str]] = {
    "cuda": {
        "add_candidates",
        "best_candidates",
        "judge_context",
        "learn_context",
        "top_k_log_probs",
        "int8_product",
        "packed_linear",
        "recurrent_step",
    }
}


def register(
    references: dict[str, Callable[..., Any]],
    fakes: dict[str, Callable[..., Any]],
) -> torch.library.Library:
    """Declares every op with its reference and fake; keep the result alive."""
    library = torch.library.Library(NAMESPACE, "DEF")
    for name, schema in SCHEMAS.items():
        library.define(name + schema)
        library.impl(name, references[name], "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fakes[name], lib=library)
    return library
