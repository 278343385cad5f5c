# SPDX-License-Identifier: Apache-2.0
"""The parts of the route on Model Runner V2, whose tensors may as well be the CPU's."""

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput

from vllm_clover2.integration import scheduling, speculative_config
from vllm_clover2.integration.attention import TreeRows
from vllm_clover2.integration.step import rows_of_text
from vllm_clover2.integration.v2.context import DeviceContext
from vllm_clover2.integration.v2.drafting import reads_drafts_as_text
from vllm_clover2.integration.v2.graphs import TreesInGraphs
from vllm_clover2.integration.v2.trees import DeviceTrees
from vllm_clover2.tree.candidates import CandidatePool
from vllm_clover2.tree.context import Calibration, ContextLimits
from vllm_clover2.tree.types import GrownTrees, TreeBatch
from vllm_clover2.tree.widths import widths_at_start

# Two trees, the first as drawn (in brackets the rows), the second of one node.
#
#     root - 5 (1) - 7 (3) - 9 (4)
#         \- 6 (2)
TOKENS = torch.tensor([[5, 6, 7, 9], [8, -1, -1, -1]])
PARENTS = torch.tensor([[0, 0, 1, 3], [0, 0, 0, 0]], dtype=torch.int32)
DEPTHS = torch.tensor([[1, 1, 2, 3], [1, 0, 0, 0]], dtype=torch.int32)
SIZES = torch.tensor([4, 1], dtype=torch.int32)
TREES = GrownTrees(
    TOKENS,
    PARENTS,
    DEPTHS,
    torch.zeros(2, 4),
    SIZES,
    torch.zeros(2, 4, dtype=torch.int8),
)
SLOTS = torch.tensor([3, 1])


def all_rows(trees: DeviceTrees) -> tuple[torch.Tensor, torch.Tensor]:
    """Slot and number of every row of both requests."""
    numbers = torch.arange(1 + trees.num_nodes).repeat(2)
    slots = SLOTS.repeat_interleave(1 + trees.num_nodes)
    return slots, numbers


def test_trees_are_kept_by_slot() -> None:
    trees = DeviceTrees(5, num_nodes=6, max_depth=3, device=torch.device("cpu"))
    tokens = trees.put(SLOTS, TREES)
    assert tokens.tolist() == [[5, 6, 7, 9, 0, 0], [8, 0, 0, 0, 0, 0]]
    rows = trees.rows(*all_rows(trees))
    expected = TreeBatch.from_padded(TOKENS, PARENTS, SIZES)
    drafted = rows.drafted.view(2, 7)
    assert drafted.sum(dim=1).tolist() == SIZES.tolist()
    known = drafted.clone()
    known[:, 0] = True
    known = known.flatten()
    assert torch.equal(rows.parents[known], expected.parents)
    assert torch.equal(rows.depths[known], expected.depths)
    assert torch.equal(rows.ancestors[known], expected.ancestors)
    # Padding sees the root and itself: what it computes is finite.
    assert rows.parents[~known].unique().tolist() == [0]
    assert rows.ancestors.view(2, 7)[1].tolist() == [
        1,
        *(1 + 2**n for n in range(1, 7)),
    ]


def test_some_requests_get_chains() -> None:
    trees = DeviceTrees(5, num_nodes=4, max_depth=3, device=torch.device("cpu"))
    tokens = trees.put(SLOTS, TREES, chains=torch.tensor([True, False]))
    assert tokens.tolist() == [[5, 7, 9, 0], [8, 0, 0, 0]]
    rows = trees.rows(*all_rows(trees))
    assert rows.parents.view(2, 5)[0].tolist() == [-1, 0, 1, 2, 0]
    assert rows.drafted.view(2, 5).sum(dim=1).tolist() == [3, 1]


def test_a_slot_without_a_tree_has_a_root() -> None:
    trees = DeviceTrees(2, num_nodes=2, max_depth=1, device=torch.device("cpu"))
    rows = trees.rows(torch.tensor([0]), torch.tensor([0]))
    assert [part.tolist() for part in rows] == [[-1], [0], [1], [False]]


def rows_of_two_requests(covers_batch: bool) -> TreeRows:
    return TreeRows(
        requests=None,
        prefix_lens=torch.tensor([7, 9], dtype=torch.int32),
        query_starts=torch.tensor([0, 3], dtype=torch.int32),
        row_offsets=torch.tensor([0, 3, 6], dtype=torch.int32),
        ancestors=torch.tensor([1, 3, 5, 1, 3, 7]),
        covers_batch=covers_batch,
    )


def test_graphs_read_trees_in_place() -> None:
    """A graph of three requests sees the trees of a later batch of two."""
    in_graphs = TreesInGraphs(4, max_rows=16, device=torch.device("cpu"))
    starts = torch.tensor([0, 3, 6, 9, 9], dtype=torch.int32)
    captured = in_graphs.rows_of(
        SimpleNamespace(num_reqs=3, num_tokens=9, query_start_loc=starts[:4])
    )
    starts.copy_(torch.tensor([0, 3, 6, 6, 6]))
    trees = rows_of_two_requests(covers_batch=True)
    in_graphs.fill(trees)
    assert torch.equal(captured.prefix_lens[:2], trees.prefix_lens)
    assert torch.equal(captured.query_starts[:2], trees.query_starts)
    assert captured.row_offsets.tolist() == [0, 3, 6, 6]  # one without rows
    assert torch.equal(captured.ancestors[:6], trees.ancestors)
    assert captured.covers_batch


def test_graphs_hold_no_prompts() -> None:
    in_graphs = TreesInGraphs(4, max_rows=16, device=torch.device("cpu"))
    with pytest.raises(RuntimeError, match="needs a batch of drafts"):
        in_graphs.fill(rows_of_two_requests(covers_batch=False))


