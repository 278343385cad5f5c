# SPDX-License-Identifier: Apache-2.0
"""Tries of continuations against collecting paths as tuples."""

import pytest
import torch

LIMITS = {
    "min_match": 1,
    "max_match": 8,
    "max_places": 16,
    "max_depth": 8,
    "max_nodes": 32,
}
NAMES = ["tokens", "parents", "depths", "matches", "places", "sizes"]


def brute_force(
    text: list[int],
    min_match: int,
    max_match: int,
    max_places: int,
    max_depth: int,
    max_nodes: int,
) -> dict[str, list[int]]:
    """The unpadded columns of one request."""
    places = []
    for end in range(1, len(text)):
        same = [
            length
            for length in range(1, min(end, max_match) + 1)
            if text[end - length : end] == text[len(text) - length :]
        ]
        if max(same, default=0) >= min_match:
            places.append((-max(same), -end))
    nodes: dict[tuple[int, ...], list[int]] = {}  # path from the root: match, places
    for negative_match, negative_end in sorted(places)[:max_places]:
        for depth in range(1, min(max_depth, -2 * negative_match) + 1):
            path = tuple(text[-negative_end:][:depth])
            if len(path) < depth or (path not in nodes and len(nodes) == max_nodes):
                break
            nodes.setdefault(path, [-negative_match, 0])[1] += 1
    rows = {path: row for row, path in enumerate(nodes, start=1)}
    return {
        "tokens": [path[-1] for path in nodes],
        "parents": [rows.get(path[:-1], 0) for path in nodes],
        "depths": [len(path) for path in nodes],
        "matches": [match for match, _ in nodes.values()],
        "places": [places for _, places in nodes.values()],
    }


def padded(texts: list[list[int]], **limits: int) -> dict[str, list]:
    """What the op must return for these texts."""
    found = [brute_force(text, **limits) for text in texts]
    expected: dict[str, list] = {"sizes": [len(one["tokens"]) for one in found]}
    for name in NAMES[:-1]:
        fill = [-1 if name == "tokens" else 0] * limits["max_nodes"]
        expected[name] = [(one[name] + fill)[: len(fill)] for one in found]
    return expected


def run(run_op, history, requests, lengths, **limits: int) -> dict[str, list]:
    before = history.clone()
    results = run_op(
        "context_nodes",
        history=history,
        requests=torch.tensor(requests, dtype=torch.int32),
        lengths=torch.tensor(lengths, dtype=torch.int32),
        **limits,
    )
    assert torch.equal(history, before)
    for name, result in zip(NAMES, results, strict=True):
        assert result.dtype == (torch.int64 if name == "tokens" else torch.int32)
        columns = () if name == "sizes" else (limits["max_nodes"],)
        assert result.shape == (len(requests), *columns)
    return {name: result.tolist() for name, result in zip(NAMES, results, strict=True)}


def check(run_op, texts: list[list[int]], **changes: int) -> None:
    limits = LIMITS | changes
    history = torch.zeros(len(texts), max(map(len, texts)) + 1, dtype=torch.int32)
    for row, text in zip(history, texts, strict=True):
        row[: len(text)] = torch.tensor(text)
    lengths = [len(text) for text in texts]
    found = run(run_op, history, list(range(len(texts))), lengths, **limits)
    assert found == padded(texts, **limits)


A, B, C, D, E, F, X = range(10, 17)
# The last tokens, a b c, stand at the beginning; b c also before e and before d f.
EXAMPLE = [A, B, C, D, X, B, C, E, B, C, D, F, A, B, C]


