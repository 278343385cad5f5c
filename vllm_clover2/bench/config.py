# SPDX-License-Identifier: Apache-2.0
"""Settings of `vllm-clover2 benchmark`, and the methods it compares."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from vllm_clover2.heads import NO_HEAD

__all__ = [
    "METHODS",
    "SHIPPED_PROMPTS",
    "BenchmarkConfig",
    "speculative_config",
]

SHIPPED_PROMPTS = Path(__file__).resolve().parents[2] / "examples" / "prompts.jsonl"

# What vLLM is told for each method; a head's folder is added where one was given and
# no model is named here.
METHODS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "clover2": {"method": "clover2"},
    "clover2-no-context": {"method": "clover2", "context": False},
    "clover2-context": {"method": "clover2", "model": NO_HEAD},
    "clover2-chain": {"method": "clover2", "tree": "chain"},
    "ngram": {
        "method": "ngram",
        "num_speculative_tokens": 5,
        "prompt_lookup_min": 2,
        "prompt_lookup_max": 4,
    },
    # Rounds repeat their prompts: answers that it kept would be found again.
    "suffix": {"method": "suffix", "suffix_decoding_max_cached_requests": 0},
    "eagle": {"method": "eagle", "num_speculative_tokens": 3},
}


class BenchmarkConfig(BaseModel):
    """Settings of a benchmark, in engines of this machine or through its servers."""

    model_config = ConfigDict(extra="forbid")

    target: str = Field(description="target model: a folder or a hub name")
    methods: list[str] = Field(
        ["none", "clover2-chain", "clover2"],
        min_length=1,
        description=f"of {', '.join(METHODS)}; none is always there",
    )
    concurrency: list[Annotated[int, Field(ge=1)]] = Field(
        [1, 2, 4, 8], min_length=1, description="requests in flight, one or several"
    )
    prompts: Path = Field(
        SHIPPED_PROMPTS, description="JSON lines with messages and, if wanted, task"
    )
    max_prompts: int | None = Field(
        None, ge=1, description="use the first prompts of each task only"
    )
    max_tokens: int = Field(64, ge=2, description="longest answer")
    rounds: int = Field(3, ge=1, description="times that all prompts are answered")
    output: Path = Field(
        Path("build/benchmark"), description="folder for figures, tables, plots, logs"
    )
    head: Path | None = Field(
        None, description="folder of the Clover-2 head; unset: the one known for target"
    )
    eagle_head: Path | None = Field(
        None, description="folder of the EAGLE head that method eagle drafts with"
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    max_model_len: int | None = Field(
        None, ge=2, description="unset: 2048, or the target's limit where it is lower"
    )
    kv_cache_gib: float = Field(
        2.0, gt=0, description="KV cache of each engine in GiB; all run side by side"
    )
    enforce_eager: bool = Field(
        False, description="do not compile the target: starts sooner, runs slower"
    )
    served: bool = Field(
        False, description="measure `vllm serve` with `vllm bench serve` instead"
    )

    @field_validator("methods")
    @classmethod
    def _known(cls, methods: list[str]) -> list[str]:
        """The methods once each, and first the one the others are compared with."""
        if unknown := [name for name in methods if name not in METHODS]:
            raise ValueError(
                f"unknown methods {unknown}; choose from {', '.join(METHODS)}"
            )
        return list(dict.fromkeys(["none", *methods]))

    @field_validator("concurrency")
    @classmethod
    def _sorted(cls, concurrency: list[int]) -> list[int]:
        return sorted(set(concurrency))

    @model_validator(mode="after")
    def _check(self) -> "BenchmarkConfig":
        if "suffix" in self.methods and find_spec("arctic_inference") is None:
            raise ValueError(
                "method suffix needs the package arctic-inference, which is not "
                "installed; `pip install arctic-inference==0.1.1`, or leave suffix out"
            )
        if "eagle" in self.methods and self.eagle_head is None:
            raise ValueError(
                "method eagle needs an EAGLE head for the target; give its folder as "
                "--eagle-head, or leave eagle out"
            )
        return self


def speculative_config(config: BenchmarkConfig, method: str) -> dict[str, Any] | None:
    """vLLM's `speculative_config` for `method`; None without speculation."""
    options = METHODS[method]
    if options is None or "model" in options:
        return options
    heads = {"clover2": config.head, "eagle": config.eagle_head}
    head = heads.get(options["method"])
    return options if head is None else options | {"model": str(head)}