def test_rows_of_text() -> None:
    """A request in its prompt, and one with nodes 2 and 5 of its tree accepted."""
    requests = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    places = torch.tensor([0, 1, 2, 0, 1, 2, 3])
    rows = rows_of_text(
        requests,
        places,
        first_rows=torch.tensor([10, 20]),
        root_rows=torch.tensor([12, 20]),
        paths=torch.tensor([[-1, -1, -1], [2, 5, -1]], dtype=torch.int32),
    )
    assert rows.tolist() == [10, 11, 12, 20, 22, 25, 20]


def test_rows_of_text_without_trees() -> None:
    rows = rows_of_text(
        torch.tensor([0, 1]),
        torch.tensor([0, 0]),
        first_rows=torch.tensor([0, 1]),
        root_rows=torch.tensor([0, 1]),
        paths=torch.empty(2, 0, dtype=torch.int32),
    )
    assert rows.tolist() == [0, 1]


def device_context(texts: list[list[int]]) -> tuple[DeviceContext, Any, Calibration]:
    """A source over texts by slot, the tables of the runner, and what it learns."""
    width = 64
    states = SimpleNamespace(
        max_num_reqs=len(texts),
        all_token_ids=SimpleNamespace(
            gpu=torch.tensor([t + [0] * (width - len(t)) for t in texts]).int()
        ),
        total_len=SimpleNamespace(gpu=torch.tensor([len(t) for t in texts]).int()),
    )
    calibration = Calibration()
    device = torch.device("cpu")
    context = DeviceContext(ContextLimits(), calibration, states, device)
    return context, states, calibration


def offer(context: DeviceContext, slots: list[int], emitted: list[int]) -> Any:
    """One step: what may follow in these texts, which went on by so many tokens."""
    at = torch.tensor(slots)
    candidates = context.candidates(at, torch.tensor(emitted, dtype=torch.int32))
    pool = CandidatePool(candidates)
    context.remember(at, pool.walk())
    return candidates


def test_texts_are_learned_from() -> None:
    """As the host does it, with the tokens that followed."""
    texts = [[7, 8, 9, 7], [1, 2, 3, 4], [5, 6, 5]]
    context, states, calibration = device_context(texts)
    offered = offer(context, [2, 0], [1, 1])
    assert offered.nodes.tokens[:, :2].tolist() == [[6, 5], [8, 9]]

    expected = Calibration()
    walk = CandidatePool(offered).walk()
    expected.observe(walk, torch.tensor([[1, -1], [8, 9]]))
    for slot, more in ((2, [1]), (0, [8, 9])):
        length = len(texts[slot])
        states.all_token_ids.gpu[slot, length : length + len(more)] = torch.tensor(more)
        states.total_len.gpu[slot] += len(more)
    offer(context, [0, 2], [2, 1])
    fresh = Calibration()
    judged = [c.judge(offered.nodes).alone for c in (calibration, expected, fresh)]
    assert torch.equal(judged[0], judged[1])
    assert not torch.equal(judged[0], judged[2])


def test_a_slots_next_request_teaches_nothing() -> None:
    context, states, calibration = device_context([[7, 8, 9, 7]])
    offered = offer(context, [0], [1])
    states.total_len.gpu[0] = 9  # of another text, whose last two tokens are new
    offer(context, [0], [2])
    judged = [c.judge(offered.nodes).alone for c in (calibration, Calibration())]
    assert torch.equal(*judged)


@pytest.mark.parametrize(
    "params",
    [
        {"presence_penalty": 0.1},
        {"bad_words": ["a"]},
        {"structured_outputs": StructuredOutputsParams(regex="a")},
        {"thinking_token_budget": 3},
    ],
    ids=lambda params: next(iter(params)),
)
def test_who_gets_chains(params: dict[str, Any]) -> None:
    assert reads_drafts_as_text(SamplingParams(**params))
    plain = SamplingParams(temperature=0.8, top_p=0.9, seed=1, min_tokens=3, logprobs=2)
    assert not reads_drafts_as_text(plain)


def test_the_default_on_a_gpu(
    target: Path, head: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the user's word it is V2, whose table of widths is vLLM's."""
    speculative = {"method": "clover2", "model": str(head)}
    args = EngineArgs(model=str(target), speculative_config=speculative)
    config = args.create_engine_config().speculative_config
    assert not config.runs_on_v2
    assert config.num_speculative_tokens_per_batch_size is None

    monkeypatch.setattr(speculative_config, "HAS_TRITON", True)
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda _: True)
    assert config.runs_on_v2
    assert not config.adapts_on_v2
    assert config.scheduled_widths() == {25}
    config.num_speculative_tokens_per_batch_size = [[1, 4, 9], [5, 99, 0]]
    assert not config.adapts_on_v2
    assert config.scheduled_widths() == {9, 0}
    config.num_speculative_tokens_per_batch_size = widths_at_start(25)
    assert config.adapts_on_v2
    assert config.scheduled_widths() == {25, 8, 2, 0}
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    assert not config.runs_on_v2


def test_the_scheduler_follows_a_worker() -> None:
    output = ModelRunnerOutput(req_ids=["a"], req_id_to_index={"a": 0})
    scheduling.attach(output, 8)
    scheduler = SimpleNamespace(dynamic_sd_lookup=[0, 25, 25, 2])
    scheduling.follow(scheduler, EMPTY_MODEL_RUNNER_OUTPUT)
    assert scheduler.dynamic_sd_lookup == [0, 25, 25, 2]
    scheduling.follow(scheduler, pickle.loads(pickle.dumps(output)))
    assert scheduler.dynamic_sd_lookup == [8, 8, 8, 8]
