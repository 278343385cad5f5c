# SPDX-License-Identifier: Apache-2.0
"""Drafts for tests that score their whole vocabulary."""

import torch

from vllm_clover2.tree import TopK


class ScoringDraft:
    """What growing asks of a draft, for one that scores its whole vocabulary.

    Its `first` and `advance` return log-probabilities [n, Vd], and `token_ids` the
    target ids of indices.
    """

    def first_top_k(self, hidden: torch.Tensor, k: int) -> tuple[torch.Tensor, TopK]:
        return self._ranked(*self.first(hidden), k)

    def advance_top_k(
        self, state: torch.Tensor, tokens: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, TopK]:
        return self._ranked(*self.advance(state, tokens), k)

    def _ranked(
        self, state: torch.Tensor, scores: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, TopK]:
        scores = scores.masked_fill(scores.isnan(), -torch.inf).float()
        values, ids = scores.topk(min(k, scores.shape[-1]), dim=-1)
        return state, TopK(values, self.token_ids(ids))


class ToyDraft(ScoringDraft):
    """A draft of random weights whose vocabulary is a subset of the target's."""

    def __init__(self, vocabulary: int, hidden: int = 16, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def weights(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        # Odd target ids, so that the two vocabularies cannot be confused.
        self.ids = torch.arange(vocabulary) * 2 + 1
        self.embedding = weights(max(2 * vocabulary, 20), hidden)
        self.head = weights(hidden, vocabulary) / 2

    def first(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return hidden, (hidden @ self.head).log_softmax(dim=-1)

    def advance(
        self, state: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        state = torch.tanh(state + self.embedding[tokens])
        return state, (state @ self.head).log_softmax(dim=-1)

    def token_ids(self, draft_ids: torch.Tensor) -> torch.Tensor:
        return self.ids[draft_ids]
