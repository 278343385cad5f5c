# SPDX-License-Identifier: Apache-2.0
"""Records the trees that a head grew, by what they were grown below."""

from typing import Any

import numpy as np
import torch
from fake_gpu import inside_a_kernel

Trees = dict[str, tuple[list[int], list[int]]]  # text: tokens, parents


def record(runner: Any, patch: Any) -> Trees:
    """Trees of ``runner`` from now on; ``patch`` sets attributes."""
    trees: Trees = {}
    if hasattr(runner, "req_states"):
        _record_v2(runner.req_states, trees, patch)
    else:
        _record_v1(runner, trees, patch)
    return trees


def _text(prompt: Any, length: int) -> str:
    """A text, short: requests differ in their first tokens."""
    return f"{[int(token) for token in prompt[:4]]} {length}"


def _record_v1(runner: Any, trees: Trees, patch: Any) -> None:
    stock = runner._remember

    def remember(req_id: str, tokens: list[int], parents: np.ndarray, *_: Any) -> Any:
        request = runner.requests[req_id]
        text = _text(request.prompt_token_ids, request.num_tokens)
        trees[text] = tokens, parents.tolist()
        return stock(req_id, tokens, parents, *_)

    patch(runner, "_remember", remember)


def _record_v2(states: Any, trees: Trees, patch: Any) -> None:
    from vllm_clover2.integration.v2.trees import DeviceTrees

    stock = DeviceTrees.put

    def put(kept: Any, slots: torch.Tensor, grown: Any, *args: Any) -> torch.Tensor:
        with inside_a_kernel():
            for row, slot in enumerate(slots.tolist()):
                size, prompt = int(grown.sizes[row]), states.all_token_ids.gpu[slot]
                text = _text(prompt, int(states.total_len.gpu[slot]))
                tokens, parents = grown.tokens[row, :size], grown.parents[row, :size]
                trees[text] = tokens.tolist(), parents.tolist()
        return stock(kept, slots, grown, *args)

    patch(DeviceTrees, "put", put)
