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
    "EngineSettings",
    "LosslessConfig",
    "speculative_config",
]

SHIPPED_PROMPTS = Path(__file__).resolve().with_name("prompts.jsonl")

# What vLLM is told for each method; a head's folder is added where one was given and
# no model is named here.
METHODS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "clover2": {"method": "clover2"},
    "clover2-no-context": {"method": "clover2", "context": False},
    "clover2-context": {"method": "clover2", "model": NO_HEAD},
    "clover2-chain": {"method": "clover2", "tree": "chain"},
    "clover2-always": {"method": "clover2", "adaptive": False},
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

_CLOVER2_METHODS = [
    name for name, one in METHODS.items() if one and one.get("method") == "clover2"
]


class EngineSettings(BaseModel):
    """What engines are started with, and the prompts that they answer."""

    model_config = ConfigDict(extra="forbid")

    target: str = Field(description="target model: a folder or a hub name")
    prompts: Path = Field(
        SHIPPED_PROMPTS, description="JSON lines with messages and, if wanted, task"
    )
    max_prompts: int | None = Field(
        None, ge=1, description="use the first prompts of each task only"
    )
    max_tokens: int = Field(64, ge=2, description="longest answer")
    head: Path | None = Field(
        None, description="folder of the Clover-2 head; unset: the one known for target"
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    max_model_len: int | None = Field(
        None, ge=2, description="unset: 2048, or the target's limit where it is lower"
    )
    kv_cache_gib: float = Field(2.0, gt=0, description="KV cache of each engine in GiB")
    enforce_eager: bool = Field(
        False, description="do not compile the target: starts sooner, runs slower"
    )


class BenchmarkConfig(EngineSettings):
    """Settings of a benchmark, in engines of this machine or through its servers."""

    methods: list[str] = Field(
        ["none", "clover2-chain", "clover2"],
        min_length=1,
        description=f"of {', '.join(METHODS)}; none is always there",
    )
    concurrency: list[Annotated[int, Field(ge=1)]] = Field(
        [1, 2, 4, 8], min_length=1, description="requests in flight, one or several"
    )
    min_prompts: int | None = Field(
        None,
        ge=1,
        description="answer twice as many prompts as there are requests in flight, but "
        "at least so many, instead of all at every load",
    )
    rounds: int = Field(3, ge=1, description="times that all prompts are answered")
    output: Path = Field(
        Path("build/benchmark"), description="folder for figures, tables, plots, logs"
    )
    eagle_head: Path | None = Field(
        None, description="folder of the EAGLE head that method eagle drafts with"
    )
    swing: bool = Field(
        False,
        description="let the load go up and down: two answers one at a time, then "
        "twice as many as may be in flight, and again",
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
        if self.swing and self.served:
            raise ValueError(
                "`vllm bench serve` keeps one load; leave out --served or --swing"
            )
        return self

    def prompts_at(self, concurrency: int) -> int | None:
        """How many prompts are answered with so many in flight; None: all."""
        if self.min_prompts is None:
            return None
        return max(self.min_prompts, 2 * concurrency)


class LosslessConfig(EngineSettings):
    """Settings of a verification."""

    method: str = Field("clover2", description=f"of {', '.join(_CLOVER2_METHODS)}")
    concurrency: int = Field(
        8, ge=2, description="requests in flight, beside one at a time"
    )
    temperature: float = Field(1.0, gt=0, description="of sampled answers")
    samples: int = Field(
        600, ge=0, description="short answers whose distribution is tested; 0: none"
    )
    output: Path = Field(
        Path("build/lossless"), description="folder for results.json and engines' logs"
    )

    @field_validator("method")
    @classmethod
    def _known(cls, method: str) -> str:
        if method not in _CLOVER2_METHODS:
            raise ValueError(f"choose from {', '.join(_CLOVER2_METHODS)}")
        return method

    def engines(self) -> BenchmarkConfig:
        """The same, for engines that answer one and several requests at a time."""
        shared = {name: getattr(self, name) for name in EngineSettings.model_fields}
        return BenchmarkConfig(
            **shared,
            methods=[self.method],
            concurrency=[1, self.concurrency],
            output=self.output,
        )


def speculative_config(config: BenchmarkConfig, method: str) -> dict[str, Any] | None:
    """vLLM's `speculative_config` for `method`; None without speculation."""
    options = METHODS[method]
    if options is None or "model" in options:
        return options
    heads = {"clover2": config.head, "eagle": config.eagle_head}
    head = heads.get(options["method"])
    return options if head is None else options | {"model": str(head)}