@pytest.mark.parametrize(
    ("max_nodes", "expected"),
    [
        (
            14,
            {
                "tokens": [D, X, B, C, E, F, A, B, E, B, C, D, -1, -1],
                "parents": [0, 1, 2, 3, 4, 1, 6, 7, 0, 9, 10, 11, 0, 0],
                "depths": [1, 2, 3, 4, 5, 2, 3, 4, 1, 2, 3, 4, 0, 0],
                "matches": [3, 3, 3, 3, 3, 2, 2, 2, 2, 2, 2, 2, 0, 0],
                "places": [2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0],
                "sizes": 12,
            },
        ),
        # Full after x; the place before d f still counts for d.
        (
            2,
            {
                "tokens": [D, X],
                "parents": [0, 1],
                "depths": [1, 2],
                "matches": [3, 3],
                "places": [2, 1],
                "sizes": 2,
            },
        ),
    ],
    ids=["all nodes", "full"],
)
def test_example(run_op, max_nodes, expected) -> None:
    found = run(
        run_op,
        torch.tensor([EXAMPLE], dtype=torch.int32),
        [0],
        [len(EXAMPLE)],
        min_match=2,
        max_match=8,
        max_places=4,
        max_depth=5,
        max_nodes=max_nodes,
    )
    assert {name: column[0] for name, column in found.items()} == expected


@pytest.mark.parametrize("vocabulary", [1, 2, 3, 12])
@pytest.mark.parametrize("min_match", [1, 2, 3])
@pytest.mark.parametrize("max_places", [1, 4, 64])
@pytest.mark.parametrize("max_nodes", [1, 5, 64])
def test_random_texts(run_op, vocabulary, min_match, max_places, max_nodes) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    # On both sides of the blocks of 32 tokens that are compared at a time.
    texts = [
        torch.randint(vocabulary, (length,), generator=generator).tolist()
        for length in (0, 1, 2, 3, 7, 31, 32, 33, 34, 35, 64, 65, 66, 100, 301)
    ]
    check(
        run_op, texts, min_match=min_match, max_places=max_places, max_nodes=max_nodes
    )


@pytest.mark.parametrize("period", [1, 2, 3])
@pytest.mark.parametrize(
    ("max_match", "max_depth", "max_nodes"),
    [(1, 63, 64), (2, 2, 64), (64, 63, 128), (64, 63, 7), (5, 1, 1)],
)
def test_loops(run_op, period, max_match, max_depth, max_nodes) -> None:
    texts = [[i % period for i in range(length)] for length in (2, 3, 4, 9, 70, 200)]
    check(run_op, texts, max_match=max_match, max_depth=max_depth, max_nodes=max_nodes)


def test_longest_match_first_then_the_most_recent(run_op) -> None:
    """Matches that rise and fall along the text, more than there are places."""
    lengths = [3, 1, 5, 2, 5, 4, 1, 6, 3, 6, 2]
    text = [
        token
        for mark, length in enumerate(lengths)
        for token in [100 + mark, *range(6 - length, 6), 200 + mark]
    ]
    text += range(6)
    for max_places in (1, 2, 3, 5, 8, 64):
        check(run_op, [text], max_places=max_places, max_match=64, max_nodes=128)
        check(run_op, [text], max_places=max_places, max_match=5, max_nodes=128)


@pytest.mark.parametrize("distance", range(1, 70))
def test_match_at_every_distance(run_op, distance) -> None:
    """One place only, wherever it lies in its block, with too little behind it."""
    text = list(range(1000, 1070))
    text[-1 - distance] = text[-1] = 5
    check(run_op, [text], max_depth=63)
    check(run_op, [text[-1 - distance :]], max_depth=63)


def test_any_order_of_requests_and_strides(run_op) -> None:
    """Rows of a wider tensor, some twice, some never; what is around them matches."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randint(2, (6, 90), generator=generator, dtype=torch.int32)
    history = wide[::2, 5:75]
    requests, lengths = [2, 0, 2, 1, 2], [70, 33, 9, 50, 70]
    limits = LIMITS | {"max_match": 64, "max_depth": 63}
    found = run(run_op, history, requests, lengths, **limits)
    texts = [history[row, :length].tolist() for row, length in zip(requests, lengths)]
    assert found == padded(texts, **limits)


def test_no_requests(run_op) -> None:
    history = torch.zeros(3, 5, dtype=torch.int32)
    found = run(run_op, history, [], [], **LIMITS)
    assert found == {name: [] for name in NAMES}


@pytest.mark.parametrize(("slot", "length"), [(-1, 3), (2, 3), (0, -1), (0, 6)])
def test_rows_and_lengths_must_be_inside(run_op, slot, length) -> None:
    with pytest.raises((RuntimeError, ValueError), match="history"):
        run(run_op, torch.zeros(2, 5, dtype=torch.int32), [slot], [length], **LIMITS)
