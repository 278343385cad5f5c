# SPDX-License-Identifier: Apache-2.0
"""Registration: schemas, fakes, which implementation runs, refusals."""

import os
import subprocess
import sys

import pytest
import torch
from paging import page_requests, random_batch

from vllm_clover2 import ops
from vllm_clover2.ops import KVLayout, schema


def attention_arguments() -> dict:
    generator = torch.Generator().manual_seed(0)
    paged = page_requests([40, 9], 2, 32, 32, KVLayout.VEC, torch.float32, generator)
    trees = random_batch([6, 3], generator)
    query = torch.randn(9, 4, 32, generator=generator)
    return {
        "query": query,
        "kv_cache": paged.cache,
        "layout": int(KVLayout.VEC),
        "block_table": paged.block_table,
        "prefix_lens": torch.tensor([34, 6], dtype=torch.int32),
        "query_starts": trees.row_offsets[:-1].clone(),
        "row_offsets": trees.row_offsets,
        "ancestors": trees.ancestors,
        "scale": 0.2,
        "softcap": 0.0,
        "sliding_window": -1,
        "out": torch.zeros_like(query),
    }


def accept_arguments() -> dict:
    trees = random_batch([6, 3], torch.Generator().manual_seed(0))
    return {
        "target_tokens": torch.ones(9, dtype=torch.int64),
        "draft_tokens": trees.tokens,
        "parents": trees.parents,
        "row_offsets": trees.row_offsets,
        "max_depth": 5,
    }


def commit_arguments() -> dict:
    return {
        "kv_caches": [torch.randn(4, 2, 32, 64) for _ in range(2)],
        "layout": int(KVLayout.VEC),
        "block_table": torch.tensor([[0, 1], [2, 3]], dtype=torch.int32),
        "prefix_lens": torch.tensor([30, 5], dtype=torch.int32),
        "paths": torch.tensor([[2, 5, -1], [1, 3, 4]], dtype=torch.int32),
        "lengths": torch.tensor([2, 3], dtype=torch.int32),
    }


def context_arguments() -> dict:
    return {
        "history": torch.tensor([[1, 2, 3, 1, 2], [4, 4, 4, 0, 0]], dtype=torch.int32),
        "requests": torch.tensor([1, 0], dtype=torch.int32),
        "lengths": torch.tensor([3, 5], dtype=torch.int32),
        "min_match": 1,
        "max_match": 8,
        "max_places": 4,
        "max_depth": 5,
        "max_nodes": 6,
    }


def judge_arguments() -> dict:
    row = torch.tensor([[0, 1, 0, 0]], dtype=torch.int32)
    return {
        "parents": row,
        "depths": torch.tensor([[1, 2, 1, 0]], dtype=torch.int32),
        "matches": torch.tensor([[3, 3, 1, 0]], dtype=torch.int32),
        "places": torch.tensor([[2, 1, 1, 0]], dtype=torch.int32),
        "bounds": [torch.tensor([2.0]), torch.tensor([0.5]), torch.tensor([2.0])],
        "values": torch.rand(2, 16),
        "max_sum": 0.98,
    }


def learn_arguments() -> dict:
    nodes = judge_arguments()
    return {
        "counts": torch.full((4, 16), 50.0, dtype=torch.float64),
        "values": torch.ones(2, 16),
        "tokens": torch.tensor([[5, 6, 7, -1]]),
        "parents": nodes["parents"],
        "depths": nodes["depths"],
        "cells": torch.tensor([[3, 3, 4, 0]]),
        "credit": torch.tensor([[0.5, torch.nan, 0.2, torch.nan]]),
        "emitted": torch.tensor([[5, 6, -1]]),
        "max_trials": 51.5,
    }


def top_k_arguments() -> dict:
    return {"logits": torch.randn(3, 100).bfloat16(), "k": 8}


def product_arguments() -> dict:
    packed, scales, bias = ops.pack_int8(torch.randn(100, 72), torch.randn(100))
    x = torch.randn(3, 72)
    return {"input": x, "packed": packed, "scales": scales, "bias": bias}


def linear_arguments() -> dict:
    packed = ops.pack_linear(torch.randn(50, 72))
    x = torch.randn(3, 72)
    return {"input": x, "packed": packed, "bias": torch.randn(50), "outputs": 50}


