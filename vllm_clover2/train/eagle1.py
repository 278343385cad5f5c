# SPDX-License-Identifier: Apache-2.0
"""EAGLE-1 in training: starting weights, forward pass, offline drafting."""

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from vllm_clover2.model.eagle1 import Eagle1Config, Eagle1Model
from vllm_clover2.model.llama import DraftCache, Packing, Positions
from vllm_clover2.train.clover2 import DraftVocabulary, Gains
from vllm_clover2.train.config import TrainConfig
from vllm_clover2.train.data import Batch, next_in_text
from vllm_clover2.train.from_target import (
    layer_shape,
    rope_theta,
    start_layers,
    target_record,
)
from vllm_clover2.train.hidden import Target, TargetStates
from vllm_clover2.train.losses import LossRows
from vllm_clover2.tree import TopK

__all__ = ["Eagle1Draft", "Eagle1Replay", "TrainableEagle1", "new_eagle1"]

_NOISE = 0.01  # width of the uniform noise on identities, as in Clover-2


def new_eagle1(
    config: TrainConfig,
    target: Target,
    draft_vocab_ids: torch.Tensor | None,  # [draft_vocab_size] int64, ascending
    gains: Gains | None,  # None: `fc` starts as any nn.Linear, as the original's does
) -> Eagle1Model:
    """A head with the target's layer shape, started from the target's weights.

    With `gains`, `fc` starts as [gain * I | I] plus noise: the feature passes, and
    the token is added at a visible size. The layer then starts from something like
    the states that its weights were trained on, not from a random mixture of them.
    """
    theta = rope_theta(config, target)
    model = Eagle1Model(
        Eagle1Config(
            **layer_shape(target),
            rope_parameters={"rope_type": "default", "rope_theta": theta},
            draft_vocab_ids=None
            if draft_vocab_ids is None
            else draft_vocab_ids.tolist(),
            target=target_record(target),
        )
    )
    if gains is not None:
        with torch.no_grad():
            embedding, feature = model.fc.weight.chunk(2, dim=1)
            model.fc.weight.uniform_(-_NOISE / 2, _NOISE / 2)
            embedding.diagonal().add_(gains.inputs)
            feature.diagonal().add_(1.0)
    start_layers(model.layers, target, config.init_layers)
    return model


class TrainableEagle1(nn.Module):
    """Forward pass of training: one call, so that it can be wrapped (DDP, AMP)."""

    def __init__(self, draft: Eagle1Model) -> None:
        super().__init__()
        self.draft = draft

    def forward(
        self,
        states: TargetStates,
        embeddings: torch.Tensor,  # [N, H] of the next tokens
        packing: Packing,
        rows: LossRows,
    ) -> list[torch.Tensor]:  # outputs of the only step at `rows` [R, H]
        """Teacher-forced: every feature is the target's own."""
        outputs = self.draft.forward_packed(states.post_norm, embeddings, packing)
        return [outputs[rows.position]]


