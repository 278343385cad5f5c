# SPDX-License-Identifier: Apache-2.0
"""Drafts that hold what the target will say.

The trees of a random head are hardly ever accepted. Here the head's trees are replaced
by random ones into which the plain run's tokens are planted, among siblings, decoys and
duplicates, so that paths of all lengths and shapes are accepted, moved and trimmed.
The plain run's tokens travel with the request, as ``SamplingParams.extra_args``.
"""

import random
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from engines import Output, Request

from vllm_clover2 import ops
from vllm_clover2.integration import step as step_module
from vllm_clover2.integration.drafting import Drafting, FinishedStep
from vllm_clover2.integration.runner import Clover2RunnerMixin
from vllm_clover2.tree.chooser import Plan
from vllm_clover2.tree.grower import Growth, TreeGrower
from vllm_clover2.tree.types import NO_TOKEN, GrownTrees, Source

TRUTH = "planted_truth"


def with_truth(requests: list[Request], plain: list[Output]) -> list[Request]:
    """The requests with the tokens that plain vLLM answered, for the planter."""
    return [
        request.replaced(
            extra_args=request.params.get("extra_args", {}) | {TRUTH: output.tokens}
        )
        for request, output in zip(requests, plain, strict=True)
    ]


@dataclass
class Planter:
    """Grows random trees, with the continuation planted where it is known."""

    seed: int
    depth: int = 5
    vocab_size: int = 512
    chain: bool = False
    hit_rate: float = 0.35  # chance that the next node continues the true path
    rng: random.Random = field(init=False)
    coins: "Coins" = field(init=False)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.coins = Coins(self.rng)

    def tree(self, truth: list[int], max_nodes: int) -> tuple[list[int], list[int]]:
        """Tokens and parents (row numbers) of 1 to ``max_nodes`` nodes."""
        rng, truth = self.rng, truth[: self.depth]
        size = rng.randint(1, max_nodes)
        if self.chain:
            size = min(size, self.depth)
        tokens: list[int] = []
        parents: list[int] = []
        depths = [0]
        planted = planted_row = 0  # length of the true path so far, and its last row
        while len(tokens) < size:
            if planted < len(truth) and rng.random() < self.hit_rate:
                parent, token = planted_row, truth[planted]
            else:
                open_rows = [r for r, depth in enumerate(depths) if depth < self.depth]
                parent, token = rng.choice(open_rows), self._decoy(truth)
            if self.chain:
                parent = len(tokens)
            if (
                planted < len(truth)
                and parent == planted_row
                and token == truth[planted]
            ):
                planted, planted_row = planted + 1, len(tokens) + 1
            tokens.append(token)
            parents.append(parent)
            depths.append(depths[parent] + 1)
        return tokens, parents

    def _decoy(self, truth: list[int]) -> int:
        """A wrong token, often one that is right elsewhere; may repeat a sibling's."""
        if truth and self.rng.random() < 0.3:
            return self.rng.choice(truth)
        return self.rng.randrange(self.vocab_size)

    def grow(self, runner: Any, request_ids: list[str], max_nodes: int) -> GrownTrees:
        """Trees for these requests, as the head would return them."""
        trees = []
        for request_id in request_ids:
            request = runner.requests[request_id]
            truth = (request.sampling_params.extra_args or {}).get(TRUTH, [])
            trees.append(self.tree(truth[len(request.output_token_ids) :], max_nodes))
        return padded_trees(trees, max_nodes)

    def install(self, patch: Any) -> None:
        """Replace the trees, and the choice of sizes, in every engine of this process.

        ``patch`` sets attributes, like ``pytest.MonkeyPatch.setattr``.
        """
        planter, stock_grow, stock_draft = self, TreeGrower.grow, Drafting.draft
        stock_propose = Clover2RunnerMixin.propose_draft_token_ids

        def grow(grower: TreeGrower, *args: Any, **kwargs: Any) -> Growth:
            # What would have been grown must not fail either.
            growth = stock_grow(grower, *args, **kwargs)
            if planted_for is None:  # warm-up
                return growth
            assert len(planted_for[1]) == len(growth.trees.sizes)
            trees = planter.grow(*planted_for, grower.options.num_nodes)
            device = growth.trees.sizes.device
            return growth._replace(
                trees=GrownTrees(*(part.to(device) for part in trees))
            )

        def draft(drafting: Drafting, step: FinishedStep) -> GrownTrees:
            nonlocal planted_for
            drafted = [step.requests[i] for i in step.drafted]
            planted_for = runner, drafted
            chooser, drafting.chooser = drafting.chooser, planter.coins
            try:
                return stock_draft(drafting, step)
            finally:
                planted_for, drafting.chooser = None, chooser

        def propose(proposing: Any, *args: Any) -> Any:
            nonlocal runner
            runner = proposing
            return stock_propose(proposing, *args)

        runner: Any = None  # whose step it is
        planted_for: tuple[Any, list[str]] | None = None
        patch(Clover2RunnerMixin, "propose_draft_token_ids", propose)
        patch(TreeGrower, "grow", grow)
        patch(Drafting, "draft", draft)


