# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels that Model Runner V2 launches, in torch.

A stand-in has the name of its kernel, and takes of the kernel's arguments those that it
needs, by their names. Tables of pointers cannot be followed here; the two methods that
launch kernels with such are replaced themselves.
"""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import fake_gpu
import numpy as np
import torch
from fake_gpu import inside_a_kernel

_GPU = "vllm.v1.worker.gpu"
_STAND_INS: dict[str, list[Callable[..., None]]] = {}


def install() -> None:
    """Replace the kernels in vLLM's modules."""
    for module, functions in _STAND_INS.items():
        namespace = importlib.import_module(f"{_GPU}.{module}")
        for function in functions:
            name = function.__name__
            setattr(namespace, name, _Kernel(getattr(namespace, name), function))

    from vllm.v1.worker.gpu.block_table import BlockTables

    BlockTables.gather_block_tables = _gather_block_tables
    BlockTables.compute_slot_mappings = _compute_slot_mappings


def kernel_of(module: str) -> Callable[..., Any]:
    """Marks what stands for the kernel of the same name in ``module``."""

    def mark(function: Callable[..., None]) -> Callable[..., None]:
        _STAND_INS.setdefault(module, []).append(function)
        return function

    return mark


class _Kernel:
    """Launched like a Triton kernel."""

    def __init__(self, kernel: Any, stand_in: Callable[..., None]) -> None:
        self._names = kernel.arg_names
        self._stand_in = stand_in
        self._needed = inspect.signature(stand_in).parameters

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self._launch

    def _launch(self, *args: Any, **kwargs: Any) -> None:
        arguments = dict(zip(self._names, args, strict=False)) | kwargs
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor) and not fake_gpu.on_gpu(value):
                kernel = self._stand_in.__name__
                raise RuntimeError(f"{kernel} got a tensor of the host, {name}")
        needed = {name: arguments[name] for name in self._needed}
        fake_gpu.launch(self._stand_in, **needed)


def _ranges(offsets: torch.Tensor, count: int) -> list[tuple[int, int]]:
    """Start and end of each of ``count`` requests."""
    ends = offsets[: count + 1].tolist()
    return list(zip(ends, ends[1:], strict=False))


def _gather_block_tables(
    self: Any, idx_mapping: torch.Tensor, num_reqs_padded: int, **_: Any
) -> tuple[torch.Tensor, ...]:
    with inside_a_kernel():
        for group, out in enumerate(self.input_block_tables):
            out[len(idx_mapping) :] = 0
            for row, slot in enumerate(idx_mapping.tolist()):
                blocks = int(self.num_blocks.gpu[group, slot])
                table = self.block_tables[group].gpu
                out[row, :blocks] = table[slot, :blocks]
    return tuple(out[:num_reqs_padded] for out in self.input_block_tables)


