# SPDX-License-Identifier: Apache-2.0
"""Trees as plain data.

A request's *rows* are its root (row 0: the last committed token, not drafted) and the
drafted *nodes* 1..N below it. A node's parent is a row number and smaller than its own,
so every prefix of the rows is a tree.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import torch

from vllm_clover2.tree.masks import depths_and_ancestors

# Ancestors-or-self of a row are the bits of one 64-bit word.
MAX_ROWS = 64
MAX_NODES = MAX_ROWS - 1
NO_TOKEN = -1


class Source(IntEnum):
    """Who proposed a node."""

    HEAD = 0
    CONTEXT = 1  # the request's own text
    BOTH = 2


class GrownTrees(NamedTuple):
    """Freshly drafted trees of B requests, padded to N nodes; node i is row i + 1."""

    tokens: torch.Tensor  # [B, N] int64, target vocabulary
    parents: torch.Tensor  # [B, N] int32, row numbers, 0 = root
    depths: torch.Tensor  # [B, N] int32, from 1
    joint: torch.Tensor  # [B, N] float32, log-probability of the path
    sizes: torch.Tensor  # [B] int32, valid nodes; the rest is padding
    sources: torch.Tensor  # [B, N] int8, see Source

    @classmethod
    def empty(cls, requests: int, device: torch.device) -> "GrownTrees":
        """Trees without nodes."""
        none = torch.empty((requests, 0), dtype=torch.int64, device=device)
        sizes = torch.zeros(requests, dtype=torch.int32, device=device)
        return cls(none, none.int(), none.int(), none.float(), sizes, none.char())


class ContextNodes(NamedTuple):
    """Continuations of earlier occurrences, B tries padded to N nodes.

    As ``ops.context_nodes`` returns them: node i is row i + 1, row 0 is the root,
    parents come first, and of siblings the one with the longest match.
    """

    tokens: torch.Tensor  # [B, N] int64, -1 padded
    parents: torch.Tensor  # [B, N] int32, row numbers
    depths: torch.Tensor  # [B, N] int32, from 1; padding 0
    matches: torch.Tensor  # [B, N] int32, tokens up to the root that agree
    places: torch.Tensor  # [B, N] int32, occurrences that go on through the node
    sizes: torch.Tensor  # [B] int32

    @property
    def valid(self) -> torch.Tensor:
        """[B, N] bool, not padding."""
        return self.depths > 0


class TopK(NamedTuple):
    """The likeliest children of M nodes, likeliest first."""

    values: torch.Tensor  # [M, k] float32 log-probabilities, at most 0
    tokens: torch.Tensor  # [M, k] int64, target vocabulary


@dataclass(frozen=True)
class TreeBatch:
    """The trees of R requests as flat arrays; request i owns a range of rows."""

    row_offsets: torch.Tensor  # [R + 1] int32
    tokens: torch.Tensor  # [rows] int64, root rows: -1
    parents: torch.Tensor  # [rows] int32, row numbers within the request, root: -1
    depths: torch.Tensor  # [rows] int32, root: 0
    ancestors: torch.Tensor  # [rows] int64, bit j: row j is ancestor-or-self

    @property
    def num_requests(self) -> int:
        """R."""
        return self.row_offsets.numel() - 1

    @property
    def num_rows(self) -> int:
        """Rows of all requests, roots included."""
        return self.parents.numel()

    @classmethod
    def from_padded(
        cls,
        tokens: torch.Tensor,  # [R, N] int64
        parents: torch.Tensor,  # [R, N] int32, row numbers, 0 = root
        sizes: torch.Tensor,  # [R] nodes to keep of each list, <= N
    ) -> "TreeBatch":
        """Trees trimmed to the first ``sizes`` nodes of each request's list."""
        requests, width = tokens.shape
        if width > MAX_NODES:
            raise ValueError(
                f"a tree has at most {MAX_NODES} nodes, found room for {width}; lower "
                "num_speculative_tokens"
            )
        row_counts = sizes.to(torch.int32) + 1
        row_offsets = torch.zeros(requests + 1, dtype=torch.int32, device=sizes.device)
        torch.cumsum(row_counts, dim=0, dtype=torch.int32, out=row_offsets[1:])
        keep = torch.arange(width + 1, device=sizes.device) < row_counts[:, None]
        root = tokens.new_full((requests, 1), NO_TOKEN)
        flat_tokens = torch.cat((root, tokens), dim=1)[keep]
        flat_parents = torch.cat((root.int(), parents.int()), dim=1)[keep]
        depths, ancestors = depths_and_ancestors(flat_parents, row_offsets, width + 1)
        return cls(row_offsets, flat_tokens, flat_parents, depths, ancestors)

    @classmethod
    def from_lists(
        cls,
        tokens: list[list[int]],  # drafted tokens of each request
        parents: list[list[int]],  # row numbers, 0 = root
        device: torch.device | str = "cpu",
    ) -> "TreeBatch":
        """Trees from Python lists; checks that parents come before their children."""
        flat_tokens, flat_parents, offsets = [], [], [0]
        for request, (own, links) in enumerate(zip(tokens, parents, strict=True)):
            check_parents(links, len(own), f"request {request}")
            flat_tokens += [NO_TOKEN, *own]
            flat_parents += [-1, *links]
            offsets.append(len(flat_tokens))
        row_offsets = torch.tensor(offsets, dtype=torch.int32, device=device)
        parent_rows = torch.tensor(flat_parents, dtype=torch.int32, device=device)
        longest = max((len(own) + 1 for own in tokens), default=1)
        depths, ancestors = depths_and_ancestors(parent_rows, row_offsets, longest)
        token_rows = torch.tensor(flat_tokens, dtype=torch.int64, device=device)
        return cls(row_offsets, token_rows, parent_rows, depths, ancestors)


def check_parents(parents: list[int], num_nodes: int, owner: str) -> None:
    """Raises unless ``parents`` describes a tree of ``num_nodes`` nodes."""
    if len(parents) != num_nodes or num_nodes > MAX_NODES:
        raise ValueError(
            f"{owner}: every node needs one parent and there are at most {MAX_NODES}, "
            f"found {num_nodes} nodes and {len(parents)} parents"
        )
    for row, parent in enumerate(parents, start=1):
        if not 0 <= parent < row:
            raise ValueError(
                f"{owner}: the parent of row {row} must be an earlier row, found "
                f"{parent}; order the nodes parents first"
            )
