# SPDX-License-Identifier: Apache-2.0
"""What answers the prompts of a benchmark with one method: an engine of its own."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from vllm_clover2.bench.config import BenchmarkConfig, speculative_config
from vllm_clover2.bench.engine import Answer, Engine
from vllm_clover2.bench.figures import (
    Measured,
    MeasuredRequest,
    Steps,
    accepted_by_step,
)
from vllm_clover2.bench.prompts import Prompt

__all__ = ["WARM_UP_TOKENS", "Backend", "EngineBackend", "engine_arguments"]

WARM_UP_TOKENS = 16


class Backend(Protocol):
    """Answers prompts with one method, until it is closed."""

    def warm_up(self, prompts: Sequence[Prompt]) -> None:
        """Answer these together, shortly."""

    def answer(
        self,
        prompts: Sequence[Prompt],
        concurrency: int,
        report: Callable[[int], None],  # told how many are done
    ) -> Measured:
        """Answer all prompts."""

    def close(self) -> None:
        """Free all that it has."""


class EngineBackend:
    """An engine of vLLM in a process of its own."""

    def __init__(
        self, config: BenchmarkConfig, method: str, max_model_len: int
    ) -> None:
        self._max_tokens, self._swing = config.max_tokens, config.swing
        llm = engine_arguments(config, method, max_model_len)
        if "speculative_config" in llm:
            llm["per_request_spec_decode_metrics"] = "detailed"
        self._engine = Engine(llm, config.output / f"engine-{method}.log")

    def warm_up(self, prompts: Sequence[Prompt]) -> None:
        tokens = [prompt.token_ids for prompt in prompts]
        for _ in self._engine.answer(tokens, WARM_UP_TOKENS):
            pass

    def answer(
        self,
        prompts: Sequence[Prompt],
        concurrency: int,
        report: Callable[[int], None],
    ) -> Measured:
        tokens = [prompt.token_ids for prompt in prompts]
        for done in self._engine.answer(
            tokens, self._max_tokens, concurrency, swing=self._swing
        ):
            report(done)
        one = self._engine.last_round
        requests = [_measured(answer) for answer in one.answers]
        steps = Steps.total([r.steps for r in requests if r.steps is not None])
        return Measured(one.seconds, requests, steps, one.longest_step_seconds)

    def close(self) -> None:
        self._engine.close()


def _measured(answer: Answer) -> MeasuredRequest:
    num_tokens = len(answer.token_ids)
    return MeasuredRequest(
        content=tuple(answer.token_ids),
        num_tokens=num_tokens,
        first_token_seconds=answer.first_token_seconds,
        decode_seconds=answer.decode_seconds,
        steps=Steps.of(accepted_by_step(answer.accepted, num_tokens)),
    )


def engine_arguments(
    config: BenchmarkConfig, method: str, max_model_len: int
) -> dict[str, Any]:
    """Arguments of `vllm.LLM`, and options of `vllm serve`."""
    arguments: dict[str, Any] = {
        "model": config.target,
        "dtype": config.dtype,
        "max_model_len": max_model_len,
        "max_num_seqs": config.concurrency[-1],
        "kv_cache_memory_bytes": int(config.kv_cache_gib * 2**30),
        "enforce_eager": config.enforce_eager,
    }
    if (speculation := speculative_config(config, method)) is not None:
        arguments["speculative_config"] = speculation
    return arguments
