# SPDX-License-Identifier: Apache-2.0
"""The plain model against the original implementation's tensors."""

import json
from pathlib import Path

import pytest
import torch
from golden_cases import case_folders
from safetensors.torch import load_file

from vllm_clover2.model import Clover2Model, DraftCache
from vllm_clover2.model.weights import from_reference

# README of the goldens: 1e-5 on the BLAS that made them, 2e-5 on another.
HIDDEN_TOLERANCE = 2e-5
LOGIT_TOLERANCE = 5e-5


@pytest.fixture(params=case_folders(), ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Path:
    return request.param


def load_model(case: Path) -> tuple[Clover2Model, torch.Tensor]:
    """The case's model and its embedding matrix (= lm_head) [V, H]."""
    reference = load_file(case / "weights.safetensors")
    config, state, _ = from_reference(
        reference, json.loads((case / "config.json").read_text())
    )
    model = Clover2Model(config).eval()
    model.load_state_dict(state)
    return model, reference["lm_head.weight"]


def assert_close(actual: torch.Tensor, expected: torch.Tensor, limit: float) -> None:
    torch.testing.assert_close(actual, expected, atol=limit, rtol=0)


def unroll(
    model: Clover2Model, g: torch.Tensor, embeddings: torch.Tensor
) -> torch.Tensor:
    """[D, B, T, H] outputs of all steps, 0 where a step reaches beyond the text."""
    outputs = [model.recurrent.first(g)]
    for step in range(1, model.config.num_draft_steps):
        g, out = model.recurrent.advance(g[:, :-1], embeddings[:, step:])
        outputs.append(torch.nn.functional.pad(out, (0, 0, 0, step)))
    return torch.stack(outputs)


@torch.inference_mode()
def test_forward_matches(case: Path) -> None:
    model, lm_head = load_model(case)
    golden = load_file(case / "forward.safetensors")
    valid = golden["attention_mask"].bool()
    embeddings = lm_head[golden["input_ids"]]
    assert torch.equal(embeddings, golden["token_emb"])

    layers: list[torch.Tensor] = []
    for layer in model.layers:
        layer.register_forward_hook(lambda _m, _i, out: layers.append(out))
    rab1 = model.rab1(golden["hidden_states"], embeddings)
    assert_close(rab1[valid], golden["rab1_out"][valid], HIDDEN_TOLERANCE)
    g = model.augment(golden["hidden_states"], embeddings, golden["attention_mask"])
    for number, out in enumerate(layers):
        assert_close(out[valid], golden[f"layer{number}_out"][valid], HIDDEN_TOLERANCE)
    assert_close(g[valid], golden["clover_h"][valid], HIDDEN_TOLERANCE)

    heads = unroll(model, g, embeddings)
    assert_close(heads[:, valid], golden["heads_out"][:, valid], HIDDEN_TOLERANCE)
    row, position = golden["logit_positions"].T
    logits = (
        golden["heads_out"].new_tensor([])
        if not len(row)
        else (heads[:, row, position] @ lm_head.T)
    )
    assert_close(logits, golden["logits"], LOGIT_TOLERANCE)


@torch.inference_mode()
def test_right_padding_needs_no_mask(case: Path) -> None:
    golden = load_file(case / "forward.safetensors")
    mask = golden["attention_mask"]
    right_padded = (mask.diff(dim=1) <= 0).all(dim=1)
    if not right_padded.any():
        pytest.skip("this case has only left-padded rows")
    model, lm_head = load_model(case)
    hidden, ids = golden["hidden_states"][right_padded], golden["input_ids"]
    g = model.augment(hidden, lm_head[ids[right_padded]])
    valid = mask[right_padded].bool()
    assert_close(g[valid], golden["clover_h"][right_padded][valid], HIDDEN_TOLERANCE)


def draft_rows(
    model: Clover2Model,
    lm_head: torch.Tensor,
    g: torch.Tensor,  # [1, H] of the last position
    top_tokens: torch.Tensor,  # [11, 10] the reference's choice per row
) -> tuple[torch.Tensor, torch.Tensor]:
    """States and outputs of the static tree's eleven rows, in their order."""
    # Row -> (parent row, rank of its token among the parent's ten).
    sources = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (2, 0)]
    sources += [(5, 0), (9, 0)]
    states, outputs = [g[0]], [model.recurrent.first(g)[0]]
    for parent, rank in sources:
        token = top_tokens[parent, rank]
        state, out = model.recurrent.advance(states[parent][None], lm_head[token][None])
        states.append(state[0])
        outputs.append(out[0])
    return torch.stack(states), torch.stack(outputs)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@torch.inference_mode()
def test_incremental_decode_matches(case: Path, fused: bool) -> None:
    model, lm_head = load_model(case)
    if fused:
        model.rab1.fuse()
        model.recurrent.fuse()
    golden = load_file(case / "decode.safetensors")
    cache = DraftCache()
    steps = sum(name.endswith(".kv_len") for name in golden)
    assert steps > 1
    for step in range(steps):
        part = {
            name.split(".", 1)[1]: tensor
            for name, tensor in golden.items()
            if name.startswith(f"step{step}.")
        }
        new = part["hidden_states"].shape[1]
        ids = part["input_ids"][:, -new:]
        g = model.augment(part["hidden_states"], lm_head[ids], cache=cache)
        assert cache.length == int(part["kv_len"])
        assert_close(g, part["clover_h"], HIDDEN_TOLERANCE)
        states, outputs = draft_rows(model, lm_head, g[:, -1], part["ss_token"])
        assert_close(states, part["row_recurrent"], HIDDEN_TOLERANCE)
        assert_close(outputs, part["row_out"], HIDDEN_TOLERANCE)
        top = (outputs @ lm_head.T).topk(10)
        assert torch.equal(top.indices, part["ss_token"])
        assert_close(top.values, part["top_logits"], LOGIT_TOLERANCE)
        share = top.values.softmax(-1)
        assert_close(share, part["ss_prob"], 1e-5)
    assert_close(cache.keys[-1], golden["kv_final.layer_last.key"], HIDDEN_TOLERANCE)
    assert_close(
        cache.values[-1], golden["kv_final.layer_last.value"], HIDDEN_TOLERANCE
    )
