# SPDX-License-Identifier: Apache-2.0
"""Static drafting against the tree tokens of the reference implementation."""

import json
from pathlib import Path

import pytest
import torch
from golden_cases import case_folders
from safetensors.torch import load_file
from scoring_draft import ScoringDraft

from vllm_clover2.model import Clover2Model
from vllm_clover2.model.weights import from_reference
from vllm_clover2.tree import grow_static, paper_tree


class PlainDraft(ScoringDraft):
    """The plain model's recurrent head as a draft of the whole vocabulary."""

    def __init__(self, case: Path) -> None:
        reference = load_file(case / "weights.safetensors")
        config = json.loads((case / "config.json").read_text())
        own_config, state, _ = from_reference(reference, config)
        model = Clover2Model(own_config)
        model.load_state_dict(state)
        self.head = model.recurrent
        self.lm_head = reference["lm_head.weight"]

    def log_probs(self, out: torch.Tensor) -> torch.Tensor:
        return (out @ self.lm_head.T).log_softmax(dim=-1)

    def first(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return hidden, self.log_probs(self.head.first(hidden))

    def advance(
        self, state: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        state, out = self.head.advance(state, self.lm_head[tokens])
        return state, self.log_probs(out)

    def token_ids(self, draft_ids: torch.Tensor) -> torch.Tensor:
        return draft_ids


@torch.inference_mode()
@pytest.mark.parametrize("case", case_folders(), ids=lambda case: case.name)
def test_paper_tree_has_the_reference_tokens(case: Path) -> None:
    draft = PlainDraft(case)
    golden = load_file(case / "decode.safetensors")
    steps = [key for key in golden if key.endswith(".clover_h_last")]
    assert len(steps) > 1
    # All steps of the case as one batch of requests.
    hidden = torch.cat([golden[key][0] for key in steps])
    grown = grow_static(draft, hidden, paper_tree())
    for request, key in enumerate(steps):
        expected = golden[key.replace("clover_h_last", "tree_tokens")]
        assert torch.equal(grown.tokens[request], expected[1:])