def step_arguments() -> dict:
    def weight(outputs: int) -> list[torch.Tensor]:
        return list(ops.pack_int8(torch.randn(outputs, 72), torch.randn(outputs)))

    return {
        "state": torch.randn(3, 72),
        "embedding": torch.randn(3, 72),
        "query": weight(72),
        "of_embedding": weight(216),
        "output": weight(72),
        "input_norm": torch.ones(72),
        "output_norm": torch.ones(72),
        "num_heads": 4,
        "eps": 1e-5,
    }


ARGUMENTS = {
    "tree_attention": attention_arguments,
    "tree_accept": accept_arguments,
    "commit_kv": commit_arguments,
    "context_nodes": context_arguments,
    "judge_context": judge_arguments,
    "learn_context": learn_arguments,
    "top_k_log_probs": top_k_arguments,
    "int8_product": product_arguments,
    "packed_linear": linear_arguments,
    "recurrent_step": step_arguments,
}


@pytest.mark.parametrize("name", list(ARGUMENTS))
def test_opcheck(name: str) -> None:
    op = getattr(torch.ops.clover2, name).default
    result = torch.library.opcheck(op, (), ARGUMENTS[name]())
    assert set(result.values()) == {"SUCCESS"}, result


def test_compiled_kernels_are_registered() -> None:
    assert ops.library_path() is not None, "build the ops first (make test does)"
    assert ops.backend("cpu") == "native"
    assert ops.backend("meta") == "reference"


def test_ops_that_need_no_kernel_do_not_count(monkeypatch) -> None:
    """A device runs compiled kernels though some ops have none for it."""
    for name in schema.WITHOUT_KERNEL["cuda"]:
        assert name in schema.SCHEMAS
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    counted = []
    monkeypatch.setattr(
        torch._C,
        "_dispatch_has_kernel_for_dispatch_key",
        lambda name, key: counted.append(name) or has_kernel(name, key),
    )
    ops.backend.__wrapped__("cuda")
    assert not {f"clover2::{n}" for n in schema.WITHOUT_KERNEL["cuda"]} & set(counted)
    assert ops.backend.__wrapped__("cpu") == "native"
    assert len(set(counted)) == len(schema.SCHEMAS)


