# SPDX-License-Identifier: Apache-2.0
"""The target answers prompts through vLLM; token ids are kept for training."""

import gzip
import hashlib
import json
import logging
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vllm_clover2.records import command, write_json
from vllm_clover2.train.resuming import refuse_changes, target_fingerprint

__all__ = ["GenerateConfig", "generate", "temperature_of"]

_logger = logging.getLogger(__name__)

# All settings that an answer depends on, beside the target and the prompts.
_ANSWER_SETTINGS = {"temperatures", "max_new_tokens", "max_model_len", "dtype", "seed"}


class GenerateConfig(BaseModel):
    """Settings of `vllm-clover2 generate`."""

    model_config = ConfigDict(extra="forbid")

    target: str = Field(description="target model: a folder or a hub name")
    prompts: Path | None = Field(None, description="JSON lines with id and messages")
    continue_from: Path | None = Field(
        None, description="instead of prompts: an answers file, whose texts go on anew"
    )
    starts: int = Field(
        4, ge=1, description="places in each text of continue_from to go on from"
    )
    exclude: list[Path] = Field(
        [],
        description="answers files that heads are measured on: texts of continue_from "
        "that share twelve tokens in a row with one of their prompts are left out",
    )
    output: Path = Field(description="answers file to write (.jsonl or .jsonl.gz)")
    temperatures: list[float] = Field(
        [0.0, 0.0, 0.7, 1.0],
        min_length=1,
        description="each prompt gets one of these, by a hash of its id",
    )
    max_new_tokens: int = Field(256, ge=1)
    max_model_len: int = Field(2048, ge=2)
    limit: int | None = Field(
        None, ge=1, description="use the first prompts or starts only"
    )
    chunk: int = Field(256, ge=1, description="prompts between two saves")
    kv_cache_gib: float | None = Field(
        None, gt=0, description="the KV cache in GiB; unset: what vLLM takes"
    )
    dtype: str = "bfloat16"
    seed: int = 0

    @model_validator(mode="after")
    def _one_source(self) -> "GenerateConfig":
        if (self.prompts is None) == (self.continue_from is None):
            raise ValueError(
                f"give either prompts or continue_from, found {self.prompts} and "
                f"{self.continue_from}"
            )
        return self

    @property
    def source(self) -> Path:
        """The file that is answered or continued."""
        path = self.prompts or self.continue_from
        assert path is not None
        return path


def temperature_of(prompt_id: str, temperatures: list[float]) -> float:
    """The temperature of a prompt: fixed by its id, so that resuming is exact."""
    return temperatures[zlib.crc32(prompt_id.encode()) % len(temperatures)]


def _read_prompts(path: Path, limit: int | None) -> list[dict[str, Any]]:
    prompts = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            record["messages"][0]["content"]  # noqa: B018 - must be there
        except (json.JSONDecodeError, KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: expected an object with a non-empty "
                f"'messages' list, got {line[:60]!r}"
            ) from error
        record["id"] = str(record.get("id", number))
        prompts.append(record)
    if len({record["id"] for record in prompts}) != len(prompts):
        raise ValueError(f"the ids in {path} must be unique")
    return prompts[:limit]


def _resume(working: Path) -> set[str]:
    """Ids that are answered already; an unfinished last line is cut off."""
    if not working.exists():
        return set()
    content = working.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    if len(complete) < len(content):
        os.truncate(working, len(complete))
    return {json.loads(line)["id"] for line in complete.splitlines()}