class Eagle1Draft(DraftVocabulary):
    """An EAGLE-1 head as the draft that one tree per request is grown from.

    A node attends to the text up to its root, whose keys and values lie here, and to
    its ancestors and itself, whose keys and values travel in the states: a state row
    is [feature H | key and value KV * D each, per level below the root].
    """

    def __init__(
        self,
        model: Eagle1Model,
        embeddings: torch.Tensor,  # [V, H] the target's input embeddings
        lm_head: torch.Tensor,  # [Vd, H] rows that are scored
        prefix: tuple[torch.Tensor, torch.Tensor],  # keys and values [B, KV, S, D]
        roots: torch.Tensor,  # [B] int64, how many of the S positions count
    ) -> None:
        super().__init__(lm_head, model.draft_vocab_ids)
        self._model = model
        self._embeddings = embeddings
        self._keys, self._values = prefix
        self._roots = roots

    def first_top_k(
        self,
        hidden: torch.Tensor,  # [B, H] features after the roots
        k: int,
    ) -> tuple[torch.Tensor, TopK]:  # [B, H], [B, k]
        return hidden, self._top_k(hidden, k)

    def advance_top_k(
        self, state: torch.Tensor, tokens: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, TopK]:  # one level wider, [M, k]
        state, out = self._step(state, tokens)
        return state, self._top_k(out, k)

    def _step(
        self,
        state: torch.Tensor,  # [M, H + levels * 2 * KV * D] of the parents
        tokens: torch.Tensor,  # [M] int64, M / B rows of each request in order
    ) -> tuple[torch.Tensor, torch.Tensor]:  # one level wider, features [M, H]
        requests, kv_heads, _, head_dim = self._keys.shape
        hidden = self._embeddings.shape[1]
        rows = len(tokens) // requests
        feature = state[:, :hidden].view(requests, rows, hidden)
        # [2, B, KV, rows * levels, D]
        above = state[:, hidden:].reshape(requests, rows, -1, 2, kv_heads, head_dim)
        levels = above.shape[2]
        above = above.permute(3, 0, 4, 1, 2, 5).flatten(3, 4)
        cache = DraftCache(
            [torch.cat([self._keys, above[0]], dim=2)],
            [torch.cat([self._values, above[1]], dim=2)],
        )
        positions = Positions.of(
            (self._roots + levels)[:, None, None].expand(-1, 1, rows),
            self._model.config,
            self._mask(rows, levels),
        )
        embeddings = self._embeddings[tokens].view(requests, rows, hidden)
        out = self._model(feature, embeddings, positions, cache).flatten(0, 1)
        own = [x[:, :, -rows:].transpose(1, 2) for x in (*cache.keys, *cache.values)]
        grown = torch.stack(own, dim=2).view(len(tokens), -1)  # [M, 2 * KV * D]
        return torch.cat([out, state[:, hidden:], grown], 1), out

    def _mask(self, rows: int, levels: int) -> torch.Tensor:
        """[B, 1, rows, S + rows * levels + rows] bool: text, ancestors, itself."""
        device = self._roots.device
        columns = torch.arange(self._keys.shape[2], device=device)
        text = (columns < self._roots[:, None])[:, None].expand(-1, rows, -1)
        itself = torch.eye(rows, dtype=torch.bool, device=device)
        ancestors = itself.repeat_interleave(levels, dim=1)
        tree = torch.cat([ancestors, itself], dim=1).expand(len(text), -1, -1)
        return torch.cat([text, tree], dim=2)[:, None]


class Eagle1Replay:
    """Drafts at any position of recorded answers; see `architectures.Replay`.

    Serving computes the keys and values of accepted tokens again from the target's
    own features, as they are here.
    """

    def __init__(
        self,
        model: Eagle1Model,
        target: Target,
        states: TargetStates,
        batch: Batch,
    ) -> None:
        dtype = model.fc.weight.dtype
        self._model = model
        self._embeddings = target.embeddings.to(dtype)
        ids = model.draft_vocab_ids
        self._lm_head = (target.lm_head if ids is None else target.lm_head[ids]).to(
            dtype
        )
        device = self._lm_head.device
        self._starts = batch.starts.to(device)
        next_ids = next_in_text(batch.input_ids.to(device), batch.lengths)
        cache = DraftCache()
        self._features = model.forward_packed(
            states.post_norm.to(dtype),
            self._embeddings[next_ids],
            Packing(batch.lengths),
            cache,
        )
        # [answers, longest, KV, D] each
        self._keys, self._values = (
            pad_sequence(rows[0].transpose(0, 1).split(batch.lengths), batch_first=True)
            for rows in (cache.keys[0], cache.values[0])
        )

    def at(
        self,
        answers: torch.Tensor,  # [B] int64, numbers in the batch
        roots: torch.Tensor,  # [B] int64, positions of the trees' roots
    ) -> tuple[Eagle1Draft, torch.Tensor]:  # and the features [B, H] to grow from
        # The root's own position is the first that the tree computes.
        longest = int(roots.max())
        keys, values = (
            rows[answers, :longest].transpose(1, 2)
            for rows in (self._keys, self._values)
        )
        draft = Eagle1Draft(
            self._model, self._embeddings, self._lm_head, (keys, values), roots
        )
        return draft, self._features[self._starts[answers] + roots - 1]