# Only the compiled kernels check their arguments: the message proves that they ran.
@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("tree_attention", {"ancestors": torch.full((9,), 3)}, "ancestors of row 0"),
        (
            "tree_attention",
            {"prefix_lens": torch.tensor([34, 94], dtype=torch.int32)},
            "request 1 needs 97 positions",
        ),
        (
            "tree_attention",
            {"query_starts": torch.tensor([4, 0], dtype=torch.int32)},
            "exceed the 9 tokens",
        ),
        ("tree_attention", {"query": torch.zeros(9, 4, 16)}, "query must be"),
        ("tree_attention", {"layout": 3}, "layout must be"),
        ("tree_attention", {"layout": 2}, "AMX layout needs bfloat16"),
        ("tree_accept", {"parents": torch.zeros(9).long()}, "parents must be int32"),
        ("tree_accept", {"max_depth": -1}, "must not be negative"),
        (
            "commit_kv",
            {"lengths": torch.tensor([2, 4], dtype=torch.int32)},
            "between 0 and 3",
        ),
        (
            "commit_kv",
            {"prefix_lens": torch.tensor([62, 5], dtype=torch.int32)},
            "beyond the 2 blocks",
        ),
        (
            "commit_kv",
            {"kv_caches": [torch.zeros(4, 2, 32, 64), torch.zeros(4, 2, 32, 32)]},
            "one shape",
        ),
        ("context_nodes", {"history": torch.zeros(2, 5).long()}, "must be int32"),
        ("context_nodes", {"history": torch.zeros(5).int()}, "found 1 dimensions"),
        ("context_nodes", {"history": torch.zeros(5, 2).int().t()}, "contiguous"),
        ("context_nodes", {"requests": torch.zeros(2).long()}, "requests must be int"),
        ("context_nodes", {"requests": torch.zeros(2, 1).int()}, "must be a vector"),
        ("context_nodes", {"requests": torch.tensor([0, 2]).int()}, "one of the 2"),
        ("context_nodes", {"lengths": torch.zeros(3).int()}, "must have 2 elements"),
        ("context_nodes", {"lengths": torch.tensor([3, 6]).int()}, "0 and 5, the wid"),
        ("context_nodes", {"min_match": 0}, "min_match must be between 1 and 8"),
        ("context_nodes", {"min_match": 9}, "min_match must be between 1 and 8"),
        ("context_nodes", {"max_match": 65}, "max_match must be between 1 and 64"),
        ("context_nodes", {"max_places": 65}, "max_places must be between 1 and 64"),
        ("context_nodes", {"max_depth": 64}, "max_depth must be between 1 and 63"),
        ("context_nodes", {"max_nodes": 0}, "max_nodes must be between 1 and 128"),
        ("context_nodes", {"max_nodes": 129}, "max_nodes must be between 1 and 128"),
        ("judge_context", {"parents": torch.full((1, 4), 1).int()}, "rows below 1"),
        ("judge_context", {"bounds": [torch.ones(1)] * 2}, "bounds three vectors"),
        ("judge_context", {"bounds": [torch.ones(1).long()] * 3}, "float32 vectors"),
        ("judge_context", {"values": torch.ones(2, 15)}, "values must be"),
        ("judge_context", {"places": torch.ones(1, 4)}, "places must be"),
        ("learn_context", {"cells": torch.full((1, 4), 16)}, "cells must be"),
        ("learn_context", {"parents": torch.full((1, 4), 3).int()}, "rows below 1"),
        ("learn_context", {"counts": torch.ones(4, 16)}, "counts must be"),
        ("learn_context", {"emitted": torch.ones(2, 3).long()}, "emitted must be"),
        ("top_k_log_probs", {"k": 0}, "k must be 1 to 100"),
        ("top_k_log_probs", {"k": 101}, "k must be 1 to 100"),
        ("top_k_log_probs", {"logits": torch.zeros(9)}, "logits must have 2"),
        ("top_k_log_probs", {"logits": torch.zeros(9, 9).double()}, "float32, bfloat"),
        ("int8_product", {"input": torch.zeros(3, 130)}, "rows of 130, found weights"),
        ("int8_product", {"packed": torch.zeros(72, 100)}, "packed by pack_int8"),
        ("int8_product", {"scales": torch.zeros(129)}, "one per output"),
        ("int8_product", {"bias": torch.zeros(99)}, "float32 vector of 100"),
        ("recurrent_step", {"embedding": torch.zeros(2, 72)}, "shape of state"),
        ("recurrent_step", {"num_heads": 5}, "must divide 72"),
        ("recurrent_step", {"input_norm": torch.ones(36)}, "vectors of 72"),
        ("recurrent_step", {"query": [torch.zeros(1)]}, "scales, bias, found 1"),
        ("recurrent_step", {"output": step_arguments()["of_embedding"]}, "found 216"),
    ],
)
def test_native_kernels_check_their_arguments(name, changes, message) -> None:
    arguments = ARGUMENTS[name]() | changes
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.clover2, name)(**arguments)


@pytest.mark.slow
def test_reference_on_request() -> None:
    """In a process of its own: the library stays loaded once it is."""
    code = "from vllm_clover2 import ops; print(ops.backend('cpu'))"
    for value, expected in (("reference", "reference"), ("", "native")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"CLOVER2_OPS": value},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == expected


def test_wrappers_call_the_ops() -> None:
    arguments = attention_arguments()
    by_op = arguments | {"out": torch.zeros_like(arguments["out"])}
    torch.ops.clover2.tree_attention(**by_op)
    ops.tree_attention(**arguments | {"layout": KVLayout.VEC})
    assert torch.equal(arguments["out"], by_op["out"])
    assert arguments["out"].abs().sum() > 0
    ours = ops.tree_accept(**accept_arguments())
    theirs = torch.ops.clover2.tree_accept(**accept_arguments())
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    moved = commit_arguments()
    before = [cache.clone() for cache in moved["kv_caches"]]
    ops.commit_kv(**moved | {"layout": KVLayout.VEC})
    assert not any(torch.equal(a, b) for a, b in zip(moved["kv_caches"], before))
    nodes = ops.context_nodes(**context_arguments())
    by_op = torch.ops.clover2.context_nodes(**context_arguments())
    assert all(torch.equal(a, b) for a, b in zip(nodes, by_op))
    assert nodes.tokens[0].tolist() == [4, 4, -1, -1, -1, -1]
    assert nodes.sizes.tolist() == [2, 3]
