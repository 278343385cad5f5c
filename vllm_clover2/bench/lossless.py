# SPDX-License-Identifier: Apache-2.0
"""`vllm-clover2 verify-lossless`: whether text is vLLM's own, on this very machine.

One engine without speculation and one with it answer the same prompts, one after the
other (each gets the whole device). Greedy answers and seeded samples must be the same;
other samples must have the same distribution, by a test that is shown to notice a
temperature that is a little lower.
"""

from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_clover2.bench.backend import engine_arguments
from vllm_clover2.bench.config import LosslessConfig
from vllm_clover2.bench.engine import Answer, Engine
from vllm_clover2.bench.prompts import Prompt
from vllm_clover2.bench.run import prepare
from vllm_clover2.bench.verdict import (
    ALPHA,
    Verdict,
    compare_greedy,
    compare_seeded,
    distributions_differ,
    identical_answers,
    worst,
)
from vllm_clover2.records import provenance, write_json

__all__ = ["verify_lossless"]

_TOP = 5  # logits that plain vLLM reports at every position
_STREAMS = 24  # seeded answers, at least: fewer could all differ by chance
_SAMPLED_PROMPTS = 4
_SAMPLE_TOKENS = 3  # the second and third come from a step that verifies a draft
_CONTROL = 0.7  # temperature of the negative control, of that which is verified


@dataclass(frozen=True)
class _Answers:
    """All that one engine says."""

    dtype: str
    greedy: dict[int, list[Answer]]  # by requests in flight
    seeded: dict[int, list[Answer]]
    samples: list[list[int]]
    control: list[list[int]]  # samples at a lower temperature; plain vLLM's alone

    @property
    def accepted(self) -> int:
        """Drafted tokens that greedy answers accepted."""
        answers = [answer for group in self.greedy.values() for answer in group]
        return sum(sum(answer.accepted) for answer in answers)


def verify_lossless(config: LosslessConfig) -> Verdict:
    """Verify, show a table, write `results.json`; the worst verdict of all."""
    engines = config.engines()
    prompts, max_model_len = prepare(engines)
    config.output.mkdir(parents=True, exist_ok=True)
    console = Console()
    answers = {}
    for method in ("none", config.method):
        llm = engine_arguments(engines, method, max_model_len)
        if method == "none":
            llm |= {"logprobs_mode": "raw_logits"}
        else:
            llm["per_request_spec_decode_metrics"] = "detailed"
            # What is not drafted under load is to be verified too.
            llm["speculative_config"] = llm["speculative_config"] | {"adaptive": False}
        console.print(f"{method}: starting, then answering {len(prompts)} prompts")
        with closing(Engine(llm, config.output / f"engine-{method}.log")) as engine:
            answers[method] = _ask(engine, config, prompts, plain=method == "none")
    result = _judge(config, answers["none"], answers[config.method])
    content = {
        **result,
        "settings": config.model_dump(mode="json"),
        "provenance": provenance(),
        "prompts": [prompt.text for prompt in prompts],
    }
    write_json(config.output / "results.json", content)
    sizes = {"greedy": len(prompts), "seeded": max(len(prompts), _STREAMS)}
    _show(console, config, result, sizes)
    console.print(f"all figures: {config.output / 'results.json'}")
    return Verdict(result["verdict"])


def _ask(
    engine: Engine, config: LosslessConfig, prompts: list[Prompt], plain: bool
) -> _Answers:
    """All answers of one engine."""
    tokens = [prompt.token_ids for prompt in prompts]

    def answer(
        texts: list[list[int]],
        max_tokens: int,
        in_flight: int,
        sampling: list[dict[str, Any]],
    ) -> list[Answer]:
        for _ in engine.answer(texts, max_tokens, in_flight, sampling):
            pass
        return engine.last_round.answers

    def samples(first_seed: int, temperature: float) -> list[list[int]]:
        """Short ones, of a few prompts in turn so that their prefixes are shared."""
        few = [tokens[number % _SAMPLED_PROMPTS % len(tokens)] for number in numbers]
        params = [
            {"temperature": temperature, "seed": first_seed + i, "ignore_eos": True}
            for i in numbers
        ]
        found = answer(few, _SAMPLE_TOKENS, config.concurrency, params)
        return [one.token_ids for one in found]

    numbers = range(config.samples)
    greedy = [{"logprobs": _TOP} if plain else {} for _ in tokens]
    streams = [tokens[i % len(tokens)] for i in range(max(len(tokens), _STREAMS))]
    seeded = [
        {"temperature": config.temperature, "seed": i} for i in range(len(streams))
    ]
    loads = (1, config.concurrency)
    # Plain vLLM and we sample with seeds that never meet: independent samples.
    seed, length = (0 if plain else config.samples), config.max_tokens
    return _Answers(
        dtype=engine.dtype,
        greedy={n: answer(tokens, length, n, greedy) for n in loads},
        seeded={n: answer(streams, length, n, seeded) for n in loads},
        samples=samples(seed, config.temperature),
        control=samples(2 * config.samples, _CONTROL * config.temperature)
        if plain
        else [],
    )


