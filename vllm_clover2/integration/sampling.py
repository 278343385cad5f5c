# SPDX-License-Identifier: Apache-2.0
"""Which path of each tree the target accepts.

The target's own sampler picks a token after the root; while the pick is a drafted
child, the walk goes on from that child. Every emitted token is thus drawn by vLLM's
sampler from its exact conditional, with the request's parameters, generator and
history: lossless for every deterministic tree, and a seeded request draws the very
numbers it would draw without speculation. Requests that want no more than the argmax
are walked all at once; the sampler is called for each token that others emit, once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.sampler import Sampler

from vllm_clover2.integration.request_sampling import RequestSampling
from vllm_clover2.integration.step import accept
from vllm_clover2.integration.verify import VerifyBatch
from vllm_clover2.tree.types import NO_TOKEN
from vllm_clover2.tree.walk import first_matching_child, request_of_row

_NOT_PICKED = NO_TOKEN - 1
"""Equal to no drafted token, not even to a placeholder."""


@dataclass(frozen=True)
class AcceptedPaths:
    """Outcome of a step's verification."""

    output: SamplerOutput  # sampled_token_ids [R, levels] int32, -1 padded
    paths: torch.Tensor  # [R, max_depth] int32 accepted rows, -1 padded
    lengths: torch.Tensor  # [R] int32


def accept_paths(
    sampler: Sampler,
    logits: torch.Tensor,  # [rows, vocab]
    sampling: RequestSampling,
    batch: VerifyBatch,
    discarded: np.ndarray,  # [R] bool, requests in the middle of their prompt
) -> AcceptedPaths:
    """Sample along the trees; discarded requests draw nothing."""
    sampled = [i for i in sorted(sampling.sampled) if not discarded[i]]
    accepted = _accept_argmax(sampler, logits, batch, sampled)
    if not sampled:
        return accepted
    tokens, paths = accepted.output.sampled_token_ids, accepted.paths
    levels = _Levels(sampler, logits, sampling, batch, discarded)
    logprobs = levels.walk(sampled, tokens, paths)
    lengths = (paths >= 0).sum(dim=1, dtype=torch.int32)
    if any(tensors is not None for _, tensors in logprobs):
        tokens = tokens[:, : int(lengths.max()) + 1]
    output = SamplerOutput(tokens, _request_major(logprobs, tokens.shape))
    return AcceptedPaths(output, paths, lengths)


def _accept_argmax(
    sampler: Sampler,
    logits: torch.Tensor,
    batch: VerifyBatch,
    excluded: list[int],  # requests that are walked otherwise: they emit nothing here
) -> AcceptedPaths:
    """One argmax over all rows, then the walk in one kernel."""
    trees = batch.trees
    if excluded:
        included = np.ones(batch.num_requests, dtype=bool)
        included[excluded] = False
        rows = np.flatnonzero(np.repeat(included, batch.row_counts))
        picks = torch.full_like(trees.tokens, _NOT_PICKED)
        if len(rows):
            index = _on_device(rows, logits.device)
            picks[index] = sampler.greedy_sample(logits[index].float()).long()
    else:
        picks = sampler.greedy_sample(logits.float()).long()
    tokens, paths, lengths = accept(
        picks, trees.tokens, trees.parents, trees.row_offsets, batch.max_depth
    )
    tokens = tokens.clamp(min=NO_TOKEN).int()
    return AcceptedPaths(SamplerOutput(tokens, None), paths, lengths)


def _on_device(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    """The numbers [n] int64 on ``device``."""
    return torch.as_tensor(numbers).to(device, non_blocking=True)


_Logprobs = list[tuple[torch.Tensor, LogprobsTensors | None]]
"""For every level the requests [n] that were sampled, and what the sampler told."""


@dataclass(frozen=True)
class _Levels:
    """Walks by one sampler call per level, over the rows of those that go on."""

    sampler: Sampler
    logits: torch.Tensor
    sampling: RequestSampling
    batch: VerifyBatch
    discarded: np.ndarray

    def walk(
        self,
        requests: list[int],
        tokens: torch.Tensor,  # [R, max_depth + 1] int32, filled in
        paths: torch.Tensor,  # [R, max_depth] int32, filled in
    ) -> _Logprobs:
        """Fill in what these requests emit and accept."""
        texts = self.sampling.output_token_ids
        known = {request: len(texts[request]) for request in requests}
        trees = self.batch.trees
        row_request = request_of_row(trees.row_offsets)
        nodes = torch.zeros_like(trees.row_offsets[:-1])
        logprobs: _Logprobs = []
        try:
            for level in range(tokens.shape[1]):
                index = _on_device(requests, nodes.device)
                picks, told = self._sample(level, requests, index, nodes)
                logprobs.append((index, told))
                tokens[index, level] = picks[index].int()
                if level == paths.shape[1]:
                    break
                nodes = first_matching_child(
                    nodes,
                    picks,
                    trees.tokens,
                    trees.parents,
                    trees.row_offsets,
                    row_request,
                )
                paths[index, level] = nodes[index]
                # The only wait for the device in a level.
                nodes_now, picked = torch.stack([nodes, picks.int()]).tolist()
                requests = [i for i in requests if nodes_now[i] >= 0]
                if not requests:
                    break
                # Penalties, bad words and processors look at these lists, which
                # have to be what plain decoding would have made of them by now.
                for request in requests:
                    texts[request].append(picked[request])
                self.sampling.texts_have_grown()
        finally:
            for request, length in known.items():
                del texts[request][length:]
        return logprobs

    def _sample(
        self, level: int, requests: list[int], index: torch.Tensor, nodes: torch.Tensor
    ) -> tuple[torch.Tensor, LogprobsTensors | None]:
        """Picks [R] int64 below these requests' nodes, and their log-probabilities."""
        roots = self.batch.trees.row_offsets[:-1]
        picks = torch.full_like(roots, _NOT_PICKED, dtype=torch.int64)
        if level == 0 and self.sampling.whole_batch_at_roots:
            output = self.sampler(
                logits=self.logits[roots],
                sampling_metadata=self.sampling.of_all(self.discarded),
            )
            picks[index] = output.sampled_token_ids[index, 0].long()
            told = output.logprobs_tensors
            if told is not None:
                told = LogprobsTensors(*(part[index] for part in told[:3]))
            return picks, told
        output = self.sampler(
            logits=self.logits[roots[index] + nodes[index]],
            sampling_metadata=self.sampling.of(requests, index),
        )
        picks[index] = output.sampled_token_ids[:, 0].long()
        return picks, output.logprobs_tensors


def _request_major(
    levels: _Logprobs,
    shape: torch.Size,  # requests, levels
) -> LogprobsTensors | None:
    """Log-probabilities of levels -> rows ordered by request, then level.

    Tokens that were not sampled, for requests that did not ask, have -inf.
    """
    told = [tensors for _, tensors in levels if tensors is not None]
    if not told:
        return None
    width = max(tensors.logprobs.shape[1] for tensors in told)
    ids = told[0].logprob_token_ids.new_zeros((*shape, width))
    logprobs = told[0].logprobs.new_full((*shape, width), -torch.inf)
    ranks = told[0].selected_token_ranks.new_zeros(shape)
    for level, (requests, tensors) in enumerate(levels):
        if tensors is not None:
            columns = tensors.logprobs.shape[1]
            ids[requests, level, :columns] = tensors.logprob_token_ids
            logprobs[requests, level, :columns] = tensors.logprobs
            ranks[requests, level] = tensors.selected_token_ranks
    return LogprobsTensors(ids.flatten(0, 1), logprobs.flatten(0, 1), ranks.flatten())
