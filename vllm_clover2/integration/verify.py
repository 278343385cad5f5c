# SPDX-License-Identifier: Apache-2.0
"""What one target pass verifies: the drafts of all requests as one batch of trees.

A draft is remembered from the step that proposed it until the step that verifies it.
vLLM's scheduler carries only its tokens, may cut the list anywhere, may leave a
request out for some steps, and may replace the list by placeholders; so a draft is
found by request id, and used only if the text has not moved on and the tokens agree.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from vllm.logger import init_logger

from vllm_clover2.integration.attention import TreeRows
from vllm_clover2.tree.masks import depths_and_ancestors
from vllm_clover2.tree.types import MAX_ROWS, NO_TOKEN, Source, TreeBatch

logger = init_logger(f"vllm.{__name__}")


@dataclass(frozen=True)
class Draft:
    """One request's proposed tree, nodes in the order sent to the scheduler."""

    num_tokens: int  # length of the request's text when it was proposed
    tokens: list[int]
    parents: np.ndarray  # [nodes] int32, row numbers (0 = root)
    sources: np.ndarray  # [nodes] int8, who proposed each
    is_chain: bool  # every node is the only child of the row before it


class DraftStore:
    """Drafts waiting for verification, by request id, and why some were not trees."""

    def __init__(self, counts: Counter[str]) -> None:
        self._drafts: dict[str, Draft] = {}
        self.counts = counts

    def put(self, request_id: str, draft: Draft) -> None:
        """Remember a draft until it is verified or replaced."""
        self._drafts[request_id] = draft

    def drop(self, request_id: str) -> None:
        """Forget the request's draft, if any."""
        self._drafts.pop(request_id, None)

    def scheduled(self, request_id: str, num_tokens: int, tokens: list[int]) -> Draft:
        """The draft that the scheduler's ``tokens`` stand for.

        An unknown draft is read as a chain, which is exact for any tokens: a row is
        accepted only if the target picks its token after the rows before it.
        """
        num_nodes = len(tokens)
        draft = self._drafts.get(request_id)
        if (
            draft is not None
            and draft.num_tokens == num_tokens
            and draft.tokens[:num_nodes] == tokens
        ):
            if num_nodes < len(draft.tokens):
                self.counts["trimmed by the scheduler"] += 1
            return dataclasses.replace(
                draft,
                tokens=tokens,
                parents=draft.parents[:num_nodes],
                sources=draft.sources[:num_nodes],
            )
        placeholders = tokens[0] == NO_TOKEN
        self.fell_back("placeholder draft" if placeholders else "unknown draft")
        unknown = np.full(num_nodes, Source.HEAD, dtype=np.int8)
        parents = np.arange(num_nodes, dtype=np.int32)
        return Draft(num_tokens, tokens, parents, unknown, is_chain=True)

    def fell_back(self, reason: str) -> None:
        """Count a request that gets less than a tree in a step; log the first one."""
        self.counts[reason] += 1
        if self.counts[reason] == 1:
            logger.info("clover2: a request is verified without its tree: %s", reason)


