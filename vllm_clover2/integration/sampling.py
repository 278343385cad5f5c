# SPDX-License-Identifier: Apache-2.0
"""Which path of each tree the target accepts.

The target's own sampler picks a token after the root; while the pick is a drafted
child, the walk goes on from that child. Every emitted token is thus drawn by vLLM's
sampler from its exact conditional, with the request's parameters, generator and
history: lossless for every deterministic tree, and a seeded request draws the very
numbers it would draw without speculation.
"""

import dataclasses
from dataclasses import dataclass

import torch
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.logits_processor.builtin import MinTokensLogitsProcessor
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from vllm_clover2.integration.step import accept
from vllm_clover2.integration.verify import VerifyBatch
from vllm_clover2.tree.types import NO_TOKEN
from vllm_clover2.tree.walk import first_matching_child, request_of_row


@dataclass(frozen=True)
class AcceptedPaths:
    """Outcome of a step's verification."""

    output: SamplerOutput  # sampled_token_ids [R, levels] int32, -1 padded
    paths: torch.Tensor  # [R, max_depth] int32 accepted rows, -1 padded
    lengths: torch.Tensor  # [R] int32


def accept_paths(
    sampler: Sampler,
    logits: torch.Tensor,  # [rows, vocab]
    metadata: SamplingMetadata,  # one entry per request
    batch: VerifyBatch,
    discarded: torch.Tensor,  # [R] bool, requests in the middle of their prompt
) -> AcceptedPaths:
    """Sample along the trees; discarded requests draw nothing and emit nothing."""
    if _picks_are_argmax(metadata):
        return _accept_greedy(sampler, logits, batch)
    return _accept_by_level(sampler, logits, metadata, batch, discarded)


def _picks_are_argmax(metadata: SamplingMetadata) -> bool:
    """Whether every pick is the argmax of its unprocessed row."""
    holder = metadata.thinking_budget_state_holder
    return (
        metadata.all_greedy
        and metadata.max_num_logprobs is None
        and not metadata.logprob_token_ids
        and metadata.no_penalties
        and metadata.allowed_token_ids_mask is None
        and not metadata.bad_words_token_ids
        and not _min_tokens(metadata)
        and not (holder is not None and holder.has_tracked_requests())
    )


def _accept_greedy(
    sampler: Sampler, logits: torch.Tensor, batch: VerifyBatch
) -> AcceptedPaths:
    """One argmax over all rows, then the walk in one kernel."""
    picks = sampler.greedy_sample(logits.float()).long()
    trees = batch.trees
    tokens, paths, lengths = accept(
        picks, trees.tokens, trees.parents, trees.row_offsets, batch.max_depth
    )
    return AcceptedPaths(SamplerOutput(tokens.int(), None), paths, lengths)


def _accept_by_level(
    sampler: Sampler,
    logits: torch.Tensor,
    metadata: SamplingMetadata,
    batch: VerifyBatch,
    discarded: torch.Tensor,
) -> AcceptedPaths:
    """One sampler call per level, over the current row of each request."""
    trees = batch.trees
    roots = trees.row_offsets[:-1]
    row_request = request_of_row(trees.row_offsets)
    nodes = torch.zeros_like(roots).masked_fill(discarded, -1)
    histories: list[list[int]] = [[] for _ in range(batch.num_requests)]
    sampled, paths, logprobs = [], [], []
    for level in range(batch.max_depth + 1):
        active = nodes >= 0
        output = sampler(
            logits=logits[roots + nodes.clamp(min=0)],
            sampling_metadata=_metadata_at(metadata, level, active, histories),
        )
        picks = output.sampled_token_ids[:, 0].long()
        picks = torch.where(active, picks, NO_TOKEN)
        sampled.append(picks)
        logprobs.append(output.logprobs_tensors)
        nodes = first_matching_child(
            nodes, picks, trees.tokens, trees.parents, trees.row_offsets, row_request
        )
        paths.append(nodes)
        if not bool((nodes >= 0).any()):
            break
        if metadata.output_token_ids:
            for history, pick in zip(histories, picks.tolist(), strict=True):
                history.append(pick)
    path_rows = torch.stack(paths[: batch.max_depth] or [nodes], dim=1)
    return AcceptedPaths(
        SamplerOutput(torch.stack(sampled, dim=1).int(), _request_major(logprobs)),
        path_rows,
        (path_rows >= 0).sum(dim=1, dtype=torch.int32),
    )


def _metadata_at(
    metadata: SamplingMetadata,
    level: int,
    active: torch.Tensor,  # [R] bool
    histories: list[list[int]],  # tokens picked in this step, by request
) -> SamplingMetadata:
    """The step's metadata as plain decoding would have it ``level`` tokens later.

    Generators of requests that stopped are hidden: they must not draw.
    """
    generators = metadata.generators
    if generators:
        is_active = active.tolist()
        generators = {i: g for i, g in generators.items() if is_active[i]}
    outputs = metadata.output_token_ids
    if outputs and level:
        outputs = [
            [*output, *history]
            for output, history in zip(outputs, histories, strict=True)
        ]
    changes = {
        "generators": generators,
        "output_token_ids": outputs,
        "spec_token_ids": None,
    }
    if level:
        # Requests with a thinking budget have no drafts, so they ended at level 0.
        changes["thinking_budget_state_holder"] = None
        min_tokens = _min_tokens(metadata)
        if min_tokens:
            later = _MinTokensAtLevel(min_tokens[0], level)
            changes["logitsprocs"] = _replaced(
                metadata.logitsprocs, min_tokens[0], later
            )
    return dataclasses.replace(metadata, **changes)


def _min_tokens(metadata: SamplingMetadata) -> list[MinTokensLogitsProcessor]:
    """The processor of ``min_tokens``, if it masks any request now."""
    return [
        processor
        for processor in metadata.logitsprocs.non_argmax_invariant
        if isinstance(processor, MinTokensLogitsProcessor) and processor.min_toks
    ]


class _MinTokensAtLevel:
    """``min_tokens`` for requests that are ``level`` tokens further than known."""

    def __init__(self, stock: MinTokensLogitsProcessor, level: int) -> None:
        self.stops = [
            (request, list(stop_ids), structured)
            for request, (least, output, stop_ids, structured) in stock.min_toks.items()
            if len(output) + level < least
        ]

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for request, stop_ids, structured in self.stops:
            row = logits[request]
            allowed_by_grammar = row[stop_ids]
            row[stop_ids] = float("-inf")
            # As in the stock processor: a grammar that allows nothing else wins.
            if structured and torch.isneginf(row).all():
                row[stop_ids] = allowed_by_grammar
        return logits


def _replaced(
    processors: LogitsProcessors, old: object, new: object
) -> LogitsProcessors:
    copy = LogitsProcessors()
    copy.argmax_invariant = processors.argmax_invariant
    copy.non_argmax_invariant = [
        new if processor is old else processor
        for processor in processors.non_argmax_invariant
    ]
    return copy


def _request_major(levels: list[LogprobsTensors | None]) -> LogprobsTensors | None:
    """Per-level log-probabilities [R, k] -> rows ordered by request, then level."""
    if levels[0] is None:
        return None

    def interleave(parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(parts, dim=1).flatten(0, 1)

    return LogprobsTensors(
        interleave([level.logprob_token_ids for level in levels]),
        interleave([level.logprobs for level in levels]),
        interleave([level.selected_token_ranks for level in levels]),
    )
