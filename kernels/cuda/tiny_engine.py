# SPDX-License-Identifier: Apache-2.0
"""vLLM alone and with clover2, on a tiny target that needs no download.

The weights are random, and all text is of sixteen tokens, which the head drafts from
too. So a tree of 25 nodes holds what follows now and then, while the text depends on
the whole context: wrong positions, masks or KV change it within tokens.
"""

import json
import os
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import torch

REPO = Path(__file__).resolve().parents[2]
NUM_TOKENS = 16  # that are ever said
LOG_TAIL = 8000  # characters
# On FLASH_ATTN, and on TRITON_ATTN, which vLLM takes for it.
DTYPES = ("bfloat16", "float32")
SETTINGS = {"max_tokens": 32, "max_model_len": 512, "kv_cache_gib": 0.25}


def why_not() -> str | None:
    """What engines need and is not installed here."""
    if find_spec("vllm") is None:
        return "vLLM is not installed"
    plugins = {plugin.name for plugin in entry_points(group="vllm.general_plugins")}
    if "clover2" not in plugins:
        return (
            "this package is not installed "
            f"(`pip install --no-build-isolation {REPO}` does that)"
        )
    return None


def save_models(folder: Path) -> tuple[Path, Path]:
    """A target and a head with random weights, of head size 64."""
    sys.path.insert(0, str(REPO / "tests" / "lossless"))
    from safetensors.torch import load_file
    from tiny_models import TinyModel, save_random_head, save_target

    shape = TinyModel(hidden_size=256)
    head = save_random_head(folder / "head", shape, draft_vocab_size=NUM_TOKENS)
    ids = load_file(head / "model.safetensors")["draft_vocab_ids"]
    lm_head = torch.zeros(shape.vocab_size, shape.hidden_size)
    torch.manual_seed(shape.seed)
    lm_head[ids] = torch.randn(NUM_TOKENS, shape.hidden_size) * shape.init
    return save_target(folder / "target", shape, lm_head), head


def check_engines(folder: Path) -> list[dict[str, object]]:
    """What ``vllm-clover2 verify-lossless`` finds, on Model Runner V2."""
    target, head = save_models(folder)
    # vLLM stops where that cannot be had.
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    return [check_engine(folder / dtype, target, head, dtype) for dtype in DTYPES]


def check_engine(
    output: Path, target: Path, head: Path, dtype: str
) -> dict[str, object]:
    """Both engines with this type; their logs' ends are part of what is found."""
    from vllm_clover2.bench.config import LosslessConfig
    from vllm_clover2.bench.lossless import verify_lossless
    from vllm_clover2.bench.verdict import Verdict

    config = LosslessConfig(
        target=str(target),
        head=head,
        dtype=dtype,
        output=output,
        **SETTINGS,
    )
    found: dict[str, object] = {"dtype": dtype, "ok": False}
    try:
        verdict = verify_lossless(config)
        result = json.loads((output / "results.json").read_text())
        said_the_same = verdict in (Verdict.EXACT, Verdict.TIE)
        found |= {"ok": said_the_same and result["accepted"] > 0, **result}
    except RuntimeError as error:
        found["error"] = str(error)
    found["logs"] = {
        log.name: log.read_text(errors="replace")[-LOG_TAIL:]
        for log in sorted(output.glob("*.log"))
    }
    return found
