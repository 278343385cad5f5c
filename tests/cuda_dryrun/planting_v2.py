# SPDX-License-Identifier: Apache-2.0
"""Plants the continuation into trees on Model Runner V2.

There a step knows its requests by their slots on the device, and how far they got is
known on the device only. Graphs may have grown the trees; they are replaced afterwards.
"""

from typing import Any

import torch
from fake_gpu import inside_a_kernel
from planting import TRUTH, Planter, padded_trees

from vllm_clover2.integration.v2.drafting import DeviceDrafting
from vllm_clover2.tree.types import GrownTrees


def install(planter: Planter, runner: Any, patch: Any) -> None:
    """Replace the trees of ``runner``; ``patch`` sets attributes."""
    truths: dict[int, list[int]] = {}  # by slot
    states = runner.req_states
    stock_add, stock_draft = DeviceDrafting.add_request, DeviceDrafting.draft

    def add_request(drafting: DeviceDrafting, slot: int, params: Any) -> None:
        truths[slot] = (params.extra_args or {}).get(TRUTH, [])
        stock_add(drafting, slot, params)

    def draft(
        drafting: DeviceDrafting, head: Any, hidden: Any, batch: Any, *args: Any
    ) -> torch.Tensor:
        # What would have been grown must not fail either.
        stock_draft(drafting, head, hidden, batch, *args)
        slots = batch.idx_mapping_np.tolist()
        with inside_a_kernel():
            lengths = states.total_len.gpu[slots].tolist()
        nodes = drafting.options.num_nodes
        trees = []
        for slot, length in zip(slots, lengths, strict=True):
            told = length - int(states.prompt_len.np[slot])
            trees.append(planter.tree(truths[slot][told:], nodes))
        planted = (part.to("cuda") for part in padded_trees(trees, nodes))
        return drafting.keep(batch, GrownTrees(*planted))

    patch(DeviceDrafting, "add_request", add_request)
    patch(DeviceDrafting, "draft", draft)
