# SPDX-License-Identifier: Apache-2.0
"""`verify-lossless` with engines that only pretend: verdicts, exit codes, JSON."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllm_clover2 import cli
from vllm_clover2.bench import lossless
from vllm_clover2.bench.engine import Answer, Round
from vllm_clover2.bench.prompts import Prompt

PROMPTS = [Prompt("all", f"prompt {n}", [n, n + 1]) for n in range(9)]


class PretendedEngine:
    """Answers like a target whose tokens depend on prompt and seed alone."""

    dtype = "float32"

    def __init__(self, llm: dict[str, Any], log: Path) -> None:
        self.llm = llm
        self.speculates = "speculative_config" in llm
        assert (llm.get("logprobs_mode") == "raw_logits") is not self.speculates

    def token(self, prompt: list[int], position: int, own: dict[str, Any]) -> int:
        if "seed" not in own:
            return prompt[0] + position
        rng = random.Random(f"{prompt} {position} {own['seed']}")
        return int(rng.expovariate(1.0 / own["temperature"]) * 4)

    def answer(
        self,
        prompts: list[list[int]],
        max_tokens: int,
        in_flight: int,
        sampling: list[dict[str, Any]],
    ) -> list[int]:
        answers = []
        for prompt, own in zip(prompts, sampling, strict=True):
            tokens = [self.token(prompt, p, own) for p in range(max_tokens)]
            top = (
                [[(t, 9.0), (t + 1, 1.0)] for t in tokens]
                if own.get("logprobs")
                else None
            )
            accepted = [2, 1] if self.speculates else []
            answers.append(Answer("", tokens, 1.0, 0.5, 0.5, accepted, top))
        self.last_round = Round(1.0, answers, 0.1)
        return [len(answers)]

    def close(self) -> None:
        pass


class WrongText(PretendedEngine):
    def token(self, prompt: list[int], position: int, own: dict[str, Any]) -> int:
        wrong = self.speculates and position == 3 and prompt[0] == 4
        return super().token(prompt, position, own) + (wrong and "seed" not in own)


class WrongSeeds(PretendedEngine):
    """Samples rightly, but with numbers of its own."""

    def token(self, prompt: list[int], position: int, own: dict[str, Any]) -> int:
        if self.speculates and "seed" in own:
            own = own | {"seed": own["seed"] + 10**6}
        return super().token(prompt, position, own)


class WrongSamples(PretendedEngine):
    """What a walk that prefers some token does, and only to short answers."""

    def token(self, prompt: list[int], position: int, own: dict[str, Any]) -> int:
        biased = self.speculates and own.get("ignore_eos") and own["seed"] % 4 == 0
        return 0 if biased and position else super().token(prompt, position, own)


class NoTemperature(PretendedEngine):
    """As for a target that is always sure: the negative control passes."""

    def token(self, prompt: list[int], position: int, own: dict[str, Any]) -> int:
        return super().token(prompt, position, own | {"temperature": 1.0})


@pytest.fixture
def verify(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[type], tuple[int, dict[str, Any]]]:
    monkeypatch.setattr(lossless, "prepare", lambda config: (PROMPTS, 64))

    def run(engine: type, *options: str) -> tuple[int, dict[str, Any]]:
        monkeypatch.setattr(lossless, "Engine", engine)
        words = ["verify-lossless", "--target", "t", "--output", str(tmp_path)]
        status = cli.main([*words, "--max-tokens", "8", *options])
        return status, json.loads((tmp_path / "results.json").read_text())

    return run


ENGINES = {
    "exact": (PretendedEngine, 0, "exact", None),
    "text": (WrongText, 1, "wrong", "greedy"),
    "seeds": (WrongSeeds, 1, "wrong", "seeded"),
    "samples": (WrongSamples, 1, "wrong", "distribution"),
    "no-power": (NoTemperature, 2, "inconclusive", "distribution"),
}


@pytest.mark.parametrize(
    ("engine", "code", "verdict", "culprit"), ENGINES.values(), ids=ENGINES
)
def test_verdicts(
    engine: type, code: int, verdict: str, culprit: str | None, verify: Callable
):
    status, result = verify(engine)
    assert status == code
    assert result["verdict"] == verdict
    for part in ("greedy", "seeded"):
        expected = verdict if part == culprit else "exact"
        assert [load["verdict"] for load in result[part].values()] == [expected] * 2
    distribution = result["distribution"]
    assert distribution["verdict"] == (
        verdict if culprit == "distribution" else "exact"
    )
    assert (distribution["control_p_value"] < 1e-4) is (verdict != "inconclusive")
    assert result["accepted"] == 2 * 3 * len(PROMPTS)


def test_a_wrong_token_is_shown(verify: Callable, capsys: pytest.CaptureFixture[str]):
    _, result = verify(WrongText, "--samples", "0")
    assert result["distribution"] is None
    (found,) = result["greedy"]["1"]["divergences"]
    assert (found["prompt"], found["position"]) == (4, 3)
    assert (found["plain"], found["ours"], found["margin"]) == (7, 8, 8.0)
    shown = " ".join(capsys.readouterr().out.split())
    assert "prompt 4, token 3: 8 for 7; top logits 7: 9.0000, 8: 1.0000" in shown
    assert "verdict: wrong" in shown


def test_methods_are_those_of_clover2(capsys: pytest.CaptureFixture[str]):
    words = ["verify-lossless", "--target", "t", "--method", "ngram"]
    assert cli.main(words) == 1
    assert "--method: choose from clover2, " in capsys.readouterr().err
