# SPDX-License-Identifier: Apache-2.0
"""The ops of drafting and of verification: score and grow; attend, accept, commit.

Call them through the functions here. A compiled kernel runs where the library has one
for the tensors' device, the pure-torch reference elsewhere, or everywhere with
``CLOVER2_OPS=reference`` in the environment. ``backend()`` tells which.
"""

import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from vllm_clover2.ops import calibration, candidates, reference, schema
from vllm_clover2.ops.int8 import Int8Weight, pack_int8
from vllm_clover2.ops.layout import KVLayout
from vllm_clover2.tree.types import ContextNodes

__all__ = [
    "ContextNodes",
    "Int8Weight",
    "KVLayout",
    "add_candidates",
    "backend",
    "best_candidates",
    "commit_kv",
    "context_nodes",
    "int8_product",
    "judge_context",
    "learn_context",
    "library_path",
    "pack_int8",
    "pack_linear",
    "packed_linear",
    "recurrent_step",
    "reference_is_asked_for",
    "top_k_log_probs",
    "tree_accept",
    "tree_attention",
    "why_reference",
]

logger = logging.getLogger(__name__)


def library_path() -> Path | None:
    """The compiled library next to this file, if it was built."""
    return next(iter(sorted(Path(__file__).parent.glob("_C*.so"))), None)


def reference_is_asked_for() -> bool:
    """Whether ``CLOVER2_OPS=reference`` is in the environment."""
    return os.environ.get("CLOVER2_OPS") == "reference"


def _load() -> str | None:
    """Loads the compiled library; returns why the references serve, if they do."""
    if reference_is_asked_for():
        return "CLOVER2_OPS=reference"
    path = library_path()
    if path is None:
        return "the compiled library is not built (pip install . builds it)"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load: {error}"
    return None


@functools.cache
def backend(device_type: str = "cpu") -> str:
    """``native`` if this device type runs compiled kernels, else ``reference``.

    Ops of ``schema.WITHOUT_KERNEL`` do not count: there is no kernel to be missing.
    """
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    if key is None:
        return "reference"
    without = schema.WITHOUT_KERNEL.get(device_type, set())
    names = [f"{schema.NAMESPACE}::{name}" for name in schema.SCHEMAS.keys() - without]
    # No public function asks the dispatcher; this one is stable since torch 1.5.
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key  # noqa: SLF001
    return "native" if all(has_kernel(name, key) for name in names) else "reference"


def why_reference() -> str | None:
    """Why no compiled kernel runs at all; None if the library was loaded."""
    return _WHY_REFERENCE


def _fake_nothing(*_: object) -> None:
    """Shape inference of ops that only change an argument."""