class Coins:
    """Decides by chance whom the head is asked for, in place of a ``Chooser``.

    Requests are drafted for in some steps and not in others, so that what the draft
    missed has to be made up for.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.cost = SimpleNamespace(observe=lambda _work, seconds: seconds)

    def plan(self, requests: list[str], *args: Any) -> Plan:
        waiting = args[2]
        heads = [self.rng.random() < 0.7 for _ in requests]
        return Plan((waiting >= 0) & np.array(heads, dtype=bool), 0.0, 0.0, 0.0)

    def sizes(self, _requests: list[str], joint: np.ndarray, *_: Any) -> np.ndarray:
        return (joint > 0.0).sum(axis=1)

    def nothing(self, *_: Any) -> None:
        """What is learned, and who is forgotten, does not matter."""

    learn_gain = accepted = earned = forget = nothing


@dataclass
class CommitSpy:
    """Counts what verification accepted, and the KV rows that had to move."""

    paths: Counter[int] = field(default_factory=Counter)  # accepted length -> requests
    moved: int = 0

    @property
    def accepted(self) -> int:
        return sum(length * count for length, count in self.paths.items())

    def install(self, patch: Any) -> None:
        spy, stock = self, ops.commit_kv

        class Ops:
            """``ops`` as a step sees it, with our ``commit_kv``."""

            def __getattr__(self, name: str) -> Any:
                return getattr(ops, name)

            def commit_kv(
                self,
                caches: Any,
                layout: Any,
                block_table: torch.Tensor,
                prefix_lens: torch.Tensor,
                paths: torch.Tensor,
                lengths: torch.Tensor,
            ) -> None:
                spy.paths.update(lengths.tolist())
                in_place = torch.arange(1, paths.shape[1] + 1, device=paths.device)
                on_path = in_place <= lengths[:, None]
                spy.moved += int((on_path & (paths != in_place)).sum())
                stock(caches, layout, block_table, prefix_lens, paths, lengths)

        patch(step_module, "ops", Ops())


class PlantedWorker:
    """Plants in a worker process: the ``worker_extension_cls`` of such engines."""

    def plant(self, seed: int) -> None:
        Planter(seed).install(setattr)
        self._planted_commits = CommitSpy()
        self._planted_commits.install(setattr)
        self._planted_texts: defaultdict[str, list[int]] = defaultdict(list)
        stock = Drafting.draft

        def draft(drafting: Drafting, step: FinishedStep) -> GrownTrees:
            for request, emitted in zip(step.requests, step.emitted, strict=True):
                self._planted_texts[request] += emitted
            return stock(drafting, step)

        Drafting.draft = draft

    def planted_texts(self) -> tuple[int, int, list[list[int]]]:
        """Rows accepted, rows moved, and the tokens of every request."""
        spy = self._planted_commits
        return spy.accepted, spy.moved, list(self._planted_texts.values())


def padded_trees(
    trees: list[tuple[list[int], list[int]]],  # tokens and parents of each
    max_nodes: int,
) -> GrownTrees:
    """The trees as a head would return them."""
    sizes = torch.tensor([len(tokens) for tokens, _ in trees], dtype=torch.int32)
    tokens = _padded([tokens for tokens, _ in trees], max_nodes, NO_TOKEN)
    parents = _padded([parents for _, parents in trees], max_nodes, 0).int()
    depths = (tokens != NO_TOKEN).int()  # not the levels: nobody asks
    joint = torch.zeros_like(tokens, dtype=torch.float32)
    joint[tokens == NO_TOKEN] = -torch.inf
    sources = torch.full_like(tokens, Source.HEAD, dtype=torch.int8)
    return GrownTrees(tokens, parents, depths, joint, sizes, sources)


def _padded(rows: list[list[int]], width: int, fill: int) -> torch.Tensor:
    """Lists of different lengths -> [rows, width] int64."""
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])
