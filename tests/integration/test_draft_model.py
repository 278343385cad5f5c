# SPDX-License-Identifier: Apache-2.0
"""The draft on vLLM's layers and paged KV computes what the plain model computes."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from engine_fixtures import TINY, Baseline, random_prompts
from engines import EnginePool
from golden_cases import case_folders
from planting import CommitSpy, Planter, with_truth
from safetensors.torch import load_file
from scoring_draft import ScoringDraft
from tiny_models import TinyModel, save_random_head, save_target
from transformers import LlamaForCausalLM
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from vllm_clover2.integration.attention import kv_layout
from vllm_clover2.integration.backlog import CommittedRows
from vllm_clover2.integration.draft_model import serving_product
from vllm_clover2.integration.proposer import Clover2Proposer
from vllm_clover2.integration.runner import Clover2RunnerMixin
from vllm_clover2.model import Clover2Model
from vllm_clover2.model.weights import from_reference, load_head, save_head
from vllm_clover2.ops.layout import read_tokens
from vllm_clover2.tree import DynamicTree, grow_dynamic, grow_static, paper_tree

# As for the plain model; vLLM fuses q, k, v and adds in another order.
GOLDEN_TOLERANCE = 2e-5
PLANTED_DEPTH = Planter(0).depth
# States of random heads reach 10; float32.
TOLERANCE = 2e-4

HEADS: dict[str, dict[str, Any]] = {
    "as-target": {},
    "one-layer": {"num_hidden_layers": 1},
    "own-kv-heads": {"num_key_value_heads": 4},
    "own-head-dim": {"head_dim": 64},
    "rope-theta": {"rope_theta": 500.0, "rms_norm_eps": 1e-2},
    "draft-vocabulary": {"draft_vocab_size": 100},
    "inner-layers": {"aux_hidden_state_layers": [1, 3]},
}


class PlainDraft(ScoringDraft):
    """The plain model as a draft; rows of the target's lm_head are its embeddings."""

    def __init__(self, model: Clover2Model, lm_head: torch.Tensor) -> None:
        self.model, self.lm_head = model, lm_head
        self.ids = model.draft_vocab_ids
        self.output = lm_head if self.ids is None else lm_head[self.ids]

    def first(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return hidden, self._log_probs(self.model.recurrent.first(hidden))

    def advance(
        self, state: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        state, out = self.model.recurrent.advance(state, self.lm_head[tokens])
        return state, self._log_probs(out)

    def token_ids(self, draft_ids: torch.Tensor) -> torch.Tensor:
        return draft_ids if self.ids is None else self.ids[draft_ids]

    def _log_probs(self, out: torch.Tensor) -> torch.Tensor:
        return (out @ self.output.T).log_softmax(-1)


@dataclasses.dataclass
class DraftSpy:
    """What the draft saw and answered in every step of an engine."""

    # Text of a request, the state "g" at its last row.
    states: list[tuple[list[int], torch.Tensor]] = dataclasses.field(
        default_factory=list
    )
    waited: int = 0  # times that rows of several steps of decoding were made up for

    def install(self, patch: Callable[..., None]) -> None:
        spy, augment = self, Clover2Proposer.augment
        propose = Clover2RunnerMixin.propose_draft_token_ids
        texts: list[list[int]] = []  # by batch index
        prompts: list[int] = []  # their lengths

        def spied_propose(
            runner: Any, scheduled: Any, sampled: list[list[int]], *rest: Any
        ) -> Any:
            texts.clear()
            prompts.clear()
            for request_id, tokens in zip(
                runner.input_batch.req_ids, sampled, strict=False
            ):
                request = runner.requests[request_id]
                known = [*request.prompt_token_ids, *request.output_token_ids]
                texts.append(known if tokens else [])  # []: inside its prompt
                prompts.append(len(request.prompt_token_ids))
            return propose(runner, scheduled, sampled, *rest)

        def spied_augment(
            proposer: Any, rows: CommittedRows, *args: Any
        ) -> torch.Tensor:
            states = augment(proposer, rows, *args)
            firsts = rows.offsets[:-1]
            for first, count, state in zip(firsts, rows.counts, states, strict=True):
                index = rows.requests[first]
                spy.states.append((texts[index], state.clone()))
                answered = rows.positions[first] >= prompts[index]
                spy.waited += bool(answered and count > 1 + PLANTED_DEPTH)
            return states

        patch(Clover2RunnerMixin, "propose_draft_token_ids", spied_propose)
        patch(Clover2Proposer, "augment", spied_augment)


@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "chunked"])
@pytest.mark.parametrize("changes", HEADS.values(), ids=HEADS)
@torch.inference_mode()
def test_states_and_trees_match_the_plain_model(
    changes: dict[str, Any],
    chunked: bool,
    engines: EnginePool,
    target: Path,
    baseline: Baseline,
    plant: Callable[..., Planter],
    commits: CommitSpy,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Prompts, steps of one and of several rows, several requests at once."""
    head = save_random_head(tmp_path, TINY, **changes)
    requests = [r.replaced(max_tokens=16) for r in random_prompts(5, seed=100)]
    options = {"max_num_batched_tokens": 64, "max_num_seqs": 8} if chunked else {}
    engine = engines.get(target, head, block_size=32, **options)
    spy = DraftSpy()
    plant(seed=100)
    spy.install(monkeypatch.setattr)
    engine.run(with_truth(requests, baseline(requests)))
    assert commits.accepted > 10
    assert len(spy.states) > 3 * len(requests)
    assert spy.waited > 0

    language_model = LlamaForCausalLM.from_pretrained(target).float().eval()
    lm_head = language_model.lm_head.weight
    hidden: list[torch.Tensor] = []
    language_model.model.norm.register_forward_pre_hook(
        lambda _, args: hidden.append(args[0])
    )
    model = load_head(head)
    for text, state in spy.states:
        tokens = torch.tensor([text])
        hidden.clear()
        after = language_model(tokens[:, :-1], output_hidden_states=True).hidden_states
        inner = [after[n] for n in changes.get("aux_hidden_state_layers", ())]
        read = model.fused(hidden[0], inner)
        expected = model.augment(read, lm_head[tokens[:, 1:]])[0, -1]
        torch.testing.assert_close(state, expected, atol=TOLERANCE, rtol=TOLERANCE)

    states = torch.stack([state for _, state in spy.states])
    tree = DynamicTree(num_nodes=25)
    ours = grow_dynamic(engine.runner.drafter.model, states, tree)
    plain = grow_dynamic(PlainDraft(model, lm_head), states, tree)
    torch.testing.assert_close(ours.joint, plain.joint, atol=1e-3, rtol=1e-4)
    same = (ours.tokens == plain.tokens) & (ours.parents == plain.parents)
    assert same.float().mean() > 0.99  # rounding may swap equally likely nodes


def supported(case: Path) -> bool:
    config = json.loads((case / "config.json").read_text())
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    return head_dim in CPUAttentionBackend.get_supported_head_sizes()


@pytest.fixture(params=filter(supported, case_folders()), ids=lambda case: case.name)
def golden(
    request: pytest.FixtureRequest, tmp_path: Path, engines: EnginePool
) -> tuple[Path, Any]:
    """A golden case, and the draft runner of an engine that has its weights.

    The other cases have head sizes that vLLM's CPU attention lacks.
    """
    case: Path = request.param
    reference = load_file(case / "weights.safetensors")
    config, state, _ = from_reference(
        reference, json.loads((case / "config.json").read_text())
    )
    model = Clover2Model(config)
    model.load_state_dict(state)
    save_head(model, tmp_path / "head", torch.float32)
    shape = TinyModel(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        num_layers=2,
    )
    target = save_target(tmp_path / "target", shape, reference["lm_head.weight"])
    engine = engines.get(target, tmp_path / "head", {"tree": "static"}, block_size=32)
    return case, engine.runner


def run_augment(
    runner: Any,
    hidden: list[torch.Tensor],  # per request: [rows, H]
    next_tokens: list[torch.Tensor],  # per request: [rows] int64
    first_positions: list[int],
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """All states of every request, and what ``augment`` returns of them [R, H]."""
    counts = [len(rows) for rows in hidden]
    committed = CommittedRows(
        hidden=torch.cat(hidden),
        requests=np.repeat(np.arange(len(counts)), counts),
        positions=np.concatenate(
            [np.arange(p, p + n) for p, n in zip(first_positions, counts, strict=True)]
        ),
        counts=np.array(counts, dtype=np.int32),
        next_tokens=torch.cat(next_tokens).numpy(),
    )
    # Two blocks of 32 positions a request; block 0 is vLLM's null block.
    blocks = 1 + torch.arange(2 * len(counts), dtype=torch.int32).view(-1, 2)
    states: list[torch.Tensor] = []
    hook = runner.drafter.model.register_forward_hook(
        lambda _m, _args, out: states.append(out.clone())
    )
    try:
        last = runner.drafter.augment(
            committed, SimpleNamespace(block_table_tensor=blocks), 32
        )
    finally:
        hook.remove()
    return list(states[0].split(counts)), last


@torch.inference_mode()
def test_golden_forward(golden: tuple[Path, Any]) -> None:
    """A batch of prompts of different lengths."""
    case, runner = golden
    tensors = load_file(case / "forward.safetensors")
    rows = []
    for number, mask in enumerate(tensors["attention_mask"].bool()):
        if bool((mask.int().diff() <= 0).all()):  # right-padded: positions from 0
            rows.append((number, int(mask.sum())))
    assert rows
    states, last = run_augment(
        runner,
        [tensors["hidden_states"][number, :length] for number, length in rows],
        [tensors["input_ids"][number, :length] for number, length in rows],
        [0] * len(rows),
    )
    for (number, length), state, final in zip(rows, states, last, strict=True):
        expected = tensors["clover_h"][number, :length]
        torch.testing.assert_close(state, expected, atol=GOLDEN_TOLERANCE, rtol=0)
        torch.testing.assert_close(final, expected[-1], atol=GOLDEN_TOLERANCE, rtol=0)


@torch.inference_mode()
def test_golden_decode(golden: tuple[Path, Any]) -> None:
    """Incremental steps, the trees drafted after each, and the final KV."""
    case, runner = golden
    tensors = load_file(case / "decode.safetensors")
    past = steps = 0
    while f"step{steps}.clover_h" in tensors:
        hidden = tensors[f"step{steps}.hidden_states"][0]
        ids = tensors[f"step{steps}.input_ids"][0, -len(hidden) :]
        # A second request beside it, two rows longer, must not matter.
        other = torch.randn(len(hidden) + 2, hidden.shape[1])
        (state, _), last = run_augment(
            runner, [hidden, other], [ids, torch.arange(len(other))], [past, 0]
        )
        expected = tensors[f"step{steps}.clover_h"][0]
        torch.testing.assert_close(state, expected, atol=GOLDEN_TOLERANCE, rtol=0)
        tree = grow_static(runner.drafter.model, last[:1], paper_tree())
        tree_tokens = tensors[f"step{steps}.tree_tokens"]
        assert tree.tokens[0].tolist() == tree_tokens[1:].tolist()
        past, steps = past + len(hidden), steps + 1
        assert past == int(tensors[f"step{steps - 1}.kv_len"])
    assert steps > 1
    context = runner.vllm_config.compilation_config.static_forward_context
    layer = context[sorted(runner.drafter._draft_attn_layer_names)[-1]]
    slots = 32 + torch.arange(past)  # block 1
    cached = read_tokens(layer.kv_cache, kv_layout(layer), slots)
    for name, ours in zip(("key", "value"), cached, strict=True):
        expected = tensors[f"kv_final.layer_last.{name}"][0].transpose(0, 1)
        torch.testing.assert_close(ours, expected, atol=GOLDEN_TOLERANCE, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_served_products_are_linear_layers(dtype: torch.dtype, bias: bool) -> None:
    # 96 x 64 is small enough for vLLM's other kernel where the processor has AMX.
    for rows, shape in ((1, (96, 64)), (8, (96, 64)), (8, (2048, 576))):
        layer = torch.nn.Linear(shape[1], shape[0], bias=bias).to(dtype)
        x = torch.randn(rows, shape[1], dtype=dtype)
        expected = layer(x)
        given = None if layer.bias is None else layer.bias.detach().clone()
        product = serving_product(layer.weight.detach().clone(), given)
        torch.testing.assert_close(product(x), expected)