def _judge(config: LosslessConfig, plain: _Answers, ours: _Answers) -> dict[str, Any]:
    """Each comparison with its verdict, ready for JSON."""
    one, several = 1, config.concurrency
    greedy: dict[int, dict[str, Any]] = {}
    for load in (one, several):
        found = compare_greedy(
            plain.greedy[one], plain.greedy[several], ours.greedy[load], plain.dtype
        )
        verdicts = [Verdict.EXACT, *(divergence.verdict for divergence in found)]
        greedy[load] = {
            "identical": identical_answers(plain.greedy[one], ours.greedy[load]),
            "verdict": worst(verdicts),
            "divergences": [
                asdict(divergence) | {"verdict": divergence.verdict}
                for divergence in found
            ],
        }
    seeded: dict[int, dict[str, Any]] = {}
    for load in (one, several):
        identical, verdict = compare_seeded(
            plain.seeded[one], plain.seeded[several], ours.seeded[load]
        )
        seeded[load] = {"identical": identical, "verdict": verdict}
    distribution = _distribution(plain, ours)
    verdicts = [
        part["verdict"]
        for part in (*greedy.values(), *seeded.values(), distribution)
        if part is not None
    ]
    return {
        "verdict": worst(verdicts),
        "dtype": plain.dtype,
        "accepted": ours.accepted,
        "plain": {
            "greedy": identical_answers(plain.greedy[one], plain.greedy[several]),
            "seeded": identical_answers(plain.seeded[one], plain.seeded[several]),
        },
        "greedy": greedy,
        "seeded": seeded,
        "distribution": distribution,
    }


def _distribution(plain: _Answers, ours: _Answers) -> dict[str, Any] | None:
    """Whether other samples differ, and whether the test would have noticed."""
    if not plain.samples:
        return None
    p_value = distributions_differ(plain.samples, ours.samples)
    control = distributions_differ(plain.samples, plain.control)
    verdict = Verdict.EXACT
    if p_value < ALPHA:
        verdict = Verdict.WRONG
    elif control >= ALPHA:
        verdict = Verdict.INCONCLUSIVE
    return {"p_value": p_value, "control_p_value": control, "verdict": verdict}


def _show(
    console: Console,
    config: LosslessConfig,
    result: dict[str, Any],
    sizes: dict[str, int],  # answers of each kind
) -> None:
    table = Table("", "as vLLM alone, one at a time", "verdict", box=None)
    for kind in ("greedy", "seeded"):
        of = f"of {sizes[kind]}"
        alone = f"{result['plain'][kind]} {of}"
        table.add_row(f"vLLM alone, {config.concurrency} at a time, {kind}", alone, "")
        for load, part in result[kind].items():
            name = f"{config.method}, {load} at a time, {kind}"
            table.add_row(name, f"{part['identical']} {of}", part["verdict"])
    if (samples := result["distribution"]) is not None:
        table.add_row(
            f"{config.samples} other samples",
            f"p = {samples['p_value']:.2g}; at {_CONTROL:g} of the temperature "
            f"{samples['control_p_value']:.2g}",
            samples["verdict"],
        )
    console.print(table)
    for load, part in result["greedy"].items():
        for found in part["divergences"]:
            console.print(f"{load} at a time: {_in_words(found)}")
    if not result["accepted"]:
        console.print("No draft was accepted: these prompts verify little.")
    if samples and samples["verdict"] == Verdict.INCONCLUSIVE:
        console.print("The lower temperature was not noticed: raise --samples.")
    console.print(f"verdict: {result['verdict']}")


def _in_words(found: dict[str, Any]) -> str:
    top = ", ".join(f"{token}: {logit:.4f}" for token, logit in found["top"])
    margin = found["margin"]
    return (
        f"prompt {found['prompt']}, token {found['position']}: {found['ours']} for "
        f"{found['plain']}; top logits {top or 'none'}; margin "
        f"{'large' if margin is None else f'{margin:.4f}'}, a tie up to "
        f"{found['tie_margin']:.4f}; vLLM alone says the same at another batch size: "
        f"{'yes' if found['plain_differs'] else 'no'}; {found['verdict']}"
    )
