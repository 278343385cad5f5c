# SPDX-License-Identifier: Apache-2.0
"""Static trees: shapes that are the same for every request and step.

A node is named by its path, the rank of the child taken at every level: [0] is the
root's likeliest child, [0, 1] that node's second.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vllm_clover2.tree.types import MAX_NODES


@dataclass(frozen=True)
class TreeShape:
    """A static tree; node i is row i + 1, level by level, likelier siblings first."""

    paths: tuple[tuple[int, ...], ...]

    @classmethod
    def from_paths(cls, paths: Iterable[Sequence[int]]) -> "TreeShape":
        """Checks and orders a list of paths.

        >>> TreeShape.from_paths([[0, 0], [1], [0]]).parents
        (0, 0, 1)
        """
        ordered = sorted((tuple(path) for path in paths), key=lambda p: (len(p), p))
        known: set[tuple[int, ...]] = {()}
        for path in ordered:
            if not path or any(type(rank) is not int or rank < 0 for rank in path):
                raise ValueError(
                    "a path must be a non-empty list of child ranks from 0, found "
                    f"{list(path)}"
                )
            if path in known:
                raise ValueError(f"each path may be listed once, found two {path}")
            if path[:-1] not in known:
                raise ValueError(
                    f"the parent of path {list(path)} must be in the tree; add "
                    f"{list(path[:-1])}"
                )
            known.add(path)
        if not 1 <= len(ordered) <= MAX_NODES:
            raise ValueError(
                f"a tree must have 1 to {MAX_NODES} nodes, found {len(ordered)}"
            )
        return cls(tuple(ordered))

    @property
    def num_nodes(self) -> int:
        """Nodes, without the root."""
        return len(self.paths)

    @property
    def depth(self) -> int:
        """Levels below the root."""
        return len(self.paths[-1])

    @property
    def parents(self) -> tuple[int, ...]:
        """Parent row of every node, 0 = root."""
        rows = {(): 0} | {path: row for row, path in enumerate(self.paths, start=1)}
        return tuple(rows[path[:-1]] for path in self.paths)

    def first(self, num_nodes: int) -> "TreeShape":
        """The tree of the first ``num_nodes`` nodes."""
        if not 1 <= num_nodes <= self.num_nodes:
            raise ValueError(
                f"num_speculative_tokens must be at most the tree's {self.num_nodes} "
                f"nodes, found {num_nodes}; lower it or list more paths"
            )
        return TreeShape(self.paths[:num_nodes])


def chain(depth: int) -> TreeShape:
    """One node per level."""
    return TreeShape.from_paths([[0] * level for level in range(1, depth + 1)])


def paper_tree() -> TreeShape:
    """The Clover-2 paper's tree of 25 nodes and depth 5.

    In brackets: how many children each node of the level above has, in order.
    """
    levels = ((4,), (3, 2, 2, 1), (3, 2, 2, 1), (3,), (2,))
    paths: list[tuple[int, ...]] = []
    above: list[tuple[int, ...]] = [()]
    for counts in levels:
        level = [
            (*parent, rank)
            # Nodes beyond the listed counts have no children.
            for parent, count in zip(above, counts, strict=False)
            for rank in range(count)
        ]
        paths += level
        above = level
    return TreeShape.from_paths(paths)
