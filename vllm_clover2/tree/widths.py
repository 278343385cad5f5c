# SPDX-License-Identifier: Apache-2.0
"""How many nodes a step verifies of every request's tree, where all get the same.

Model Runner V2 plans a step before it knows what the last one accepted, and replays it
as CUDA graphs of requests with equally many rows. So a width is chosen for the whole
batch, from a short list, as :class:`~vllm_clover2.tree.chooser.Chooser` chooses sizes:
expected tokens less what their time is worth. Nodes stand in falling joint
probability; what the n-th one is worth is remembered from the trees of past steps, and
corrected by how much of it came true.
"""

from dataclasses import dataclass

import numpy as np

from vllm_clover2.tree.chooser import FIRST_PROBE, Chooser, Probes
from vllm_clover2.tree.step_cost import StepCost, Work

_SHARE = 3
"""Every width is so many times the next smaller one."""
_ROWS_AT_START = 512
"""Rows of a step for which a GPU takes little longer than for one, before any is
measured; vLLM captures CUDA graphs up to as many."""
_MEMORY = 0.05
"""Share of one more step in the running averages."""
_LEAST_TRUST, _MOST_TRUST = 0.25, 2.0


def widths_of(num_nodes: int) -> list[int]:
    """Nodes of a request that a step may verify, falling, the last 0.

    >>> widths_of(25)
    [25, 8, 2, 0]
    """
    widths = [num_nodes]
    while widths[-1]:
        widths.append(widths[-1] // _SHARE)
    return widths


def widths_at_start(num_nodes: int) -> list[tuple[int, int, int]]:
    """First and last batch size of every width, before anything is known.

    In the form of vLLM's ``num_speculative_tokens_per_batch_size``, from which it also
    takes the widths that CUDA graphs are captured for.

    >>> widths_at_start(25)
    [(1, 19, 25), (20, 56, 8), (57, 170, 2), (171, 512, 0)]
    """
    table, first = [], 1
    for width in widths_of(num_nodes):
        last = max(first, _ROWS_AT_START // (1 + width))
        table.append((first, last, width))
        first = last + 1
    return table


@dataclass(frozen=True)
class Verified:
    """What a step did, and what became of it."""

    drafts: np.ndarray  # [requests] int, nodes that were verified of each
    work: Work
    seconds: float
    accepted: int  # of all drafts
    # The trees that it drafted below: how many, and the sum [nodes] of their nodes'
    # joint probabilities, which count for nothing where there are no trees.
    trees: int
    joint: np.ndarray


class WidthChooser:
    """Chooses the width of steps and learns from what became of them."""

    def __init__(
        self,
        cost: StepCost,
        num_nodes: int,
        draft_rows: int,  # most rows of a request that the draft's KV is written for
    ) -> None:
        self.cost = cost
        self._chooser = Chooser(cost)
        self._widths = np.array(widths_of(num_nodes)[::-1])
        self._draft_rows = draft_rows
        # Joint probabilities of the nodes, on average; at first a guess.
        self._joint = 0.6 ** np.arange(1.0, num_nodes + 1)
        self._unseen = FIRST_PROBE  # steps since trees were last seen
        self._last: np.ndarray | None = None  # as the last step has grown them
        # Of a verified draft, on average.
        self._expected = self._accepted = 1.0
        self._unverified = 0  # steps since there was one
        self._probes = Probes()

    @property
    def trust(self) -> float:
        """Accepted tokens by expected ones."""
        trust = self._accepted / max(self._expected, 1e-6)
        return min(max(trust, _LEAST_TRUST), _MOST_TRUST)

    def learn(self, step: Verified) -> None:
        """Take in a step; in order, though some steps late."""
        requests = len(step.drafts)
        self.cost.observe(step.work, step.seconds)
        self._chooser.earned(
            requests, requests + step.accepted, step.work, step.seconds
        )
        verified = int((step.drafts > 0).sum())
        self._unverified += 1
        if verified and self._last is not None:
            expected = np.concatenate([[0.0], self._last.cumsum()])[step.drafts].sum()
            new = _weight(self._unverified)
            self._expected += new * (expected / verified - self._expected)
            self._accepted += new * (step.accepted / verified - self._accepted)
            self._unverified = 0
        self._last = None
        self._unseen += 1
        if step.trees:
            self._last = step.joint / step.trees
            self._joint += _weight(self._unseen) * (self._last - self._joint)
            self._unseen = 0

    def choose(
        self,
        plain: Work,  # of the next step without drafts
    ) -> int:
        """Nodes to verify of every request."""
        requests = plain.rows - plain.prompt
        worth = np.concatenate([[0.0], self._joint.cumsum()])[self._widths]
        expected = requests * self.trust * worth
        times = [self.cost.seconds(self.work(plain, w)) for w in self._widths.tolist()]
        # Noise may make a larger step look quicker than a smaller one.
        net = expected - self._chooser.rate(plain) * np.maximum.accumulate(times)
        best = int(self._widths[net.argmax()])
        if best == 0:
            # Now and then a little, to see whether it would pay again.
            return int(self._widths[1]) if self._probes.due() else 0
        self._probes.reset()
        return best

    def work(self, plain: Work, width: int) -> Work:
        """A step of which every request verifies, and is then given, such a tree."""
        requests = plain.rows - plain.prompt
        return Work(
            plain.rows + requests * width,
            plain.prompt,
            plain.context,
            augmented=plain.prompt + requests * min(1 + width, self._draft_rows),
            levels=int(width > 0),
            grown=requests * int(width > 0),
        )


def _weight(steps: int) -> float:
    """Of what is seen again after so many steps, in a running average."""
    return 1.0 - (1.0 - _MEMORY) ** steps