def _read_starts(config: GenerateConfig) -> list[dict[str, Any]]:
    from transformers import AutoConfig

    from vllm_clover2.train.continuing import starts_in

    assert config.continue_from is not None
    target = AutoConfig.from_pretrained(config.target).get_text_config()
    starts, left_out = starts_in(
        config.continue_from,
        target.vocab_size,
        config.starts,
        config.max_model_len - 1,
        config.temperatures,
        config.exclude,
        config.seed,
    )
    if left_out:
        _logger.warning(
            "%d texts of %s are left out: repeated ones, and those that share tokens "
            "with a prompt of exclude",
            left_out,
            config.continue_from,
        )
    return starts[: config.limit]


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _claim(config: GenerateConfig, working: Path) -> None:
    """Write `OUTPUT.settings.json`; a call that continues must be the same call."""
    settings = config.model_dump(mode="json", include=_ANSWER_SETTINGS) | {
        "target": target_fingerprint(config.target),
        "prompts": _hash(config.source),
    }
    if config.continue_from is not None:
        settings["starts"] = config.starts
        settings["exclude"] = [_hash(path) for path in config.exclude]
    record = config.output.with_name(config.output.name + ".settings.json")
    if working.exists():
        before = {}
        if record.exists():
            before = json.loads(record.read_text("utf-8"))["settings"]
        remedy = "choose another output, or delete that file to begin anew"
        refuse_changes(str(working), before, settings, remedy)
    write_json(record, {"command": command(), "settings": settings})


def generate(config: GenerateConfig) -> Path:
    """Answer every prompt, or go on from every start.

    A call that was stopped is continued where it was. Answers are appended to
    `OUTPUT.partial` chunk by chunk; the output file appears when all are there, and
    what made it is in `OUTPUT.settings.json`.

    Raises:
        ValueError: the output is there, or was begun with other settings.
    """
    # Only this command needs the engine, and only through its public interface.
    from vllm import LLM

    if config.output.exists():
        raise ValueError(f"{config.output} exists; delete it or choose another name")
    if config.prompts is not None:
        prompts = _read_prompts(config.prompts, config.limit)
    else:
        prompts = _read_starts(config)
    config.output.parent.mkdir(parents=True, exist_ok=True)
    working = config.output.with_name(config.output.name + ".partial")
    _claim(config, working)
    done = _resume(working)
    waiting = [record for record in prompts if record["id"] not in done]
    if waiting:
        kv_cache = config.kv_cache_gib
        llm = LLM(
            model=config.target,
            dtype=config.dtype,
            max_model_len=config.max_model_len,
            kv_cache_memory_bytes=int(kv_cache * 2**30) if kv_cache else None,
            seed=config.seed,
        )
        with working.open("a", encoding="utf-8") as stream:
            for start in range(0, len(waiting), config.chunk):
                for answer in _answer(
                    llm, waiting[start : start + config.chunk], config
                ):
                    stream.write(json.dumps(answer) + "\n")
                stream.flush()
    _finish(working, config.output)
    return config.output


def _answer(
    llm: Any,  # vllm.LLM
    prompts: list[dict[str, Any]],
    config: GenerateConfig,
) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    temperatures = [
        temperature_of(prompt["id"], prompt.get("temperatures", config.temperatures))
        for prompt in prompts
    ]
    params = [
        SamplingParams(
            temperature=temperature,
            max_tokens=config.max_new_tokens,
            seed=config.seed + zlib.crc32(prompt["id"].encode()),
        )
        for prompt, temperature in zip(prompts, temperatures, strict=True)
    ]
    if config.prompts is not None:
        outputs = llm.chat([prompt["messages"] for prompt in prompts], params)
    else:
        key = "prompt_token_ids"
        starts = [{key: prompt[key]} for prompt in prompts]
        outputs = llm.generate(starts, params)
    return [
        {
            "id": prompt["id"],
            **({"origin": prompt["origin"]} if "origin" in prompt else {}),
            "task": prompt.get("task", ""),
            "temperature": temperature,
            "finish_reason": output.outputs[0].finish_reason,
            "prompt_token_ids": list(output.prompt_token_ids),
            "output_token_ids": list(output.outputs[0].token_ids),
        }
        for prompt, temperature, output in zip(
            prompts, temperatures, outputs, strict=True
        )
    ]


def _finish(working: Path, output: Path) -> None:
    if output.suffix != ".gz":
        os.replace(working, output)
        return
    packed = output.with_name(output.name + ".packing")
    with working.open("rb") as source, gzip.open(packed, "wb") as sink:
        shutil.copyfileobj(source, sink)
    os.replace(packed, output)
    working.unlink()
