# SPDX-License-Identifier: Apache-2.0
"""What the ops mean, in plain torch: slow, for every layout, dtype and device."""

import torch
import torch.nn.functional as F

from vllm_clover2.ops.int8 import LEAST_INPUT, unpack_int8
from vllm_clover2.ops.layout import KVLayout, head_size, read_tokens, write_tokens
from vllm_clover2.tree.walk import first_matching_child, request_of_row


def _slots(
    block_table_row: torch.Tensor,  # [max_blocks] int32
    positions: torch.Tensor,  # [n] int64
    block_size: int,
) -> torch.Tensor:
    """Slots [n] int64 of a request's positions."""
    blocks = block_table_row.long()[positions // block_size]
    return blocks * block_size + positions % block_size


def tree_attention(
    query: torch.Tensor,  # [tokens, heads, D]
    kv_cache: torch.Tensor,  # [blocks, kv_heads, block_size, 2 * D]
    layout: int,
    block_table: torch.Tensor,  # [R, max_blocks] int32
    prefix_lens: torch.Tensor,  # [R] int32
    query_starts: torch.Tensor,  # [R] int32
    row_offsets: torch.Tensor,  # [R + 1] int32
    ancestors: torch.Tensor,  # [rows] int64
    scale: float,
    softcap: float,
    sliding_window: int,
    out: torch.Tensor,  # [tokens, heads, D]
) -> None:
    """Softmax attention of tree rows over their prefix and their ancestors-or-self.

    Row r of request i is ``query[query_starts[i] + r]``. Its own and its ancestors' KV
    is in the cache at linear positions ``prefix + row``, while its *sequence* position
    is ``prefix + depth``; a window of w lets it see sequence positions > its own - w.
    Blocks before the root's window are not read: they may be another request's by now.
    """
    starts, prefixes = query_starts.tolist(), prefix_lens.tolist()
    for i, (begin, end) in enumerate(
        zip(row_offsets[:-1].tolist(), row_offsets[1:].tolist(), strict=True)
    ):
        if begin == end:
            continue
        rows = slice(starts[i], starts[i] + end - begin)
        out[rows] = _attend_one(
            query[rows], kv_cache, KVLayout(layout), block_table[i], prefixes[i],
            ancestors[begin:end], scale, softcap, sliding_window,
        ).to(out.dtype)  # fmt: skip


def _attend_one(
    query: torch.Tensor,  # [rows, heads, D]
    kv_cache: torch.Tensor,
    layout: KVLayout,
    block_table_row: torch.Tensor,  # [max_blocks]
    prefix: int,
    ancestors: torch.Tensor,  # [rows] int64
    scale: float,
    softcap: float,
    sliding_window: int,
) -> torch.Tensor:
    """Attention [rows, heads, D] float32 of one request's tree."""
    rows, heads, dim = query.shape
    if dim != head_size(kv_cache):
        raise ValueError(
            f"query has head size {dim}, the cache {head_size(kv_cache)}; pass the "
            "cache of the same layer"
        )
    device = query.device
    first = (
        0 if sliding_window < 0 else min(max(prefix - sliding_window + 1, 0), prefix)
    )
    positions = torch.arange(first, prefix + rows, device=device)
    slots = _slots(block_table_row, positions, kv_cache.shape[2])
    keys, values = read_tokens(kv_cache, layout, slots)
    group = heads // keys.shape[1]
    keys = keys.float().repeat_interleave(group, dim=1)
    values = values.float().repeat_interleave(group, dim=1)

    bits = torch.arange(rows, device=device)
    related = (ancestors[:, None] >> bits) & 1 == 1  # [rows, rows]
    visible = torch.cat(
        (torch.ones(rows, prefix - first, dtype=torch.bool, device=device), related),
        dim=1,
    )
    if sliding_window >= 0:
        row_positions = prefix + related.sum(dim=1) - 1
        key_positions = torch.cat((positions[: prefix - first], row_positions))
        visible &= key_positions > row_positions[:, None] - sliding_window

    scores = torch.einsum("rhd,khd->hrk", query.float(), keys) * scale
    if softcap > 0:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~visible, -torch.inf)
    return torch.einsum("hrk,khd->rhd", torch.softmax(scores, dim=-1), values)