def _fake_tree_accept(
    target_tokens: torch.Tensor,
    draft_tokens: torch.Tensor,
    parents: torch.Tensor,
    row_offsets: torch.Tensor,
    max_depth: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    del draft_tokens, parents
    requests = row_offsets.shape[0] - 1
    return (
        row_offsets.new_empty((requests, max_depth), dtype=torch.int32),
        row_offsets.new_empty((requests,), dtype=torch.int32),
        target_tokens.new_empty((requests,), dtype=torch.int64),
    )


def _fake_context_nodes(
    history: torch.Tensor,
    requests: torch.Tensor,
    lengths: torch.Tensor,
    min_match: int,
    max_match: int,
    max_places: int,
    max_depth: int,
    max_nodes: int,
) -> tuple[torch.Tensor, ...]:
    del lengths, min_match, max_match, max_places, max_depth
    shape = (requests.shape[0], max_nodes)
    return (
        history.new_empty(shape, dtype=torch.int64),
        *(history.new_empty(shape, dtype=torch.int32) for _ in range(4)),
        history.new_empty(shape[:1], dtype=torch.int32),
    )


def _fake_add_candidates(*inputs: Any) -> tuple[torch.Tensor, ...]:
    depths, rows, child_values, width = (inputs[i] for i in (6, 10, 13, 15))
    level = depths.shape[1] + rows.shape[1] * child_values.shape[1]
    shape = (rows.shape[0], min(width, level))
    return (
        *(rows.new_empty(shape) for _ in range(3)),
        child_values.new_empty(shape),
    )


def _fake_best_candidates(
    parents: torch.Tensor,
    joint: torch.Tensor,
    below: torch.Tensor,
    depths: torch.Tensor,
    num_nodes: int,
) -> tuple[torch.Tensor, ...]:
    del below
    shape = (parents.shape[0], min(num_nodes, parents.shape[1] - 1))
    return (
        parents.new_empty(shape),
        depths.new_empty(shape),
        depths.new_empty(shape),
        joint.new_empty(shape),
        depths.new_empty(shape[:1]),
    )


def _fake_judge_context(
    parents: torch.Tensor, *inputs: Any
) -> tuple[torch.Tensor, ...]:
    values = inputs[4]
    return (
        parents.new_empty(parents.shape, dtype=torch.int64),
        *(values.new_empty(parents.shape) for _ in range(3)),
    )


def _fake_top_k_log_probs(
    logits: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (logits.shape[0], k)
    return (
        logits.new_empty(shape, dtype=torch.float32),
        logits.new_empty(shape, dtype=torch.int64),
    )


def _fake_int8_product(
    input: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    del packed, bias
    return input.new_empty((input.shape[0], scales.shape[0]))


def _fake_packed_linear(
    input: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    outputs: int,
) -> torch.Tensor:
    del packed, bias
    return input.new_empty((input.shape[0], outputs))


def _fake_recurrent_step(
    state: torch.Tensor, *_: object
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(state), torch.empty_like(state)


REFERENCES: dict[str, Callable[..., Any]] = {
    name: getattr(module, name)
    for module in (reference, candidates, calibration)
    for name in schema.SCHEMAS
    if hasattr(module, name)
}
"""Every op in pure torch."""
_LIBRARY = schema.register(
    REFERENCES,
    {
        "tree_attention": _fake_nothing,
        "tree_accept": _fake_tree_accept,
        "commit_kv": _fake_nothing,
        "context_nodes": _fake_context_nodes,
        "add_candidates": _fake_add_candidates,
        "best_candidates": _fake_best_candidates,
        "judge_context": _fake_judge_context,
        "learn_context": _fake_nothing,
        "top_k_log_probs": _fake_top_k_log_probs,
        "int8_product": _fake_int8_product,
        "packed_linear": _fake_packed_linear,
        "recurrent_step": _fake_recurrent_step,
    },
)
_WHY_REFERENCE = _load()
if _WHY_REFERENCE is not None:
    logger.info("clover2 ops run their reference: %s", _WHY_REFERENCE)


def tree_attention(
    query: torch.Tensor,  # [tokens, heads, D]
    kv_cache: torch.Tensor,  # [blocks, kv_heads, block_size, 2 * D]
    layout: KVLayout,
    block_table: torch.Tensor,  # [R, max_blocks] int32
    prefix_lens: torch.Tensor,  # [R] int32, committed positions
    query_starts: torch.Tensor,  # [R] int32, index in query of each root row
    row_offsets: torch.Tensor,  # [R + 1] int32
    ancestors: torch.Tensor,  # [rows] int64, bit j: row j is ancestor-or-self
    scale: float,
    out: torch.Tensor,  # [tokens, heads, D], tree rows are written
    softcap: float = 0.0,
    sliding_window: int = -1,
) -> None:
    """Attends every tree row to its request's prefix and its own ancestors.

    The rows' KV must already be in the cache, row r at position prefix + r. Rows of
    ``out`` that belong to no tree stay as they are.
    """
    torch.ops.clover2.tree_attention.default(
        query, kv_cache, int(layout), block_table, prefix_lens, query_starts,
        row_offsets, ancestors, scale, softcap, sliding_window, out,
    )  # fmt: skip


def tree_accept(
    target_tokens: torch.Tensor,  # [rows] int64
    draft_tokens: torch.Tensor,  # [rows] int64
    parents: torch.Tensor,  # [rows] int32, root: -1
    row_offsets: torch.Tensor,  # [R + 1] int32
    max_depth: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Accepted rows [R, max_depth] (-1 padded), their number [R], next tokens [R]."""
    result: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    result = torch.ops.clover2.tree_accept.default(
        target_tokens, draft_tokens, parents, row_offsets, max_depth
    )
    return result


def commit_kv(
    kv_caches: list[torch.Tensor],  # one per layer
    layout: KVLayout,
    block_table: torch.Tensor,  # [R, max_blocks] int32
    prefix_lens: torch.Tensor,  # [R] int32
    paths: torch.Tensor,  # [R, max_depth] int32, rows
    lengths: torch.Tensor,  # [R] int32
) -> None:
    """Moves accepted rows' KV to the positions after the root, in every layer."""
    torch.ops.clover2.commit_kv.default(
        kv_caches, int(layout), block_table, prefix_lens, paths, lengths
    )


def context_nodes(
    history: torch.Tensor,  # [slots, width] int32, rows contiguous
    requests: torch.Tensor,  # [R] int32, rows of history
    lengths: torch.Tensor,  # [R] int32, known tokens; the last is the root
    min_match: int,  # 1 .. max_match
    max_match: int,  # to 64
    max_places: int,  # 1 .. 64
    max_depth: int,  # 1 .. 63
    max_nodes: int,  # 1 .. 128
) -> ContextNodes:
    """What followed earlier occurrences of each text's last tokens, as a trie.

    Of the places where at least ``min_match`` last tokens occur before, the
    ``max_places`` with the longest match, the most recent first, are followed for up
    to ``max_depth`` tokens each, but no more than twice their match. On CUDA nothing
    is found for a request whose row or length is outside ``history``; elsewhere that
    is an error.
    """
    return ContextNodes(
        *torch.ops.clover2.context_nodes.default(
            history, requests, lengths, min_match, max_match, max_places, max_depth,
            max_nodes,
        )
    )  # fmt: skip


# See ops/candidates.py and ops/calibration.py for the arguments and results of these.
add_candidates = torch.ops.clover2.add_candidates.default
best_candidates = torch.ops.clover2.best_candidates.default
judge_context = torch.ops.clover2.judge_context.default
learn_context = torch.ops.clover2.learn_context.default


def top_k_log_probs(
    logits: torch.Tensor,  # [M, V] float32, bfloat16 or float16
    k: int,  # 1..V
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest log-softmax values [M, k] float32 of each row, and their indices.

    Of equal logits the lower index comes first; what is not finite counts as -inf. On
    CUDA the reference serves.
    """
    result: tuple[torch.Tensor, torch.Tensor]
    result = torch.ops.clover2.top_k_log_probs.default(logits, k)
    return result


def int8_product(
    input: torch.Tensor,  # [M, K] float32, bfloat16 or float16
    weight: Int8Weight,  # [N, K]
) -> torch.Tensor:
    """input W^T + bias [M, N], like input, with both factors rounded to int8.

    On CUDA the reference serves.
    """
    result: torch.Tensor = torch.ops.clover2.int8_product.default(input, *weight)
    return result


_PANEL = 16


def pack_linear(
    weight: torch.Tensor,  # [N, K] float32
) -> torch.Tensor:  # [ceil(N / 16), K, 16]
    """The weight as `packed_linear` reads it: sixteen outputs beside each other."""
    outputs, depth = weight.shape
    panels = F.pad(weight, (0, 0, 0, -outputs % _PANEL)).view(-1, _PANEL, depth)
    return panels.transpose(1, 2).contiguous()


def packed_linear(
    input: torch.Tensor,  # [M, K] float32
    packed: torch.Tensor,  # [ceil(N / 16), K, 16], of pack_linear
    bias: torch.Tensor | None,  # [N] float32
    outputs: int,  # N
) -> torch.Tensor:
    """input W^T + bias [M, N] float32, quick for a few rows too.

    On CUDA the reference serves.
    """
    result: torch.Tensor = torch.ops.clover2.packed_linear.default(
        input, packed, bias, outputs
    )
    return result


def recurrent_step(
    state: torch.Tensor,  # [M, H] float32, bfloat16 or float16
    embedding: torch.Tensor,  # [M, H], any of these dtypes
    query: Int8Weight,  # [H, H], with a bias
    of_embedding: Int8Weight,  # [3 H, H]: key, value, the embedding's part of output
    output: Int8Weight,  # [H, H]: the state's part
    input_norm: torch.Tensor,  # [H]
    output_norm: torch.Tensor,  # [H]
    num_heads: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step of Clover-2's recurrence: the next state and the output, [M, H] each.

    On CUDA the reference serves.
    """
    result: tuple[torch.Tensor, torch.Tensor]
    result = torch.ops.clover2.recurrent_step.default(
        state, embedding, list(query), list(of_embedding), list(output),
        input_norm, output_norm, num_heads, eps,
    )  # fmt: skip
    return result
