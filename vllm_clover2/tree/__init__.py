# SPDX-License-Identifier: Apache-2.0
"""Trees of drafted tokens as plain data: shapes, growth, masks, walk."""

from vllm_clover2.tree.context import Calibration, ContextLimits
from vllm_clover2.tree.grower import Growth, TreeGrower
from vllm_clover2.tree.growth import Draft, DynamicTree, grow_dynamic, grow_static
from vllm_clover2.tree.masks import depths_and_ancestors
from vllm_clover2.tree.options import TreeOptions
from vllm_clover2.tree.shapes import TreeShape, chain, paper_tree
from vllm_clover2.tree.types import (
    MAX_NODES,
    MAX_ROWS,
    ContextNodes,
    GrownTrees,
    Source,
    TopK,
    TreeBatch,
    check_parents,
)
from vllm_clover2.tree.walk import first_matching_child, request_of_row

__all__ = [
    "MAX_NODES",
    "MAX_ROWS",
    "Calibration",
    "ContextLimits",
    "ContextNodes",
    "Draft",
    "DynamicTree",
    "GrownTrees",
    "Growth",
    "Source",
    "TopK",
    "TreeBatch",
    "TreeGrower",
    "TreeOptions",
    "TreeShape",
    "chain",
    "check_parents",
    "depths_and_ancestors",
    "first_matching_child",
    "grow_dynamic",
    "grow_static",
    "paper_tree",
    "request_of_row",
]