def tree_accept(
    target_tokens: torch.Tensor,  # [rows] int64: the target's choice after each row
    draft_tokens: torch.Tensor,  # [rows] int64; the root's is ignored
    parents: torch.Tensor,  # [rows] int32
    row_offsets: torch.Tensor,  # [R + 1] int32
    max_depth: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Walks down each tree while the target's choice is a child's token.

    Returns accepted rows [R, max_depth] int32 (-1 after the end), their number [R]
    int32 and the target's choice after the last of them [R] int64. Of siblings with the
    same token the first in row order is taken. A tree without rows accepts nothing and
    has next token -1.
    """
    roots = row_offsets[:-1].long()
    requests = roots.numel()
    device = target_tokens.device
    row_request = request_of_row(row_offsets)
    paths = torch.full((requests, max_depth), -1, dtype=torch.int32, device=device)
    nodes = torch.where(row_offsets[1:] > row_offsets[:-1], 0, -1).int()
    next_tokens = torch.full((requests,), -1, dtype=torch.int64, device=device)
    for depth in range(max_depth + 1):
        walking = nodes >= 0
        if depth:
            paths[:, depth - 1] = nodes
        rows = (roots + nodes)[walking]
        next_tokens[walking] = target_tokens[rows]
        if depth < max_depth:
            nodes = first_matching_child(
                nodes, next_tokens, draft_tokens, parents, row_offsets, row_request
            )
    return paths, (paths >= 0).sum(dim=1, dtype=torch.int32), next_tokens


def commit_kv(
    kv_caches: list[torch.Tensor],  # each [blocks, kv_heads, block_size, 2 * D]
    layout: int,
    block_table: torch.Tensor,  # [R, max_blocks] int32
    prefix_lens: torch.Tensor,  # [R] int32
    paths: torch.Tensor,  # [R, max_depth] int32
    lengths: torch.Tensor,  # [R] int32
) -> None:
    """Moves accepted rows' KV: ``prefix + paths[r, i - 1]`` to ``prefix + i``."""
    if not kv_caches:
        return
    block_size = kv_caches[0].shape[2]
    depths = torch.arange(1, paths.shape[1] + 1, device=paths.device)
    valid = depths <= lengths[:, None]
    requests, _ = valid.nonzero(as_tuple=True)
    base = prefix_lens.long()[:, None]
    source = (base + paths)[valid]
    destination = (base + depths)[valid]
    table = block_table.long()

    def slots(positions: torch.Tensor) -> torch.Tensor:
        block = table[requests, positions // block_size]
        return block * block_size + positions % block_size

    for cache in kv_caches:
        # Read everything before the first write: the ranges may overlap.
        keys, values = read_tokens(cache, KVLayout(layout), slots(source))
        write_tokens(cache, KVLayout(layout), slots(destination), keys, values)


def context_nodes(
    history: torch.Tensor,  # [slots, width] int32
    requests: torch.Tensor,  # [R] int32, rows of history
    lengths: torch.Tensor,  # [R] int32, known tokens
    min_match: int,
    max_match: int,
    max_places: int,
    max_depth: int,
    max_nodes: int,
) -> tuple[torch.Tensor, ...]:
    """What followed earlier occurrences of each text's last tokens, as a trie.

    Place j of a text of n tokens is an earlier position of its last token; it matches
    as many tokens as are equal up to j and up to n - 1, at most ``max_match``. Places
    that match ``min_match`` or more are taken by length of match, the longest first,
    the most recent of equal ones first, ``max_places`` of them. What follows a place
    that matches m tokens, up to ``2 * m`` tokens, becomes a path from the root.

    Returns, per request and node in the order of creation, tokens [R, max_nodes] int64
    (-1 after the last), and as int32 [R, max_nodes] (0 after the last) parents (row
    numbers: 0 the root, i + 1 node i), depths (from 1), the longest match of the places
    through the node and the number of these places; and the numbers of nodes [R] int32.

    Raises:
        ValueError: A row or a length is outside ``history``.
    """
    slots, width = history.shape
    shape = (requests.shape[0], max_nodes)
    columns = [history.new_zeros(shape) for _ in range(4)]
    tokens = history.new_full(shape, -1, dtype=torch.int64)
    sizes = []
    for i, (slot, length) in enumerate(
        zip(requests.tolist(), lengths.tolist(), strict=True)
    ):
        if not (0 <= slot < slots and 0 <= length <= width):
            raise ValueError(
                f"request {i} must be a row of history {[slots, width]} and at most "
                f"that wide, found row {slot}, length {length}"
            )
        text = history[slot, :length].tolist()
        ordered = _matching_places(text, min_match, max_match)[:max_places]
        nodes = _continuations(text, ordered, max_depth, max_nodes)
        sizes.append(len(nodes))
        for column, values in zip((tokens, *columns), zip(*nodes), strict=False):
            column[i, : len(nodes)] = column.new_tensor(values)
    return tokens, *columns, lengths.new_tensor(sizes)


def _matching_places(
    text: list[int], min_match: int, max_match: int
) -> list[tuple[int, int]]:
    """Lengths of match and positions of all places that count, the best first."""
    places = []
    for place in range(len(text) - 1):
        limit = min(max_match, place + 1)
        match = 0
        while match < limit and text[place - match] == text[-1 - match]:
            match += 1
        if match >= min_match:
            places.append((match, place))
    return sorted(places, reverse=True)


def _continuations(
    text: list[int],
    places: list[tuple[int, int]],  # length of match, position
    max_depth: int,
    max_nodes: int,
) -> list[list[int]]:
    """Nodes [token, parent row, depth, longest match, places] of the trie."""
    nodes: list[list[int]] = []
    row_of: dict[tuple[int, int], int] = {}  # (parent row, token): row
    for match, place in places:
        row = 0
        followers = text[place + 1 : place + 1 + min(max_depth, 2 * match)]
        for depth, token in enumerate(followers, start=1):
            child = row_of.get((row, token))
            if child is None:
                if len(nodes) == max_nodes:
                    break
                nodes.append([token, row, depth, match, 0])
                child = row_of[row, token] = len(nodes)
            nodes[child - 1][4] += 1
            row = child
    return nodes


def top_k_log_probs(
    logits: torch.Tensor,  # [M, V] float32, bfloat16 or float16
    k: int,  # 1..V
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest log-probabilities of each row and where they are.

    Returns values [M, k] float32, falling and at most 0, and indices [M, k] int64; of
    equal logits the lower index comes first. Logits that are NaN or infinite have
    probability 0, and no row becomes NaN: one without finite logits has only -inf.
    """
    finite = torch.where(logits.isfinite(), logits.float(), -torch.inf)
    log_probs = torch.log_softmax(finite, dim=-1)
    # Rounding may lift log(1) above 0. Of -inf alone log_softmax makes NaN.
    log_probs = log_probs.nan_to_num(-torch.inf, neginf=-torch.inf).clamp(max=0.0)
    indices = _ranks(finite).topk(k, dim=-1).indices
    return log_probs.gather(-1, indices), indices


def _ranks(logits: torch.Tensor) -> torch.Tensor:
    """Distinct int64 numbers that order the float32 values of a row, ties by index.

    topk itself leaves the order of equal values open, and bf16 logits are often equal.
    """
    bits = (logits + 0.0).view(torch.int32)  # -0 becomes 0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    last = logits.shape[-1] - 1
    return (ordered.long() << 32) + last - torch.arange(last + 1, device=logits.device)


def int8_product(
    input: torch.Tensor,  # [M, K] float32, bfloat16 or float16
    packed: torch.Tensor,  # see int8.Int8Weight
    scales: torch.Tensor,  # [N] float32
    bias: torch.Tensor | None,  # [N] float32
) -> torch.Tensor:
    """input W^T + bias [M, N], like input; every input row is rounded to int8.

    Sums are exact. A row with NaN or infinity becomes NaN.
    """
    rows = input.float()
    largest = rows.abs().amax(dim=1, keepdim=True)
    finite = rows.isfinite().all(dim=1, keepdim=True)
    inverse = torch.where(largest >= LEAST_INPUT, 127 / largest, 0.0)
    steps = torch.where(finite, (rows * inverse).round(), 0.0)
    weight = unpack_int8(packed, scales, input.shape[1])
    sums = (steps.double() @ weight.double().T).float()  # of integers below 2^53
    row_scales = torch.where(finite, largest / 127, torch.nan)
    out = sums * (row_scales * scales)
    return (out if bias is None else out + bias).to(input.dtype)


def packed_linear(
    input: torch.Tensor,  # [M, K] float32
    packed: torch.Tensor,  # [ceil(N / 16), K, 16] float32, see pack_linear
    bias: torch.Tensor | None,  # [N] float32
    outputs: int,  # N
) -> torch.Tensor:
    """input W^T + bias [M, N] float32."""
    weight = packed.transpose(1, 2).flatten(0, 1)[:outputs]
    return F.linear(input, weight, bias)


def recurrent_step(
    state: torch.Tensor,  # [M, H] float32, bfloat16 or float16
    embedding: torch.Tensor,  # [M, H] of the tokens chosen after the states
    query: list[torch.Tensor],  # int8.Int8Weight: H -> H
    of_embedding: list[torch.Tensor],  # H -> 3 H: key, value, part of the output
    output: list[torch.Tensor],  # H -> H: the state's part of the output
    input_norm: torch.Tensor,  # [H], like state
    output_norm: torch.Tensor,  # [H]
    num_heads: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``model.layers.RecurrentHead.advance`` with int8 weights: next state and output.

    Everything between the products is float32.
    """
    size = (num_heads, state.shape[1] // num_heads)

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        return x * (weight.float() * scale)

    queries = int8_product(norm(state.float(), input_norm), *query)
    key, value, of_token = int8_product(embedding.float(), *of_embedding).chunk(3, -1)
    cosine = torch.nn.functional.cosine_similarity(
        queries.unflatten(1, size), key.unflatten(1, size), dim=-1, eps=eps
    )
    added = (cosine[..., None] * value.unflatten(1, size)).flatten(1)
    following = state.float() + added
    out = norm(int8_product(following, *output) + of_token, output_norm)
    return following.to(state.dtype), out.to(state.dtype)
