# SPDX-License-Identifier: Apache-2.0
"""Hidden states of the target: computed on the fly, optionally kept on disk.

Only the state before the final norm is kept (`num_tokens x hidden_size` in
bfloat16); the state after it, and the target's logits, follow from it cheaply.
"""

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from vllm_clover2.train.data import AnswerSet, Batch, collate, token_budget_batches

__all__ = ["HiddenStateCache", "Target"]


class Target:
    """The frozen target, as far as training a draft needs it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)
        self.config = model.config
        self.lm_head: torch.Tensor = model.get_output_embeddings().weight  # [V, H]
        self._decoder = model.get_decoder()
        self._norm: nn.Module = self._decoder.norm
        self._pre_norm: torch.Tensor | None = None
        self._norm.register_forward_pre_hook(self._record)

    @classmethod
    def load(cls, path: str, dtype: torch.dtype, device: torch.device) -> "Target":
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        return cls(model.to(device))

    def _record(self, _module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self._pre_norm = inputs[0]

    @torch.inference_mode()
    def pre_norm(
        self,
        input_ids: torch.Tensor,  # [B, T] int64, right-padded
    ) -> torch.Tensor:  # [B, T, H]
        """Hidden states after the last layer, before the final norm.

        Rows at padding are garbage; causality keeps the others clean, so no
        mask is passed (which keeps the fast causal attention kernels).
        """
        # The first pass over a norm is the decoder's own: nothing else calls it.
        self._decoder(input_ids=input_ids, use_cache=False)
        assert self._pre_norm is not None
        states, self._pre_norm = self._pre_norm, None
        return states

    def post_norm(self, pre_norm: torch.Tensor) -> torch.Tensor:
        """[..., H] -> [..., H]: what the lm_head sees."""
        with torch.no_grad():
            states = self._norm(pre_norm)
        self._pre_norm = None
        return states


class HiddenStateCache:
    """Memory-mapped hidden states of an AnswerSet, filled on demand.

    Several processes may use one cache: an answer's flag is set after its rows
    are written, and writing the same rows twice is harmless.
    """

    def __init__(self, folder: Path, answers: AnswerSet, target: Target) -> None:
        self.answers = answers
        self.target = target
        hidden_size = target.config.hidden_size
        identity = {
            "answers": answers.fingerprint,
            "target": getattr(target.config, "_name_or_path", ""),
            "hidden_size": hidden_size,
        }
        self._claim(folder, identity)
        total = int(answers.starts[-1])
        self._states = torch.from_file(
            str(folder / "states.bf16"),
            shared=True,
            size=total * hidden_size,
            dtype=torch.bfloat16,
        ).view(total, hidden_size)
        self._done = torch.from_file(
            str(folder / "done.u8"), shared=True, size=len(answers), dtype=torch.uint8
        )

    @staticmethod
    def _claim(folder: Path, identity: dict[str, object]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        record = folder / "identity.json"
        if not record.exists():
            record.write_text(json.dumps(identity, indent=1))
        found = json.loads(record.read_text())
        if found != identity:
            raise ValueError(
                f"hidden-state cache {folder} belongs to {found}, but this run needs "
                f"{identity}; choose another folder or delete it"
            )

    @property
    def num_done(self) -> int:
        return int(self._done.sum(dtype=torch.int64))

    def fetch(self, batch: Batch) -> torch.Tensor:  # [B, T, H] bfloat16
        """Hidden states of a batch (zeros at padding); computes what is missing."""
        if not bool(self._done[torch.from_numpy(batch.indices)].all()):
            self._compute(batch)
        starts, lengths = self.answers.starts, batch.lengths.tolist()
        shape = (*batch.input_ids.shape, self._states.shape[1])
        states = torch.zeros(shape, dtype=torch.bfloat16)
        for row, index in enumerate(batch.indices):
            start = int(starts[index])
            states[row, : lengths[row]] = self._states[start : start + lengths[row]]
        return states

    def _compute(self, batch: Batch) -> None:
        device = self.target.lm_head.device
        states = self.target.pre_norm(batch.input_ids.to(device)).to("cpu")
        for row, index in enumerate(batch.indices):
            start, end = self.answers.starts[index], self.answers.starts[index + 1]
            self._states[start:end] = states[row, : end - start].to(torch.bfloat16)
            self._done[index] = 1

    def fill(self, indices: np.ndarray, max_tokens: int) -> None:
        """Compute every answer of `indices` that is not there yet."""
        missing = indices[self._done[torch.from_numpy(indices)].numpy() == 0]
        for chunk in np.array_split(missing, max(1, len(missing) // 512)):
            for batch in token_budget_batches(
                self.answers.lengths, chunk, max_tokens, seed=None
            ):
                self._compute(collate(self.answers, batch))
