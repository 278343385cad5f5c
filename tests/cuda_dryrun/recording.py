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
    from vllm_clover2.integration.v2.drafting import DeviceDrafting

    stock = DeviceDrafting.draft

    def draft(
        drafting: DeviceDrafting, head: Any, hidden: Any, batch: Any, *args: Any
    ) -> torch.Tensor:
        drafts = stock(drafting, head, hidden, batch, *args)
        kept = drafting.trees
        with inside_a_kernel():  # graphs may have grown them: look at what was kept
            for tokens, slot in zip(drafts, batch.idx_mapping_np, strict=True):
                prompt, size = states.all_token_ids.gpu[slot], int(kept._sizes[slot])
                text = _text(prompt, int(states.total_len.gpu[slot]))
                parents = kept._parents[slot, 1 : 1 + size]
                trees[text] = tokens[:size].tolist(), parents.tolist()
        return drafts

    patch(DeviceDrafting, "draft", draft)
