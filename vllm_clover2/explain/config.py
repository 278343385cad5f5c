# SPDX-License-Identifier: Apache-2.0
"""Settings of `vllm-clover2 explain`."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["ExplainConfig"]


class ExplainConfig(BaseModel):
    """What to answer, with which trees, and where to write the page."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(min_length=1, description="what the user asks the target")
    target: str = Field(description="target model: a folder or a hub name")
    head: str | None = Field(
        None,
        description="folder of the head, or none: text only; unset: the known one",
    )
    max_tokens: int = Field(64, ge=2, description="longest answer")
    tree: str = Field(
        "dynamic:25+context",
        description="chain:DEPTH[+context], paper, or dynamic:NODES[:DEPTH][+context]",
    )
    output: Path = Field(Path("explain.html"), description="page to write")
    threads: int | None = Field(None, ge=1, description="CPU threads")
