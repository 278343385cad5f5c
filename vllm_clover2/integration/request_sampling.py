# SPDX-License-Identifier: Apache-2.0
"""What vLLM's sampler has to know of some of a step's requests.

The walk along the trees samples fewer requests from level to level, and never those
whose picks are the argmax of unprocessed rows.
"""

import copy
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.v1.sample.logits_processor import (
    AdapterLogitsProcessor,
    BatchUpdate,
    LogitsProcessor,
    LogitsProcessors,
    MoveDirectionality,
)
from vllm.v1.sample.logits_processor.builtin import (
    LogitBiasLogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.worker.gpu_input_batch import InputBatch


class RequestSampling:
    """Who of a batch needs vLLM's sampler, and its metadata for any of these.

    Requests are named by their index in the batch. It holds for all steps until a
    request comes, goes or moves.
    """

    def __init__(self, batch: InputBatch) -> None:
        def indices(*groups: Collection[str]) -> set[int]:
            return {batch.req_id_to_index[name] for group in groups for name in group}

        self._batch = batch
        self._metadata = batch.sampling_metadata
        self._random = indices(batch.random_reqs)
        self._top_p = indices(batch.top_p_reqs)
        self._top_k = indices(batch.top_k_reqs)
        self._allowed = indices(batch.has_allowed_token_ids)
        self._logprobs = indices(batch.num_logprobs, batch.logprob_token_ids)
        self._penalized = indices(
            batch.frequency_penalties_reqs,
            batch.presence_penalties_reqs,
            batch.repetition_penalties_reqs,
        )
        self._thinking = _thinking_requests(batch)
        self._always_sampled = self._random.union(
            self._penalized,
            self._allowed,
            self._logprobs,
            self._thinking,
            batch.bad_words_token_ids,
        )
        self._opaque = opaque_processor(batch.logitsprocs) is not None
        self._of_whole_batch = [
            processor
            for processor in batch.logitsprocs.all
            if not _tells_requests(processor)
        ]

    def holds_for(self, batch: InputBatch) -> bool:
        """Whether these are still the batch's requests, each in its place.

        vLLM makes a new metadata object for every batch that changes in this.
        """
        return batch.sampling_metadata is self._metadata

    @property
    def sampled(self) -> set[int]:
        """Requests that need the sampler: argmax of their rows is not their pick."""
        if self._of_whole_batch:
            return set(range(self._batch.num_reqs))
        changed = (
            changed_requests(processor)
            for processor in self._batch.logitsprocs.non_argmax_invariant
        )
        return self._always_sampled.union(*changed)

    @property
    def whole_batch_at_roots(self) -> bool:
        """Whether the roots of all requests have to be sampled in one call.

        Something that is called there knows requests by their place in the batch.
        """
        return self._opaque or bool(self._thinking)

    @property
    def output_token_ids(self) -> list[list[int]]:
        """What each request has written: the very lists that processors look at."""
        return self._batch.req_output_token_ids

    def texts_have_grown(self) -> None:
        """Tell processors that follow the texts, as plain decoding does every step."""
        for processor in self._of_whole_batch:
            processor.update_state(None)

    def of_all(self, discarded: np.ndarray) -> SamplingMetadata:
        """Metadata of the whole batch.

        Generators of ``discarded`` requests [R] bool are hidden: they must not draw.
        """
        metadata = copy.copy(self._metadata)
        metadata.generators = {
            request: generator
            for request, generator in metadata.generators.items()
            if not discarded[request]
        }
        metadata.spec_token_ids = None
        return metadata

    def of(
        self,
        requests: list[int],  # in rising order
        index: torch.Tensor,  # [n] int64, the same on the device
    ) -> SamplingMetadata:
        """Metadata of a batch of these requests."""
        batch, whole = self._batch, self._metadata

        def rows(tensor: torch.Tensor, wanted_by: Collection[int]) -> Any:
            return tensor[index] if _any(requests, wanted_by) else None

        def entries(states: dict[int, Any] | None) -> dict[int, Any]:
            return {
                place: states[request]
                for place, request in enumerate(requests)
                if states and request in states
            }

        bad_words = entries(whole.bad_words_token_ids)
        penalized = _any(requests, self._penalized)
        return SamplingMetadata(
            temperature=rows(whole.temperature, self._random),
            all_greedy=not _any(requests, self._random),
            all_random=self._random.issuperset(requests),
            top_p=rows(whole.top_p, self._top_p),
            top_k=rows(whole.top_k, self._top_k),
            generators=entries(whole.generators),
            max_num_logprobs=(
                whole.max_num_logprobs if _any(requests, self._logprobs) else None
            ),
            no_penalties=not penalized,
            prompt_token_ids=rows(whole.prompt_token_ids, self._penalized),
            frequency_penalties=rows(whole.frequency_penalties, self._penalized),
            presence_penalties=rows(whole.presence_penalties, self._penalized),
            repetition_penalties=rows(whole.repetition_penalties, self._penalized),
            output_token_ids=[self.output_token_ids[request] for request in requests]
            if penalized or bad_words
            else [],
            allowed_token_ids_mask=rows(whole.allowed_token_ids_mask, self._allowed),
            bad_words_token_ids=bad_words,
            logitsprocs=_processors_of(requests, index, batch),
            logprob_token_ids=entries(whole.logprob_token_ids) or None,
        )


def _any(requests: Iterable[int], among: Collection[int]) -> bool:
    return any(request in among for request in requests)


def _thinking_requests(batch: InputBatch) -> set[int]:
    if batch.thinking_budget_state_holder is None:
        return set()
    return set(batch.thinking_budget_state_holder._state)


STATES: dict[Any, str] = {
    MinTokensLogitsProcessor: "min_toks",
    LogitBiasLogitsProcessor: "biases",
    AdapterLogitsProcessor: "req_info",
}
"""Processors that keep a dict of states by request, and its name."""


def _states_name(processor: LogitsProcessor) -> str | None:
    cls: Any = type(processor)
    adapter = AdapterLogitsProcessor
    if (
        issubclass(cls, adapter)
        and cls.apply is adapter.apply
        and cls.update_state is adapter.update_state
    ):
        cls = adapter
    return STATES.get(cls)


def _tells_requests(processor: LogitsProcessor) -> bool:
    """Whether it is known whose rows the processor changes; follows from its class."""
    return type(processor) is MinPLogitsProcessor or _states_name(processor) is not None


def changed_requests(processor: LogitsProcessor) -> set[int] | None:
    """Requests whose rows the processor changes; None: it does not tell."""
    if type(processor) is MinPLogitsProcessor:
        return _with_min_p(processor)
    name = _states_name(processor)
    return None if name is None else set(getattr(processor, name))


def _with_min_p(processor: MinPLogitsProcessor) -> set[int]:
    return set(np.flatnonzero(processor.min_p_cpu).tolist())


def _min_p_of(
    index: torch.Tensor, processor: MinPLogitsProcessor
) -> MinPLogitsProcessor:
    part = copy.copy(processor)
    part.min_p = processor.min_p[index]
    return part


def opaque_processor(processors: LogitsProcessors) -> LogitsProcessor | None:
    """A processor that can only be called as plain vLLM does, if there is one.

    That is once a step and for the whole batch: it may count its calls, or keep in
    any way a state that is not a function of each request's text. Its class can deny
    this by ``depends_on_text_alone = True``.
    """
    for processor in processors.all:
        if not _tells_requests(processor) and not getattr(
            processor, "depends_on_text_alone", False
        ):
            return processor
    return None


@dataclass(frozen=True)
class _InWholeBatch:
    """Applies a processor that knows requests by their place in the whole batch."""

    processor: LogitsProcessor
    index: torch.Tensor  # [n] the places of those that are sampled
    num_requests: int

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        whole = logits.new_zeros((self.num_requests, logits.shape[1]))
        whole[self.index] = logits
        return self.processor.apply(whole)[self.index]


def _processors_of(
    requests: list[int], index: torch.Tensor, batch: InputBatch
) -> LogitsProcessors:
    """The processors as plain vLLM would have them in a batch of these requests."""
    part = LogitsProcessors()
    for name in ("argmax_invariant", "non_argmax_invariant"):
        processors = [
            _processor_of(requests, index, processor, batch.num_reqs)
            for processor in getattr(batch.logitsprocs, name)
        ]
        setattr(part, name, [each for each in processors if each is not None])
    return part


def _processor_of(
    requests: list[int],
    index: torch.Tensor,
    processor: LogitsProcessor,
    num_requests: int,
) -> LogitsProcessor | _InWholeBatch | None:
    """The processor in a batch of these requests; None: it changes none of them.

    Only states are made anew, the processor's own code moves them to their new places.
    """
    changed = changed_requests(processor)
    if changed is None:
        return _InWholeBatch(processor, index, num_requests)
    if changed.isdisjoint(requests):
        return None
    if type(processor) is MinPLogitsProcessor:
        return _min_p_of(index, processor)
    part = copy.copy(processor)
    name = _states_name(processor)
    states = getattr(processor, name)
    setattr(part, name, {i: states[i] for i in requests if i in states})
    moved = [
        (request, place, MoveDirectionality.UNIDIRECTIONAL)
        for place, request in enumerate(requests)
    ]
    part.update_state(BatchUpdate(len(requests), removed=[], added=[], moved=moved))
    return part
