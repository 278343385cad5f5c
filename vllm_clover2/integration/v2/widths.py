# SPDX-License-Identifier: Apache-2.0
"""How many nodes of a tree the coming steps verify, from what past ones did.

The host does not wait for what a step did: its figures are copied behind it, and read
in the first later step that finds them there.
"""

from collections import deque
from typing import NamedTuple

import numpy as np
import torch
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_clover2.integration.v2.trees import DeviceTrees
from vllm_clover2.tree.step_cost import StepCost, Work
from vllm_clover2.tree.widths import Verified, WidthChooser


class _Unseen(NamedTuple):
    """A step whose figures are on their way from the device."""

    begun: torch.cuda.Event
    ended: torch.cuda.Event
    figures: torch.Tensor  # [nodes + 2] float32 on the host, once it has ended
    drafts: np.ndarray  # [R] nodes that were verified
    work: Work
    grown: bool


class AdaptiveWidths:
    """Watches steps without waiting for them, and chooses widths."""

    def __init__(self, cost: StepCost, trees: DeviceTrees, has_head: bool) -> None:
        self.chooser = WidthChooser(cost, trees.num_nodes, 1 + trees.max_depth)
        self._trees = trees
        self._has_head = has_head
        self._unseen: deque[_Unseen] = deque()
        self._begun = _recorded()

    def begin(self) -> None:
        """The device begins a step."""
        self._begun = _recorded()

    @torch.inference_mode()
    def end(
        self,
        batch: InputBatch,
        num_sampled: torch.Tensor,  # [R] int32
        grown: bool,  # whether it has grown trees
    ) -> int:
        """The step ends, and has drafted; returns the width for the coming ones."""
        requests, rows = batch.num_reqs, batch.num_tokens
        drafts = batch.num_draft_tokens_per_req
        if drafts is None:
            drafts = np.zeros(requests, dtype=np.int32)
        prompt = rows - requests - int(drafts.sum())
        context = int(batch.seq_lens_cpu_upper_bound[:requests].sum())
        augmented = 0
        if self._has_head:
            augmented = rows - int((drafts - self._trees.max_depth).clip(min=0).sum())
        work = Work(rows, prompt, context, augmented, int(grown), requests * grown)
        figures = self._figures(batch.idx_mapping, num_sampled)
        self._unseen.append(
            _Unseen(self._begun, _recorded(), figures, drafts, work, grown)
        )
        while self._unseen and self._unseen[0].ended.query():
            self._learn(self._unseen.popleft())
        # The next step is taken to be like this one.
        return self.chooser.choose(Work(requests + prompt, prompt, context))

    def _figures(
        self, slots: torch.Tensor, num_sampled: torch.Tensor
    ) -> torch.Tensor:  # [nodes + 2] float32
        """Joint probabilities by node, trees, accepted nodes: sums over requests.

        Of requests in the middle of their prompt nothing counts. On the host, once the
        device has come so far.
        """
        drafted = (num_sampled > 0).float()
        joint = drafted @ self._trees.joint[slots].exp()
        accepted = (num_sampled - 1).clamp(min=0).sum()
        counts = torch.stack([drafted.sum(), accepted.float()])
        return torch.cat([joint, counts]).to("cpu", non_blocking=True)

    def _learn(self, step: _Unseen) -> None:
        *joint, trees, accepted = step.figures.numpy().astype(np.float64)
        self.chooser.learn(
            Verified(
                step.drafts,
                step.work,
                1e-3 * step.begun.elapsed_time(step.ended),
                int(accepted),
                int(trees) if step.grown else 0,
                np.array(joint),
            )
        )


def _recorded() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