@dataclass(frozen=True)
class VerifyBatch:
    """Rows whose logits a step computes: of each request its root, then its nodes.

    ``trees`` numbers rows over the whole batch; its parents, and accepted paths, count
    within a request, 0 being its root.
    """

    trees: TreeBatch
    row_counts: np.ndarray  # [R] int32 rows of each request, 1 = only its root
    root_positions: np.ndarray  # [R] int32 position (and KV slot number) of each root
    root_query_rows: np.ndarray  # [R] int32 index of each root in the step's rows
    tree_requests: np.ndarray  # [T] requests whose rows branch
    sources: np.ndarray  # [rows] int8 who proposed each node, roots: -1
    ranks: np.ndarray  # [rows] int64 place of each node among its siblings, from 1
    query_rows: int  # rows of the whole step, prompts included
    max_depth: int

    @property
    def num_requests(self) -> int:
        """Requests in the batch, those in the middle of their prompt included."""
        return len(self.root_positions)

    @classmethod
    def build(
        cls,
        drafts: Sequence[Draft | None],
        num_computed: np.ndarray,  # [R] tokens with KV before this step
        num_scheduled: np.ndarray,  # [R] rows of this step
    ) -> "VerifyBatch":
        """Lay the requests' drafts (None: only a root) out as flat arrays."""
        counts = np.array(
            [1 + len(d.tokens) if d else 1 for d in drafts], dtype=np.int32
        )
        row_offsets = _offsets(counts)
        is_node = np.ones(row_offsets[-1], dtype=bool)
        is_node[row_offsets[:-1]] = False
        tokens = np.full(len(is_node), NO_TOKEN, dtype=np.int64)
        parents = np.full(len(is_node), -1, dtype=np.int32)
        sources = np.full(len(is_node), -1, dtype=np.int8)
        if len(is_node) > len(drafts):
            tokens[is_node] = np.concatenate([d.tokens for d in drafts if d])
            parents[is_node] = np.concatenate([d.parents for d in drafts if d])
            sources[is_node] = np.concatenate([d.sources for d in drafts if d])
        offsets, rows = torch.from_numpy(row_offsets), torch.from_numpy(parents)
        depths, ancestors = depths_and_ancestors(rows, offsets, int(counts.max()))
        return cls(
            trees=TreeBatch(offsets, torch.from_numpy(tokens), rows, depths, ancestors),
            row_counts=counts,
            root_positions=(num_computed + num_scheduled - counts).astype(np.int32),
            root_query_rows=(np.cumsum(num_scheduled) - counts).astype(np.int32),
            tree_requests=np.flatnonzero(
                [d is not None and not d.is_chain for d in drafts]
            ),
            sources=sources,
            ranks=_sibling_ranks(parents, counts),
            query_rows=int(num_scheduled.sum()),
            max_depth=int(depths.max()),
        )

    def to(self, device: torch.device) -> "VerifyBatch":
        """The batch with its trees on ``device``."""
        if device.type == "cpu":
            return self
        trees = TreeBatch(
            *(
                getattr(self.trees, field.name).to(device, non_blocking=True)
                for field in dataclasses.fields(TreeBatch)
            )
        )
        return dataclasses.replace(self, trees=trees)

    def positions(self) -> torch.Tensor:
        """RoPE position of every row [rows] int64: its root's plus its depth."""
        roots = np.repeat(self.root_positions.astype(np.int64), self.row_counts)
        depths = self.trees.depths
        return torch.from_numpy(roots).to(depths.device) + depths

    def tree_rows(self, least_requests: float = math.inf) -> TreeRows | None:
        """What attends along trees.

        Beside a tree roots and chains are taken for trees as well, and without one
        where there are at least so many requests; unless there are prompt rows, which
        vLLM's attention has to run for in any case.
        """
        requests = self.tree_requests
        if not len(requests) and self.num_requests < least_requests:
            return None
        if int(self.row_counts.sum()) == self.query_rows:
            requests = np.arange(self.num_requests)
        elif not len(requests):
            return None
        ancestors, among = self.trees.ancestors, None
        device = ancestors.device

        def on_device(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array).to(device, non_blocking=True)

        counts = self.row_counts[requests]
        if len(requests) < self.num_requests:
            among = on_device(requests)
            in_tree = np.isin(np.arange(self.num_requests), requests)
            ancestors = ancestors[on_device(np.repeat(in_tree, self.row_counts))]
        return TreeRows(
            requests=among,
            prefix_lens=on_device(self.root_positions[requests]),
            query_starts=on_device(self.root_query_rows[requests]),
            row_offsets=on_device(_offsets(counts)),
            ancestors=ancestors,
            covers_batch=int(counts.sum()) == self.query_rows,
        )


def likeliest_path(parents: np.ndarray) -> list[int]:
    """Rows of the path that follows the likeliest child from the root.

    >>> likeliest_path(np.array([0, 0, 2, 1, 4]))
    [1, 4, 5]
    """
    path: list[int] = []
    children = np.flatnonzero(parents == 0)
    while len(children):
        path.append(int(children[0]) + 1)  # siblings stand in falling order
        children = np.flatnonzero(parents == path[-1])
    return path


def _sibling_ranks(parents: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Place of each row among those with the same parent in its request, from 1."""
    owners = np.repeat(np.arange(len(counts)), counts)
    family = owners * (MAX_ROWS + 1) + parents
    order = np.argsort(family, kind="stable")  # siblings stand in falling order
    ordered = family[order]
    ranks = np.empty_like(order)
    ranks[order] = np.arange(len(order)) - np.searchsorted(ordered, ordered) + 1
    return ranks


def _offsets(counts: np.ndarray) -> np.ndarray:
    """[n] counts -> [n + 1] int32 start of each, and the end."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
