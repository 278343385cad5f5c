# SPDX-License-Identifier: Apache-2.0
"""The options that shape drafted trees: names, ranges and defaults in one place."""

from typing import Literal, Self

import pydantic

from vllm_clover2.tree import shapes
from vllm_clover2.tree.context import ContextLimits
from vllm_clover2.tree.growth import DynamicTree
from vllm_clover2.tree.types import MAX_NODES


class TreeOptions(pydantic.BaseModel):
    """Options of a tree. Unknown names are refused."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    # Nodes per tree. Default: the whole tree if it is static, else 25, the paper's
    # size: on the CPU a verify step over 26 rows costs a quarter more than over one.
    num_speculative_tokens: int | None = pydantic.Field(None, ge=1, le=MAX_NODES)
    # "static" is the paper's tree; a list of paths is a static tree of one's own.
    tree: Literal["chain", "static", "dynamic"] | list[list[int]] = "dynamic"
    # Dynamic trees only. A verified token beyond five levels is rare.
    top_k: int = pydantic.Field(8, ge=1, le=MAX_NODES)
    depth: int = pydantic.Field(5, ge=1, le=MAX_NODES)
    top_p: float = pydantic.Field(1.0, gt=0.0, le=1.0)
    # Dynamic trees only: drop children under this share of their likeliest sibling.
    # Clover-1 has 0.25, for budgets of a few nodes; with 25 it costs 8 % of the tokens
    # per step (SmolLM2-135M, greedy: 2.13 instead of 2.31).
    min_ratio: float = pydantic.Field(0.0, ge=0.0, le=1.0)
    # Dynamic trees and chains: grow and verify fewer nodes where they cost more than
    # they yield (see tree.chooser). Off: always num_speculative_tokens, if the tree has
    # as many.
    adaptive: bool = True
    # Dynamic trees and chains: continuations of earlier occurrences of the text's last
    # tokens, in the same request, are candidates too.
    context: bool = True
    # Levels that such continuations may reach below the root.
    context_depth: int = pydantic.Field(16, ge=1, le=MAX_NODES)
    # Tokens that must agree, and that are compared at most.
    context_min_match: int = pydantic.Field(1, ge=1, le=64)
    context_max_match: int = pydantic.Field(16, ge=1, le=64)

    @pydantic.model_validator(mode="after")
    def _check_size(self) -> Self:
        """A tree of the wanted size must exist."""
        if self.context_min_match > self.context_max_match:
            raise ValueError(
                f"context_min_match must not exceed context_max_match "
                f"({self.context_max_match}), found {self.context_min_match}"
            )
        if self.tree == "dynamic" and not self.context:
            candidates = self.dynamic_tree().num_candidates
            if self.num_nodes > candidates:
                raise ValueError(
                    f"num_speculative_tokens must be at most {candidates}, all nodes "
                    f"tried with top_k {self.top_k} and depth {self.depth}; found "
                    f"{self.num_nodes}: raise top_k or depth"
                )
        elif self.has_fixed_shape:
            self.static_shape()
        return self

    @property
    def has_fixed_shape(self) -> bool:
        """Whether every tree has the same nodes, whatever the draft thinks of them."""
        return self.tree not in ("dynamic", "chain")

    @property
    def num_nodes(self) -> int:
        """Nodes per tree."""
        if self.num_speculative_tokens is not None:
            return self.num_speculative_tokens
        if isinstance(self.tree, list):
            return len(self.tree)
        return self.depth if self.tree == "chain" else 25

    @property
    def max_depth(self) -> int:
        """Levels of the deepest tree."""
        if self.has_fixed_shape:
            return self.static_shape().depth
        if self.tree == "chain":
            return self.num_nodes
        limits = self.context_limits()
        levels = self.depth if limits is None else max(self.depth, limits.max_depth)
        return min(self.num_nodes, levels)

    def context_limits(self) -> ContextLimits | None:
        """What of its own text a request is offered; None: nothing."""
        if self.has_fixed_shape or not self.context:
            return None
        return ContextLimits(
            min_match=self.context_min_match,
            max_match=self.context_max_match,
            max_depth=self.context_depth,
        )

    def static_shape(self) -> shapes.TreeShape:
        """The static tree, cut to ``num_speculative_tokens`` nodes."""
        if self.tree == "static":
            return shapes.paper_tree().first(self.num_nodes)
        if isinstance(self.tree, list):
            return shapes.TreeShape.from_paths(self.tree).first(self.num_nodes)
        raise ValueError(f"{self.tree!r} has no fixed shape; use dynamic_tree()")

    def dynamic_tree(self) -> DynamicTree:
        """The limits of a dynamic tree, or of a chain, which has one node a level."""
        if self.has_fixed_shape:
            raise ValueError(
                f'tree must be "dynamic" or "chain", found {self.tree!r}; use '
                "static_shape()"
            )
        if self.tree == "chain":
            return DynamicTree(self.num_nodes, top_k=1, depth=self.num_nodes)
        return DynamicTree(
            self.num_nodes, self.top_k, self.depth, self.top_p, self.min_ratio
        )
