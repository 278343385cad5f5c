# SPDX-License-Identifier: Apache-2.0
"""What is recorded of an answer's steps, and the texts of tokens."""

from pathlib import Path

import pytest
import torch
from tiny_models import (
    TinyModel,
    save_predictable_target,
    save_random_head,
    save_target,
)
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from vllm_clover2.explain.record import Answer, Step, greedy_answer, record_steps
from vllm_clover2.explain.texts import TokenTexts
from vllm_clover2.train.architectures import load_draft
from vllm_clover2.train.hidden import Target
from vllm_clover2.tree import check_parents

SHAPE = TinyModel(vocab_size=48, hidden_size=32)
PROMPT = list(range(20))


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    heads = (SHAPE.num_heads, SHAPE.num_kv_heads)
    return save_predictable_target(folder, SHAPE.hidden_size, *heads)


@pytest.fixture(scope="module")
def target(target_folder: Path) -> Target:
    return Target.load(str(target_folder), torch.float32, torch.device("cpu"))


@pytest.fixture(scope="module")
def repeating(target: Target) -> Answer:
    """An answer that repeats itself, so that the text is a good source."""
    return greedy_answer(target, PROMPT, 40, [])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer")
    return AutoTokenizer.from_pretrained(save_target(folder, TinyModel(num_layers=1)))


def greedy(target_folder: Path, prompt: list[int], num_tokens: int) -> list[int]:
    """The answer without a cache, from whole passes."""
    model = LlamaForCausalLM.from_pretrained(target_folder).eval()
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(num_tokens):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens


def written(steps: list[Step]) -> list[int]:
    tokens = []
    for step in steps:
        tokens += [step.nodes[row - 1].token for row in step.path]
        tokens += [] if step.own is None else [step.own]
    return tokens


def check_tree(step: Step) -> None:
    check_parents([node.parent for node in step.nodes], len(step.nodes), "step")
    assert step.path == [r for r, n in enumerate(step.nodes, 1) if n.accepted]
    above = 0
    for row in step.path:
        assert step.nodes[row - 1].parent == above
        above = row
    for node in step.nodes:
        parent = step.nodes[node.parent - 1] if node.parent else None
        assert 0 <= node.target <= 1
        assert 0 < node.joint <= (parent.joint if parent else 1) + 1e-6
        # Accepted is what the target chose behind accepted nodes, and nothing else.
        choice = parent.choice if parent else step.choice
        reached = parent is None or parent.accepted
        if node.accepted:
            assert reached
            assert node.token == choice
            assert node.target > 1 / SHAPE.vocab_size


@pytest.mark.parametrize("tree", ["dynamic:25+context", "chain:5+context", "paper"])
def test_steps_write_what_greedy_decoding_gives(
    tree: str, target: Target, target_folder: Path, repeating: Answer, tmp_path: Path
) -> None:
    prompt = repeating.tokens[: repeating.prompt_len]
    assert repeating.tokens == greedy(target_folder, prompt, 40)
    folder = save_random_head(tmp_path / "head", SHAPE)
    head = load_draft(folder, torch.float32, target)
    steps = record_steps(target, head, repeating, tree)
    output = repeating.tokens[repeating.prompt_len :]
    assert written(steps) == output[1:]
    assert steps[0].root == 0
    for step, following in zip(steps, steps[1:]):
        assert following.root == step.root + len(step.path) + 1
    for step in steps:
        check_tree(step)
        assert step.draft_seconds > 0
        assert step.verify_seconds > 0
    if tree != "paper":  # whose source is the random head alone
        accepted = [n for step in steps for n in step.nodes if n.accepted]
        assert {"text", "both"} & {node.source for node in accepted}


def test_choices_of_rejected_nodes_are_the_targets(
    target: Target, target_folder: Path, repeating: Answer
) -> None:
    """The tree's pass sees the text before the root and the node's own path alone."""
    steps = record_steps(target, None, repeating, "dynamic:25+context")
    compared = 0
    for step in steps:
        for row, node in enumerate(step.nodes, start=1):
            path, above = [], row
            while above:
                path.insert(0, step.nodes[above - 1].token)
                above = step.nodes[above - 1].parent
            before = repeating.tokens[: repeating.prompt_len + step.root + 1]
            if not node.accepted and compared < 8:
                assert greedy(target_folder, before + path, 1)[-1] == node.choice
                compared += 1
    assert compared == 8
    assert {n.source for step in steps for n in step.nodes} == {"text"}


def test_an_answer_ends_with_its_end_token(target: Target) -> None:
    tokens = greedy_answer(target, PROMPT, 8, []).tokens
    end = tokens[len(PROMPT) + 2]
    first = tokens.index(end, len(PROMPT))
    answer = greedy_answer(target, PROMPT, 8, [end])
    assert answer.tokens == tokens[: first + 1]
    assert answer.cache.get_seq_length() == first


def test_parts_of_characters_are_shown_as_bytes(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    texts = TokenTexts(tokenizer)
    ids = tokenizer("a 😀</script>\n", add_special_tokens=False).input_ids
    shown = [texts.of(token) for token in ids]
    assert {"<F0>", "<9F>", "<98>", "<80>"} <= set(shown)
    added = texts.added(ids)
    assert "".join(added) == "a 😀</script>\n"
    assert added[shown.index("<80>")].endswith("😀")
    # Bytes that never become a character stay bytes, and hide nothing that follows.
    broken = [token for token in ids if texts.of(token) == "<F0>"]
    assert texts.added([*broken, *ids[-1:], *broken]) == ["<F0>", "\n", "<F0>"]


def test_spaces_and_special_tokens_are_shown(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    texts = TokenTexts(tokenizer)
    assert texts.of(tokenizer.eos_token_id) == "</s>"
    ids = tokenizer(" the of", add_special_tokens=False).input_ids
    assert "".join(map(texts.of, ids)) == " the of"