def _compute_slot_mappings(
    self: Any,
    idx_mapping: torch.Tensor,
    query_start_loc: torch.Tensor,
    positions: torch.Tensor,
    num_tokens_padded: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    assert out is None
    for tensor in (idx_mapping, query_start_loc, positions):
        if not fake_gpu.on_gpu(tensor):
            raise RuntimeError("compute_slot_mappings got a tensor of the host")
    with inside_a_kernel():
        self.slot_mappings.fill_(-1)
        ranges = _ranges(query_start_loc, len(idx_mapping))
        for group, size in enumerate(self.block_sizes):
            table = self.block_tables[group].gpu
            for slot, (start, end) in zip(idx_mapping.tolist(), ranges, strict=True):
                if slot >= 0:
                    rows = positions[start:end]
                    blocks = table[slot, rows // size].long()
                    self.slot_mappings[group, start:end] = blocks * size + rows % size
    return self.slot_mappings[:, :num_tokens_padded]


@kernel_of("buffer_utils")
def _apply_write_kernel(
    output_ptr: torch.Tensor,  # [rows, width] or [rows]
    write_indices_ptr: torch.Tensor,
    write_starts_ptr: torch.Tensor,
    write_contents_ptr: torch.Tensor,
    write_cu_lens_ptr: torch.Tensor,
) -> None:
    rows = output_ptr.view(len(output_ptr), -1)
    first = 0
    for row, start, end in zip(
        write_indices_ptr.tolist(),
        write_starts_ptr.tolist(),
        write_cu_lens_ptr.tolist(),
        strict=True,
    ):
        content = write_contents_ptr[first:end]
        rows[row, start : start + len(content)] = content
        first = end


@kernel_of("input_batch")
def _prepare_prefill_inputs_kernel(
    input_ids_ptr: torch.Tensor,
    next_prefill_tokens_ptr: torch.Tensor,  # [lookahead, slots]
    num_lookahead: int,
    idx_mapping_ptr: torch.Tensor,
    query_start_loc_ptr: torch.Tensor,
    all_token_ids_ptr: torch.Tensor,
    prefill_lens_ptr: torch.Tensor,
    num_computed_tokens_ptr: torch.Tensor,
) -> None:
    ranges = _ranges(query_start_loc_ptr, len(idx_mapping_ptr))
    for slot, (start, end) in zip(idx_mapping_ptr.tolist(), ranges, strict=True):
        first, length = int(num_computed_tokens_ptr[slot]), int(prefill_lens_ptr[slot])
        if first >= length:
            continue
        text, after = all_token_ids_ptr[slot], first + end - start
        input_ids_ptr[start:end] = text[first:after]
        for place in range(num_lookahead):
            known = after + place < length
            token = text[after + place] if known else 0
            next_prefill_tokens_ptr[place, slot] = token


@kernel_of("input_batch")
def _prepare_pos_seq_lens_kernel(
    pos_ptr: torch.Tensor,
    seq_lens_ptr: torch.Tensor,
    idx_mapping_ptr: torch.Tensor,
    query_start_loc_ptr: torch.Tensor,
    num_computed_tokens_ptr: torch.Tensor,
) -> None:
    seq_lens_ptr.zero_()
    ranges = _ranges(query_start_loc_ptr, len(idx_mapping_ptr))
    for row, (start, end) in enumerate(ranges):
        first = int(num_computed_tokens_ptr[idx_mapping_ptr[row]])
        seq_lens_ptr[row] = first + end - start
        pos_ptr[start:end] = torch.arange(first, first + end - start)


@kernel_of("input_batch")
def _combine_sampled_and_draft_tokens_kernel(
    input_ids_ptr: torch.Tensor,
    idx_mapping_ptr: torch.Tensor,
    last_sampled_tokens_ptr: torch.Tensor,  # [slots, 1]
    query_start_loc_ptr: torch.Tensor,
    seq_lens_ptr: torch.Tensor,
    prefill_len_ptr: torch.Tensor,
    draft_tokens_ptr: torch.Tensor,  # [slots, nodes]
    cu_num_logits_ptr: torch.Tensor,
    logits_indices_ptr: torch.Tensor,
) -> None:
    requests = len(idx_mapping_ptr)
    ends = query_start_loc_ptr[1:].tolist()
    for row, (first, last) in enumerate(_ranges(cu_num_logits_ptr, requests)):
        slot, end, rows = int(idx_mapping_ptr[row]), ends[row], last - first
        logits_indices_ptr[first:last] = torch.arange(end - rows, end)
        length, prompt = int(seq_lens_ptr[row]), int(prefill_len_ptr[slot])
        if length <= prompt:
            continue
        if length - rows >= prompt:
            input_ids_ptr[end - rows] = last_sampled_tokens_ptr[slot, 0]
        input_ids_ptr[end - rows + 1 : end] = draft_tokens_ptr[slot, : rows - 1]


@kernel_of("input_batch")
def _get_num_sampled_and_rejected_kernel(
    num_sampled_ptr: torch.Tensor,
    num_rejected_ptr: torch.Tensor,
    seq_lens_ptr: torch.Tensor,
    cu_num_logits_ptr: torch.Tensor,
    idx_mapping_ptr: torch.Tensor,
    prefill_len_ptr: torch.Tensor,
) -> None:
    requests = len(idx_mapping_ptr)
    in_prompt = seq_lens_ptr[:requests] < prefill_len_ptr[idx_mapping_ptr]
    num_sampled_ptr.masked_fill_(in_prompt, 0)
    rows = cu_num_logits_ptr[: requests + 1].diff()
    num_rejected_ptr.copy_((rows - num_sampled_ptr).masked_fill(in_prompt, 0))


@kernel_of("input_batch")
def _post_update_kernel(
    idx_mapping_ptr: torch.Tensor,
    num_computed_tokens_ptr: torch.Tensor,
    last_sampled_tokens_ptr: torch.Tensor,
    output_bin_counts_ptr: torch.Tensor,  # [slots, vocab]
    sampled_tokens_ptr: torch.Tensor,  # [requests, levels]
    num_sampled_ptr: torch.Tensor,
    num_rejected_ptr: torch.Tensor,
    query_start_loc_ptr: torch.Tensor,
    all_token_ids_ptr: torch.Tensor,
    total_len_ptr: torch.Tensor,
) -> None:
    ranges = _ranges(query_start_loc_ptr, len(idx_mapping_ptr))
    for row, (start, end) in enumerate(ranges):
        slot, count = int(idx_mapping_ptr[row]), int(num_sampled_ptr[row])
        length = int(total_len_ptr[slot])
        tokens = sampled_tokens_ptr[row, :count]
        if count:
            last_sampled_tokens_ptr[slot, 0] = tokens[-1]
            total_len_ptr[slot] += count
        all_token_ids_ptr[slot, length : length + count] = tokens
        for token in tokens.tolist():
            output_bin_counts_ptr[slot, token] += 1
        num_computed_tokens_ptr[slot] += end - start - int(num_rejected_ptr[row])


@kernel_of("input_batch")
def _expand_idx_mapping_kernel(
    idx_mapping_ptr: torch.Tensor,
    expanded_idx_mapping_ptr: torch.Tensor,
    expanded_local_pos_ptr: torch.Tensor,
    cu_num_logits_ptr: torch.Tensor,
) -> None:
    ranges = _ranges(cu_num_logits_ptr, len(idx_mapping_ptr))
    for row, (start, end) in enumerate(ranges):
        expanded_idx_mapping_ptr[start:end] = idx_mapping_ptr[row]
        expanded_local_pos_ptr[start:end] = torch.arange(end - start)


@kernel_of("sample.gumbel")
def _temperature_kernel(
    logits_ptr: torch.Tensor,  # [rows, vocab]
    expanded_idx_mapping_ptr: torch.Tensor,
    temperature_ptr: torch.Tensor,
) -> None:
    temperatures = temperature_ptr[expanded_idx_mapping_ptr].float()
    logits_ptr.div_(torch.where(temperatures == 0.0, 1.0, temperatures)[:, None])


@kernel_of("sample.gumbel")
def _gumbel_sample_kernel(
    local_argmax_ptr: torch.Tensor,  # [rows, blocks]
    local_max_ptr: torch.Tensor,
    logits_ptr: torch.Tensor,  # [rows, vocab]
    expanded_idx_mapping_ptr: torch.Tensor,
    seeds_ptr: torch.Tensor,
    pos_ptr: torch.Tensor,
    temp_ptr: torch.Tensor,
    BLOCK_SIZE: int,  # noqa: N803
) -> None:
    """Noise that follows from the request's seed and the position, as there."""
    noised = logits_ptr.float().clone()
    for row, slot in enumerate(expanded_idx_mapping_ptr.tolist()):
        if slot >= 0 and temp_ptr[slot] != 0.0:
            key = [int(seeds_ptr[slot]) % 2**64, int(pos_ptr[row])]
            philox = np.random.Philox(key=np.array(key, dtype=np.uint64))
            noise = np.random.Generator(philox)
            noised[row] += torch.from_numpy(noise.gumbel(size=noised.shape[1])).float()
    missing = local_max_ptr.shape[1] * BLOCK_SIZE - noised.shape[1]
    blocks = torch.nn.functional.pad(noised, (0, missing), value=-torch.inf)
    best, place = blocks.view(*local_max_ptr.shape, BLOCK_SIZE).max(dim=-1)
    local_max_ptr.copy_(best)
    local_argmax_ptr.copy_(place + BLOCK_SIZE * torch.arange(place.shape[1]))


@kernel_of("sample.min_p")
def _min_p_kernel(
    logits_ptr: torch.Tensor,
    expanded_idx_mapping_ptr: torch.Tensor,
    min_p_ptr: torch.Tensor,
) -> None:
    least = min_p_ptr[expanded_idx_mapping_ptr].float().log()[:, None]
    threshold = logits_ptr.amax(dim=-1, keepdim=True) + least
    logits_ptr.masked_fill_(logits_ptr < threshold, -torch.inf)


@kernel_of("sample.logit_bias")
def _bias_kernel(
    logits_ptr: torch.Tensor,
    expanded_idx_mapping_ptr: torch.Tensor,
    num_allowed_token_ids_ptr: torch.Tensor,
    num_logit_bias_ptr: torch.Tensor,
    bias_token_ids_ptr: torch.Tensor,
    bias_ptr: torch.Tensor,
    pos_ptr: torch.Tensor,
    min_lens_ptr: torch.Tensor,
    num_stop_token_ids_ptr: torch.Tensor,
    stop_token_ids_ptr: torch.Tensor,
) -> None:
    for row, slot in enumerate(expanded_idx_mapping_ptr.tolist()):
        assert not num_allowed_token_ids_ptr[slot]
        biased = int(num_logit_bias_ptr[slot])
        tokens = bias_token_ids_ptr[slot, :biased].long()
        logits_ptr[row, tokens] += bias_ptr[slot, :biased]
        if pos_ptr[row] + 1 < min_lens_ptr[slot]:
            stops = int(num_stop_token_ids_ptr[slot])
            logits_ptr[row, stop_token_ids_ptr[slot, :stops].long()] = -torch.inf


@kernel_of("sample.bad_words")
def _bad_words_kernel(
    logits_ptr: torch.Tensor,
    expanded_idx_mapping_ptr: torch.Tensor,
    bad_word_token_ids_ptr: torch.Tensor,
    bad_word_offsets_ptr: torch.Tensor,
    num_bad_words_ptr: torch.Tensor,
    all_token_ids_ptr: torch.Tensor,
    prompt_len_ptr: torch.Tensor,
    total_len_ptr: torch.Tensor,
    input_ids_ptr: torch.Tensor,
    expanded_local_pos_ptr: torch.Tensor,
) -> None:
    for row, slot in enumerate(expanded_idx_mapping_ptr.tolist()):
        output = all_token_ids_ptr[
            slot, int(prompt_len_ptr[slot]) : int(total_len_ptr[slot])
        ].tolist()
        drafts = int(expanded_local_pos_ptr[row])
        output += input_ids_ptr[row - drafts + 1 : row + 1].tolist()
        words = _ranges(bad_word_offsets_ptr[slot], int(num_bad_words_ptr[slot]))
        for start, end in words:
            *prefix, last = bad_word_token_ids_ptr[slot, start:end].tolist()
            if output[len(output) - len(prefix) :] == prefix:
                logits_ptr[row, last] = -torch.inf


@kernel_of("sample.penalties")
def _bincount_kernel(
    expanded_idx_mapping_ptr: torch.Tensor,
    all_token_ids_ptr: torch.Tensor,
    prompt_len_ptr: torch.Tensor,
    prefill_len_ptr: torch.Tensor,
    prompt_bin_mask_ptr: torch.Tensor,  # [slots, vocab / 32] int32
    output_bin_counts_ptr: torch.Tensor,
) -> None:
    for slot in expanded_idx_mapping_ptr.tolist():
        prompt, known = int(prompt_len_ptr[slot]), int(prefill_len_ptr[slot])
        for token in set(all_token_ids_ptr[slot, :prompt].tolist()):
            bit = 1 << token % 32
            prompt_bin_mask_ptr[slot, token // 32] |= bit - (bit >> 31 << 32)
        for token in all_token_ids_ptr[slot, prompt:known].tolist():
            output_bin_counts_ptr[slot, token] += 1


@kernel_of("sample.penalties")
def _penalties_kernel(
    logits_ptr: torch.Tensor,
    expanded_idx_mapping_ptr: torch.Tensor,
    token_ids_ptr: torch.Tensor,  # [rows] of the step
    expanded_local_pos_ptr: torch.Tensor,
    repetition_penalty_ptr: torch.Tensor,
    frequency_penalty_ptr: torch.Tensor,
    presence_penalty_ptr: torch.Tensor,
    prompt_bin_mask_ptr: torch.Tensor,
    output_bin_counts_ptr: torch.Tensor,
    vocab_size: int,
) -> None:
    """The tokens of a request's rows before a row count as its output."""
    for row, slot in enumerate(expanded_idx_mapping_ptr.tolist()):
        counts = output_bin_counts_ptr[slot].clone()
        for before in range(row - int(expanded_local_pos_ptr[row]) + 1, row + 1):
            counts[token_ids_ptr[before].long()] += 1
        bits = prompt_bin_mask_ptr[slot][:, None] >> torch.arange(32) & 1
        seen = bits.flatten()[:vocab_size].bool() | (counts > 0)
        scale = torch.where(seen, repetition_penalty_ptr[slot], 1.0)
        logits = logits_ptr[row]
        logits *= torch.where(logits > 0, 1.0 / scale, scale)
        logits -= frequency_penalty_ptr[slot] * counts
        logits -= presence_penalty_ptr[slot] * (counts > 0)


@kernel_of("sample.logprob")
def _topk_log_softmax_kernel(
    output_ptr: torch.Tensor,  # [rows, k]
    logits_ptr: torch.Tensor,
    topk_ids_ptr: torch.Tensor,
) -> None:
    log_probs = logits_ptr.float().log_softmax(dim=-1)
    output_ptr.copy_(log_probs.gather(1, topk_ids_ptr.long()))


@kernel_of("sample.logprob")
def _ranks_kernel(
    output_ptr: torch.Tensor, logits_ptr: torch.Tensor, token_ids_ptr: torch.Tensor
) -> None:
    chosen = logits_ptr.gather(1, token_ids_ptr[:, None].long())
    output_ptr.copy_((logits_ptr >= chosen).sum(dim=1))


@kernel_of("structured_outputs")
def _apply_grammar_bitmask_kernel(
    logits_ptr: torch.Tensor,
    logits_indices_ptr: torch.Tensor,
    cu_num_logits_ptr: torch.Tensor,
    bitmask_ptr: torch.Tensor,  # [masks, vocab / 32] int32
    vocab_size: int,
    MASK_STRIDE: int,  # noqa: N803
) -> None:
    for mask, place in zip(bitmask_ptr, logits_indices_ptr.tolist(), strict=True):
        request, position = divmod(place, MASK_STRIDE)
        first, end = cu_num_logits_ptr[request : request + 2].tolist()
        if first + position < end:
            bits = mask[:, None] >> torch.arange(32) & 1
            refused = bits.flatten()[:vocab_size] == 0
            logits_ptr[first + position].masked_fill_(refused, -torch.inf)


@kernel_of("spec_decode.rejection_sampler")
def _flatten_sampled_kernel(
    flat_sampled_ptr: torch.Tensor,
    sampled_ptr: torch.Tensor,  # [requests, levels]
    num_sampled_ptr: torch.Tensor,
    cu_num_logits_ptr: torch.Tensor,
) -> None:
    starts = cu_num_logits_ptr.tolist()
    for request, count in enumerate(num_sampled_ptr.tolist()):
        first = starts[request]
        flat_sampled_ptr[first : first + count] = sampled_ptr[request, :count]


@kernel_of("spec_decode.rejection_sampler")
def _gather_draft_sampled_kernel(
    draft_sampled_ptr: torch.Tensor,
    pos_ptr: torch.Tensor,
    input_ids_ptr: torch.Tensor,
    positions_ptr: torch.Tensor,
    logits_indices_ptr: torch.Tensor,
    expanded_idx_mapping_ptr: torch.Tensor,
    expanded_local_pos_ptr: torch.Tensor,
    prefill_len_ptr: torch.Tensor,
) -> None:
    rows, local = logits_indices_ptr, expanded_local_pos_ptr
    positions = positions_ptr[rows]
    in_prompt = positions - local < prefill_len_ptr[expanded_idx_mapping_ptr]
    placeholder = (local > 0) & in_prompt
    draft_sampled_ptr.copy_(input_ids_ptr[rows].masked_fill(placeholder, -1))
    pos_ptr.copy_(positions)
