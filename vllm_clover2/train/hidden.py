# SPDX-License-Identifier: Apache-2.0
"""Hidden states of the target: computed on the fly, optionally kept on disk.

Of the last layer only the state before the final norm is kept (`num_tokens x
hidden_size` in bfloat16); the state after it, and the target's logits, follow from it
cheaply. Beside it lie those of inner layers that a draft reads.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from vllm_clover2.records import chat_template_sha256, write_json
from vllm_clover2.train.data import AnswerSet, Batch
from vllm_clover2.train.resuming import refuse_changes, target_fingerprint

__all__ = ["HiddenStateCache", "Target", "TargetStates"]


class TargetStates(NamedTuple):
    """The target's hidden states of packed texts."""

    pre_norm: torch.Tensor  # [N, H] after the last layer
    post_norm: torch.Tensor  # [N, H] after the final norm
    aux: tuple[torch.Tensor, ...] = ()  # each [N, H], after inner layers


class Target:
    """The frozen target, as far as training a draft needs it."""

    def __init__(
        self, model: nn.Module, fingerprint: str, chat_template: str | None = None
    ) -> None:
        self.fingerprint = fingerprint  # see `target_fingerprint`
        self.chat_template = chat_template  # see `chat_template_sha256`
        self.model = model.eval().requires_grad_(False)
        self.config = model.config
        lm_head = model.get_output_embeddings()
        if lm_head.bias is not None:
            raise ValueError(
                "a draft's logits are lm_head.weight times its states, so the target's "
                f"lm_head must have no bias; {type(model).__name__}'s has one"
            )
        self.lm_head: torch.Tensor = lm_head.weight  # [V, H]
        self.embeddings: torch.Tensor = model.get_input_embeddings().weight  # [V, H]
        self._decoder = model.get_decoder()
        self.norm = _final_norm(self._decoder)
        self._pre_norm: torch.Tensor | None = None
        self.norm.register_forward_pre_hook(self._record)
        self.aux_layers: list[int] = []
        self._aux: dict[int, torch.Tensor] = {}

    @classmethod
    def load(cls, path: str, dtype: torch.dtype, device: torch.device) -> "Target":
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        try:
            chat_template = chat_template_sha256(path)
        except (ValueError, OSError):  # answers are token ids: none is needed
            chat_template = None
        return cls(model.to(device), target_fingerprint(path), chat_template)

    def _record(self, _module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self._pre_norm = inputs[0]

    def read_layers(self, numbers: list[int] | None) -> None:
        """Give the states after so many layers too, as `TargetStates.aux`.

        Raises:
            ValueError: there are not so many layers.
        """
        if not numbers or numbers == self.aux_layers:
            return
        layers = getattr(self._decoder, "layers", [])
        if not 1 <= min(numbers) <= max(numbers) < len(layers):
            raise ValueError(
                "aux_hidden_state_layers must be numbers of inner layers, of which the "
                f"target's `layers` has {max(0, len(layers) - 1)}, found {numbers}"
            )
        self.aux_layers = numbers
        for number in numbers:
            layers[number - 1].register_forward_hook(partial(self._record_aux, number))

    def _record_aux(
        self, number: int, _module: nn.Module, _inputs: Any, output: Any
    ) -> None:
        self._aux[number] = output[0] if isinstance(output, tuple) else output

    @property
    def row_size(self) -> int:
        """Columns of what `hidden` gives."""
        return int(self.config.hidden_size) * (1 + len(self.aux_layers))

    @torch.inference_mode()
    def hidden(
        self,
        input_ids: torch.Tensor,  # [N] int64, packed texts
        lengths: tuple[int, ...],  # of the texts, best similar: they are padded here
    ) -> torch.Tensor:  # [N, row_size]
        """States after the last layer, before the final norm, beside inner layers'.

        Causality keeps the padding on the right away from the tokens, so no mask is
        passed (which keeps the fast causal attention kernels).
        """
        padded = pad_sequence(input_ids.split(lengths), batch_first=True)
        # The first pass over a norm is the decoder's own: nothing else calls it.
        self._decoder(input_ids=padded, use_cache=False)
        assert self._pre_norm is not None
        every = [self._pre_norm, *(self._aux[number] for number in self.aux_layers)]
        self._pre_norm = None
        self._aux.clear()
        states = torch.cat(every, dim=-1)
        return torch.cat([row[:n] for row, n in zip(states, lengths, strict=True)])

    def states(self, batch: Batch) -> TargetStates:
        """The states of a batch, computed now."""
        input_ids = batch.input_ids.to(self.lm_head.device)
        return self.states_of(self.hidden(input_ids, batch.lengths))

    def states_of(
        self,
        hidden: torch.Tensor,  # [N, row_size]
    ) -> TargetStates:
        """The parts of what `hidden` gave."""
        pre_norm, *aux = hidden.split(self.config.hidden_size, dim=-1)
        return TargetStates(pre_norm, self.post_norm(pre_norm), tuple(aux))

    def post_norm(self, pre_norm: torch.Tensor) -> torch.Tensor:
        """[..., H] -> [..., H]: what the lm_head sees."""
        with torch.no_grad():
            states = self.norm(pre_norm)
        self._pre_norm = None
        return states


def _final_norm(decoder: nn.Module) -> nn.Module:
    """The norm after the last layer, whatever its name is."""
    norms = [one for one in decoder.children() if "norm" in type(one).__name__.lower()]
    if not norms:
        raise ValueError(
            "a draft reads the target's state before the norm that follows its layers; "
            f"{type(decoder).__name__} has no norm there"
        )
    return norms[-1]


class HiddenStateCache:
    """Memory-mapped hidden states of an AnswerSet, filled on demand.

    Several processes may use one cache: an answer's flag is set after its rows
    are written, and writing the same rows twice is harmless.
    """

    def __init__(self, folder: Path, answers: AnswerSet, target: Target) -> None:
        self.answers = answers
        self.target = target
        row_size = target.row_size
        identity = {
            "answers": answers.fingerprint,
            "target": target.fingerprint,
            "dtype": str(target.lm_head.dtype),  # that the states are computed in
            "hidden_size": target.config.hidden_size,
        }
        if target.aux_layers:
            identity["aux_hidden_state_layers"] = target.aux_layers
        self._claim(folder, identity)
        total = int(answers.starts[-1])
        self._states = torch.from_file(
            str(folder / "states.bf16"),
            shared=True,
            size=total * row_size,
            dtype=torch.bfloat16,
        ).view(total, row_size)
        self._done = torch.from_file(
            str(folder / "done.u8"), shared=True, size=len(answers), dtype=torch.uint8
        )

    @staticmethod
    def _claim(folder: Path, identity: dict[str, object]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        record = folder / "identity.json"
        if not record.exists():
            write_json(record, identity)
        found = json.loads(record.read_text())
        refuse_changes(
            f"the hidden-state cache {folder}",
            found,
            identity,
            "choose another folder or delete it",
        )

    def fetch(self, batch: Batch) -> torch.Tensor:  # [N, row_size] bfloat16
        """Hidden states of a batch; computes what is missing."""
        missing = [index for index in batch.indices if not self._done[index]]
        if missing:
            self._compute(missing)
        return torch.cat([self._states[self._rows(index)] for index in batch.indices])

    def _rows(self, index: int) -> slice:
        return slice(
            int(self.answers.starts[index]), int(self.answers.starts[index + 1])
        )

    def _compute(self, indices: list[int]) -> None:
        texts = [torch.from_numpy(self.answers.answer(index)) for index in indices]
        lengths = tuple(map(len, texts))
        input_ids = torch.cat(texts).long().to(self.target.lm_head.device)
        states = self.target.hidden(input_ids, lengths).to("cpu")
        for index, rows in zip(indices, states.split(lengths), strict=True):
            self._states[self._rows(index)] = rows.to(torch.bfloat16)
            self._done[index] = 1
