# SPDX-License-Identifier: Apache-2.0
"""The attention backend that is chosen for the user, and when it is not."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_clover2.integration import engine_args
from vllm_clover2.tree.options import TreeOptions

FLASH, TRITON = AttentionBackendEnum.FLASH_ATTN, AttentionBackendEnum.TRITON_ATTN


def chosen(
    monkeypatch: pytest.MonkeyPatch,
    family: int | None = 100,  # compute capability times ten; None: no GPU
    dtype: torch.dtype = torch.bfloat16,
    backend: Any = None,
    config_backend: Any = None,
    draft_backend: Any = None,
    tree: str = "dynamic",
) -> tuple[Any, Any]:
    """Backends of the target and of the draft."""
    platform = SimpleNamespace(
        is_cuda=lambda: family is not None,
        is_device_capability_family=lambda asked: asked == family,
    )
    monkeypatch.setattr(engine_args, "current_platform", platform)
    args = SimpleNamespace(
        attention_backend=backend,
        attention_config=SimpleNamespace(backend=config_backend),
    )
    speculative = SimpleNamespace(
        attention_backend=draft_backend, tree_options=lambda: TreeOptions(tree=tree)
    )
    target = SimpleNamespace(dtype=dtype)
    engine_args.choose_attention_backend(args, target, speculative)
    return args.attention_backend, speculative.attention_backend


def test_flash_attention_on_blackwell(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch) == (FLASH, FLASH)
    assert chosen(monkeypatch, dtype=torch.float16) == (FLASH, FLASH)
    assert chosen(monkeypatch, draft_backend=TRITON) == (FLASH, TRITON)


@pytest.mark.parametrize(
    "changes",
    [
        {"family": None},
        {"family": 80},
        {"family": 90},
        {"family": 120},  # prefers FLASH_ATTN anyway
        {"dtype": torch.float32},
        {"config_backend": TRITON},
        {"tree": "chain"},
    ],
    ids=str,
)
def test_left_to_vllm(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, **changes) == (None, None)


@pytest.mark.parametrize("backend", [TRITON, "TRITON_ATTN", "auto"])
def test_the_users_choice_is_kept(
    backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = (FLASH, FLASH) if backend == "auto" else (backend, None)
    assert chosen(monkeypatch, backend=backend) == expected
